"""Tables of planted failures, worked out by hand."""

import pandas as pd
import pytest
import torch

from lib.show.sentences import say
from lib.studies import planted, scoring
from lib.studies.localisation import NOT_RETRIEVED, OVERRIDDEN


@pytest.fixture(scope="module")
def run(organism) -> dict:
    return planted.plant_run(organism, seed=8, repair=True)


def test_tables_by_hand(run):
    wrong = run | {"seed": 1, "kind": OVERRIDDEN, "sites": 2, "truth": "L12 H2, L12 MLP", "repair named: told": 0}
    wrong |= {"joined: kind": False, "joined: off": 3, "joined: site": False, "dynamic alone: site": False}
    table = pd.DataFrame([run, {**run, "seed": 2}, wrong, {"seed": 3, "accepted": False}])
    table["accepted"] = table.accepted.astype(bool)
    summary = scoring.summarise(table).set_index("rule")
    row = summary.loc["joined"]
    assert (row.n, row.kind, row["layer"], row.site) == (3, pytest.approx(2 / 3), *[pytest.approx(2 / 3)] * 2)
    assert row["kind low"] == pytest.approx(0.0943, abs=1e-3) and row["kind high"] == pytest.approx(0.9916, abs=1e-3)
    constant = summary.loc["always L8 H5"]
    assert constant.kind == constant.site == pytest.approx(2 / 3)
    assert scoring.by_group(table).site.tolist() == [2, 0]
    says = scoring.confusions(table).set_index("rule").loc["joined"]
    assert says.tolist() == [2, 0, 1, 0] and says.index[2] == f"{OVERRIDDEN}, said {NOT_RETRIEVED}"
    beside = scoring.against(table.assign(**{"dynamic alone: kind": True})).set_index("rule")
    assert beside.loc["dynamic alone", ["only it", "only joined", "p"]].tolist() == [0, 0, 1.0], "its site counts too"
    beside = scoring.against(table.assign(**{"chapter 2: kind": True, "chapter 2: site": True})).set_index("rule")
    assert beside.loc["chapter 2", ["only it", "only joined", "p"]].tolist() == [1, 0, 1.0]
    repaired = scoring.repairs(table).set_index(["planted", "trained layer"]).repaired
    assert repaired[OVERRIDDEN, "named"] == 0
    assert repaired[NOT_RETRIEVED, "named"] == 2 * (run["repair named: told"] == run["untold"])


@pytest.fixture(scope="module")
def table(run) -> pd.DataFrame:
    """A plant found, and one of two sites missed."""
    missed = {**run, "sites": 2, "joined: kind": False, "joined: site": False, "repair named: told": 0}
    return pd.DataFrame([{"seed": 8, **run}, {"seed": 10, **missed}, {"seed": 12, "accepted": False}]).astype(
        {"accepted": bool}
    )


def test_by_damage_by_hand(run, table):
    rows = scoring.by_damage(table).set_index("damaged")
    matrix = run["damage"].split()[-3]
    assert rows.n.to_dict() == {matrix: 1, "two sites": 1} and rows.right.to_dict() == {matrix: 1, "two sites": 0}


def test_repaired_counts_plants_of_which_every_lost_fact_is_told(run, table):
    found = scoring.repaired(table)
    assert found.named.tolist() == [run["repair named: told"] == run["untold"], False]
    assert scoring.repaired(
        pd.DataFrame([run]).drop(columns="repair named: told").assign(**{"repair named: told": float("nan")})
    ).empty, "a plant that was not retrained counts for nothing"


@pytest.mark.parametrize(
    ("ours", "theirs", "p", "says"),
    [
        (0, 0, 1.0, "right about the same plants"),
        (9, 0, 0.004, "right on 9 plants, other alone on 0: better (McNemar, p = 0.004)"),
        (0, 20, 1e-6, "right on 0 plants, other alone on 20: worse (McNemar, p < 0.001)"),
        (3, 1, 0.6, "right on 3 plants, other alone on 1: no clear difference"),
    ],
)
def test_no_word_without_its_number(ours, theirs, p, says):
    row = pd.Series({"only joined": ours, "only it": theirs, "p": p}, name="other")
    assert says in say("scoring", "beside", row=row)


@pytest.mark.parametrize(
    ("share", "low", "says"), [(0.94, 0.9, "missed"), (0.96, 0.9, "reaches below it"), (1, 0.96, "is reached.")]
)
def test_a_goal_is_reached_or_missed(share, low, says):
    row = pd.Series({"kind": share, "kind low": low, "kind high": 1.0, "n": 100})
    assert says in say("scoring", "goal", row=row, what="kind", goal=0.95)


def test_a_close_up_shows_the_fall_at_the_planted_layer(organism, table):
    """Below the plant nothing differs; above it the failing prompts are lost, and their controls are not."""
    before = {name: p.clone() for name, p in organism.module.named_parameters()}
    found = scoring.close_ups(organism, table)
    assert all(torch.equal(p, before[name]) for name, p in organism.module.named_parameters())
    layer = planted.from_row(organism, table.iloc[0]).lowest
    lines = {name: part.pivot(index="layer", columns="fact", values="logits") for name, part in found.groupby("curve")}
    was, now = lines["failing template, before"], lines["failing template, planted"]
    assert len(now.columns) == table.untold[0] and found.seed.unique().tolist() == [8]
    assert (was - now).mean(1).diff().idxmax() == layer + 1, "the final norm's scale differs everywhere, by less"
    assert (now.iloc[-1] < 0).all() and (was.iloc[-1] > now.iloc[-1]).all()
    assert (lines["controls, planted"].iloc[-1] > now.iloc[-1]).all()
