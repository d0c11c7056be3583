"""A learned token before every text: all families, both pathways; the model is what it was afterwards."""

from dataclasses import replace

import pytest
import torch

from lib import edits, sinks, training
from lib.errors import DataError, EditError
from lib.facts import Case, Fact
from lib.forward import next_token_logits
from lib.models import Model
from lib.trace import capture, logit_trace, subject_positions
from lib.training import Recipe, sink_task, task_at, train
from lib.weights import SINKS
from tests.conftest import TINY, drawn

PROMPTS = ["The capital of France is", "Germany's capital city is", "Once"]
RECIPE = Recipe(max_steps=2, window=8, positions=4)
FACTS = (Fact("France", "Paris"), Fact("Germany", "Berlin"))


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest, smollm2: Model) -> Model:
    """A random model of every family, the first ones also with a token that stands before every text."""
    return drawn(request.param, smollm2.tokenizer)


def moved(model: Model, pathway: str, size: float = 0.5) -> dict:
    torch.manual_seed(3)
    return {part: x + size * torch.randn_like(x) for part, x in sinks.ordinary(model, pathway).items()}


def by_module(model: Model, prompts: list[str]) -> torch.Tensor:
    """What the model's own module says after each prompt, read in one padded batch."""
    tokens, last = model.encode(prompts)
    with torch.no_grad():
        return model.module(tokens, use_cache=False).logits[torch.arange(len(last)), last]


