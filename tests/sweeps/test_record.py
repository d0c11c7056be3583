"""The record: what is written is read, what was changed is refused or found out, and what a build does again."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
from typer.testing import CliRunner

from lib.__main__ import app
from lib.errors import SweepError
from lib.results import Results
from lib.sweeps import experiments, kept_sinks, record, runs, spot
from lib.sweeps.specification import Tolerance
from tests.sweeps.test_runs import _study, here, spec  # noqa: F401

GRID = spec(grid={"layer": [3, 11], "scale": [0.5, 2.0]})


@pytest.fixture
def kept(tmp_path, here, monkeypatch):  # noqa: F811
    """A recorded sweep, in a place of its own, that is all that is recorded; its table's path."""
    monkeypatch.setattr(record, "FOLDER", tmp_path / "record")
    monkeypatch.setattr(spot, "BUILD", tmp_path / "build")
    monkeypatch.setattr(runs, "BUILD", tmp_path / "build")
    monkeypatch.setattr(spot, "recordable", lambda name, names=(): [] if names else [GRID])
    monkeypatch.delenv("RECORD", raising=False)
    spot.make("organism")
    here.clear()
    return record.path_of(GRID)


def altered(path, change) -> None:
    """The table after a change, with a header that vouches for it."""
    table, header = change(path.read_text()), json.loads(path.with_suffix(".json").read_text())
    path.write_text(table)
    header["sha256"] = hashlib.sha256(table.encode()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(header))


def test_chapters_read_what_was_recorded_and_run_nothing(kept, here, organism, monkeypatch, capsys):  # noqa: F811
    report = Results("x", organism)
    [table] = record.tables(report, [GRID])
    [timed] = record.tables(report, [GRID], timing=True)
    assert not here and (timed.seconds > 0).all()
    note = report.provenance["sweeps"]["organism/s"]
    assert note["runs"] == 4 and len(note["date"]) == 10
    pd.testing.assert_frame_equal(record.recorded(report, GRID), table, check_exact=True)
    assert record.recorded(report, GRID.model_copy(update={"name": "other"})).empty
    monkeypatch.setenv("RECORD", "off")
    assert record.recorded(report, GRID).empty
    [live] = record.tables(report, [GRID])
    assert report.provenance["sweeps"]["organism/s"] == {"runs": 4}
    pd.testing.assert_frame_equal(live, table, check_exact=True)
    assert capsys.readouterr().out == "", "a page shows what a chapter prints"


def test_of_a_longer_specification_only_what_is_missing_is_done(kept, here, monkeypatch):  # noqa: F811
    before, header = kept.read_text().splitlines(), json.loads(kept.with_suffix(".json").read_text())
    kept.with_suffix(".json").write_text(
        json.dumps(header | {"commit": "a" * 40, "code": {"lib/old.py": "0"}, "processor": "old"})
    )
    longer = GRID.model_copy(update={"grid": {"layer": [3, 11, 5], "scale": [0.5, 2.0]}})
    monkeypatch.setattr(spot, "recordable", lambda name, names=(): [longer])
    monkeypatch.setattr(runs, "BUILD", kept.parent / "elsewhere")  # nothing is left of the runs but their record
    with pytest.raises(SweepError, match="lacks 2 runs of the specification"):
        record.read(longer)
    spot.make("organism", missing=True)
    assert [run["layer"] for run in here] == [5, 5]
    found, text = record.read(longer).header, kept.read_text().splitlines()
    assert text[:5] == before and len(text) == 7
    assert (
        found.processor.startswith("old and ")
        and found.code == {"lib/old.py": "0"}
        and found.commit.startswith(f"{'a' * 40}; 2 more by ")
    )
    monkeypatch.setattr(spot, "recordable", lambda name, names=(): [GRID])
    with pytest.raises(SweepError, match="has 2 others"):
        spot.make("organism", missing=True)


def test_results_of_another_version_are_set_aside_by_a_record(kept, here):  # noqa: F811
    header = runs.default_store(GRID) / "sweep.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"code": {"lib/old.py": "1"}}))
    spot.make("organism")
    assert len(here) == 4


def test_with_the_repairs_the_sinks_are_kept_too(kept, here, monkeypatch):  # noqa: F811
    trained = []

    keep = lambda model, table, missing: trained.append((model.name, len(table), missing))  # noqa: E731
    monkeypatch.setattr(kept_sinks, "keep", keep)
    spot.make("organism")
    assert not trained, "only with that sweep"
    repairs = GRID.model_copy(update={"name": "repairs"})
    monkeypatch.setattr(spot, "recordable", lambda name, names=(): [repairs])
    for missing in (False, True):
        spot.make("organism", missing=missing)
    assert trained == [("organism", 4, False), ("organism", 4, True)]


