"""What a reader sees first: the box that opens each chapter, and the landing page.

Both are filled while the book is staged, from what the runs reported: boxes by the texts of templates/boxes.yaml, the
landing page from book/index.md, which holds Jinja's marks. So no number in them is typed, and a chapter need not be
executed again when a word of its box changes.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml
from jinja2 import UndefinedError

from lib.errors import ChapterError
from lib.files import ROOT
from lib.press.beside import Beside
from lib.press.claims import VERDICTS, Judged, by_kind
from lib.press.execute import NO_FAILURE, executed_path
from lib.press.texts import chapter_number, entries, fill, rendered
from lib.results import results_path

QUESTION = re.compile(r"^\*\*Question\.\*\* (.+)$", re.M)  # a paragraph of the chapter's first cell
WORDS, LOOK = 200, 0.3  # words read a minute; minutes for a figure or table
ENTITIES = str.maketrans({"<": "&lt;", "{": "&#123;", "\x1b": "␛"})
PANELS = "landing*.png"  # pictures that chapters keep for the landing page


def add_box(notebook: Path, model_name: str, run: Mapping[str, Any], judged: Sequence[Judged]) -> None:
    """Put the box in place of the question in a staged executed chapter that asks one. run: the chapter's results file.
    Raises ChapterError for an answer with a number that the chapter did not report."""
    book = nbformat.read(notebook, as_version=4)
    first = next((cell for cell in book.cells if cell.cell_type == "markdown"), None)
    if first is None or not (asked := QUESTION.search(first.source)):
        return
    entry = entries("boxes.yaml").get(notebook.stem, {})
    if reason := none_of({notebook.stem: run}):
        entry = {"answer": _no_failure(model_name, reason), "after": entry.get("after", ())}
    try:
        answer = " ".join(rendered(entry.get("answer", ""), v=inert(run["values"])).split())
    except UndefinedError as error:
        raise ChapterError(f"the box of {notebook.stem} (templates/boxes.yaml) needs a number: {error}.") from error
    picture, alt = _picture(book, entry.get("figure", ""), notebook)
    numbers = defaultdict(list)
    for i, judgement in enumerate(judged, start=1):
        if judgement.claim.chapter == notebook.stem:
            numbers[VERDICTS[judgement.verdict]].append(i)
    box = fill(
        "box.md",
        question=asked[1],
        answer=answer,
        picture=picture,
        alt=alt,
        figure=entry.get("figure"),
        numbers=numbers,
        refute=entry.get("refute"),
        reading=minutes_to_read(book),
        running=minutes_to_run(run["provenance"]),
        after=entry.get("after", ()),
        model_name=model_name,
    )
    first.source = first.source[: asked.start()] + box.strip() + first.source[asked.end() :]
    nbformat.write(book, notebook)


def minutes_to_read(book: nbformat.NotebookNode) -> int:
    """Of an average reader, for prose, and figures and tables that are not folded."""
    prose = sum(len(cell.source.split()) for cell in book.cells if cell.cell_type == "markdown")
    open_ones = (cell for cell in book.cells if "hide-cell" not in cell.metadata.get("tags", ()))
    return max(1, round(prose / WORDS + LOOK * sum("figure" in cell.metadata.get("mystnb", {}) for cell in open_ones)))


def minutes_to_run(provenance: Mapping[str, Any]) -> str:
    """As the run took, recorded sweeps not counted."""
    minutes = round(provenance["seconds"] / 60)
    return str(minutes) if minutes else "< 1"


def landing(
    page: str,
    model_name: str,
    runs: Mapping[str, Mapping[str, Any]],
    judged: Sequence[Judged],
    others: Sequence[Beside] = (),
) -> str:
    """The landing page, from its text. runs: results files by chapter. In the text: `c1`, `c2` ... for what chapters
    reported, `sides` for the same by model, `chapters` for the map of them, `claims` for counts of `verdicts` by model
    and kind of claim, `others` for models that were run before, `citation` for CITATION.cff, `panel(NAME)` for whether
    a chapter kept that picture beside its results. Raises ChapterError for a number that the text needs and no chapter
    reported."""
    texts, folder = entries("boxes.yaml"), results_path(model_name, "").parent
    chapters = [
        {
            "name": name,
            "number": chapter_number(name),
            "short": texts.get(name, {}).get("short", ""),
            "after": texts.get(name, {}).get("after", ()),
            "reading": minutes_to_read(nbformat.read(executed_path(model_name, name), as_version=4)),
            "running": minutes_to_run(run["provenance"]),
        }
        for name, run in runs.items()
    ]
    values, claims = by_number(runs), {model_name: by_kind(judged)} | {o.name: by_kind(o.judged) for o in others}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    minutes = sum(run["provenance"]["seconds"] for run in runs.values()) / 60
    about = {"chapters": chapters, "claims": claims, "model_name": model_name, "minutes": minutes}
    about |= {"others": others, "by_number": by_number, "sides": _sides(model_name, runs, others)}
    about["no_failure"] = (reason := none_of(runs)) and _no_failure(model_name, reason)
    about |= {"citation": citation, "verdicts": list(VERDICTS.values())}
    try:
        return rendered(page, panel=lambda name: (folder / f"{name}.png").is_file(), **about, **values) + "\n"
    except UndefinedError as error:
        raise ChapterError(f"book/index.md needs a number that no chapter reported: {error}.") from error


def none_of(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Why chapters found no failure to study; empty if there was one."""
    return str(next((run["values"][NO_FAILURE] for run in runs.values() if NO_FAILURE in run["values"]), ""))


