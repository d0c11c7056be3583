"""Execute chapters with papermill, build the book with Jupyter Book, check its numbers against expectation.

1. Each chapter has a fingerprint: its notebook, every module of lib/ that it imports, directly or through others, all
   of data/, the pins and the installed packages, the subject's weights. A chapter whose fingerprint is unchanged is not
   executed again. Beside these copies only sweeps keep anything, run by run (`sweep`).
2. Executed copies go to _build/executed/<subject>/, numbers to _build/results/<subject>/. A chapter that reads what
   another one makes has that one executed before it, and is executed anew when it changes.
3. The dashboard is made from the results and the edits, and kept by the same rule, as _build/dashboard/<subject>.html.
4. The book is staged from the executed copies, the pages of book/ and the page of claims, which is made from the
   results; it is built with warnings as errors into a new folder, gets the dashboard beside it, and is put in place of
   _build/html in one step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import papermill
import psutil
import yaml
from papermill.exceptions import PapermillExecutionError

from lib import claims, colophon, inputs, known_answers
from lib.errors import ChapterError
from lib.results import BUILD, PACKAGES, chapter_folder, make_folder, reach, results_path, slug, write_atomically
from lib.subjects import ROOT, canonical, load, weights_sha256

BOOK = ROOT / "book"
PINS = ("requirements.txt", "constraints.txt", "pyproject.toml")
_JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"  # this environment's, whatever the PATH says
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


def run(subject: str, chapters: Iterable[str], parameters: dict[str, Any] | None = None, *, force: bool = False,
        jobs: int | None = None, say: Callable[[str], None] = print) -> None:  # fmt: skip
    """Execute the chapters whose inputs changed. jobs: how many at a time, each with its share of the cores; two by
    default, where there are two cores: much of a chapter is not done in matrices, and a second core is idle meanwhile.
    Raises ChapterError for an unknown parameter, or with the failing cell and its traceback; the chapters before it
    keep their results, the failing one leaves nothing, and none is begun after it."""
    subject = canonical(subject)
    chapters, values = list(dict.fromkeys(chapters)), {"subject": subject, **(parameters or {})}
    for chapter in chapters:
        check_parameters(BOOK / f"{chapter}.ipynb", values)
    make_folder(executed_path(subject, "").parent)
    weights = weights_sha256(subject)
    if subject == "gpt2":  # numbers of a wrong tokenizer or a broken forward pass would look like any others
        known_answers.require(load(subject))
    for chapter, needed in NEEDS.items():
        if chapter in chapters and needed not in chapters and not is_current(subject, needed, None, weights):
            say(f"{chapter} needs {needed}, which is executed first")
            run(subject, [needed], say=say)
    cores = os.cpu_count() or 1
    due = [c for c in chapters if force or not is_current(subject, c, values, weights)]
    jobs = max(1, min(jobs or 2, cores, len(due)))
    waiting, running = sorted(chapters, key=_rank), dict[Future[None], str]()
    with _threads_each(cores // jobs), ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                unready = {*waiting, *running.values()}
                for chapter in [c for c in waiting if NEEDS.get(c) not in unready][: jobs - len(running)]:
                    waiting.remove(chapter)
                    future = pool.submit(_bring_up, subject, chapter, values, weights, force=force, say=say)
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
    subject: str, chapter: str, values: dict[str, Any], weights: str, *, force: bool, say: Callable[[str], None]
) -> None:
    """Execute one chapter, unless it is current."""
    if not force and is_current(subject, chapter, values, weights):
        say(f"{chapter}: nothing changed, kept")
        return
    done, found = executed_path(subject, chapter), results_path(subject, chapter)
    for old in (done.with_suffix(".key"), done, found):  # a failing chapter must not leave older figures standing
        old.unlink(missing_ok=True)
    shutil.rmtree(chapter_folder(subject, chapter), ignore_errors=True)
    start = time.perf_counter()
    execute(BOOK / f"{chapter}.ipynb", done, values)
    if not found.exists():
        done.unlink()
        raise ChapterError(f"{chapter} ran, but saved no results; its last cell must call report.save().")
    stamp = {"values": values, "fingerprint": fingerprint(subject, chapter, values, weights)}
    write_atomically(done.with_suffix(".key"), json.dumps(stamp))
    say(f"{chapter}: executed on {subject} in {time.perf_counter() - start:.0f} s")


@contextmanager
def _threads_each(threads: int) -> Iterator[None]:
    """So many threads for each kernel that is started meanwhile; more threads than cores wait for one another."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = before or str(max(1, threads))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else None


