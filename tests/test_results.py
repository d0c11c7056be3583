"""A number is reported once, with its provenance, and written in one step."""

import json

import numpy as np
import pytest
import torch

from lib import files, results
from lib.errors import ChapterError
from lib.results import Results
from lib.sites import Site


@pytest.fixture
def report(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "BUILD", tmp_path / "_build")
    return Results("09_example", tiny, seed=3)


def test_file_has_provenance_and_values(report, tmp_path):
    report("share", torch.tensor(0.25), ".0%")
    report("site", Site(9, 8))
    report.table("cases", {"a": np.float32(1.5), "b": [np.int64(2), None]})
    path = report.save()
    assert path == tmp_path / "_build" / "results" / "tiny" / "09_example.json"
    content = json.loads(path.read_text())
    assert content["values"] == {"share": 0.25, "site": "L10 H8", "cases": {"a": 1.5, "b": [2, None]}}
    wanted = {"model", "weights_sha256", "lib", "commit", "packages", "seed", "threads", "start", "seconds"}
    assert wanted <= set(content["provenance"]) and content["provenance"]["seed"] == 3


def test_a_number_is_reported_once(report):
    report("n", 8)
    for repeat in (lambda: report("n", 9), lambda: report.table("n", {}), lambda: report.many({"m": 1, "n": 9})):
        with pytest.raises(KeyError, match="reported twice in 09_example"):
            repeat()


def test_many_numbers_at_once(report, monkeypatch):
    texts = {}
    monkeypatch.setattr(results, "_glue", texts.__setitem__)
    report.many({"n": 8, "share": (0.25, ".0%"), "ends": (0.5, 1.5), "interval": ((-0.1, 0.2), "+.2f")})
    assert report.values == {"n": 8, "share": 0.25, "ends": [0.5, 1.5], "interval": [-0.1, 0.2]}
    assert texts == {"n": "8", "share": "25%", "ends": "0.5 to 1.5", "interval": "-0.10 to +0.20"}


def test_texts():
    assert results.as_text([0.1, 0.25], ".2f") == "0.10, 0.25"
    assert results.as_text(0.5, ".0%") == "50%"
    assert results.as_text((-0.1, 0.25), "+.2f") == "-0.10 to +0.25"
    assert results.as_text(("L1 H0", "L2 H3"), "") == "L1 H0, L2 H3"


def test_nothing_is_written_where_nothing_can_be(report, tmp_path):
    (tmp_path / "_build").write_text("a file where the folder should be")
    with pytest.raises(ChapterError, match=r"cannot write .*make .*_build.* a folder"):
        report.save()
    assert list(tmp_path.iterdir()) == [tmp_path / "_build"]


def test_model_names_become_folders():
    assert files.slug("openai-community/gpt2") == "openai-community-gpt2"
    assert "/" not in files.slug("../../etc")