def test_values_of_every_kind_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    results = [
        {"text": 'a, "b"', "none": None, "list": [1.5, [True, "x"]], "float": 0.1 + 0.2, "mixed": "2"},
        {"text": "é", "float": 1.0, "mixed": 2, "line": "one\ntwo", "empty": ""},
    ]
    wanted = spec(seeds=[0, 1])
    planned = runs.plan(wanted, tmp_path / "store")
    planned.store.begin(planned.header)
    for run, result in zip(planned.runs, results, strict=True):
        planned.store.write(run.key, {"parameters": run.parameters, "result": result, "seconds": 2.0})
    record.write(planned, "by hand")
    assert [row["result"] for row in record.read(wanted).rows] == results
    text = record.path_of(wanted).read_bytes()
    record.path_of(wanted).write_bytes(text.replace(b"\n", b"\r\n"))
    assert [row["result"] for row in record.read(wanted).rows] == results, "line ends of another system"
    key = planned.runs[0].key
    planned.store.write(key, {"parameters": planned.runs[0].parameters, "result": {"x": float("nan")}, "seconds": 1.0})
    with pytest.raises(SweepError, match="a run of s gave what no record holds"):
        record.write(planned, "by hand")
    assert record.path_of(wanted).read_bytes().startswith(b"layer"), "nothing is half-written"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.replace("margin", "margins", 1), "it has no column margin"),
        (lambda t: t + t.splitlines()[1] + "\n", "line 6 is a run that stands before it already"),
        (lambda t: "\n".join(t.splitlines()[:-1]) + "\n", "it has 3 runs, not 4"),
        (lambda t: t.replace(",8,", ",NaN,", 1), "line 2 cannot be read .NaN is no number"),
        (lambda t: t[: len(t) - 9], "line 5 cannot be read"),
        (lambda t: t.replace("11,v_only", "12,v_only", 1), "lacks 1 runs of the specification, and has 1 others"),
    ],
)
def test_a_table_that_is_none_is_refused(kept, change, message):
    altered(kept, change)
    with pytest.raises(SweepError, match=rf"s\.csv .*{message}.*`python -m lib record s --model organism` renews it"):
        record.read(GRID)


def test_a_record_of_something_else_is_refused(kept, monkeypatch):
    header = json.loads(kept.with_suffix(".json").read_text())
    for key, value, message in [
        ("model", "smollm2", "was made of the model smollm2, not organism"),
        ("weights_sha256", "0" * 64, r"was made with weights 0{12}\.\.\., not "),
        ("data", header["data"] | {"templates.yaml": "0"}, r"was made of other data \(templates\.yaml\)"),
        ("runs", "4", "the header: runs: Input should be a valid integer"),
        ("sha256", "0" * 64, "it is not as it was written"),
    ]:
        kept.with_suffix(".json").write_text(json.dumps(header | {key: value}))
        with pytest.raises(
            SweepError, match=message + ".*renews it; with RECORD=off in the environment the runs are done here"
        ):
            record.read(GRID)
    kept.with_suffix(".json").write_text("{")
    with pytest.raises(SweepError, match="is no record"):
        record.read(GRID)
    kept.with_suffix(".json").unlink()
    with pytest.raises(SweepError, match=r"there is no record .*s on organism: 4 runs, 4 finished"):
        record.read(GRID)


def test_a_build_does_two_runs_again_and_keeps_them(kept, here, monkeypatch):  # noqa: F811
    [check] = spot.spot_check("organism")
    assert len(here) == len(check.again) == spot.DRAWN and not check.wrong and not check.outdated
    monkeypatch.setattr(spot, "commit", lambda: "another")
    assert spot.spot_check("organism") == [check] and len(here) == 2, "the code is the same"
    assert len(spot.spot_check("organism", whole=True)[0].again) == 4, "those that made the record count"
    assert len(here) == 2


def test_the_commit_draws_and_every_run_may_come(kept):
    recorded = record.read(GRID)
    drawn = [json.dumps([row["parameters"] for row in spot.draw(recorded, str(i))]) for i in range(200)]
    assert drawn[0] == json.dumps([row["parameters"] for row in spot.draw(recorded, "0")])
    assert all(any(json.dumps(row["parameters"]) in text for text in drawn) for row in recorded.rows)