def is_current(subject: str, chapter: str, values: dict[str, Any] | None, weights: str) -> bool:
    """Whether the executed copy and the results of a chapter belong to its present inputs. values: the parameters it
    should have been run with; None: whichever it was run with."""
    stamp = executed_path(subject, chapter).with_suffix(".key")
    if not (stamp.exists() and executed_path(subject, chapter).exists() and results_path(subject, chapter).exists()):
        return False
    try:
        kept = json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError:  # a stamp that cannot be read vouches for nothing
        return False
    if values is not None and kept["values"] != values:
        return False
    return kept["fingerprint"] == fingerprint(subject, chapter, kept["values"], weights)


def provenances(subject: str) -> dict[str, dict[str, Any]]:
    """Where each chapter's results come from, by chapter."""
    read = {c: results_path(subject, c).read_text(encoding="utf-8") for c in chapter_names()}
    return {chapter: json.loads(text)["provenance"] for chapter, text in read.items()}


def executed_path(subject: str, chapter: str) -> Path:
    return BUILD / "executed" / slug(subject) / f"{chapter}.ipynb"


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
            str(notebook), str(partial), values, kernel_name="python3",
            resources={"metadata": {"path": str(notebook.parent)}},  # `cwd` would move this process, under the others
            progress_bar={"desc": notebook.stem, "leave": False}, log_output=False,
        )  # fmt: skip
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


def fingerprint(subject: str, chapter: str, values: dict[str, Any], weights: str) -> str:
    """sha256 over everything that a chapter's output can depend on."""
    files = [BOOK / f"{chapter}.ipynb", *_everyones(), *sources(BOOK / f"{chapter}.ipynb")]
    facts = {"values": values, "weights": weights, "python": sys.version, "packages": {p: version(p) for p in PACKAGES}}
    if needed := NEEDS.get(chapter):
        stamp = executed_path(subject, needed).with_suffix(".key")
        facts["needed"] = stamp.read_text(encoding="utf-8") if stamp.exists() else ""
    return inputs.digest(files, json.dumps(facts, sort_keys=True, default=str), ROOT)


def _everyones() -> list[Path]:
    """The pins and the data, on which every output depends."""
    return [*(ROOT / p for p in PINS), *inputs.data_files(ROOT)]


