"""Execute chapters with papermill, each in a kernel of its own, two at a time.

1. Each chapter has a fingerprint: its notebook, every module of lib/ that it imports, directly or through others, all
   of data/, the files of a case of one's own, the pins and the installed packages, the model's weights. A chapter whose
   fingerprint is unchanged is not executed again. Beside these copies sweeps keep runs (`lib.sweeps`),
   `knowledge_path` the relation maps, and `side_effects` the streams that two chapters read.
2. Executed copies go to _build/executed/<model>/, numbers to _build/results/<model>/. A chapter that reads what
   another one makes has that one executed before it, and is executed anew when it changes.
3. A terminal shows one bar a chapter. All that kernels say, warnings and bars of their own, goes to
   _build/logs/<model>/<chapter>.log, which errors name.
"""

import ast
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

import nbformat
import papermill
import psutil
from filelock import FileLock
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from lib.checkpoints.fetching import weights_sha256
from lib.checkpoints.named import canonical
from lib.diagnosis import NoFailure
from lib.errors import ChapterError
from lib.facts import case_sums
from lib.files import BUILD, ROOT, data_files, digest, imports, live, make_folder, modules, run_folder, write_atomically
from lib.models import load, use_device_of
from lib.press.kernel import FORKS, Forked, warm_up
from lib.press.texts import fill
from lib.results import PACKAGES, Results, chapter_folder, results_path
from lib.studies import known_answers
from lib.sweeps.store import in_turn

BOOK = ROOT / "book"
PINS = ("requirements.txt", "constraints.txt", "pyproject.toml")
NEEDS = {"04_side_effects": "03_four_pathways"}  # a chapter that reads files which another one makes
LONGEST = (  # the third first: the fourth, which is the longest, waits for it
    "03_four_pathways",
    "10_your_model",
    "04_side_effects",
    "05_cross_validation",
    "02_knowledge_path",
    "08_generalisation",
)
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list in JSON"}
KINDS |= {dict: "a mapping in JSON", tuple: "a tuple", type(None): "nothing"}
NO_FAILURE = "no_failure"  # the key under which a chapter reports why there was nothing to study
LOADING = Lock()  # transformers loads one model at a time
SOCKET_NAME = 103  # bytes that the path of a Unix socket may have, on the system that allows the fewest
for said_by in ("papermill", "traitlets"):  # why a kernel did not start, or ended, is told by us
    logging.getLogger(said_by).setLevel(logging.CRITICAL)


def chapter_names() -> list[str]:
    """The numbered notebooks of book/, in order."""
    return sorted(p.stem for p in BOOK.glob("[0-9]*.ipynb"))


def choose_chapters(words: Sequence[str]) -> list[str]:
    """Full names for what a user typed (`1`, `01`, `01_static_diagnostics`); all of them for nothing.
    Raises ChapterError for a word that fits no chapter."""
    names = chapter_names()
    fits = {word: [n for n in names if n == word or n.startswith(f"{word.zfill(2)}_")] for word in words}
    if strange := next((word for word in words if not fits[word]), None):
        raise ChapterError(f"there is no chapter {strange!r}; choose from {', '.join(names)}.")
    return [name for word in words for name in fits[word]] or names


