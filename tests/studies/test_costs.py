"""The benchmark can fail, and its record is read back as it was written."""

import json
import time

import pandas as pd
import pytest
import torch
from typer import BadParameter

from lib import diagnosis, files
from lib.errors import DataError
from lib.results import Results
from lib.show import figures, tables
from lib.studies import costs
from tests.bench import book, measure, rows
from tests.bench.__main__ import bench, with_rows_replaced
from tests.bench.measure import Row

ONE, SQUARE = torch.ones(3), torch.ones(8, 8)


def row(**changes) -> Row:
    """One product of matrices beside ten and a long sleep."""
    given = {"name": "sum", "what": "three ones", "peer_name": "a slow way", "tolerance": 1e-6, "rounds": 2}
    given |= {"ours": lambda: _products(1, 0.005), "peer": lambda: _products(10, 0.1)}
    return Row(**given | {"same": measure.largest} | changes)


def _products(n: int, seconds: float) -> torch.Tensor:
    time.sleep(seconds)
    return [ONE, *(SQUARE @ SQUARE for _ in range(n))][0]


def test_a_ratio_is_that_of_the_times():
    found = measure.run(row(), matmul=1e9)
    assert 4 < found["least"] <= found["ratio"] <= found["most"] < 25 and found["met"] is True
    assert found["difference"] == 0 and found["gflop"] == 2 * 8**3 / 1e9
    assert (found["bound"], found["goal"]) == (10, 8), "ten times fewer operations, and four fifths of that"


def test_results_that_differ_are_an_error():
    with pytest.raises(AssertionError, match=r"sum: results differ by 0\.5, allowed 1e-06"):
        measure.run(row(peer=lambda: 2 * ONE), matmul=1e9)


def test_a_missed_goal_is_said():
    assert measure.run(row(share=5.0), matmul=1e9)["met"] is False
    assert measure.run(row(share=None, seconds=1e-6), matmul=1e9)["met"] is False
    assert measure.run(row(share=None), matmul=1e9)["met"] is None
    found = measure.run(row(ours=lambda: ONE), matmul=1e9)
    assert found["bound"] is found["goal"] is found["met"] is None, "nothing was multiplied"


def test_the_times_of_a_build_are_read_from_its_results(tmp_path):
    """A table by hand: two builds, one of them too slow, and a chapter."""
    (tmp_path / "01_a.json").write_text('{"provenance": {"seconds": 12.5, "peak_mb": 800}, "values": {}}')
    rows = [book.row("cold", 481.0, 480), book.row("warm", 15.0, 15), *book.chapters(tmp_path)]
    table = tables.arranged("costs_builds", costs.builds({"book": rows}))
    assert table.index.tolist() == ["cold", "warm", "01_a"]
    assert table.to_dict("list") == {
        "seconds": ["481", "15", "12"],
        "goal": ["480", "15", ""],
        "met": ["no", "yes", ""],
        "MB": ["", "", "800"],
    }
    assert tables.arranged("costs_builds", costs.builds({})).index.tolist() == ["not measured"]


def test_a_sample_stands_for_the_whole():
    found = measure.run(row(peer_of=0.1), matmul=1e9)
    assert 0.95 < found["peer_s"] < 2


def test_operations_and_memory_are_those_of_the_work():
    a = torch.randn(64, 32)
    assert measure.count(lambda: (a @ a.T).shape) == ((64, 64), 2 * 64 * 32 * 64)
    _, grown = measure.timed(lambda: torch.ones(8_000_000))
    assert grown is None or 25 < grown < 60, "32 MB"


@pytest.mark.parametrize("text", [None, "", "[]", '{"rows": []}'])
def test_what_is_no_record(tmp_path, monkeypatch, text):
    monkeypatch.setattr(costs, "DATA", tmp_path)
    if text is not None:
        (tmp_path / "bench-gemma3.json").write_text(text)
    with pytest.raises(DataError, match=r"bench-gemma3.json is no record.*tests.bench --model gemma3 --record"):
        costs.load_record("gemma3")


def test_records_are_outside_what_numbers_depend_on_but_for_the_chapter_that_shows_them():
    records = {costs.path_of(name) for name in costs.MODELS}
    assert all(path.is_file() for path in records) and len(records) == 2
    assert records <= {*files.modules(["studies/costs"], files.ROOT)} and not records & {*files.data_files(files.ROOT)}


