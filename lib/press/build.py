"""Build the dashboard and the HTML book, from what the chapters of one model gave.

The book is staged from the executed copies, the pages of book/, and what is made from the results: the page of claims,
the foot of each chapter, the numbers that may come out otherwise elsewhere, the times. Jupyter Book builds it with
warnings as errors into a new folder, which gets the dashboard and is put in place of _build/html in one step. What it
said stands in _build/logs/<model>/book.log.
"""

import ast
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import vl_convert
import yaml

from lib.checkpoints.fetching import weights_sha256
from lib.checkpoints.named import canonical
from lib.errors import ChapterError
from lib.facts import case_sums
from lib.files import BUILD, ROOT, digest, file_sha256, live, make_folder, modules, run_folder, slug, write_atomically
from lib.models import load, use_device_of
from lib.press import beside, boxes, claims, execute, unchanged
from lib.press.check import judged
from lib.press.execute import BOOK, chapter_names, executed_path, is_current, log_path, shared_inputs, without_colours
from lib.press.texts import fill
from lib.results import PACKAGES, chapter_folder, results_path
from lib.sweeps import kept_sinks, spot

_JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"  # this environment's, whatever the PATH says
TWO_MODELS = "      - file: book/two_models\n"  # in _toc.yml
DIFFER, TIMES = "% what may differ\n", "% what it took\n"  # comments in a page, in whose place what is made stands


def provenances(model_name: str) -> dict[str, dict[str, Any]]:
    """Where each chapter's results come from, by chapter."""
    texts = {c: results_path(model_name, c).read_text(encoding="utf-8") for c in chapter_names()}
    return {chapter: json.loads(text)["provenance"] for chapter, text in texts.items()}


def dashboard_path(model_name: str) -> Path:
    return BUILD / "dashboard" / f"{run_folder(model_name)}.html"


def dashboard(
    model_name: str, output: Path | None = None, *, force: bool = False, say: Callable[[str], None] = print
) -> Path:
    """The page of all heads of a model, from its results and edits; kept if nothing that it depends on changed.
    output: a copy elsewhere. Raises BookError as `lib.dashboard.collect` does; then no page is left standing."""
    model_name = canonical(model_name)
    with execute.alone(say):
        path = _dashboard(model_name, force, say)
    if output is not None:
        write_atomically(output, path.read_text(encoding="utf-8"))
        say(f"dashboard: copied to {output}")
    return output or path


def _dashboard(model_name: str, force: bool, say: Callable[[str], None]) -> Path:
    from lib.dashboard.collect import TAKEN, collect
    from lib.dashboard.render import render

    weights, path = weights_sha256(model_name), dashboard_path(model_name)
    if not force and dashboard_is_current(model_name, weights):
        say(f"dashboard: nothing changed, kept {path}")
    else:
        for old in (path.with_suffix(".key"), path):
            old.unlink(missing_ok=True)
        start = time.perf_counter()
        made = {c: json.loads(p.read_text("utf-8")) for c in TAKEN if (p := results_path(model_name, c)).exists()}
        without = (reason := boxes.none_of(made)) and fill("no_failure.html", model_name=model_name, reason=reason)
        write_atomically(path, without or render(collect(use_device_of(load(model_name)))))
        write_atomically(path.with_suffix(".key"), _dashboard_key(model_name, weights))
        size, seconds = path.stat().st_size / 1e6, time.perf_counter() - start
        say(f"dashboard: made {path}, {size:.1f} MB, in {seconds:.0f} s")
    return path


def dashboard_is_current(model_name: str, weights: str) -> bool:
    """Whether the page is there and belongs to the present results, edits, weights and sources."""
    path = dashboard_path(model_name)
    stamp = path.with_suffix(".key")
    return path.is_file() and stamp.is_file() and stamp.read_text() == _dashboard_key(model_name, weights)


def _dashboard_key(model_name: str, weights: str) -> str:
    from lib.dashboard.collect import EDITS, TAKEN
    from lib.dashboard.render import PARTS

    files = [*shared_inputs(), *modules({"dashboard/collect", "dashboard/render"}, ROOT), *PARTS]
    files += [results_path(model_name, chapter) for chapter in TAKEN]
    for folder in (chapter_folder(model_name, EDITS), kept_sinks.folder(model_name)):
        files += sorted(folder.glob("*.safetensors"))
    packages = {p: version(p) for p in (*PACKAGES, "vl-convert-python")}
    return digest(files, json.dumps([weights, sys.version, packages, case_sums(model_name)], sort_keys=True), ROOT)


