"""Patching last rows against whole forward passes."""

import pytest
import torch

from lib import interventions
from lib.facts import Fact, prompts
from lib.studies import cross_validation
from lib.trace import capture, hooked

FACTS = (Fact("France", "Paris"), Fact("Japan", "Tokyo"))
FAILING, CONTROL = "{}'s capital city is", "As everyone knows, the capital of {} is"


@pytest.fixture(scope="module")
def pairs(tiny) -> torch.Tensor:
    return torch.tensor([[tiny.first_token(f.answer), tiny.first_token("the")] for f in FACTS])


def test_a_run_sees_what_a_capture_sees(tiny):
    texts = prompts(FACTS, FAILING) + prompts(FACTS, CONTROL)
    mine, own = interventions.run_with_cache(tiny, texts).capture(), capture(tiny, texts)
    for name in ("stream", "z", "mlps", "logits"):
        a, b = getattr(mine, name), getattr(own, name)
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name  # fp32 rounding of another order of sums


def test_its_own_output_changes_nothing(tiny, pairs):
    run = interventions.run_with_cache(tiny, prompts(FACTS, FAILING))
    found = interventions.patch_components(tiny, run, run.z, run.mlps, pairs)
    assert found.shape == (tiny.weights.n_layers * (tiny.weights.n_heads + 1), len(FACTS))
    assert torch.allclose(found, interventions.logit_differences(run, pairs).expand_as(found), atol=1e-4)


def test_patched_heads_are_those_of_whole_passes(tiny, pairs):
    """patch_heads runs the model's own blocks; both give the share of the lost margin that comes back."""
    bad, good = (interventions.run_with_cache(tiny, prompts(FACTS, t)) for t in (FAILING, CONTROL))
    base, told = (interventions.logit_differences(run, pairs) for run in (bad, good))
    mine = (interventions.patch_components(tiny, bad, good.z, good.mlps, pairs) - base) / (told - base)
    theirs = cross_validation.patch_heads(tiny, FACTS, FAILING, CONTROL, pairs[:, 1])["last"]
    assert torch.allclose(mine[: theirs[..., 0].numel()].view_as(theirs), theirs, atol=1e-3, rtol=1e-3)
    assert theirs.abs().max() > 0.05, "nothing was patched"


def test_a_patched_mlp_by_a_hook(tiny, pairs):
    bad, good = (interventions.run_with_cache(tiny, prompts(FACTS, t)) for t in (FAILING, CONTROL))
    mine = interventions.patch_components(tiny, bad, good.z, good.mlps, pairs)[-tiny.weights.n_layers + 1]
    tokens, last = tiny.encode(prompts(FACTS, FAILING))
    rows = torch.arange(len(FACTS))
    with hooked(after={tiny.weights.blocks[1].mlp_written: lambda out: out.index_put((rows, last), good.mlps[:, 1])}):
        logits = tiny.module(tokens).logits[rows, last]
    assert torch.allclose(mine, -logits.gather(1, pairs).diff()[:, 0], atol=1e-3)


def test_below_the_lowest_layer_nothing_is_patched(tiny, pairs):
    bad, good = (interventions.run_with_cache(tiny, prompts(FACTS, t)) for t in (FAILING, CONTROL))
    whole, upper = (interventions.patch_components(tiny, bad, good.z, good.mlps, pairs, lowest=i) for i in (0, 1))
    heads = tiny.weights.n_heads
    assert torch.equal(upper[:heads], interventions.logit_differences(bad, pairs).expand(heads, -1))
    assert torch.allclose(upper[heads : 2 * heads], whole[heads : 2 * heads], atol=1e-5)


def test_patches_go_on_from_kept_rows(tiny, pairs):
    """What leaves a layer is all that the layers above need."""
    bad, good = (interventions.run_with_cache(tiny, prompts(FACTS, t)) for t in (FAILING, CONTROL))
    whole = list(interventions.patched_streams(tiny, bad, good.z))
    (*_, again) = interventions.patched_streams(tiny, bad, good.z, start=1, below=whole[0])
    assert torch.allclose(again, whole[-1], atol=1e-5)
    heads = tiny.weights.n_layers * tiny.weights.n_heads
    of_all = interventions.patch_components(tiny, bad, good.z, good.mlps, pairs)[:heads]
    assert torch.allclose(interventions.patched_logit_differences(tiny, whole[-1], pairs), of_all, atol=1e-4)


def test_a_rerun_is_a_run(tiny):
    texts = prompts(FACTS, FAILING)
    before, W = interventions.run_with_cache(tiny, texts), tiny.weights.blocks[1].attn.W_O
    kept = W.clone()
    with torch.no_grad():
        W.mul_(1.5)
        again, whole = interventions.rerun_from(tiny, before, 1), interventions.run_with_cache(tiny, texts)
        W.copy_(kept)
    assert torch.equal(again.logits, whole.logits) and not torch.equal(again.logits, before.logits)


def test_some_prompts_of_a_run(tiny):
    run = interventions.run_with_cache(tiny, prompts(FACTS, FAILING))
    part = run.take([1])
    assert part.prompts == run.prompts[1:] and torch.equal(part.logits, run.logits[1:])
    assert torch.equal(part.z, run.z[1:])