def sources(notebook: Path) -> list[Path]:
    """The files of lib/ that a chapter's cells import, and those that these import, and so on, functions included."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    named = inputs.imports("\n".join(line for line in lines if not line.startswith(("%", "!"))))
    return inputs.modules(named, ROOT)


def dashboard_path(subject: str) -> Path:
    return BUILD / "dashboard" / f"{slug(subject)}.html"


def dashboard(
    subject: str, output: Path | None = None, *, force: bool = False, say: Callable[[str], None] = print
) -> Path:
    """The page of all heads of a subject, from its results and edits; kept if nothing that it depends on changed.
    output: a copy elsewhere. Raises BookError as `lib.dashboard.collect` does; then no page is left standing."""
    from lib.dashboard import collect, render

    subject = canonical(subject)
    weights, path = weights_sha256(subject), dashboard_path(subject)
    if not force and dashboard_is_current(subject, weights):
        say(f"dashboard: nothing changed, kept {path}")
    else:
        for old in (path.with_suffix(".key"), path):
            old.unlink(missing_ok=True)
        start = time.perf_counter()
        write_atomically(path, render(collect(load(subject))))
        write_atomically(path.with_suffix(".key"), _dashboard_key(subject, weights))
        size, seconds = path.stat().st_size / 1e6, time.perf_counter() - start
        say(f"dashboard: made {path}, {size:.1f} MB, in {seconds:.0f} s")
    if output is not None:
        write_atomically(output, path.read_text(encoding="utf-8"))
        say(f"dashboard: copied to {output}")
    return output or path


def dashboard_is_current(subject: str, weights: str) -> bool:
    """Whether the page is there and belongs to the present results, edits, weights and sources."""
    path = dashboard_path(subject)
    stamp = path.with_suffix(".key")
    return path.is_file() and stamp.is_file() and stamp.read_text() == _dashboard_key(subject, weights)


def _dashboard_key(subject: str, weights: str) -> str:
    from lib.dashboard import EDITS, PARTS, TAKEN

    files = [*_everyones(), *inputs.modules({"dashboard"}, ROOT), *(ROOT / "lib" / part.name for part in PARTS)]
    files += [results_path(subject, chapter) for chapter in TAKEN]
    files += sorted(chapter_folder(subject, EDITS).glob("*.safetensors"))
    packages = {p: version(p) for p in (*PACKAGES, "altair", "vl-convert-python")}
    return inputs.digest(files, json.dumps([weights, sys.version, packages], sort_keys=True), ROOT)


def build(subject: str, *, force: bool = False, say: Callable[[str], None] = print) -> Path:
    """Stage the executed chapters with the pages of book/ and build the HTML. Raises ChapterError where a chapter
    was not executed for this subject or where the build warns."""
    subject = canonical(subject)
    weights = weights_sha256(subject)
    missing = [c for c in chapter_names() if not is_current(subject, c, None, weights)]
    if missing:
        raise ChapterError(
            f"not executed on {subject} since its inputs changed: {', '.join(missing)}. "
            f"Run `python -m lib run --subject {subject}` first."
        )
    page = dashboard_path(subject) if (BOOK / "dashboard.md").is_file() else None  # the book's page that shows it
    if page and not dashboard_is_current(subject, weights):
        raise ChapterError(
            f"there is no dashboard of the present results of {subject}. "
            f"Run `python -m lib dashboard --subject {subject}` first."
        )
    make_folder(BUILD)
    html, stamp = BUILD / "html", BUILD / "html.key"
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        stage = Path(temporary) / "stage"
        shutil.copytree(BOOK, stage / "book", ignore=shutil.ignore_patterns("*.ipynb", ".ipynb_checkpoints"))
        for chapter in chapter_names():
            shutil.copy(executed_path(subject, chapter), stage / "book")
            colophon.add(stage / "book" / f"{chapter}.ipynb", results_path(subject, chapter))
        for name in ("_config.yml", "_toc.yml"):
            shutil.copy(ROOT / name, stage)
        if (ROOT / "data" / "claims.yaml").is_file():
            text = claims.page(judged(subject), subject)
            (stage / "book" / "reproduction.md").write_text(text, encoding="utf-8")
        for path in stage.glob("book/verify.md"):
            expected = ROOT / "data" / "expected" / f"{slug(subject)}.json"
            wanted = json.loads(expected.read_text(encoding="utf-8")) if expected.is_file() else {}
            text = path.read_text(encoding="utf-8").replace(colophon.MARK, colophon.tolerances(subject, wanted))
            text = text.replace(colophon.TIMES, colophon.times(provenances(subject)))
            path.write_text(text, encoding="utf-8")
        ways = "".join(Path(__file__).with_name(f"{name}.py").read_text("utf-8") for name in ("mathml", "theme"))
        shown = hashlib.sha256(page.read_bytes()).hexdigest() if page else ""
        files = sorted(p for p in stage.rglob("*") if p.is_file())
        key = inputs.digest(files, subject + version("jupyter-book") + ways + shown, stage)
        if not force and html.is_dir() and stamp.exists() and stamp.read_text() == key:
            say("book: nothing changed, kept")
            return html / "index.html"
        stamp.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-c",
            _JUPYTER_BOOK,
            "build",
            str(stage),
            "--path-output",
            temporary,
            "-W",
            "-n",
            "--keep-going",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        output = _ANSI.sub("", done.stdout + done.stderr).replace(str(stage), "")
        if done.returncode:
            trouble = [line for line in output.splitlines() if "WARNING" in line or "ERROR" in line]
            raise ChapterError(
                "the book does not build without warnings:\n" + "\n".join(trouble or output.splitlines()[-30:])
            )
        fresh = Path(temporary) / "_build" / "html"
        if page:
            shutil.copy(page, fresh / "dashboard.html")
        if html.exists():
            shutil.rmtree(html)
        fresh.rename(html)
    write_atomically(stamp, key)
    say(f"book: built {html / 'index.html'}")
    return html / "index.html"


def imprint(subject: str) -> dict[str, str]:
    """What the title page of a built book says: title and author, of which runs it is, and the date of the last."""
    subject = canonical(subject)
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    runs = [json.loads(results_path(subject, c).read_text(encoding="utf-8"))["provenance"] for c in chapter_names()]
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    about = (
        f"Made on {subject}, weights sha256 {runs[0]['weights_sha256']}, by version {runs[0]['lib']}, commit {commits}."
    )
    return {"title": config["title"], "author": config["author"], "about": about, "date": max(r["start"] for r in runs)}


def check(subject: str, folder: Path = ROOT / "data" / "expected") -> list[tuple[str, str, Any, Any, bool]]:
    """Compare results with data/expected/<subject>.json: rows (chapter, key, expected, found, holds). An expectation
    is {"value": v} with "tolerance" (absolute) for numbers, or {"min": a, "max": b}. A value that no run of the present
    inputs produced is `not run` and does not hold. Raises ChapterError where nothing is expected of the subject."""
    subject = canonical(subject)
    path = folder / f"{slug(subject)}.json"
    if not path.is_file():
        raise ChapterError(
            f"nothing is expected of {subject!r}: there is no {path}. "
            "Expected figures exist for this repository's own subjects."
        )
    rows, values = [], current_values(subject)
    for chapter, keys in json.loads(path.read_text(encoding="utf-8")).items():
        for key, wanted in keys.items():
            value = reach(values.get(chapter, {}), key)
            rows.append((chapter, key, _wish(wanted), value, _holds(wanted, value)))
    return rows


def judged(subject: str) -> list[claims.Judged]:
    """The source page's claims and what the current results of a subject make of them."""
    subject = canonical(subject)
    listed = claims.load(ROOT / "data" / "claims.yaml", chapters=chapter_names())
    return claims.judge_all(listed, subject, current_values(subject))


