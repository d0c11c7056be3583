"""The head-to-head comparison: its rule on tables made by hand, its controls, and the edits that chapter 4 takes."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest

from lib import edits, training, weights
from lib.errors import EditError
from lib.studies import pathways
from lib.sweeps.experiments import one_thread
from lib.training import Recipe, chosen, false_facts, recommended, task_at
from tests.test_edits import an_edit

QUICK = Recipe(rates=(0.003, 0.03), max_steps=25, margin=0.5, kl_weight=1.0)


@pytest.mark.parametrize(
    "reached, kl, margin, diverged, best",
    [
        ([True, True, False], [0.5, 0.2, 0.1], [1.5, 1.1, 0.9], [False] * 3, 1),  # in time, with the least harm
        ([False] * 3, [0.1, 0.2, 0.3], [-1.0, 0.2, 0.1], [False] * 3, 1),  # none in time: the largest margin
        ([False] * 3, [np.nan, 0.2, 0.3], [9.0, -2.0, -1.0], [True, False, False], 2),  # never one that diverged
    ],
)
def test_the_rule_by_hand(reached, kl, margin, diverged, best):
    assert chosen(pd.DataFrame({"reached": reached, "kl": kl, "min_margin": margin, "diverged": diverged})) == best


def outcomes(base, **rows):
    """Edits by pathway, from (told, reached, neutral KL)."""
    n = len(base.facts)
    return {
        name: replace(base, told_after=(told,) * n, recipe={"reached": reached, "neutral_kl": kl})
        for name, (told, reached, kl) in rows.items()
    }


def test_recommended_needs_its_goal(organism):
    found = outcomes(an_edit(organism), full=(1, True, 0.3), ffn=(1, True, 0.2), v_only=(1, False, 0.1))
    assert recommended(found) == "ffn"
    assert recommended({"v_only": found["v_only"]}) == "none"


def test_what_is_studied_when_nothing_can_be_recommended(organism):
    base = an_edit(organism)
    found = outcomes(base, full=(0, False, 0.1), ffn=(1, False, 0.3), v_only=(1, False, 0.2))
    studied, reason = training.under_study(found)
    assert studied == "v_only" and "none reaches its goal" in reason
    assert training.under_study(found | outcomes(base, full=(0, True, 0.1)))[0] == "full"
    with pytest.raises(EditError, match="every training diverged"):
        training.under_study({})


def test_gpt2_counts_are_the_papers():
    """7.1M, 2.4M, 4.7M and 590K parameters, exactly; and the last a share of 0.474 %, where the page says 0.48."""
    sizes = pathways.gpt2_sizes()
    assert [sizes[name]["parameters"] for name in weights.PAPER] == [7_087_872, 2_362_368, 4_722_432, 589_824]
    assert sizes["v_only"]["share"] == pytest.approx(589_824 / 124_439_808)


@pytest.fixture(scope="module")
def ran(organism, case):
    task = task_at(organism, case, 7, QUICK)
    return task, training.compare(organism, task, pathways=("ffn", "v_only"), progress=False)


def test_compare_takes_the_rules_choice(ran):
    _, found = ran
    assert len(found.grid) == 4 and found.grid.groupby("pathway").chosen.sum().tolist() == [1, 1]
    for name, run in found.runs.items():
        best = found.grid[(found.grid.pathway == name) & found.grid.chosen].iloc[0]
        assert run.rate == best.rate and found.edits[name] is run.edit


@pytest.fixture(scope="module")
def swept(organism):
    """What the sweeps of chapter 3 give, at two rates of two pathways, on one thread: grid, then what is further."""
    with one_thread():
        grid = table(organism, [{"pathway": [p], "rate": [1e-3, 3e-3]} for p in ("v_only", "ffn")])
        return grid, table(organism, pathways.further(grid, seeds=2))


def table(model, grids: list[dict]) -> pd.DataFrame:
    """As `sweeps.table`, without its cluster."""
    runs = [dict(zip(g, values, strict=True)) for g in grids for values in product(*g.values())]
    full = [{"facts": "true", "longer": 1, "seed": 0, **run} for run in runs]
    return pd.DataFrame([run | pathways.train_at(model, **run) for run in full])


def gathered(model, task, grid, runs) -> training.Comparison:
    """As chapter 3 does it."""
    best = training.chosen_rows(grid).itertuples()
    with one_thread():
        trained = [training.train(model, task, r.pathway, rate=r.rate, seed=r.seed) for r in best]
    return pathways.gather(model, grid, runs, trained)


def test_the_sweeps_make_the_comparison(swept, organism):
    grid, runs = swept
    task = pathways.diagnosed_task(organism)
    found, checks = gathered(organism, task, grid, runs), pathways.controls(runs)
    assert found.grid.pathway.tolist() == ["ffn", "ffn", "v_only", "v_only"], "in the order of PATHWAYS"
    assert found.grid.groupby("pathway").chosen.sum().tolist() == [1, 1]
    assert found.seeds.groupby("pathway").seed.agg(list).tolist() == [[0, 1], [0, 1]]
    for name, run in found.runs.items():
        row = found.seeds[(found.seeds.pathway == name) & (found.seeds.seed == 0)].iloc[0]
        assert (run.steps, run.history.min_margin.tolist()) == (row.steps, row.margins), "the same run, to the bit"
    missed = found.grid[found.grid.chosen & ~found.grid.reached].pathway.tolist()
    assert checks.control.tolist() == ["false facts"] * 2 + ["more steps"] * len(missed)
    assert checks[checks.control == "more steps"].pathway.tolist() == missed


def test_a_run_that_comes_out_otherwise_is_an_error(swept, organism):
    (grid, runs), task = swept, pathways.diagnosed_task(organism)
    remedy = r"came out otherwise than in the sweep .* `python -m lib record pathways --model organism` renews"
    with pytest.raises(EditError, match=remedy):
        gathered(organism, task, grid.assign(reached=~grid.reached), runs)


def test_lessons_that_there_are(organism):
    with pytest.raises(EditError, match="facts 'half': choose true or false"):
        pathways.train_at(organism, pathway="ffn", rate=1e-3, facts="half")


def test_false_facts_are_false_and_share_everything_else(ran, organism):
    task, _ = ran
    lies = false_facts(task)
    assert not any(a.answer == b.answer for a, b in zip(task.facts, lies.facts, strict=True))
    assert [organism.first_token(f.answer) for f in lies.facts] == lies.answers.tolist()
    assert lies.prompt_stream is task.prompt_stream


def test_head_to_head_and_spread(ran, swept, organism):
    _, found = ran
    head = pathways.head_to_head(organism, found)
    assert head.outside_unchanged.all()
    assert head.parameters.tolist() == [e.parameters for e in found.edits.values()]
    spread = pathways.spread(gathered(organism, pathways.diagnosed_task(organism), *swept).seeds)
    assert (spread.kl_min <= spread.kl_mean).all() and (spread.kl_mean <= spread.kl_max).all()
    assert (spread.seeds == 2).all()


def test_saved_edits_that_fit_are_taken_and_others_are_trained(ran, organism, case, tmp_path, monkeypatch):
    calls, six = [], {name: an_edit(organism, name) for name in weights.OF_A_LAYER}
    monkeypatch.setattr(training, "compare", lambda *a, **k: calls.append(1) or ran[1])
    monkeypatch.setattr(training, "_fits", lambda edit, *a: True)
    edits.save_all(six, tmp_path)
    assert list(training.saved_or_trained(organism, case, tmp_path)) == list(weights.OF_A_LAYER) and not calls
    for name in ("q_only", "k_only"):  # a model where they cost too much has the paper's four
        (tmp_path / f"{name}.safetensors").unlink()
    assert list(training.saved_or_trained(organism, case, tmp_path)) == list(weights.PAPER) and not calls
    (tmp_path / "ffn.safetensors").unlink()
    training.saved_or_trained(organism, case, tmp_path)
    assert calls == [1], "one is missing: all are trained anew"


def test_an_edit_fits_its_own_recipe_and_seed_only(ran, organism, case, monkeypatch):
    edit = ran[1].edits["v_only"]
    read = type(edit)(**{**vars(edit), "recipe": json.loads(json.dumps(edit.recipe))})
    assert not training._fits(read, organism, case, 0), "of another recipe"
    monkeypatch.setattr(training, "DEFAULT", QUICK)
    assert training._fits(read, organism, case, 0)
    assert not training._fits(read, organism, case, 1)
