"""Plants that break what they should and nothing else, and rules that cannot see them."""

import ast
import inspect
import json
from pathlib import Path

import pytest
import torch

from lib import interventions, sweeps
from lib.errors import DataError
from lib.facts import load_cases, load_templates
from lib.recall import scorable
from lib.sites import Site
from lib.studies import knowledge_path, localisation, planted
from lib.studies.localisation import NOT_RETRIEVED, OVERRIDDEN, Look, Named

SEEDS = (8, 17, 33, 9)  # a query, an MLP, a head's value and output, a head's output


@pytest.fixture(scope="module")
def run(organism) -> dict:
    return planted.plant_run(organism, seed=8, repair=True)


def bytes_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plant_is_where_it_says_and_leaves_no_trace(organism, seed):
    plant, before = planted.draw(organism, seed), bytes_of(organism)
    with pytest.raises(RuntimeError, match="stop"), planted.applied(organism, plant):
        changed = {n for n, p in organism.module.named_parameters() if not torch.equal(p, before[n])}
        layers = {int(n.split(".")[2]) for n in changed}
        assert layers == {d.site.layer for d in plant.damages}
        raise RuntimeError("stop")
    assert all(torch.equal(p, before[n]) for n, p in organism.module.named_parameters())


def test_only_the_head_of_a_suppressor_changes(organism):
    site, before = Site(10, 3), bytes_of(organism)
    drawn = planted.draw(organism, 9)
    plant = planted.Plant(**{**vars(drawn), "damages": (planted.Damage(site, "o", "mean", 3.0),)})
    with planted.applied(organism, plant):
        W = organism.module.get_parameter("transformer.h.10.attn.c_proj.weight")
        rows = (before["transformer.h.10.attn.c_proj.weight"] != W).any(1).nonzero()[:, 0].tolist()
    d = organism.weights.d_head
    assert rows and set(rows) <= set(range(3 * d, 4 * d))


def test_smallest_by_hand():
    """One row must become 2 along the second axis, the first axis must stay: only the part of the row that the kept
    one lacks can carry it."""
    X, Y, keep = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    change = planted.smallest(X, Y, keep)
    assert torch.allclose(change, torch.tensor([[0.0, 0.0], [0.0, 2.0]]), atol=1e-3)
    assert torch.allclose(X @ planted.smallest(X, Y, X), Y, atol=1e-3), "what cannot be told apart leaks"


def test_controls_are_left_alone(organism):
    """An MLP that suppresses one template moves no control's logits by more than a tenth of what it moves there."""
    plant = planted.draw(organism, 17)
    before = planted.run_on(organism, plant)
    with planted.applied(organism, plant, before):
        seen = [interventions.rerun_from(organism, r, plant.lowest) for r in before]
    moved = [float((a.logits - b.logits).abs().max()) for a, b in zip(seen, before, strict=True)]
    assert max(moved[1:]) < 0.1 * moved[0]


def test_accepted_by_hand():
    before = torch.tensor([[True] * 4, [True, True, True, False]])
    after = torch.tensor([[True, False, False, True], [True, True, True, True]])
    assert planted.accepted(before, after) == (0.5, 1.0, True)
    assert planted.accepted(before, torch.tensor([[False] * 4, [True, True, False, True]]))[2] is False, "2 of 3 kept"
    assert planted.accepted(before, before) == (0.0, 1.0, False)


def test_a_seed_is_a_plant(organism):
    assert planted.draw(organism, 5) == planted.draw(organism, 5) != planted.draw(organism, 5, 1)
    drawn = [planted.draw(organism, seed) for seed in range(8)]
    assert [p.kind for p in drawn] == [NOT_RETRIEVED, OVERRIDDEN] * 4
    assert [len(p.damages) for p in drawn] == [1, 1, 2, 2] * 2
    assert all(p.failing not in p.controls for p in drawn)
    assert all(c.split("{}")[0] != p.failing.split("{}")[0] for p in drawn for c in p.controls)


def test_the_judged_draws_are_not_the_designed_ones():
    assert not set(planted.DESIGN) & set(planted.SCORED) and len(planted.SCORED) >= 100


def test_the_diagnosis_cannot_see_the_plant():
    assert list(inspect.signature(localisation.blind).parameters) == ["model", "facts", "failing", "controls"]
    tree = ast.parse(Path(localisation.__file__).read_text(encoding="utf-8"))
    named = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "lib.diagnosis" in named and not any("planted" in (m or "") for m in named)


def test_a_run_says_what_a_blind_diagnosis_says(organism, run):
    """The run computes nothing below the damage again; the diagnosis computes everything, on the planted model."""
    plant = planted.draw(organism, 8, run["rejected"])
    with planted.applied(organism, plant):
        found = localisation.blind(organism, plant.facts, plant.failing, plant.controls)
    assert {n: str(v.site) for n, v in found.items()} == {n: run[f"{n}: named"] for n in localisation.RULES}
    assert {n: v.kind for n, v in found.items()} == {n: run[f"{n}: says"] for n in localisation.RULES}


def test_a_run_is_plain_and_repeats_itself(organism, run):
    assert json.loads(json.dumps(run)) == run and not {"seed", "repair"} & run.keys(), "a sweep adds what it gave"
    again = planted.plant_run(organism, seed=8)
    assert again == {k: v for k, v in run.items() if not k.startswith("repair")}
    assert run["accepted"] and run["joined: site"] and run["joined: kind"]
    assert 0 <= run["repair named: told"] <= run["untold"]


