"""The chapters as files: what stands in git, and what prose may say."""

import ast
import json
import re
import subprocess
from itertools import pairwise

import pytest

from lib.files import ROOT
from lib.press import boxes
from lib.press.execute import BOOK, chapter_names
from lib.press.texts import entries

PAPER = {"25.8", "149.9", "42.7", "42.6", "0.44", "7.1", "2.4", "4.7"}  # figures of the source page, quoted as such
HIDDEN = ("hide-input", "hide-cell", "remove-cell", "remove-input")
NOT_THE_WORD = r"in case\b|in (?:both|95 % of) cases|head to head|\btold of in full|in fact\b"


def notebook_cells(chapter: str, kind: str) -> list[dict]:
    nb = json.loads((BOOK / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in nb["cells"] if cell["cell_type"] == kind]


def cells(chapter: str, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook_cells(chapter, kind)]


def tagged(chapter: str, *tags: str) -> list[str]:
    """The code cells with one of some tags; all of them, if none is named."""
    code = notebook_cells(chapter, "code")
    return ["".join(c["source"]) for c in code if not tags or {*tags} & {*c["metadata"].get("tags", [])}]


def glossary_terms() -> list[str]:
    text = (BOOK / "glossary.md").read_text(encoding="utf-8")
    return re.findall(r"^(?![\s:])(.+)$", text[text.index(":sorted:") : text.rindex("```")], re.M)


def page_text(page: str) -> str:
    """What a reader meets, in its order: in a chapter the box comes after the question; Jinja's marks are not read."""
    if "." in page:
        return without_marks((BOOK / page).read_text(encoding="utf-8"))
    text, entry = "\n\n".join(cells(page, "markdown")), entries("boxes.yaml").get(page, {})
    question = boxes.QUESTION.search(text)
    box = without_marks(f"{entry.get('answer', '')}\n\n{entry.get('refute', '')}")
    return f"{text[: question.end()]}\n\n{box}\n\n{text[question.end() :]}"


def without_marks(text: str) -> str:
    return re.sub(r"(?s)\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", "", text)


def words_before_links(text: str, terms: list[str]) -> dict[str, str]:
    """The words of the glossary that a text uses before it links them, with the place. Headings, code, formulas,
    quotations and the texts of other links are not prose."""
    text = re.sub(r"(?ms)^#+ .*?$|^```bash$.*?^```$|^(?:```|:::).*?$|^:\w+:.*?$|\$[^$]+\$|\(\S+\)=", " ", text)
    text = re.sub(r"(\{[\w:]+\})?`[^`]*`", lambda role: role[0] if role[1] == "{term}" else " ", text)
    text = re.sub(r"\"[^\"]*\"|" + NOT_THE_WORD, " ", text)
    seen, gaps = set(), {}
    words = "|".join(re.escape(t) for t in sorted(terms, key=len, reverse=True))
    for found in re.finditer(rf"\{{term\}}`([^`<]*)(?:<([^>]*)>)?`|\b(?:{words})s?\b", text, re.I):
        if found[1] is not None:
            seen.add((found[2] or found[1]).strip().lower())
        else:
            term = found[0].lower()
            term = term if term in map(str.lower, terms) else term.removesuffix("s")
            if term not in seen:
                gaps.setdefault(term, text[max(0, found.start() - 40) : found.end() + 30].replace("\n", " "))
    return gaps


@pytest.fixture(params=chapter_names())
def chapter(request) -> str:
    return request.param


def test_no_outputs_in_git_and_one_parameters_cell(chapter):
    code = notebook_cells(chapter, "code")
    assert not any(c["outputs"] or c["execution_count"] for c in code)
    (parameters,) = (c for c in code if "parameters" in c["metadata"].get("tags", []))
    for statement in ast.parse("".join(parameters["source"])).body:
        assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)


def test_every_cell_has_a_name_of_its_own(chapter):
    names = [cell["id"] for kind in ("code", "markdown") for cell in notebook_cells(chapter, kind)]
    assert len(names) == len(set(names))


def test_chapters_define_nothing(chapter):
    for source in cells(chapter, "code"):
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.For | ast.While), source
        assert source.count("\n") < 26, "a long cell is a function that lib lacks"


def test_a_chapter_shows_how_it_is_done_in_a_few_lines_at_a_time(chapter):
    shown = {*tagged(chapter)} - {*tagged(chapter, *HIDDEN, "parameters", "try")}
    assert shown == {*tagged(chapter, "method")} and len(shown) >= 3
    for source in shown:
        assert source.count("\n") < 6 and not re.search(r"^(report|figures|tables)\b", source, re.M), source
        assert max(map(len, source.splitlines())) <= 88, source


