"""Execute chapters with papermill, build the book with Jupyter Book, check its numbers against expectation.

1. Each chapter has a fingerprint: its notebook, every module of lib/ that it imports, directly or through others, all
   of data/, the pins and the installed packages, the subject's weights. A chapter whose fingerprint is unchanged is not
   executed again. Beside these copies only sweeps keep anything, run by run (`sweep`).
2. Executed copies go to _build/executed/<model>/, numbers to _build/results/<model>/. A chapter that reads what
   another one makes has that one executed before it, and is executed anew when it changes.
3. The dashboard is made from the results and the edits, and kept by the same rule, as _build/dashboard/<model>.html.
4. The book is staged from the executed copies, the pages of book/ and the page of claims, which is made from the
   results; it is built with warnings as errors into a new folder, gets the dashboard beside it, and is put in place of
   _build/html in one step.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import papermill
import psutil
from papermill.exceptions import PapermillExecutionError

from lib.errors import ChapterError
from lib.files import BUILD, ROOT, data_files, digest, imports, make_folder, modules, slug, write_atomically
from lib.models import canonical, load, use_device_of, weights_sha256
from lib.results import PACKAGES, chapter_folder, results_path
from lib.studies import known_answers

BOOK = ROOT / "book"
PINS = ("requirements.txt", "constraints.txt", "pyproject.toml")
NEEDS = {"04_side_effects": "03_four_pathways"}  # a chapter that reads files which another one makes
LONGEST = ("03_four_pathways", "08_generalisation", "04_side_effects", "02_knowledge_path", "05_cross_validation")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def chapter_names() -> list[str]:
    """The numbered notebooks of book/, in order."""
    return sorted(p.stem for p in BOOK.glob("[0-9]*.ipynb"))


def choose_chapters(words: Sequence[str]) -> list[str]:
    """Full names for what a user typed (`1`, `01`, `01_static_diagnostics`); all of them for nothing.
    Raises ChapterError for a word that fits no chapter."""
    names = chapter_names()
    chosen = []
    for word in words:
        fits = [n for n in names if n == word or n.startswith(f"{word.zfill(2)}_")]
        if not fits:
            raise ChapterError(f"there is no chapter {word!r}; choose from {', '.join(names)}.")
        chosen += fits
    return chosen or names


def run(
    model_name: str,
    chapters: Iterable[str],
    parameters: dict[str, Any] | None = None,
    *,
    force: bool = False,
    jobs: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Execute the chapters whose inputs changed. jobs: how many at a time, each with its share of the cores; two by
    default, where there are two cores: much of a chapter is not done in matrices, and a second core is idle meanwhile.
    Raises ChapterError for an unknown parameter, or with the failing cell and its traceback; the chapters before it
    keep their results, the failing one leaves nothing, and none is begun after it."""
    model_name = canonical(model_name)
    chapters, values = list(dict.fromkeys(chapters)), {"model_name": model_name, **(parameters or {})}
    for chapter in chapters:
        check_parameters(BOOK / f"{chapter}.ipynb", values)
    make_folder(executed_path(model_name, "").parent)
    weights = weights_sha256(model_name)
    if model_name == "gpt2":  # numbers of a wrong tokenizer or a broken forward pass would look like any others
        known_answers.require(use_device_of(load(model_name)))
    for chapter, needed in NEEDS.items():
        if chapter in chapters and needed not in chapters and not is_current(model_name, needed, None, weights):
            say(f"{chapter} needs {needed}, which is executed first")
            run(model_name, [needed], say=say)
    cores = os.cpu_count() or 1
    due = [c for c in chapters if force or not is_current(model_name, c, values, weights)]
    jobs = max(1, min(jobs or 2, cores, len(due)))
    waiting, running = sorted(chapters, key=_rank), dict[Future[None], str]()
    with _threads_each(cores // jobs), ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                unready = {*waiting, *running.values()}
                for chapter in [c for c in waiting if NEEDS.get(c) not in unready][: jobs - len(running)]:
                    waiting.remove(chapter)
                    future = pool.submit(_bring_up, model_name, chapter, values, weights, force=force, say=say)
                    running[future] = chapter
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        except KeyboardInterrupt:
            for kernel in psutil.Process().children(recursive=True):
                kernel.terminate()
            raise


def _rank(chapter: str) -> tuple[int, str]:
    """The longest first, so that none of them runs alone at the end; the others in the order of the book."""
    return LONGEST.index(chapter) if chapter in LONGEST else len(LONGEST), chapter


def _bring_up(
    model_name: str, chapter: str, values: dict[str, Any], weights: str, *, force: bool, say: Callable[[str], None]
) -> None:
    """Execute one chapter, unless it is current."""
    if not force and is_current(model_name, chapter, values, weights):
        say(f"{chapter}: nothing changed, kept")
        return
    done, found = executed_path(model_name, chapter), results_path(model_name, chapter)
    for old in (done.with_suffix(".key"), done, found):  # a failing chapter must not leave older figures standing
        old.unlink(missing_ok=True)
    shutil.rmtree(chapter_folder(model_name, chapter), ignore_errors=True)
    start = time.perf_counter()
    execute(BOOK / f"{chapter}.ipynb", done, values)
    if not found.exists():
        done.unlink()
        raise ChapterError(f"{chapter} ran, but saved no results; its last cell must call report.save().")
    stamp = {"values": values, "fingerprint": fingerprint(model_name, chapter, values, weights)}
    write_atomically(done.with_suffix(".key"), json.dumps(stamp))
    say(f"{chapter}: executed on {model_name} in {time.perf_counter() - start:.0f} s")


@contextmanager
def _threads_each(threads: int) -> Iterator[None]:
    """So many threads for each kernel that is started meanwhile; more threads than cores wait for one another."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = before or str(max(1, threads))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else None


def is_current(model_name: str, chapter: str, values: dict[str, Any] | None, weights: str) -> bool:
    """Whether the executed copy and the results of a chapter belong to its present inputs. values: the parameters it
    should have been run with; None: whichever it was run with."""
    stamp = executed_path(model_name, chapter).with_suffix(".key")
    if not (
        stamp.exists() and executed_path(model_name, chapter).exists() and results_path(model_name, chapter).exists()
    ):
        return False
    try:
        kept = json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError:  # a stamp that cannot be read vouches for nothing
        return False
    if values is not None and kept["values"] != values:
        return False
    return kept["fingerprint"] == fingerprint(model_name, chapter, kept["values"], weights)


def executed_path(model_name: str, chapter: str) -> Path:
    return BUILD / "executed" / slug(model_name) / f"{chapter}.ipynb"


def check_parameters(notebook: Path, values: dict[str, Any]) -> None:
    """Papermill only warns of a name it does not know, and then runs with the default: refuse it instead."""
    known = papermill.inspect_notebook(str(notebook))
    if unknown := sorted(set(values) - set(known)):
        raise ChapterError(
            f"{notebook.name} has no parameter {', '.join(map(repr, unknown))}; "
            f"its parameters cell knows {', '.join(sorted(known)) or 'none'}."
        )


def execute(notebook: Path, output: Path, values: dict[str, Any]) -> None:
    """Run one notebook; its executed copy appears only if every cell succeeded."""
    partial = output.with_suffix(".part.ipynb")
    try:
        papermill.execute_notebook(
            str(notebook),
            str(partial),
            values,
            kernel_name="python3",
            resources={"metadata": {"path": str(notebook.parent)}},  # `cwd` would move this process, under the others
            progress_bar={"desc": notebook.stem, "leave": False},
            log_output=False,
        )
        text = partial.read_text(encoding="utf-8")
        for folder in (ROOT, sys.prefix):  # a published notebook names no folder of this machine
            text = text.replace(f"{folder}/", "")
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    except PapermillExecutionError as error:
        trace = _ANSI.sub("", "\n".join(error.traceback))
        raise ChapterError(
            f"{notebook.name}, cell {error.cell_index + 1}, raised {error.ename}: {error.evalue}\n\n"
            f"{error.source}\n\n{trace}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def fingerprint(model_name: str, chapter: str, values: dict[str, Any], weights: str) -> str:
    """sha256 over everything that a chapter's output can depend on."""
    files = [BOOK / f"{chapter}.ipynb", *_everyones(), *sources(BOOK / f"{chapter}.ipynb")]
    facts = {"values": values, "weights": weights, "python": sys.version, "packages": {p: version(p) for p in PACKAGES}}
    if needed := NEEDS.get(chapter):
        stamp = executed_path(model_name, needed).with_suffix(".key")
        facts["needed"] = stamp.read_text(encoding="utf-8") if stamp.exists() else ""
    return digest(files, json.dumps(facts, sort_keys=True, default=str), ROOT)


def _everyones() -> list[Path]:
    """The pins and the data, on which every output depends."""
    return [*(ROOT / p for p in PINS), *data_files(ROOT)]


def sources(notebook: Path) -> list[Path]:
    """The files of lib/ that a chapter's cells import, and those that these import, and so on, functions included."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    named = imports("\n".join(line for line in lines if not line.startswith(("%", "!"))))
    return modules(named, ROOT)


logging.getLogger("papermill").setLevel(logging.ERROR)
