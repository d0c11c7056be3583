"""What a page says of the run behind it: the foot of a chapter, with the files to take away, and the list of numbers
that may come out otherwise elsewhere. Made from the results when the book is built; nobody types it."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

from lib.errors import ChapterError
from lib.press.texts import fill
from lib.sweeps.spot import Check

PACKAGES = ("torch", "transformers")  # those whose versions the foot of a chapter names
MARK = "% what may differ\n"  # comments in a page, in whose place `tolerances` and `times` stand
TIMES = "% what it took\n"


def add(notebook: Path, results: Path, checks: Sequence[Check] = ()) -> None:
    """Append the foot to a staged executed chapter, put its results beside it, and show its parameters once: the cell
    that papermill adds is not shown if it repeats the one above it. checks: of the records that chapters read."""
    book = nbformat.read(notebook, as_version=4)
    shutil.copy(results, notebook.with_suffix(".json"))
    provenance = json.loads(results.read_text(encoding="utf-8"))["provenance"]
    book.cells.append(
        nbformat.v4.new_markdown_cell(foot(provenance, notebook.stem, checks), id=f"{notebook.stem[:2]}-foot")
    )
    tagged = {tag: cell for cell in book.cells for tag in cell.metadata.get("tags", [])}
    if {"parameters", "injected-parameters"} <= set(tagged):
        shown, added = tagged["parameters"], tagged["injected-parameters"]
        if _statements(added.source) <= _statements(shown.source):  # nothing that is not said above
            added.metadata["tags"].append("remove-cell")
    nbformat.write(book, notebook)


def foot(provenance: dict[str, Any], chapter: str, checks: Sequence[Check] = ()) -> str:
    """Where a chapter's numbers come from, as MyST markdown. provenance: as `Results` keeps it. Raises ChapterError for
    a record that the chapter read and no check is of."""
    packages = [f"{name} {version}" for name, version in provenance["packages"].items() if name in PACKAGES]
    sweeps, known = provenance.get("sweeps", {}), {f"{c.header.model}/{c.header.sweep}": c for c in checks}
    for name, note in sweeps.items():
        if "date" in note and name not in known:
            raise ChapterError(f"{chapter} read the record {name}, which data/record has no more; run {chapter} again.")
        sweeps[name] = {"date": "", **note, **(_checked(known[name]) if "date" in note else {})}
    return fill("foot.md", run=provenance, packages=packages, chapter=chapter, sweeps=sweeps)


def _checked(check: Check) -> dict[str, Any]:
    again = [", ".join(f"{key} {value}" for key, value in run.items()) for run in check.again]
    return {"again": again, "outdated": check.outdated}


def tolerances(model_name: str, expected: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Which numbers may differ on another machine and by how much, as MyST markdown. expected: as data/expected holds
    them, by chapter and key; empty where nothing is expected of the model."""
    entries = [(chapter, key, wanted) for chapter, keys in expected.items() for key, wanted in keys.items()]
    loose = [entry for entry in entries if "value" not in entry[2] or entry[2].get("tolerance")]
    return fill("tolerances.md", model_name=model_name, total=len(entries), loose=loose)


def times(provenances: dict[str, dict[str, Any]]) -> str:
    """How long each chapter of this build took and how much memory, as MyST markdown. provenances: as `Results` keeps
    them, by chapter."""
    return fill("times.md", runs=provenances, minutes=sum(run["seconds"] for run in provenances.values()) / 60)


def _statements(source: str) -> set[str]:
    return {ast.dump(statement) for statement in ast.parse(source).body}
