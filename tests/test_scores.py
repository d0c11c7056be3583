"""Tables of planted failures, worked out by hand."""

import pandas as pd
import pytest

from lib import plants, scores
from lib.blind import NOT_RETRIEVED, OVERRIDDEN


@pytest.fixture(scope="module")
def run(organism) -> dict:
    return plants.plant_run(organism, seed=8, repair=True)


def test_tables_by_hand(run):
    wrong = {
        **run, "seed": 1, "kind": OVERRIDDEN, "sites": 2, "truth": "L12 H2, L12 MLP", "joined: kind": False,
        "joined: off": 3, "joined: site": False, "dynamic alone: site": False, "repair named: told": 0,
    }  # fmt: skip
    table = pd.DataFrame([run, {**run, "seed": 2}, wrong, {"seed": 3, "accepted": False}])
    table["accepted"] = table.accepted.astype(bool)
    summary = scores.summarise(table).set_index("rule")
    row = summary.loc["joined"]
    assert (row.n, row.kind, row["layer"], row.site) == (3, pytest.approx(2 / 3), *[pytest.approx(2 / 3)] * 2)
    assert row["kind low"] == pytest.approx(0.0943, abs=1e-3) and row["kind high"] == pytest.approx(0.9916, abs=1e-3)
    constant = summary.loc["always L8 H5"]
    assert constant.kind == constant.site == pytest.approx(2 / 3)
    assert scores.by_group(table).site.tolist() == [2, 0]
    assert scores.confusion(table).loc[OVERRIDDEN].to_dict() == {NOT_RETRIEVED: 1}
    beside = scores.against(table.assign(**{"dynamic alone: kind": True})).set_index("rule")
    assert beside.loc["dynamic alone", ["only it", "only joined", "p"]].tolist() == [0, 0, 1.0], "its site counts too"
    beside = scores.against(table.assign(**{"chapter 2: kind": True, "chapter 2: site": True})).set_index("rule")
    assert beside.loc["chapter 2", ["only it", "only joined", "p"]].tolist() == [1, 0, 1.0]
    repaired = scores.repairs(table).set_index(["planted", "trained layer"]).repaired
    assert repaired[OVERRIDDEN, "named"] == 0
    assert repaired[NOT_RETRIEVED, "named"] == 2 * (run["repair named: told"] == run["untold"])
