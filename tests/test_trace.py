"""The exact trace: parts sum to the whole, predictions equal interventions, no hook remains, parity with peers."""

from functools import partial

import pytest
import torch

from lib import facts
from lib.errors import CompletenessError, DataError
from lib.interventions import run_with_cache
from lib.models import Model
from lib.trace import CONVENTIONS, capture, hooked, logit_lens, logit_trace, subject_attention, subject_positions
from lib.weights import NoNorm

PROMPTS = ["The capital of France is", "Japan's capital city is", "One two three four five six seven"]


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def some_tokens(n: int = 3) -> torch.Tensor:
    return torch.randint(0, 49152, (len(PROMPTS), n), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_parts_sum_to_the_whole(tiny, convention):
    trace = logit_trace(tiny, capture(tiny, PROMPTS), some_tokens(), convention)
    assert trace.error < 1e-3


def test_the_whole_is_the_models_own_logit(tiny):
    seen, tokens = capture(tiny, PROMPTS), some_tokens()
    for i, prompt in enumerate(PROMPTS):  # one by one, without padding and without our code's batching
        torch.testing.assert_close(seen.stream[i], capture(tiny, [prompt]).stream[0], atol=1e-4, rtol=1e-4)
        own = tiny.module(torch.tensor([tiny.token_ids(prompt)])).logits[0, -1]
        torch.testing.assert_close(seen.logits[i], own, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logit_trace(tiny, seen, tokens).total[i], own[tokens[i]], atol=1e-4, rtol=1e-4)


def test_conventions_differ_by_what_they_say(tiny):
    seen, tokens = capture(tiny, PROMPTS), some_tokens()
    raw, scaled, centred = (logit_trace(tiny, seen, tokens, c) for c in CONVENTIONS)
    # a difference between two tokens does not see the vocabulary mean
    torch.testing.assert_close(scaled.difference().heads, centred.difference().heads, atol=1e-4, rtol=1e-3)
    x = seen.stream[:, -1]
    product = torch.einsum("bd,dbn->bn", x, tiny.weights.W_U[:, tokens])
    torch.testing.assert_close(raw.cumulative[..., -1], product, atol=1e-3, rtol=1e-4)


def without(model: Model, layer: int, head: int):
    """A hook that takes a head away."""
    width = model.weights.d_head

    def zero(z: torch.Tensor) -> torch.Tensor:
        return z.index_fill(-1, torch.arange(head * width, (head + 1) * width), 0)

    return {model.weights.blocks[layer].heads_out: zero}


def test_prediction_equals_intervention(tiny):
    """Zero a head inside the model, and hold fixed what the trace holds fixed: what the later MLPs and heads write,
    and the final norm's scale. The logits must move by what the trace predicted."""
    layer, head = 1, 2
    ids, norm, final = tiny.encode(PROMPTS[:1])[0], tiny.weights.norm_final, tiny.weights.norm_final_module
    seen, tokens = capture(tiny, PROMPTS[:1]), some_tokens()[:1]
    predicted = logit_trace(tiny, seen, tokens).heads[0, :, layer, head]
    later = [m for b in tiny.weights.blocks[layer + 1 :] for m in (b.heads_out, b.mlp_out)]
    frozen, outputs = [tiny.weights.blocks[layer].mlp_out, *later], {}
    with hooked(after={m: partial(outputs.__setitem__, m) for m in frozen}):
        before = tiny.module(ids).logits[0, -1]
    norms, entered, block = {final: (norm, norm.scale(seen.stream[:, -1]))}, {}, tiny.weights.blocks[layer]
    if not isinstance(block.after_attn, NoNorm):
        own = block.after_attn, block.heads_scale(seen.z[:, layer])
        norms[block.module.post_attention_layernorm] = own

    def frozen_norm(m: torch.nn.Module, _: torch.Tensor) -> torch.Tensor:
        norm, scale = norms[m]
        y = norm.centre(entered[m]) / scale * norm.gain
        return y if norm.bias is None else y + norm.bias

    held = {m: lambda _, m=m: outputs[m] for m in frozen} | {m: partial(frozen_norm, m) for m in norms}
    with hooked(before=without(tiny, layer, head) | {m: partial(entered.__setitem__, m) for m in norms}, after=held):
        after = tiny.module(ids).logits[0, -1]
    assert predicted.abs().max() > 1e-3  # the head does something
    torch.testing.assert_close((before - after)[tokens[0]], predicted, atol=2e-4, rtol=1e-3)


def test_a_missing_term_is_an_error(tiny):
    """The check must be able to fail: a capture whose MLP output was tampered with."""
    seen = capture(tiny, PROMPTS)
    seen.mlps[:, 1] *= 1.5
    with pytest.raises(CompletenessError, match=r"misses the model's own logits by .* \(allowed 0.001\)"):
        logit_trace(tiny, seen, some_tokens())


def test_hooks_see_and_replace_what_enters_and_leaves():
    """By position and by name; a module's output may be a tensor or a tuple."""

    class Layer(torch.nn.Module):
        def forward(self, hidden_states, more=1.0):
            return (hidden_states * more, "rest")

    layer, seen = Layer(), []
    with hooked(before={layer: seen.append}, after={layer: seen.append}):
        layer(torch.tensor(2.0), more=3.0)
        layer(hidden_states=torch.tensor(5.0))
    assert [x.item() for x in seen] == [2.0, 6.0, 5.0, 5.0]
    with hooked(before={layer: lambda x: x + 1}, after={layer: lambda x: -x}):
        assert layer(torch.tensor(2.0), more=3.0) == (-9.0, "rest")
        assert layer(hidden_states=torch.tensor(2.0)) == (-3.0, "rest")
    linear, failing = torch.nn.Identity(), pytest.raises(RuntimeError, match="midway")
    with failing, hooked(after={linear: lambda x: x + 1}, before={layer: seen.append}):
        assert linear(torch.tensor(1.0)) == 2.0
        raise RuntimeError("midway")
    assert hooks(linear) == hooks(layer) == 0


def test_no_hook_remains(tiny):
    before = hooks(tiny.module)
    capture(tiny, PROMPTS)
    assert hooks(tiny.module) == before
    broken = {tiny.weights.blocks[2].module: lambda _: 1 / 0}
    with pytest.raises(ZeroDivisionError), hooked(after=broken):
        capture(tiny, PROMPTS)
    assert hooks(tiny.module) == before


def test_lens_ends_in_the_models_own_answer(tiny):
    seen, tokens = capture(tiny, PROMPTS), some_tokens()
    logprob, rank = logit_lens(tiny, seen, tokens)
    own = seen.logits.log_softmax(-1).gather(1, tokens)
    torch.testing.assert_close(logprob[:, -1], own, atol=1e-4, rtol=1e-4)
    theirs = (seen.logits[:, None] > seen.logits.gather(1, tokens)[..., None]).sum(-1) + 1
    assert torch.equal(rank[:, -1], theirs)


def test_lens_uses_each_layers_own_scale(tiny):
    """TransformerLens #1076: the last layer's scale on every layer."""
    seen, tokens = capture(tiny, PROMPTS), some_tokens()
    middle = tiny.weights.norm_final_module(seen.stream[:, 1]) @ tiny.weights.W_U
    torch.testing.assert_close(
        logit_lens(tiny, seen, tokens)[0][:, 1], middle.log_softmax(-1).gather(1, tokens), atol=1e-4, rtol=1e-4
    )


def test_last_patterns_are_probabilities_over_the_prompt_only(tiny):
    seen = run_with_cache(tiny, PROMPTS)
    torch.testing.assert_close(seen.patterns.sum(-1), torch.ones(seen.patterns.shape[:-1]))
    for i, last in enumerate(seen.last.tolist()):
        assert seen.patterns[i, ..., last + 1 :].sum() == 0


def test_another_position_is_seen_as_the_last_one_of_a_shorter_prompt(tiny):
    ids = tiny.token_ids(PROMPTS[2])
    seen, alone = capture(tiny, PROMPTS[2:], at=torch.tensor([2])), capture(tiny, [tiny.tokenizer.decode(ids[:3])])
    for part in ("stream", "z", "mlps", "logits"):
        torch.testing.assert_close(getattr(seen, part), getattr(alone, part), atol=1e-4, rtol=1e-4)


@pytest.mark.model
def test_subject_positions_find_every_token_of_the_subject(smollm2):
    prompt = "The capital of Burkina Faso is"
    positions = subject_positions(smollm2, prompt, "Burkina Faso")
    ids = smollm2.token_ids(prompt)
    assert "".join(smollm2.token_text(ids[i]) for i in positions).strip() == "Burkina Faso"
    assert subject_positions(smollm2, "Fiji's capital city is", "Fiji")[0] == 0
    with pytest.raises(DataError, match="does not stand in the prompt"):
        subject_positions(smollm2, prompt, "Ghana")
    patterns = run_with_cache(smollm2, [prompt]).patterns
    (seen,) = subject_attention(smollm2, patterns, [prompt], ["Burkina Faso"])
    torch.testing.assert_close(seen, patterns[0][..., positions].sum(-1))


@pytest.mark.model
def test_smollm2_is_complete_on_every_prompt_of_the_eight(smollm2):
    lines = [p for t in facts.load_templates().values() for p in facts.prompts(facts.load_facts("eight"), t)]
    tokens = torch.tensor([[smollm2.first_token("Paris"), smollm2.first_token("the")]]).expand(16, -1)
    errors = [
        logit_trace(smollm2, capture(smollm2, lines[i : i + 16]), tokens[: len(lines[i : i + 16])], c).error
        for i in range(0, len(lines), 16)
        for c in ("scaled", "centred")
    ]
    assert max(errors) <= 1e-3


def test_full_size_gpt2_is_complete(full_gpt2):
    for convention in CONVENTIONS:
        assert logit_trace(full_gpt2, capture(full_gpt2, PROMPTS), some_tokens(), convention).error <= 1e-3
