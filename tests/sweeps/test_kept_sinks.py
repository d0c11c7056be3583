"""The sinks that are kept beside the record are those of its runs."""

import pandas as pd
import pytest

from lib import edits
from lib.facts import load_cases
from lib.studies.comparisons import sinks
from lib.sweeps import kept_sinks, load, record
from lib.sweeps.runs import frame


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "organism"])
def test_each_is_of_a_recorded_run(name):
    kept = record.read(load("repairs", model_name=name))
    rows = sinks(frame(kept.rows)).set_index("pathway")
    found = edits.load_all(kept_sinks.folder(name))
    assert set(found) == set(rows.index) != set()
    for pathway, edit in found.items():
        row = rows.loc[pathway]
        assert edit.base_sha256 == kept.header.weights_sha256
        assert (edit.recipe["rate"], edit.recipe["steps"], edit.seed) == (row.rate, row.steps, row.seed)
        assert (edit.parameters, sum(edit.told_after)) == (row.parameters, row.told)


@pytest.mark.parametrize("pathway", edits.SINKS)
def test_it_tells_what_the_run_told(organism, pathway):
    assert edits.verify(organism, kept_sinks.kept(organism)[pathway])["as recorded"].all()


def test_keeping_trains_by_the_row(organism, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_sinks, "FOLDER", tmp_path)
    assert kept_sinks.kept(organism) == {} and kept_sinks.keep(organism, pd.DataFrame()) == []
    row = {"case": 1, "facts": "eight", "variant": "true", "pathway": "sink_token", "parameters": 144}
    rows = [row | {"rate": 0.01, "steps": steps, "seed": seed} for steps, seed in ((2, 0), (2, 1), (0, 0))]
    (path,) = kept_sinks.keep(organism, pd.DataFrame(rows))
    edit = kept_sinks.kept(organism)["sink_token"]
    assert path == tmp_path / "organism" / "sinks" / "sink_token.safetensors"
    assert (edit.recipe["steps"], edit.seed, edit.base_sha256) == (2, 0, organism.weights_sha256)
    before = path.read_bytes()
    assert kept_sinks.keep(organism, pd.DataFrame(rows), missing=True) == [], "what is there stays"
    kept_sinks.keep(organism, pd.DataFrame(rows))
    assert path.read_bytes() == before, "the same row, the same file"


def test_on_a_case_of_ones_own_there_is_none(organism, monkeypatch):
    """The kept ones are of the book's first case: trained for another wording, they belong on no page of this one."""
    assert set(kept_sinks.kept(organism)) == set(edits.SINKS)
    monkeypatch.setattr(kept_sinks, "load_cases", lambda name: load_cases(name)[1:])
    assert kept_sinks.kept(organism) == {}
