"""The foot of a chapter: which run made its numbers, and the files to take away. Made from the results file when the
book is built; nobody types it."""

from __future__ import annotations

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
        if _statements(added.source) <= _statements(shown.source):
            added.metadata["tags"].append("remove-cell")
    nbformat.write(book, notebook)


def foot(provenance: dict[str, Any], chapter: str) -> str:
    """Where a chapter's numbers come from, as MyST markdown. provenance: as `Results` keeps it."""
    p = {key: _code(value) for key, value in provenance.items() if not isinstance(value, dict)}
    packages = ", ".join(_code(f"{name} {v}") for name, v in provenance["packages"].items() if name in _SHOWN)
    return _FOOT.format(chapter=chapter, packages=packages, **p)


_SHOWN = ("torch", "transformers")
_FOOT = """:::{{div}} colophon
**Where these numbers come from.** One run on {subject} ({source}), started {start} and done in {seconds} seconds.
Weights: sha256 {weights_sha256}. Code: version {lib}, commit {commit}; Python {python}, {packages}; seed {seed},
threads {threads}.

**Take it with you.** {{download}}`All numbers of this chapter, as JSON <{chapter}.json>`;
<a href="../_sources/book/{chapter}.ipynb" download>the executed notebook</a>, with every figure and table.
:::
"""


def _statements(source: str) -> set[str]:
    return {line for line in source.splitlines() if line and not line.startswith("#")}


def _code(value: Any) -> str:
    """A value as code, so that nothing in it is read as markup."""
    return "`" + str(value).replace("`", "'") + "`"