def whole(model_name: str, *, say: Callable[[str], None] = print, bars: bool = False) -> None:
    """Chapters, spot-checks (unless $RECORD is `off`), dashboard and HTML, where something changed."""
    with execute.alone(say):
        execute.run(model_name, chapter_names(), say=say, bars=bars)
        with ThreadPoolExecutor(1) as aside:  # a core is idle while the longest run of the spot-checks ends
            page = aside.submit(dashboard, model_name, say=say)
            if not live():
                spot.spot_check(model_name, say=say)
            page.result()
        build(model_name, say=say)


def build(model_name: str, *, force: bool = False, say: Callable[[str], None] = print) -> Path:
    """Stage the executed chapters with the pages of book/ and build the HTML. Raises ChapterError where a chapter
    was not executed for this model or where the build warns."""
    model_name = canonical(model_name)
    page = _require_inputs(model_name)
    html, stamp = make_folder(BUILD) / "html", BUILD / "html.key"
    with execute.alone(say), tempfile.TemporaryDirectory(prefix="stage-", dir=BUILD) as temporary:
        for killed in set(BUILD.glob("stage-*")) - {Path(temporary)}:  # an earlier build's
            shutil.rmtree(killed, ignore_errors=True)
        stage = Path(temporary) / "stage"
        _stage(model_name, stage)
        beside = [Path(__file__).with_name("theme.py"), *([page] if page else [])]
        files = sorted(p for p in stage.rglob("*") if p.is_file())
        key = digest(files, f"{model_name} {version('jupyter-book')} {' '.join(map(file_sha256, beside))}", stage)
        if not force and stamp.exists() and stamp.read_text() == f"{key} {unchanged.listing(html)}":
            say("book: nothing changed, kept")
            return html / "index.html"
        stamp.unlink(missing_ok=True)
        built = _html(stage, Path(temporary), log_path(model_name, "book"))
        if page:
            shutil.copy(page, built / "dashboard.html")
        if html.exists():
            html.rename(Path(temporary) / "old")
        built.rename(html)
    write_atomically(stamp, f"{key} {unchanged.listing(html)}")
    say(f"book: built {html / 'index.html'}")
    return html / "index.html"


def _require_inputs(model_name: str) -> Path | None:
    """The dashboard, if the book has a page that shows it. Raises ChapterError where it or a chapter is not current."""
    weights = weights_sha256(model_name)
    missing = [c for c in chapter_names() if not is_current(model_name, c, None, weights)]
    if missing:
        fault = f"not executed on {model_name} since its inputs changed: {', '.join(missing)}"
        raise ChapterError(f"{fault}. Run `python -m lib run --model {model_name}` first.")
    if not (BOOK / "dashboard.md").is_file():
        return None
    if not dashboard_is_current(model_name, weights):
        fault = f"there is no dashboard of the present results of {model_name}"
        raise ChapterError(f"{fault}. Run `python -m lib dashboard --model {model_name}` first.")
    return dashboard_path(model_name)