def test_what_a_chapter_hides_is_no_longer_than_it_needs(chapter):
    """Numbers are reported together, and what is long is a function of lib."""
    for source in set(tagged(chapter, *HIDDEN)) - set(tagged(chapter, "remove-cell", "exercise")):
        calls = [re.match(r"(report)\(", ast.unparse(statement)) for statement in ast.parse(source).body]
        assert not any(one and other for one, other in pairwise(calls)), f"several numbers: report.many\n{source}"
        assert source.count("\n") < (22 if "import" in source else 16), source


def test_no_measured_decimal_is_typed_into_prose(chapter):
    for text in cells(chapter, "markdown"):
        typed = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", re.sub(r"\{[^}]*\}`[^`]*`", "", text)))
        assert typed <= PAPER, typed


@pytest.mark.parametrize("name", ["../book/index.md", "../book/abstract.md", "press/templates/boxes.yaml"])
def test_no_number_is_typed_into_what_a_reader_sees_first(name):
    text = without_marks((ROOT / "lib" / name).read_text(encoding="utf-8")).replace("Python 3.11", "")
    assert re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])|\d ?%", text.replace("95 %", "")) == []


def test_a_chapter_asks_its_question_first(chapter):
    assert boxes.QUESTION.search(cells(chapter, "markdown")[0])


def test_every_box_answers_with_a_figure_that_its_chapter_has():
    for chapter, entry in entries("boxes.yaml").items():
        shown = [cell["metadata"].get("mystnb", {}).get("figure", {}) for cell in notebook_cells(chapter, "code")]
        figures = [figure.get("name") for figure in shown]
        assert {"short", "after"} <= entry.keys() and set(entry["after"]) < set(chapter_names())
        assert "answer" not in entry or (entry["figure"] in figures and entry["refute"])
    assert list(entries("boxes.yaml")) == chapter_names()


def test_no_two_figures_of_the_book_have_one_name():
    shown = [c["metadata"].get("mystnb", {}) for chapter in chapter_names() for c in notebook_cells(chapter, "code")]
    names = [cell["figure"]["name"] for cell in shown if "name" in cell.get("figure", {})]
    assert len(names) == len(set(names)) > 50


def test_the_abstract_has_at_most_200_words():
    english = (BOOK / "abstract.md").read_text(encoding="utf-8").split("::::")[0].split("\n", 1)[1]
    assert len(english.split()) <= 200


def test_every_figure_has_caption_and_alt_text(chapter):
    for cell in notebook_cells(chapter, "code"):
        if re.search(r"^figures\.(?!style)", "".join(cell["source"]), re.M):
            assert cell["metadata"]["mystnb"]["figure"]["caption"] and cell["metadata"]["mystnb"]["image"]["alt"]


def test_the_two_miscited_papers_are_cited_by_their_authors():
    bibliography = (BOOK / "references.bib").read_text(encoding="utf-8")
    for key, first in (("lu2024insights", "Lu"), ("liu2024relation", "Liu")):
        entry = bibliography[bibliography.index(key) :]
        assert re.search(r"author\s*=\s*\{" + first, entry[: entry.index("\n}")])


def test_nothing_in_git_names_a_machine():
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split():
        if name.endswith((".py", ".md", ".yml", ".yaml", ".ipynb", ".toml", ".txt", ".cff", ".json")):
            assert not re.search(r"(?<![\w.])/(root|home|work|tmp)/\w", (ROOT / name).read_text(encoding="utf-8")), name


@pytest.mark.parametrize("page", [*chapter_names(), "index.md", "abstract.md", "dashboard.md", "verify.md"])
def test_words_of_the_glossary_are_linked_at_first_use(page):
    assert words_before_links(page_text(page), glossary_terms()) == {}


def test_a_word_that_is_used_before_it_is_linked_is_found():
    terms = ["Head", "Routing failure", "Model"]
    fine = '# Heads\n\nA {term}`head`, heads, in {doc}`a head <x>` `head` "head" $head$. {term}`model`: a model.'
    assert words_before_links(fine, terms) == {}
    assert set(words_before_links("Two heads. A {term}`head`.", terms)) == {"head"}
    assert set(words_before_links("{term}`heads <Head>` and a routing failure", terms)) == {"routing failure"}
    assert len(glossary_terms()) > 40
