"""Results of other models, kept beside their record: what is kept, what is shown, and what is refused."""

import json

import pytest

from lib.checkpoints.named import SPECS
from lib.errors import ChapterError
from lib.files import ROOT
from lib.press import beside, boxes, build
from lib.press.execute import chapter_names

CHAPTER = "02_knowledge_path"
RUN = {
    "provenance": {"model": "gemma3", "weights_sha256": SPECS["gemma3"].sha256, "lib": "0", "seed": 0},
    "values": {"told": 1},
}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Results of one chapter of gemma3, in a record of its own."""
    monkeypatch.setattr(beside, "FOLDER", tmp_path / "record")
    folder = beside.folder_of("gemma3")
    folder.mkdir(parents=True)
    (folder / f"{CHAPTER}.json").write_text(json.dumps(RUN))
    return folder


def test_what_is_kept_of_other_models_is_read(kept):
    (other,) = beside.others("smollm2")
    assert other.name == "gemma3" and boxes.by_number(other.runs) == {"c2": {"told": 1}} and other.pictures == []
    assert beside.others("gemma3") == []
    assert {j.verdict for j in other.judged} == {"not run"}


def test_results_of_other_weights_and_what_is_no_result_are_refused(kept):
    path = kept / f"{CHAPTER}.json"
    path.write_text(path.read_text().replace(SPECS["gemma3"].sha256, "0" * 64))
    with pytest.raises(ChapterError, match=r"made by gemma3 \(000000000000.*then `python -m lib keep`"):
        beside.others("smollm2")
    path.write_text(path.read_text()[:20])
    with pytest.raises(ChapterError, match="is no results file"):
        beside.others("smollm2")


def test_only_a_named_model_whose_chapters_are_all_current_is_kept(kept, monkeypatch):
    with pytest.raises(ChapterError, match="has no name"):
        beside.keep("somebody/model")
    monkeypatch.setattr(beside, "is_current", lambda model_name, chapter, *_: chapter != CHAPTER)
    with pytest.raises(ChapterError, match=f"inputs changed: {CHAPTER}. Run"):
        beside.keep("organism")
    assert (kept / f"{CHAPTER}.json").is_file()


def test_a_whole_run_is_kept_with_its_pictures_in_place_of_an_older_one(kept, monkeypatch, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for chapter in chapter_names():
        (results / f"{chapter}.json").write_text("{}")
    (results / "landing.png").write_bytes(b"picture")
    monkeypatch.setattr(beside, "is_current", lambda *_: True)
    monkeypatch.setattr(beside, "results_path", lambda model_name, chapter: results / f"{chapter}.json")
    beside.folder_of("organism").mkdir(parents=True)
    (beside.folder_of("organism") / "older.json").touch()
    folder = beside.keep("organism", say=lambda _: None)
    assert {p.name for p in folder.iterdir()} == {f"{c}.json" for c in chapter_names()} | {"landing.png"}
    assert [p.name for p in folder.parent.iterdir()] == ["chapters"]


def test_the_page_stands_in_the_book_only_beside_another_model(kept, tmp_path):
    stage = tmp_path / "stage"
    (stage / "book").mkdir(parents=True)
    page, contents = stage / "book" / "two_models.md", stage / "_toc.yml"
    page.write_text("{% for o in others %}{{ o.name }} {{ by_number(o.runs).c2.told }} {{ here.c2.told }}{% endfor %}")
    contents.write_text((ROOT / "_toc.yml").read_text())
    here = {CHAPTER: {"values": {"told": 3}}}
    (kept / "landing.png").write_bytes(b"picture")
    build._stage_beside("m", stage, here, beside.others("m"))
    assert page.read_text() == "gemma3 1 3\n" and (stage / "book" / "gemma3_landing.png").is_file()
    page.write_text("{{ here.c3.told }}")
    with pytest.raises(ChapterError, match=r"two_models\.md needs a number"):
        build._stage_beside("m", stage, here, beside.others("m"))
    assert "two_models" in contents.read_text()
    build._stage_beside("m", stage, here, [])
    assert not page.exists() and "two_models" not in contents.read_text()
