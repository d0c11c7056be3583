"""The box at the head of a chapter, and the landing page."""

from types import SimpleNamespace

import nbformat
import pytest

from lib.errors import ChapterError
from lib.files import ROOT
from lib.press import boxes
from lib.press.texts import fill

RUN = {"provenance": {"seconds": 130.0}, "values": {"told": 2}}
SVG = "<svg xmlns='http://www.w3.org/2000/svg'/>"
JUDGED = [
    SimpleNamespace(claim=SimpleNamespace(chapter=chapter, kind=kind), verdict=verdict)
    for chapter, kind, verdict in (
        ("02_x", "empirical", "differs"),
        ("03_y", "empirical", "reproduced"),
        ("02_x", "arithmetic", "not run"),
        ("02_x", "empirical", "differs"),
    )
]
ENTRY = {
    "short": "s",
    "figure": "fig-a",
    "after": ["01_w"],
    "refute": "none.",
    "answer": "{% if v.told %}Of it {{ v.told }}.{% else %}Nothing fails.{% endif %}",
}


@pytest.fixture
def staged(tmp_path, monkeypatch):
    monkeypatch.setattr(boxes, "entries", lambda name: {"02_x": ENTRY})
    figure = {"figure": {"name": "fig-a", "caption": "c"}, "image": {"alt": "a [line]"}}
    output = nbformat.v4.new_output("execute_result", {"image/svg+xml": SVG}, execution_count=1)
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\n**Question.** Where?\n\nThen " + "word " * 400),
        nbformat.v4.new_code_cell("x", metadata={"mystnb": figure}, outputs=[output]),
    ]
    answer = {"mystnb": {"code_prompt_show": "Answer"}}  # a fold is no figure to look at
    cells += [nbformat.v4.new_code_cell("x", metadata=answer) for _ in range(3)]
    folded = {"mystnb": figure, "tags": ["hide-cell"]}  # nor is a folded figure read
    cells += [nbformat.v4.new_code_cell("x", metadata=folded) for _ in range(3)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "02_x.ipynb")
    return tmp_path / "02_x.ipynb"


def first_cell(notebook) -> str:
    return nbformat.read(notebook, as_version=4).cells[0].source


def test_the_box_stands_where_the_question_was_and_says_all(staged):
    boxes.add_box(staged, "m", RUN, JUDGED)
    title, box, rest = first_cell(staged).partition(":::{admonition}")[0], *first_cell(staged).split(":::")[1:3]
    assert title.startswith("# Title") and rest.strip().startswith("Then word")
    for text in ("Where?", "Of it 2.", "1, 4 differ; 3 not run", "none.", "2 to read, 2 to run", "`m`", "<01_w>"):
        assert text in box, text
    assert r"[![a \[line\]](key_02_x.svg)](#fig-a)" in box
    assert staged.with_name("key_02_x.svg").read_text() == SVG
    nbformat.validate(nbformat.read(staged, as_version=4))


def test_a_run_without_a_failure_says_so(staged):
    boxes.add_box(staged, "m", RUN | {"values": {"told": 0}}, [])
    assert "Nothing fails." in first_cell(staged) and "Claims" not in first_cell(staged)


def test_a_number_that_was_not_reported_is_refused(staged):
    with pytest.raises(ChapterError, match=r"02_x.*told"):
        boxes.add_box(staged, "m", RUN | {"values": {}}, [])


def test_a_chapter_without_an_answer_has_a_box_and_one_without_a_question_none(staged, monkeypatch):
    monkeypatch.setattr(boxes, "entries", lambda name: {})
    boxes.add_box(staged, "m", RUN, [])
    assert "Where?" in first_cell(staged) and "Answer" not in first_cell(staged)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")]), staged)
    boxes.add_box(staged, "m", RUN, [])
    assert first_cell(staged) == "# Title"