def test_an_expensive_run_is_drawn_rarely_however_long_all_of_them_take(kept):
    recorded = record.read(GRID)
    rows = [row | {"seconds": 100.0 * (i + 1)} for i, row in enumerate(recorded.rows)]
    draws = [spot.draw(replace(recorded, rows=rows), str(i)) for i in range(2000)]
    first, weights = Counter(rows.index(drawn[0]) for drawn in draws), [1, 2**-5, 3**-5, 4**-5]
    assert [first[i] / 2000 for i in range(4)] == pytest.approx([w / sum(weights) for w in weights], abs=0.04)
    assert all(len(drawn) == spot.DRAWN and drawn[0] != drawn[1] for drawn in draws)


def test_a_cell_that_was_edited_is_found_out(kept, here, monkeypatch):  # noqa: F811
    [row, *_] = [row for row in record.read(GRID).rows if row["parameters"]["layer"] == 3]
    margin = row["result"]["margin"]
    monkeypatch.setattr(spot, "DRAWN", 4)
    altered(kept, lambda text: text.replace(repr(margin), repr(margin + 0.1)))
    with pytest.raises(SweepError, match=rf"s, layer=3, .*: margin: recorded {margin + 0.1}, now {margin}") as error:
        spot.spot_check("organism")
    assert "renew the record (`python -m lib record --model organism`)" in str(error.value)


def test_changed_code_is_checked_anew_and_named(kept, here, monkeypatch):  # noqa: F811
    spot.spot_check("organism")
    changed = runs.code("told.told_under") | {"lib/studies/other.py": "1"}
    monkeypatch.setattr(runs, "code", lambda name: changed)
    monkeypatch.setattr(spot, "meaning", lambda name: {**record.meaning(name), "lib/studies/other.py": "1"})
    [pair] = spot.kept("organism")
    with pytest.raises(SweepError, match=r"no runs of the record of s were done again .* spot-check --model organism"):
        spot.check(*pair)
    said: list[str] = []
    spot.spot_check("organism", say=said.append)
    assert len(here) == 4
    assert any("recorded by another version of lib/studies/other.py; `python -m lib record" in line for line in said)


def test_a_comment_is_no_other_version():
    plain = "def f(x):\n    return x + 1"
    told = '"""Room."""\n\ndef f(x):  # adds\n    """Adds."""\n    return x+1\n'
    assert experiments._meaning(plain) == experiments._meaning(told) != experiments._meaning(plain + "0")


@pytest.mark.parametrize(
    "was, now, same",
    [
        (1, 1, True), (1, 2, False), (1.0, 1.0015, True), (1.0, 1.01, False), (100.0, 100.09, True), ("a", "b", False),
        (True, False, False), (True, 1, True), (None, 0.0, False), ([1.0, 2.0], [1.0, 2.0, 3.0], True),
        ([1.0], [1.0, 2.0, 3.0], False), ({"a": [1]}, {"a": [2]}, False), ({"a": 1}, {"b": 1}, False),
    ],
)  # fmt: skip
def test_what_counts_as_the_same(was, now, same):
    tolerance = Tolerance(lengths=1, columns={"n": 2})
    assert (record.differences({"x": was}, {"x": now}, tolerance) == []) == same
    assert record.differences({"n": 3}, {"n": 5}, tolerance) == []
    assert record.differences({"n": 3}, {"n": 6}, tolerance) == ["n: recorded 3, now 6"]
    counts = Tolerance(counts=2, columns={"*_n": 0})
    assert record.differences({"told": 3, "told_n": 8}, {"told": 5, "told_n": 9}, counts) == [
        "told_n: recorded 8, now 9"
    ]
    assert record.differences({"x": 1}, {}, tolerance) == ["x: recorded 1, now null"]


def test_what_is_recorded_of_a_model():
    assert {s.name for s in spot.recordable("organism")} - {s.name for s in spot.recordable("smollm2")} == {"planted"}
    assert all(s.model == "gpt2" for s in spot.recordable("gpt2"))
    done = CliRunner().invoke(app, ["record", "layer", "--model", "organism"])
    assert "there is no sweep 'layer' to record of organism; choose from layers, mended" in str(done.exception)


def test_what_is_looser_for_some_runs_is_so_for_these_alone():
    tolerance = Tolerance(counts=1, columns={"*d": 0, "bled": 1}, looser={"variant=random": {"bled": 6}})
    for variant, wrong in (("random", []), ("true", ["bled: recorded 1, now 7"])):
        room = tolerance.for_run({"variant": variant, "seed": 0})
        assert record.differences({"bled": 1, "told": 3}, {"bled": 7, "told": 3}, room) == wrong
        assert record.differences({"told": 3}, {"told": 4}, room), "all else is held as before"
