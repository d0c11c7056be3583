"""What a page says of the run behind it: the foot of a chapter, with the files to take away, and the list of numbers
that may come out otherwise elsewhere. Made from the results when the book is built; nobody types it."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import nbformat


def add(notebook: Path, results: Path) -> None:
    """Append the foot to a staged executed chapter, put its results beside it, and show its parameters once: the cell
    that papermill adds is not shown if it repeats the one above it."""
    book = nbformat.read(notebook, as_version=4)
    shutil.copy(results, notebook.with_suffix(".json"))
    provenance = json.loads(results.read_text(encoding="utf-8"))["provenance"]
    book.cells.append(nbformat.v4.new_markdown_cell(foot(provenance, notebook.stem), id=f"{notebook.stem[:2]}-foot"))
    tagged = {tag: cell for cell in book.cells for tag in cell.metadata.get("tags", [])}
    if {"parameters", "injected-parameters"} <= set(tagged):
        shown, added = tagged["parameters"], tagged["injected-parameters"]
        if _statements(added.source) <= _statements(shown.source):  # nothing that is not said above
            added.metadata["tags"].append("remove-cell")
    nbformat.write(book, notebook)


def foot(provenance: dict[str, Any], chapter: str) -> str:
    """Where a chapter's numbers come from, as MyST markdown. provenance: as `Results` keeps it."""
    p = {key: _code(value) for key, value in provenance.items() if not isinstance(value, dict)}
    packages = ", ".join(_code(f"{name} {v}") for name, v in provenance["packages"].items() if name in _SHOWN)
    return _FOOT.format(**p | {"chapter": chapter, "packages": packages})


_SHOWN = ("torch", "transformers")
_FOOT = """:::{{div}} colophon
**Where these numbers come from.** One run on {model} ({source}), started {start} and done in {seconds} seconds.
Weights: sha256 {weights_sha256}. Code: version {lib}, commit {commit}; Python {python}, {packages}; seed {seed},
threads {threads}.

**Take it with you.** {{download}}`All numbers of this chapter, as JSON <{chapter}.json>`;
<a href="../_sources/book/{chapter}.ipynb" download>the executed notebook</a>, with every figure and table.
:::
"""
MARK = "% what may differ\n"  # a comment in a page, in whose place the list stands


def tolerances(model_name: str, expected: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Which numbers may differ on another machine and by how much, as MyST markdown. expected: as data/expected holds
    them, by chapter and key; empty where nothing is expected of the model."""
    entries = [(chapter, key, wanted) for chapter, keys in expected.items() for key, wanted in keys.items()]
    loose = [(c, k, w) for c, k, w in entries if "value" not in w or w.get("tolerance")]
    if not entries:
        return (
            f"Of {_code(model_name)}, the model of this build, nothing is expected: it is not this repository's own.\n"
        )
    rows = "\n".join(
        f"* - {int(chapter.partition('_')[0])}\n  - {_code(key)}\n  - {_range(wanted)}\n  - {wanted['why']}"
        for chapter, key, wanted in loose
    )
    return _TOLERANCES.format(model=_code(model_name), n=len(entries), loose=len(loose), rows=rows)


TIMES = "% what it took\n"  # likewise


def times(provenances: dict[str, dict[str, Any]]) -> str:
    """How long each chapter of this build took and how much memory, as MyST markdown. provenances: as `Results` keeps
    them, by chapter."""
    rows = "\n".join(
        f"* - {{doc}}`{int(chapter.partition('_')[0])} <{chapter}>`\n  - {p['seconds']:.0f}\n"
        f"  - {p['peak_mb']:,}\n  - {p['threads']}\n  - {_code(p['start'])}"
        for chapter, p in provenances.items()
    )
    total = sum(p["seconds"] for p in provenances.values())
    return _TIMES.format(rows=rows, minutes=total / 60)


_TIMES = """The chapters of this build add up to {minutes:.1f} minutes; run two at a time, as they are by default,
they are done sooner. Runs of a sweep that were kept from an earlier build are not in it; memory is the notebook's own,
not that of workers beside it.

:::{{list-table}}
:header-rows: 1
:class: times

* - Chapter
  - Seconds
  - Peak memory, MB
  - Threads
  - Started (UTC)
{rows}
:::
"""
_TOLERANCES = """Of {n} numbers and names that are expected of {model}, {loose} may come out otherwise on another
machine, because processors round differently; by how much, and why, is listed below. All others must be the same.

::::{{dropdown}} What may differ, and by how much
:::{{list-table}}
:header-rows: 1
:class: tolerances

* - Chapter
  - Number
  - May be
  - Why
{rows}
:::
::::
"""


def _range(wanted: dict[str, Any]) -> str:
    if "value" in wanted:
        return f"{wanted['value']:,} ± {wanted['tolerance']:,}"
    ends = [f"{word} {wanted[end]:,}" for end, word in (("min", "at least"), ("max", "at most")) if end in wanted]
    return ", ".join(ends)


def _statements(source: str) -> set[str]:
    return {ast.dump(statement) for statement in ast.parse(source).body}


def _code(value: Any) -> str:
    """A value as code, so that nothing in it is read as markup."""
    return "`" + str(value).replace("`", "'") + "`"