@pytest.mark.parametrize("pathway", SINKS)
@pytest.mark.parametrize("bos", [(), (11,)], ids=["no bos", "bos"])
def test_untrained_it_is_the_prefix_that_it_starts_from(model, pathway, bos):
    model = replace(model, bos=bos)
    expected = next_token_logits(model, ["\n" + p for p in PROMPTS])
    with sinks.standing(model, sinks.ordinary(model, pathway)) as changed:
        assert changed.bos == (*bos, 49152)
        assert (next_token_logits(changed, PROMPTS) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("pathway", SINKS)
@pytest.mark.parametrize("bos", [(), (11,)], ids=["no bos", "bos"])
def test_packs_module_view_and_trace_agree_on_what_is_said(model, pathway, bos):
    model = replace(model, bos=bos)
    with sinks.standing(model, moved(model, pathway)) as changed:
        packed, module = next_token_logits(changed, PROMPTS), by_module(changed, PROMPTS)
        view = changed.weights.residuals(changed.encode(PROMPTS[:1])[0])[-1][:, -1]
        trace = logit_trace(changed, capture(changed, PROMPTS), torch.tensor([[5], [6], [7]]))  # complete, or it raises
    seen = (model.weights.norm_final(view) @ model.weights.W_U)[0]
    assert (packed - module).abs().max() < 1e-4 and (packed[0] - seen).abs().max() < 1e-4
    assert torch.allclose(trace.total[:, 0], packed[torch.arange(3), torch.tensor([5, 6, 7])], atol=1e-4)


@pytest.mark.parametrize("bos", [(), (11,)], ids=["no bos", "bos"])
def test_in_the_middle_packs_module_view_and_trace_agree_too(model, bos):
    """The control: the same row, and another place; a text of one token has it at the end."""
    model = replace(model, bos=bos)
    ids = model.pieces(PROMPTS[0])
    with sinks.standing(model, moved(model, "sink_token"), middle=True) as changed:
        assert changed.token_ids(PROMPTS[0]) == [*bos, *ids[:3], 49152, *ids[3:]]
        packed, module = next_token_logits(changed, PROMPTS), by_module(changed, PROMPTS)
        view = changed.weights.residuals(changed.encode(PROMPTS[:1])[0])[-1][:, -1]
        trace = logit_trace(changed, capture(changed, PROMPTS), torch.tensor([[5], [6], [7]]))
        places = subject_positions(changed, PROMPTS[0], "France")
        assert [changed.token_text(changed.token_ids(PROMPTS[0])[i]) for i in places] == [" France"]
    with sinks.standing(model, moved(model, "sink_token")) as before:
        assert before.weights_sha256 != changed.weights_sha256, "the same row, and another model"
    seen = (model.weights.norm_final(view) @ model.weights.W_U)[0]
    assert (packed - module).abs().max() < 1e-4 and (packed[0] - seen).abs().max() < 1e-4
    assert torch.allclose(trace.total[:, 0], packed[torch.arange(3), torch.tensor([5, 6, 7])], atol=1e-4)
    with pytest.raises(EditError, match="only a learned row"), sinks.standing(model, moved(model, "sink_kv"), middle=1):
        pass


@pytest.mark.parametrize("pathway", SINKS)
def test_it_changes_what_is_said_and_nothing_stays(model, pathway):
    before, sum_before = by_module(model, PROMPTS), edits.outside_sha256(model.module, ())
    with pytest.raises(KeyboardInterrupt), sinks.standing(model, moved(model, pathway)) as changed:
        assert (by_module(changed, PROMPTS) - before).abs().max() > 1e-2
        raise KeyboardInterrupt
    assert torch.equal(by_module(model, PROMPTS), before)
    assert edits.outside_sha256(model.module, ()) == sum_before and model.weights.sink is None


def test_a_key_and_a_value_are_seen_by_every_later_position_and_by_nothing_else(tiny_gpt2_model):
    """Worked out by hand: with a key that every query scores far highest, attention is on the sink alone, so that what
    a head gathers is the learned value."""
    model = tiny_gpt2_model
    attn = model.weights.blocks[0].attn
    with sinks.standing(model, moved(model, "sink_kv")) as changed:
        tokens, _ = changed.encode(PROMPTS[:1])
        x = model.weights.blocks[0].norm_attn(changed.weights.embed(tokens))
        q = attn.queries(x)[0, :, -1]
        key = 1e4 * q / q.pow(2).sum(-1, keepdim=True)
    value = torch.arange(float(key.numel())).view_as(key)
    learned = sinks.ordinary(model, "sink_kv")
    learned[sinks.KEYS][0], learned[sinks.VALUES][0] = key, value
    with sinks.standing(model, learned) as changed:
        z = capture(changed, PROMPTS[:1]).z[0, 0]
    assert torch.allclose(z, value, atol=1e-3)


def test_generation_goes_on_from_it(smollm2):
    """With the module's own cache, where later steps do not read the sink again."""
    with sinks.standing(smollm2, moved(smollm2, "sink_kv", 0.05)) as changed:
        tokens = torch.tensor([changed.token_ids(PROMPTS[0])])
        cached = smollm2.module.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
        plain = tokens
        for _ in range(4):
            with torch.no_grad():
                plain = torch.cat((plain, smollm2.module(plain, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(("pathway", "middle"), [*((p, False) for p in SINKS), ("sink_token", True)])
def test_training_agrees_with_finite_differences(tiny, pathway, middle):
    case = Case("c", "c", FACTS, FACTS, "of_is", ("visited",))
    task = sink_task(tiny, task_at(tiny, case, 1, RECIPE), middle=middle)
    values, rows = sinks.ordinary(tiny, pathway), torch.tensor([0])
    leaves = {part: v.clone().requires_grad_() for part, v in values.items()}
    cross_entropy, kl, _ = training.losses(tiny, task, leaves, rows)
    (cross_entropy + kl).backward()
    part, leaf = next(iter(leaves.items()))
    direction = leaf.grad / leaf.grad.norm()
    sides = [
        sum(float(x) for x in training.losses(tiny, task, values | {part: values[part] + e * direction}, rows)[:2])
        for e in (1e-2, -1e-2)
    ]
    assert (sides[0] - sides[1]) / 2e-2 == pytest.approx(float(leaf.grad.norm()), rel=0.02)


def test_in_the_middle_training_is_held_to_what_the_same_tokens_said(tiny):
    """Compared positions before the learned row are the text's own, those after it one later."""
    case = Case("c", "c", FACTS, FACTS, "of_is", ("visited",))
    plain = task_at(tiny, case, 1, RECIPE)
    task = sink_task(tiny, plain, middle=True)
    assert task.windows[0].index(len(tiny.weights.W_E)) == 4 and RECIPE.read.tolist() == [1, 3, 5, 7]
    window = [t for t in task.windows[0] if t != len(tiny.weights.W_E)]
    with torch.no_grad():
        logits = tiny.module(torch.tensor([window])).logits[0, [1, 3, 4, 6]]
    assert torch.allclose(task.untouched.log_z[0], logits.logsumexp(-1), atol=1e-4)


@pytest.mark.parametrize("pathway", SINKS)
def test_an_edit_is_made_saved_applied_and_verified(tiny, pathway, tmp_path):
    about = {"layer": 0, "facts": FACTS, "template": "The capital of {} is", "told_before": (False, False), "seed": 0}
    edit = edits.make(tiny, moved(tiny, pathway), pathway=pathway, recipe={}, **about)
    w, size = tiny.weights, tiny.weights.n_layers * tiny.weights.n_kv_heads * tiny.weights.d_head
    assert edit.parameters == (w.d_model if pathway == "sink_token" else 2 * size)
    again = edits.load(edits.save(edit, tmp_path / "edit.safetensors"))
    assert all(torch.equal(again.values[part], value) for part, value in edit.values.items())
    assert edits.verify(tiny, again)["as recorded"].all() and edits.outside_unchanged(tiny, again)
    with edits.applied(tiny, again) as changed:
        with pytest.raises(EditError, match="has a sink before every text already"), sinks.standing(changed, {}):
            pass
        with pytest.raises(EditError, match="is for another"), edits.applied(changed, again):
            pass
    part = next(iter(again.values))
    other = replace(again, values=again.values | {part: again.values[part][..., :-1]})
    with pytest.raises(EditError, match=r"has the shape .* of another model"), edits.applied(tiny, other):
        pass
    with pytest.raises(EditError, match=r"was made with .* before every text"):
        edits.check(replace(tiny, bos=(11,)), again)


def test_a_prompt_as_long_as_the_context_leaves_no_room(tiny_gpt2_model):
    too_long = pytest.raises(DataError, match="a text has 65 tokens; tiny reads 64")
    with sinks.standing(tiny_gpt2_model, sinks.ordinary(tiny_gpt2_model, "sink_token")) as changed, too_long:
        next_token_logits(changed, ["a" + " a" * 63])


def test_a_pathway_of_a_layer_takes_no_task_with_a_sink(tiny_gpt2_model):
    case = Case("c", "c", FACTS, FACTS, "of_is", ("visited",))
    task = task_at(tiny_gpt2_model, case, 1, RECIPE)
    with pytest.raises(EditError, match="sink_kv needs a task with a sink"):
        train(tiny_gpt2_model, task, "sink_kv", rate=1e-3)
    with pytest.raises(EditError, match="v_only needs a task without a sink"):
        train(tiny_gpt2_model, sink_task(tiny_gpt2_model, task), "v_only", rate=1e-3)