@pytest.mark.parametrize("seed", [8, 9, 10, 11])
def test_a_row_tells_the_whole_plant(organism, seed):
    row = {"seed": seed} | json.loads(json.dumps(planted.plant_run(organism, seed=seed)))
    assert planted.from_row(organism, row) == planted.draw(organism, seed, row["rejected"])


def test_every_scored_seed_is_run_and_repaired_once():
    every = sweeps.expand(sweeps.load("plants"))
    assert [(r["seed"], r["repair"]) for r in every] == [(seed, True) for seed in planted.SCORED]


def test_nothing_to_diagnose_is_an_error(organism):
    plant = planted.draw(organism, 8)
    with pytest.raises(DataError, match="no fact fails that a control tells"):
        localisation.blind(organism, plant.facts, plant.failing, plant.controls)


def test_a_model_that_tells_nothing_cannot_be_broken(tiny_gpt2_model):
    with pytest.raises(DataError, match="there is nothing to break"):
        planted.draw(tiny_gpt2_model, 0)


def test_a_negative_seed_is_refused(organism):
    with pytest.raises(DataError, match="neither may be negative"):
        planted.draw(organism, -1)


SITES = (Site(0, 0), Site(0, 1), Site(1, 0), Site(1, 1), Site(0, mlp=True), Site(1, mlp=True))


def evidence(pushed, still_pushed, written, still_written, effect, *, loud=(0,) * 6, maps=(0,) * 4) -> Look:
    """Two controls, the second pushing 1 less than the first everywhere; one fact, at which L1 H1 alone looks. What
    each component pushes (difference) and writes (attribution), under the controls and when it fails."""
    numbers = [torch.tensor(x, dtype=torch.float) for x in (pushed, still_pushed, written, still_written, effect)]
    pushed, still_pushed, written, still_written, effect = numbers
    return Look(
        facts=(),
        sites=SITES,
        told=torch.tensor([[False], [True], [True]]),
        difference=torch.stack((still_pushed, pushed, pushed - 1))[:, None],
        attribution=torch.stack((still_written, written, written))[:, None],
        margin=torch.zeros(3, 1),
        attention=torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(3, 1, 2, 2),
        effect=effect[:, None],
        maps=torch.tensor(maps, dtype=torch.float).view(2, 2),
        loudness=torch.tensor(loud, dtype=torch.float),
    )


dynamic = localisation.RULES["dynamic alone"]


def test_not_retrieved_by_hand():
    """L1 H1 looked at the subject and wrote 5; it pushes 4 less than its lowest control, and its return gives 4."""
    found = evidence([0, 5, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 5, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 4, 0, 0, 0, 0])
    assert localisation.excess(found).tolist() == [-1, 4, -1, -1, -1, -1]
    assert localisation.faults(found).tolist() == [-1, 8, -1, -1, -2, -2] or localisation.faults(found)[1] == 8
    assert dynamic(found) == Named(Site(0, 1), NOT_RETRIEVED)


def test_overridden_by_hand():
    """L2 H0 never looked at the subject; it pushes 6 against an answer that L1 H1 still writes."""
    writes = [0, 5, 0, 0, 0, 0]
    found = evidence(writes, [0, 5, -6, 0, 0, 0], writes, writes, [0, 0, 5, 0, 0, 0])
    assert dynamic(found) == Named(Site(1, 0), OVERRIDDEN)


def test_an_mlp_answers_for_what_it_says_itself():
    """L1 MLP brings back 9 without having pushed less; L2 MLP pushes 4 less than ever, and brings back 3."""
    writes = [0, 5, 0, 0, 0, 0]
    found = evidence(writes, [0, 5, 0, 0, 0, -5], writes, writes, [0, 0, 0, 0, 9, 3])
    assert dynamic(found) == Named(Site(1, mlp=True), OVERRIDDEN)
    assert localisation.RULES["largest patching effect"](found).site == Site(0, mlp=True), "the simple rule is misled"


def test_static_by_hand_and_what_it_adds():
    push, none = [0, 5, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]
    quiet = evidence(push, push, push, push, none, maps=[0, 2, 0, 0])
    assert localisation.static(quiet) == Named(Site(0, 1), NOT_RETRIEVED)
    loud = evidence(push, push, push, push, none, maps=[0, 2, 0, 0], loud=[0, 9, 0, 0, 0, 7])
    assert localisation.static(loud) == Named(Site(1, mlp=True), OVERRIDDEN), "a head that maps is no suppressor"
    close = [0, 0, 4.2, 4, 0, 0]
    tie = evidence(none, [0, 0, 0, 0, 0, 0], none, none, close, loud=[0, 0, 0, 9, 0, 0])
    assert (dynamic(tie).site, localisation.joined(tie).site) == (Site(1, 0), Site(1, 1))


def joined_names(model, case) -> Named:
    """What the joined rule names of a case that nobody planted for this test."""
    failing, *controls = (load_templates()[t] for t in (case.template, *case.controls))
    return localisation.blind(model, scorable(model, case.facts), failing, controls)["joined"]


@pytest.mark.parametrize("truth", knowledge_path.organism_truth(), ids=lambda c: c["kind"])
def test_the_organisms_own_failures(organism, truth):
    named = joined_names(organism, next(c for c in load_cases("organism") if c.template == truth["template"]))
    assert (str(named.site), named.kind) == (truth["suppressor"] or truth["knowledge_head"], truth["kind"])


@pytest.mark.model
def test_smollm2s_own_failures(smollm2):
    named = [joined_names(smollm2, case) for case in load_cases("smollm2")]
    assert named == [Named(Site.parse("L24 H4"), NOT_RETRIEVED), Named(Site.parse("L30 MLP"), OVERRIDDEN)]
