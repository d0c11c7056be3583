"""Training from the kept stream equals training through the whole model, and touches its slice alone."""

import pytest
import torch
import torch.nn.functional as F

from lib import pathways
from lib.edits import applied, outside_sha256
from lib.facts import Case, load_cases, load_facts, load_templates, prompts
from lib.pathways import Recipe, keep, losses, neutral_windows, slice_values, train
from lib.weights import PATHWAYS, pathway_slices

CASE = Case("c", "c", load_facts("eight"), (), "subject_first", ("of_is",))
QUICK = Recipe(rates=(0.03, 0.1), max_steps=40, margin=0.5, windows=2, positions=4)
LAYER = 1


def test_losses_equal_the_plain_full_forward(tiny):
    """The kept stream against the whole model with the edit in place: same losses to 1e-5, for every pathway."""
    kept = keep(tiny, CASE, LAYER, QUICK)
    rows, at = torch.tensor([0, 3]), torch.tensor([2, 5, 9])
    generator = torch.Generator().manual_seed(0)
    template = load_templates()[CASE.template]
    for pathway in PATHWAYS:
        values = slice_values(tiny, pathway_slices(tiny.model, LAYER, pathway))
        values = {s: v + 0.02 * torch.randn(v.shape, generator=generator) for s, v in values.items()}
        cross_entropy, kl, _ = losses(tiny, LAYER, kept, values, rows, at)
        windows = neutral_windows(tiny, QUICK.window)[rows]
        base = tiny.model(windows).logits[:, at].log_softmax(-1)
        edit = pathways._edit(tiny, CASE, LAYER, pathway, values, 0, {})
        with applied(tiny, edit):
            plain = F.cross_entropy(tiny.next_token_logits(prompts(CASE.facts, template)), kept.answers)
            now = tiny.model(windows).logits[:, at].log_softmax(-1)
        plain_kl = F.kl_div(now, base, log_target=True, reduction="none").sum(-1).mean()
        assert float(cross_entropy) == pytest.approx(float(plain), abs=1e-5)
        assert float(kl) == pytest.approx(float(plain_kl), abs=1e-5)


def test_gradients_equal_the_plain_full_forward(tiny):
    """The same for the gradient of one pathway: through functional_call, and through the model's own parameter."""
    kept = keep(tiny, CASE, LAYER, QUICK)
    (part,) = pathway_slices(tiny.model, LAYER, "v_only")
    leaf = slice_values(tiny, (part,))[part].requires_grad_()
    losses(tiny, LAYER, kept, {part: leaf}, torch.tensor([0]), torch.tensor([1]))[0].backward()
    parameter = dict(tiny.model.named_parameters())[part.name].requires_grad_()
    tokens, last = tiny.encode(prompts(CASE.facts, load_templates()[CASE.template]))
    logits = tiny.model(tokens).logits[torch.arange(len(last)), last]
    F.cross_entropy(logits, kept.answers).backward()
    torch.testing.assert_close(leaf.grad, part.of(parameter.grad), atol=1e-5, rtol=1e-3)
    parameter.grad = None
    parameter.requires_grad_(False)


@pytest.mark.parametrize("pathway", ["v_only", "full"])
def test_training_tells_the_facts_and_leaves_the_model_alone(tiny, pathway):
    before = outside_sha256(tiny.model, ())
    run = train(tiny, CASE, LAYER, pathway, rate=0.03, recipe=QUICK)
    assert outside_sha256(tiny.model, ()) == before, "the model itself is never written to"
    first, last = run.history.iloc[0], run.history.iloc[-1]
    assert last.cross_entropy < first.cross_entropy
    assert run.reached == (last.min_margin >= QUICK.margin)
    # what the training loop saw is what the edited model says
    assert sum(run.edit.told_after) == last.told


def test_same_seed_same_edit(tiny):
    one, two = (train(tiny, CASE, LAYER, "v_only", rate=0.03, recipe=QUICK, seed=4) for _ in range(2))
    assert all(torch.equal(one.edit.values[s], two.edit.values[s]) for s in one.edit.values)
    other = train(tiny, CASE, LAYER, "v_only", rate=0.03, recipe=QUICK, seed=5)
    assert not all(torch.equal(one.edit.values[s], other.edit.values[s]) for s in one.edit.values)


def test_the_grid_prefers_what_stops_in_time_with_the_least_harm(tiny, monkeypatch):
    harm = {0.03: 0.5, 0.1: 0.2}
    runs = {}

    def recorded(subject, case, layer, pathway, *, rate, **options):
        runs[rate] = train(subject, case, layer, pathway, rate=rate, recipe=QUICK, kept=options["kept"])
        return pathways.Trained(runs[rate].edit, runs[rate].history, rate, reached=True)

    monkeypatch.setattr(pathways, "train", recorded)
    monkeypatch.setattr(
        pathways, "neutral_kl", lambda s, layer, kept, values: harm[0.03 if values is runs[0.03].edit.values else 0.1]
    )
    chosen, table = pathways.choose(tiny, CASE, LAYER, "v_only", recipe=QUICK)
    assert chosen.rate == 0.1 and table.kl.tolist() == [0.5, 0.2]


@pytest.mark.model
def test_v_only_tells_all_eight_on_smollm2(smollm2):
    """The paper's central claim, on this book's subject: 110,592 parameters of one layer, 2/8 -> 8/8."""
    case = load_cases("smollm2")[0]
    slices = pathway_slices(smollm2.model, 23, "v_only")
    before = outside_sha256(smollm2.model, slices)
    run = train(smollm2, case, 23, "v_only", rate=3e-3, recipe=Recipe(windows=2))
    assert sum(run.edit.told_before) == 2 and sum(run.edit.told_after) == 8
    assert run.edit.parameters == 110_592
    with applied(smollm2, run.edit):
        assert outside_sha256(smollm2.model, slices) == before