@pytest.fixture
def land(staged, monkeypatch):
    monkeypatch.setattr(boxes, "executed_path", lambda model_name, name: staged)
    monkeypatch.setattr(boxes, "results_path", lambda model_name, name: staged.with_name("results.json"))
    return lambda page, run=RUN: boxes.landing(page, "m", {"02_x": run}, JUDGED)


def test_the_landing_page_has_numbers_intervals_verdicts_and_minutes(land):
    assert land("{{ c2.told }} {{ counted(2, 8) }} {{ minutes | format('.1f') }}") == "2 2 of 8 (3% to 65%) 2.2\n"
    assert land("{{ claims.m.values() | map(attribute='differs') | join(' ') }}") == "2 0\n"
    assert land("{% for c in chapters %}{{ c.number }} {{ c.reading }} {{ c.after[0] }}{% endfor %}") == "2 2 01_w\n"
    with pytest.raises(ChapterError, match="other"):
        land("{{ c2.other }}")


def test_the_landing_page_of_a_model_without_a_failure_says_so_and_shows_no_finding(land):
    """The book's own page; without chapter 1's numbers nothing stands in the others' place."""
    none = {"no_failure": "8 of 8 facts are *told*.", "countries_scored": 3, "source": "s", "heads": 4}
    page = (ROOT / "book" / "index.md").read_text(encoding="utf-8").replace("c1.", "c2.")
    text = land(page, {"provenance": {"seconds": 60.0}, "values": none})
    assert r"**There is no failure to study on `m`.** 8 of 8 facts are \*told\*." in text
    assert "What was found" not in text and "## The claims" in text and "## Limits" in text
    with pytest.raises(ChapterError, match="needs a number that no chapter reported"):
        land(page, {"provenance": {"seconds": 60.0}, "values": {"heads": 4}})


def test_the_second_panel_appears_with_its_picture(land, staged):
    page = "{% if panel('landing') and c2.landing is defined %}![]({{ c2.landing }}){% endif %}"
    with_words = RUN | {"values": {"landing": "carries over"}}
    assert "carries" not in land(page, with_words)
    staged.with_name("landing.png").write_bytes(b"")
    assert "carries over" in land(page, with_words) and "carries" not in land(page)


def side(cause: str) -> dict[str, dict]:
    judged = [
        {"case": 1, "pathway": p, "facts": f, "parameters": n, "middle": k, "untold": 19, "low": 0.1, "high": 0.5}
        for p, f, n, k in (("v_only", "eight", 110592, 1), ("full", "eight", 3540096, 2), ("sink_token", "fit", 576, 9))
    ] + [
        {"case": 1, "pathway": "sink_kv", "facts": "eight", "parameters": 11520, "middle": 11, "untold": 19}
        | {"low": 0.2, "high": 0.8}
    ]
    diagnosis = {"a": {"knowledge_head": "L24 H4", "failure_kind": "overridden", "suppressor": "L30 MLP"}}
    return {"c2": {"causes": [{"case": "a", "title": "a | b", "cause": cause}], "diagnosis": diagnosis}} | {
        "c8": {"judged": judged, "cause_1_pathway": "sink_kv", "place_1_pathway": "v_only"}
    }


def test_two_prescriptions_stand_side_by_side_and_the_chosen_pathway_is_not_chosen_by_what_is_shown():
    sides = {"m": side("first position"), "n": side("none found"), "none": {"c2": {}, "c8": {}}}
    page = fill("prescriptions.md", sides=sides)
    first, second = page.strip().splitlines()[2:]
    cells = [c.strip() for c in first.replace(r"\|", "/").split("|")[1:-1]]
    assert cells[:3] == ["m", "a / b", "L24 H4, overridden by L30 MLP"] and cells[4] == "first position"
    assert cells[3] == "v only, 110,592 numbers: **1 of 19** (10% to 50%)"  # full repairs more of those shown
    assert cells[5] == "sink kv, 11,520 numbers: **11 of 19** (20% to 80%)"
    assert second.startswith("| n |") and "none found" in second