def _stage(model_name: str, stage: Path) -> None:
    """The sources of the book in a new folder: pages, executed chapters, and what is made from the results."""
    shutil.copytree(BOOK, stage / "book", ignore=shutil.ignore_patterns("*.ipynb", ".ipynb_checkpoints"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, stage)
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    static = make_folder(stage / "book" / "_static")
    # only pages with a chart read it; in a function, or its names would meet those of other scripts
    (static / "vega.js").write_text(f"(() => {{{bundle}\n}})();", encoding="utf-8")
    runs = provenances(model_name)
    recorded = any("date" in note for run in runs.values() for note in run.get("sweeps", {}).values())
    checks = {c.name: c for c in (spot.check(*pair) for pair in spot.kept(model_name))} if recorded else {}
    verdicts = judged(model_name) if (ROOT / "data" / "claims.yaml").is_file() else []
    for chapter in chapter_names():
        shutil.copy(executed_path(model_name, chapter), stage / "book")
        shutil.copy(results_path(model_name, chapter), stage / "book")
    reported = {c: json.loads((stage / "book" / f"{c}.json").read_text(encoding="utf-8")) for c in runs}
    for chapter, run in reported.items():
        boxes.add_box(stage / "book" / f"{chapter}.ipynb", model_name, run, verdicts)
        add_foot(stage / "book" / f"{chapter}.ipynb", run["provenance"], checks)
    index = stage / "book" / "index.md"
    others = [] if boxes.none_of(reported) else beside.others(model_name)
    text = boxes.landing(index.read_text(encoding="utf-8"), model_name, reported, verdicts, others)
    index.write_text(text, encoding="utf-8")
    _stage_beside(model_name, stage, reported, others)
    for picture in sorted(results_path(model_name, "").parent.glob(boxes.PANELS)):
        shutil.copy(picture, stage / "book")
    if verdicts:
        text = claims.page(verdicts, model_name, {other.name: other.judged for other in others})
        (stage / "book" / "reproduction.md").write_text(text, encoding="utf-8")
    if (path := stage / "book" / "verify.md").is_file():
        expected = ROOT / "data" / "expected" / f"{slug(model_name)}.json"
        wanted = json.loads(expected.read_text(encoding="utf-8")) if expected.is_file() else {}
        text = path.read_text(encoding="utf-8").replace(DIFFER, tolerances(model_name, wanted))
        path.write_text(text.replace(TIMES, fill("times.md", runs=runs)), encoding="utf-8")


def _stage_beside(
    model_name: str, stage: Path, reported: Mapping[str, Mapping[str, Any]], others: list[beside.Beside]
) -> None:
    """The page that sets models side by side, and its pictures; no page where no other model's results are kept."""
    page, contents = stage / "book" / "two_models.md", stage / "_toc.yml"
    if not others:
        page.unlink(missing_ok=True)
        contents.write_text(contents.read_text(encoding="utf-8").replace(TWO_MODELS, ""), encoding="utf-8")
        return
    text = boxes.two_models(page.read_text(encoding="utf-8"), model_name, reported, others)
    page.write_text(text, encoding="utf-8")
    for other in others:
        for picture in other.pictures:
            shutil.copy(picture, page.with_name(f"{other.name}_{picture.name}"))


def add_foot(notebook: Path, provenance: dict[str, Any], checks: Mapping[str, spot.Check]) -> None:
    """Append the foot to a staged executed chapter, and show its parameters once: the cell that papermill adds is not
    shown if it repeats the one above it. checks: of the records that it read, by `<model>/<sweep>`."""
    book = nbformat.read(notebook, as_version=4)
    foot = fill("foot.md", run=provenance, chapter=notebook.stem, checks=checks)
    book.cells.append(nbformat.v4.new_markdown_cell(foot, id=f"{notebook.stem[:2]}-foot"))
    tagged = {tag: cell for cell in book.cells for tag in cell.metadata.get("tags", [])}
    added, shown = tagged.get("injected-parameters"), tagged.get("parameters")
    if added and shown and _statements(added.source) <= _statements(shown.source):
        added.metadata["tags"].append("remove-cell")
    nbformat.write(book, notebook)


def _statements(source: str) -> set[str]:
    return {ast.dump(statement) for statement in ast.parse(source).body}


def tolerances(model_name: str, expected: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Which numbers may differ on another machine and by how much, as MyST markdown. expected: as data/expected holds
    them, by chapter and key; empty where nothing is expected of the model."""
    entries = [(chapter, key, wanted) for chapter, keys in expected.items() for key, wanted in keys.items()]
    loose = [entry for entry in entries if "value" not in entry[2] or entry[2].get("tolerance")]
    return fill("tolerances.md", model_name=model_name, total=len(entries), loose=loose)


def _html(stage: Path, output: Path, log: Path) -> Path:
    """The folder that Jupyter Book makes of the stage. Raises ChapterError with its warnings where it has any."""
    options = ["build", str(stage), "--path-output", str(output), "-W", "-n", "--keep-going"]
    ended = subprocess.run([sys.executable, "-c", _JUPYTER_BOOK, *options], capture_output=True, text=True, cwd=ROOT)
    said = without_colours(ended.stdout + ended.stderr).replace(str(stage), "")
    write_atomically(log, said)
    if ended.returncode:
        trouble = [line for line in said.splitlines() if "WARNING" in line or "ERROR" in line]
        lines = "\n".join(trouble or said.splitlines()[-30:])
        raise ChapterError(f"the book does not build without warnings:\n{lines}\nAll that was said stands in {log}.")
    return output / "_build" / "html"


def imprint(model_name: str) -> dict[str, str]:
    """What the title page of a built book says: title and author, of which runs it is, and the date of the last."""
    model_name = canonical(model_name)
    config, runs = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8")), list(provenances(model_name).values())
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    weights, version_ = runs[0]["weights_sha256"], runs[0]["lib"]
    about = f"Made on {model_name}, weights sha256 {weights}, by version {version_}, commit {commits}."
    return {"title": config["title"], "author": config["author"], "about": about, "date": max(r["start"] for r in runs)}
