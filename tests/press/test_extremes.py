"""A model that knows nothing and one that tells everything: that is a result, which pages state."""

import json

import pytest

from lib import diagnosis, facts, models, recall
from lib.press import execute
from tests import extremes


@pytest.fixture(scope="module", params=["random", "telling"])
def folder(request, tmp_path_factory, smollm2):
    return extremes.make(request.param, tmp_path_factory.mktemp("extremes") / request.param)


def test_chapters_about_a_failure_say_that_there_is_none(folder, tmp_path, monkeypatch):
    """Chapter 3 itself, in a kernel; chapter 4 needs its edits and is not executed. Nothing else is said of them."""
    model, case = models.load(str(folder)), facts.load_cases("any")[0]
    states = recall.known_and_told(diagnosis.case_table(model, case), case)
    share = {"random": 0, "telling": 8}[folder.name]
    assert (states.told.sum(), states.known.sum(), len(states)) == (share, share, 8)
    monkeypatch.setattr(execute, "BUILD", tmp_path)
    monkeypatch.setattr("lib.results.BUILD", tmp_path)
    said: list[str] = []
    execute.run(str(folder), ["03_four_pathways", "04_side_effects"], say=said.append)
    assert [line.split(" in ")[0].split(": ")[1] for line in said] == [f"executed on {folder}"] * 2
    for chapter in ("03_four_pathways", "04_side_effects"):
        values = json.loads(execute.results_path(str(folder), chapter).read_text())["values"]
        assert f"{share} of 8 facts are told and {share} known" in values["no_failure"]
        assert "There is no failure to study" in execute.executed_path(str(folder), chapter).read_text()
