"""Results of other models, kept beside their record: what is kept, what is shown, and what is refused."""

import json

import pytest

from lib.checkpoints.named import SPECS
from lib.errors import ChapterError
from lib.press import beside, boxes

CHAPTER = "02_knowledge_path"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Results of one chapter of gemma3, in a record of its own."""
    monkeypatch.setattr(beside, "FOLDER", tmp_path)
    folder = beside.folder_of("gemma3")
    folder.mkdir(parents=True)
    run = {"provenance": {"weights_sha256": SPECS["gemma3"].sha256}, "values": {"told": 1}}
    (folder / f"{CHAPTER}.json").write_text(json.dumps(run))
    return folder


def test_what_is_kept_of_other_models_is_read(kept):
    (other,) = beside.others("smollm2")
    assert other.name == "gemma3" and boxes.by_number(other.runs) == {"c2": {"told": 1}} and other.pictures == []
    assert beside.others("gemma3") == []
    assert {j.verdict for j in other.judged()} == {"not run"}


def test_results_of_other_weights_and_what_is_no_result_are_refused(kept):
    path = kept / f"{CHAPTER}.json"
    path.write_text(path.read_text().replace(SPECS["gemma3"].sha256, "0" * 64))
    with pytest.raises(ChapterError, match=r"weights 000000000000.*python -m lib keep --model gemma3"):
        beside.others("smollm2")
    path.write_text(path.read_text()[:20])
    with pytest.raises(ChapterError, match="is no results file"):
        beside.others("smollm2")


def test_only_a_named_model_with_current_chapters_is_kept(kept, monkeypatch, tmp_path):
    with pytest.raises(ChapterError, match="has no name"):
        beside.keep("somebody/model")
    monkeypatch.setattr(beside, "is_current", lambda *_: False)
    with pytest.raises(ChapterError, match="no chapter is current on organism"):
        beside.keep("organism")
    assert (kept / f"{CHAPTER}.json").is_file()


def test_current_chapters_are_kept_with_their_pictures_in_place_of_older_ones(kept, monkeypatch, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / f"{CHAPTER}.json").write_text("{}")
    (results / "landing.png").write_bytes(b"picture")
    monkeypatch.setattr(beside, "is_current", lambda model_name, chapter, *_: chapter == CHAPTER)
    monkeypatch.setattr(beside, "results_path", lambda model_name, chapter: results / f"{chapter}.json")
    folder = beside.keep("organism", say=lambda _: None)
    assert {p.name for p in folder.iterdir()} == {f"{CHAPTER}.json", "landing.png"}


def test_the_page_says_so_where_nothing_is_kept():
    page = "{% for o in others %}{{ o.name }}{% else %}none of {{ here.c2.told }}{% endfor %}"
    assert boxes.two_models(page, "m", {CHAPTER: {"values": {"told": 3}}}, []) == "none of 3\n"
    with pytest.raises(ChapterError, match=r"two_models\.md needs a number"):
        boxes.two_models("{{ here.c3.told }}", "m", {}, [])