def test_records_are_told_as_they_are(tmp_path, monkeypatch, organism):
    one, other = measure.run(row(), matmul=1e9), measure.run(row(share=9.0, name="other"), matmul=1e9)
    points = [{"grows": "prompts", "at": n, "trace_s": 0.1 * n, "forward_s": 0.05 * n} for n in (1, 4)]
    sizes = [{"shape": "a", "parameters": 9}, {"shape": "b", "precision": "bfloat16", "seconds": 1.0, "peak_gb": 3.0}]
    record = {"machine": {"processor": "p", "cores": 2, "threads": 2}, "commit": "c", "started": "s"}
    record |= {"rows": [one, other], "growth": points, "sizes": sizes, "matmul_gflops": 100.0}
    monkeypatch.setattr(costs, "DATA", tmp_path)
    second = record | {"rows": [one], "growth": [], "sizes": [], "started": "later", "load": 3.21}
    for name, content in (("smollm2", record), ("gemma3", second)):
        costs.path_of(name).write_text(json.dumps(content))
    records, report = {name: costs.load_record(name) for name in costs.MODELS}, Results("09_what_it_costs", organism)
    table, points, _ = costs.tables(records)
    costs.report_costs(report, records, table, points)
    assert table.model.tolist() == ["smollm2", "smollm2", "gemma3"]
    said = report.values
    assert (said["comparisons"], said["goals"], said["met"]) == (3, 3, 2)
    assert said["missed"].startswith("other of smollm2 beside a slow way: ") and "wanted 90 times" in said["missed"]
    first, other = said["runs"].split("All rows are of that run.")[:2]
    assert first.startswith("smollm2: s (UTC), p, 2 cores") and "load" not in first
    assert other.startswith(" gemma3: later (UTC)") and "a load of 3.2 at its start" in other
    drawn = figures.cost_ratios(table).axes[0]
    assert len(drawn.get_yticks()) == 2, "a line a peer, whatever the number of models"
    spreads = [lines.get_segments() for lines in drawn.collections if hasattr(lines, "get_segments")]
    assert [segments[0][0][1] for segments in spreads] == [-0.18, 0.18]
    assert (said["largest"], said["largest_precision"]) == ("b", "bfloat16")
    assert said["growth"] == "4 times the prompts take 4 times as long."


def test_rows_measured_again_take_the_place_of_their_own():
    record = {"started": "then", "rows": [{"row": n, "peer": "p", "ratio": 1} for n in ("a", "b")]}
    again = with_rows_replaced(record, [{"row": "b", "peer": "p", "ratio": 2, "started": "now"}])
    assert [(r["row"], r["ratio"]) for r in again["rows"]] == [("a", 1), ("b", 2)]
    assert costs.measured_again(record) == "All rows are of that run."
    assert costs.measured_again(again) == "Measured again later, with newer code: b now (UTC)."
    with pytest.raises(DataError, match="the record has no row b / other"):
        with_rows_replaced(record, [{"row": "b", "peer": "other"}])


def test_a_row_that_is_not_there_is_refused_before_anything_is_measured():
    with pytest.raises(BadParameter, match=r"there is no row 'nonsense'; choose from trace, .*, load"):
        bench(["load", "nonsense"])
    with pytest.raises(BadParameter, match="'organism' has no record; choose from smollm2, gemma3"):
        bench(["load"], model_name="organism")


def test_layers_that_stand_for_all_are_spread_over_them():
    assert rows.layers_of_peer(30) == [0, 10, 20, 29] and rows.layers_of_peer(18) == [0, 6, 12, 17]


def test_rows_are_of_the_layer_that_is_diagnosed_and_say_the_same_on_a_model_of_another_family(organism, case):
    """The organism's first case, at the layer that its diagnosis names."""
    assert rows.studied(organism) == (case, diagnosis.prescribe(organism, case).knowledge_head.layer)
    for row in (*rows.trace_rows(organism), *rows.static_rows(organism)):
        assert row.same(row.ours(), row.peer()) <= row.tolerance and row.seconds is None


def test_rows_of_before_are_judged_by_the_goals_of_now():
    """By hand: twice the operations, so four fifths of two; one row that knew, one of a goal of five."""
    new = {
        "row": "a",
        "peer": "p",
        "ratio": 1.7,
        "gflop": 1.0,
        "peer_gflop": 2.0,
        "goal": 1.8,
        "met": False,
        "bound": 2.0,
    }
    old = {k: v for k, v in new.items() if k != "bound"} | {"goal": 5}
    record = {"rows": [new, old, old | {"goal": None, "met": None}], "growth": [], "sizes": []}
    table = costs.tables({"smollm2": record})[0]
    assert table.goal[:2].tolist() == [1.8, 1.6] and table.met[:2].tolist() == [False, True]
    assert pd.isna(table.goal[2]) and pd.isna(table.met[2])