def _no_failure(model_name: str, reason: str) -> str:
    return fill("no_failure.md", model_name=model_name, reason=inert(reason)).strip()


def two_models(page: str, model_name: str, runs: Mapping[str, Mapping[str, Any]], others: Sequence[Beside]) -> str:
    """The page that sets models side by side, from its text. In it: `here.c2` for what chapter 2 reported in this
    build, `by_number(o.runs).c2` for what it reported on one of `others`. Raises ChapterError as `landing` does."""
    about = {"here": by_number(runs), "others": others, "sides": _sides(model_name, runs, others)}
    try:
        return rendered(page, model_name=model_name, by_number=by_number, **about) + "\n"
    except UndefinedError as error:
        raise ChapterError(f"book/two_models.md needs a number that no chapter reported: {error}.") from error


def _sides(
    model_name: str, runs: Mapping[str, Mapping[str, Any]], others: Sequence[Beside]
) -> dict[str, dict[str, Any]]:
    return {model_name: by_number(runs)} | {o.name: by_number(o.runs) for o in others}


def by_number(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What chapters reported, as `c1`, `c2` ..."""
    return {f"c{chapter_number(name)}": inert(run["values"]) for name, run in runs.items()}


def inert(value: Any) -> Any:
    """The same, but that no text in it opens a tag or holds MyST's braces: a token may be any text."""
    if isinstance(value, dict):
        return {key: inert(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [inert(entry) for entry in value]
    return value.translate(ENTITIES) if isinstance(value, str) else value


def _picture(book: nbformat.NotebookNode, figure: str, notebook: Path) -> tuple[str, str]:
    """The file of a figure's picture, put beside the notebook, and its alternative text; empty if there is none."""
    for cell in book.cells:
        shown = cell.metadata.get("mystnb", {})
        if figure and shown.get("figure", {}).get("name") == figure:
            for output in cell.get("outputs", ()):
                if drawn := output.get("data", {}).get("image/svg+xml"):
                    path = notebook.with_name(f"key_{notebook.stem}.svg")
                    path.write_text(drawn, encoding="utf-8")
                    return path.name, shown.get("image", {}).get("alt", "")
    return "", ""