def run(
    model_name: str,
    chapters: Iterable[str],
    parameters: dict[str, Any] | None = None,
    *,
    force: bool = False,
    jobs: int = 2,
    say: Callable[[str], None] = print,
    bars: bool = False,
) -> None:
    """Execute the chapters whose inputs changed. jobs: how many at a time, each with its share of the cores; two by
    default, where there are two cores: much of a chapter is not done in matrices, and a second core is idle meanwhile.
    bars: show a bar a chapter on the terminal, instead of saying a line when it ends. Raises ChapterError for an
    unknown parameter, or with the failing cell and its traceback; the chapters before it keep their results, the
    failing one leaves nothing, and none is begun after it."""
    model_name, chapters = canonical(model_name), list(dict.fromkeys(chapters))
    values = {"model_name": model_name, **(parameters or {})}
    for chapter in chapters:
        check_parameters(BOOK / f"{chapter}.ipynb", values)
    make_folder(executed_path(model_name, "").parent)
    with alone(say):
        for half_written in executed_path(model_name, "").parent.glob("*.part*"):  # by a build that was killed
            half_written.unlink()
        weights = weights_sha256(model_name)
        if model_name == "gpt2":  # numbers of a wrong tokenizer or a broken forward pass would look like any others
            known_answers.require(use_device_of(load(model_name)))
        for chapter, needed in NEEDS.items():
            if chapter in chapters and needed not in chapters and not is_current(model_name, needed, None, weights):
                say(f"{chapter} needs {needed}, which is executed first")
                run(model_name, [needed], say=say, bars=bars)
        due = [c for c in chapters if force or not is_current(model_name, c, values, weights)]
        if due:
            warm_up()
        cores = os.cpu_count() or 1
        jobs = max(1, min(jobs, cores, len(due)))
        columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "cells", TimeElapsedColumn()
        with Progress(*columns, disable=not bars) as progress:
            _in_order(chapters, jobs, _Press(model_name, values, weights, force, cores // jobs, say, progress))


def alone(say: Callable[[str], None]) -> AbstractContextManager[object]:
    """Held while this process builds; another one waits. What is within it may ask again."""
    lock = FileLock(make_folder(BUILD) / "build.lock", is_singleton=True, thread_local=False)
    return in_turn(lock, say, f"another build is at work in {BUILD}; this one goes on when that has ended")


def _in_order(chapters: Sequence[str], jobs: int, press: "_Press") -> None:
    """Every chapter, so many at a time: the longest first, so that none of them runs alone at the end, the others in
    the order of the book, and each after the one that it needs."""
    waiting = sorted(chapters, key=lambda c: (LONGEST.index(c) if c in LONGEST else len(LONGEST), c))
    running: dict[Future[None], str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                unready = {*waiting, *running.values()}
                for chapter in [c for c in waiting if NEEDS.get(c) not in unready][: jobs - len(running)]:
                    waiting.remove(chapter)
                    running[pool.submit(press.bring_up, chapter)] = chapter
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        except KeyboardInterrupt:
            for kernel in psutil.Process().children(recursive=True):
                kernel.terminate()
            press.say("stopped: the chapters that were executed are kept, and the same command goes on from there")
            raise


@dataclass(frozen=True)
class _Press:
    """What all chapters of one call of `run` have in common."""

    model_name: str
    values: dict[str, Any]
    weights: str
    force: bool
    threads: int  # of each kernel; more threads than cores wait for one another
    say: Callable[[str], None]
    progress: Progress

    def bring_up(self, chapter: str) -> None:
        """Execute one chapter, unless it is current, and say so."""
        cells = len(nbformat.read(BOOK / f"{chapter}.ipynb", 4).cells) + 1  # the parameters'
        bar, start, outcome = self.progress.add_task(chapter, total=cells), time.perf_counter(), "nothing changed, kept"
        if self.force or not is_current(self.model_name, chapter, self.values, self.weights):
            self._execute(chapter, lambda cell, cell_index: self.progress.update(bar, completed=cell_index))
            outcome = f"executed on {self.model_name} in {time.perf_counter() - start:.0f} s"
        self.progress.update(bar, completed=cells)
        if self.progress.disable:
            self.say(f"{chapter}: {outcome}")

    def _execute(self, chapter: str, tick: Callable[..., None]) -> None:
        executed, results = executed_path(self.model_name, chapter), results_path(self.model_name, chapter)
        for old in (executed.with_suffix(".key"), executed, results):  # a failing chapter must not leave older figures
            old.unlink(missing_ok=True)
        shutil.rmtree(chapter_folder(self.model_name, chapter), ignore_errors=True)
        log = log_path(self.model_name, chapter)
        try:
            needed = results_path(self.model_name, NEEDS.get(chapter, chapter))  # its own are gone
            if reason := needed.exists() and json.loads(needed.read_text(encoding="utf-8"))["values"].get(NO_FAILURE):
                raise NoFailure(reason)
            execute(BOOK / f"{chapter}.ipynb", executed, self.values, log=log, threads=self.threads, tick=tick)
        except NoFailure as reason:
            self._without_failure(chapter, str(reason))
        if fault := _unreported(executed, results):
            for file in (executed, results):
                file.unlink(missing_ok=True)
            raise ChapterError(f"{chapter} ran, but {fault}.")
        stamp = fingerprint(self.model_name, chapter, self.values, self.weights)
        pictures = re.findall(r'report\.figure\(\s*"(\w+)"', _cells(executed, "code"))
        made = [f"{name}.png" for name in pictures if (results.parent / f"{name}.png").exists()]
        made += sorted(f"{chapter}/{path.name}" for path in results.with_suffix("").glob("*"))
        content = {"values": self.values, "fingerprint": stamp, "made": made}
        write_atomically(executed.with_suffix(".key"), json.dumps(content))

    def _without_failure(self, chapter: str, reason: str) -> None:
        """The page and the results of a chapter on a model that has no failure under its cases: its question, its
        parameters, and the reason."""
        book = nbformat.read(BOOK / f"{chapter}.ipynb", 4)
        setting = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
        said = fill("no_failure.md", model_name=self.model_name, reason=reason)
        book.cells = [book.cells[0], setting, nbformat.v4.new_markdown_cell(said, id=f"{chapter[:2]}-no-failure")]
        write_atomically(executed_path(self.model_name, chapter), nbformat.writes(book))
        with LOADING:
            report = Results(chapter, use_device_of(load(self.model_name)), seed=self.values.get("seed", 0))
        report.table(NO_FAILURE, reason)
        report.save()


def _unreported(executed: Path, results: Path) -> str:
    """What a chapter that ran owes its readers, as the end of a sentence: results, with every number that its prose
    names; empty if nothing."""
    if not results.exists():
        return "saved no results; its last cell must call report.save()"
    reported = json.loads(results.read_text(encoding="utf-8"))["values"]
    prose = _cells(executed, "markdown")
    lacking = [key for key in dict.fromkeys(re.findall(r"\{glue:text\}`([^`]+)`", prose)) if key not in reported]
    return f"its prose names {', '.join(lacking)}, which it did not report" if lacking else ""


def is_current(model_name: str, chapter: str, values: dict[str, Any] | None, weights: str) -> bool:
    """Whether the executed copy and the results of a chapter belong to its present inputs. values: the parameters it
    should have been run with; None: whichever it was run with."""
    executed = executed_path(model_name, chapter)
    try:
        stamp = json.loads(executed.with_suffix(".key").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # a stamp that is missing or cannot be read vouches for nothing
        return False
    results = results_path(model_name, chapter)
    files = [executed, results, *(results.parent / name for name in stamp.get("made", ()))]
    if not all(path.exists() for path in files) or values not in (None, stamp["values"]):
        return False
    return stamp["fingerprint"] == fingerprint(model_name, chapter, stamp["values"], weights)


def executed_path(model_name: str, chapter: str) -> Path:
    return BUILD / "executed" / run_folder(model_name) / f"{chapter}.ipynb"


def log_path(model_name: str, name: str) -> Path:
    """Where all is kept that a chapter, or another program, said while it ran."""
    return BUILD / "logs" / run_folder(model_name) / f"{name}.log"


def check_parameters(notebook: Path, values: dict[str, Any]) -> None:
    """Papermill only warns of a name it does not know, and then runs with the default: refuse it instead, and a value
    that is not of the kind of the chapter's own."""
    known = literals(notebook)
    if unknown := sorted(set(values) - set(known)):
        names, others = ", ".join(map(repr, unknown)), ", ".join(sorted(known)) or "none"
        raise ChapterError(f"{notebook.name} has no parameter {names}; its parameters cell knows {others}.")
    for name, value in values.items():
        kind, own = type(known[name]), known[name]
        if not (type(value) is kind or (kind is float and type(value) is int) or own is None):
            raise ChapterError(f"{notebook.name}: {name} is {KINDS[kind]}, as {own!r}, and not {value!r:.60}.")


def literals(notebook: Path) -> dict[str, Any]:
    """The parameters of a chapter, with the values that its cell gives them."""
    known = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(entry["default"]) for name, entry in known.items()}


def parse_parameters(chapters: Iterable[str], texts: Iterable[str]) -> dict[str, Any]:
    """`name=value`, as typed, -> values of the kind that the chapters give these names. Raises ChapterError for a text
    of another form, a name that stands twice or that a chapter does not have, and a value of another kind."""
    given: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise ChapterError(f"--parameter {text!r}: write NAME=VALUE.")
        if name in given:
            raise ChapterError(f"--parameter {name} stands twice, as {given[name]!r} and as {value!r}; give it once.")
        given[name] = value
    values: dict[str, Any] = {}
    for chapter in chapters:
        known = literals(BOOK / f"{chapter}.ipynb")
        check_parameters(BOOK / f"{chapter}.ipynb", {name: known.get(name, "") for name in given})
        values |= {name: _as_kind(chapter, name, text, known[name]) for name, text in given.items()}
    return values


def _as_kind(chapter: str, name: str, text: str, own: Any) -> Any:
    """A typed text as a value of the kind of the chapter's own."""
    value: Any = WORDS.get(text.lower()) if isinstance(own, bool) else text
    if not isinstance(own, bool | str):
        with suppress(ValueError, RecursionError):
            value = json.loads(text)
    value = float(value) if isinstance(own, float) and type(value) is int else value
    odd = isinstance(value, float) and not math.isfinite(value)
    if odd or (own is not None and type(value) is not type(own)):
        raise ChapterError(f"--parameter {name}={text}: in {chapter} {name} is {KINDS[type(own)]}, as {own!r}.")
    return value


def execute(
    notebook: Path, output: Path, values: dict[str, Any], *, log: Path, threads: int, tick: Callable[..., None]
) -> None:
    """Run one notebook; its executed copy appears only if every cell succeeded. log: for all that its kernel says.
    threads: of the kernel, unless $OMP_NUM_THREADS says. tick: called with each cell and its index, before it is run.
    """
    unfinished = output.with_suffix(".part.ipynb")
    write_atomically(log, "")
    try:
        with log.open("a", encoding="utf-8") as stream, tempfile.TemporaryDirectory(prefix="qkv-") as folder:
            papermill.execute_notebook(
                str(notebook),
                str(unfinished),
                values,
                kernel_name="python3",
                resources={"metadata": {"path": str(notebook.parent)}},  # `cwd` would move this process too
                progress_bar=False,
                stdout_file=stream,
                stderr_file=stream,
                kernel_manager_class=_kernel_manager(Path(folder), stream, threads),
                on_cell_start=tick,
            )
        text = unfinished.read_text(encoding="utf-8")
        for place in (ROOT, sys.prefix):  # a published notebook names no folder of this machine
            text = text.replace(f"{place}/", "")
        write_atomically(output, text)
    except PapermillExecutionError as error:
        if error.ename == NoFailure.__name__:
            raise NoFailure(error.evalue) from None
        fault = f"{notebook.name}, cell {error.cell_index + 1}, raised {error.ename}: {error.evalue}"
        trace = without_colours("\n".join(error.traceback))
        said = f"All that it said before stands in {log}."
        raise ChapterError(f"{fault}\n\n{error.source}\n\n{trace}\n\n{said}") from error
    except (RuntimeError, EOFError, ConnectionError) as error:  # the kernel died, or never came up
        memory = psutil.virtual_memory()
        free = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory are free now"
        advice = f"where it was too little, --jobs 1 runs one chapter at a time. What it said before stands in {log}."
        raise ChapterError(f"{notebook.name}: {str(error).rstrip('.')}; {free}, and {advice}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _kernel_manager(folder: Path, stream: TextIO, threads: int) -> type[AsyncKernelManager]:
    """For a kernel of this interpreter and this checkout, whichever kernels and settings of IPython are installed, that
    writes into a stream whatever it does not send, and that is reached through sockets in a folder that nobody else may
    read; through TCP where there are none, or where their names would be too long."""
    sockets = os.name == "posix" and len(os.fsencode(folder / "k-ipc-1")) <= SOCKET_NAME
    connection = {"transport": "ipc", "connection_file": str(folder / "k.json")} if sockets else {}
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "IPYTHONDIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    class Manager(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict())  # of no folder of kernels

        def __init__(self, **options: Any) -> None:
            super().__init__(**options, **connection)
            self.provisioner = Forked(kernel_spec=self.kernel_spec, parent=self) if FORKS else None

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            await super().start_kernel(stdout=stream, stderr=stream, env=environment, **options)

    return Manager


def without_colours(text: str) -> str:
    """A text without the escapes of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def fingerprint(model_name: str, chapter: str, values: dict[str, Any], weights: str) -> str:
    """sha256 over everything that a chapter's output can depend on."""
    files = [BOOK / f"{chapter}.ipynb", *shared_inputs(), *sources(BOOK / f"{chapter}.ipynb")]
    packages = {p: version(p) for p in PACKAGES}
    facts = {"values": values, "weights": weights, "python": sys.version, "packages": packages, "live": live()}
    facts |= {"case": sums} if (sums := case_sums(model_name)) else {}
    if needed := NEEDS.get(chapter):
        stamp = executed_path(model_name, needed).with_suffix(".key")
        facts["needed"] = stamp.read_text(encoding="utf-8") if stamp.exists() else ""
    return digest(files, json.dumps(facts, sort_keys=True, default=str), ROOT)


def shared_inputs() -> list[Path]:
    """The pins and the data, on which every output depends."""
    return [*(ROOT / p for p in PINS), *data_files(ROOT)]


def sources(notebook: Path) -> list[Path]:
    """The files of lib/ that a chapter's cells import, and those that these import, and so on, functions included."""
    code = re.sub(r"^[%!].*", "", _cells(notebook, "code"), flags=re.MULTILINE)
    return modules(imports(code), ROOT)


def _cells(notebook: Path, kind: str) -> str:
    """The texts of all cells that are `code`, or `markdown`."""
    return "\n".join(cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == kind)