def current_values(subject: str) -> dict[str, dict[str, Any]]:
    """What a subject's chapters reported, of those whose results belong to their present inputs."""
    weights = weights_sha256(subject)
    current = [c for c in chapter_names() if is_current(subject, c, None, weights)]
    return {c: _own_values(subject, c, weights) for c in current}


def _own_values(subject: str, chapter: str, weights: str) -> dict[str, Any]:
    """Raises ChapterError for a results file that another subject's run, or another model's, has left there."""
    path = results_path(subject, chapter)
    content = json.loads(path.read_text(encoding="utf-8"))
    own = content["provenance"]
    if (own["subject"], own["weights_sha256"]) != (subject, weights):
        raise ChapterError(
            f"{path} was made by {own['subject']} ({own['weights_sha256'][:12]}...), not by {subject} "
            f"({weights[:12]}...). Run `python -m lib run {chapter} --subject {subject} --force`."
        )
    return content["values"]


def _holds(wanted: dict[str, Any], value: Any) -> bool:
    if "value" in wanted and not isinstance(wanted["value"], float):
        return value == wanted["value"]
    if not isinstance(value, int | float):
        return False
    if "value" in wanted:
        return abs(value - wanted["value"]) <= wanted["tolerance"]
    return wanted.get("min", float("-inf")) <= value <= wanted.get("max", float("inf"))


def _wish(wanted: dict[str, Any]) -> str:
    if "value" in wanted:
        return str(wanted["value"]) + (f" ± {wanted['tolerance']}" if "tolerance" in wanted else "")
    return " and ".join(
        f"{word} {wanted[end]}" for end, word in (("min", "at least"), ("max", "at most")) if end in wanted
    )


logging.getLogger("papermill").setLevel(logging.ERROR)
