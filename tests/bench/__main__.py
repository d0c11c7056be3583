"""`make bench`: every row measured and checked, the table printed, all of it kept as JSON.

python -m tests.bench [ROW ...] [--model NAME] [--book] [--output FILE | --record]
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from lib import __version__, models
from lib.errors import DataError
from lib.files import BUILD, commit, write_atomically
from lib.studies import costs
from tests.bench import big, growth, measure, rows
from tests.bench.book import BOOK

app = typer.Typer(add_completion=False)


def with_rows_replaced(record: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The record with rows measured again in place of those of the same work and peer. Raises DataError for a row that
    it does not have."""
    new = {(row["row"], row["peer"]): row for row in measured}
    if unknown := new.keys() - {(row["row"], row["peer"]) for row in record["rows"]}:
        raise DataError(f"the record has no row {' / '.join(min(unknown))}; make a whole one, without naming rows.")
    return record | {"rows": [new.get((row["row"], row["peer"]), row) for row in record["rows"]]}


@app.command()
def bench(
    only: Annotated[list[str] | None, typer.Argument(help="Rows to run, such as `step`; all if none is named.")] = None,
    model_name: Annotated[
        str, typer.Option("--model", help="The rows' model; what grows, and sizes, are of smollm2's shape and its run.")
    ] = "smollm2",
    output: Annotated[Path, typer.Option(help="The file to write.")] = BUILD / "bench.json",
    record: Annotated[
        bool, typer.Option(help="Write the record that the book shows; of some rows, put them in place of its own.")
    ] = False,
    book: Annotated[bool, typer.Option(help="Take the times that `python -m tests.bench.book` has written.")] = False,
) -> None:
    """Measure the book's work against its peers, each row with its equality check. Exit 1 where results differ."""
    built = json.loads(BOOK.read_text("utf-8")) if book else []
    makers = {maker.__name__.removesuffix("_rows"): maker for maker in rows.ROWS}
    for word in only or ():
        if word not in makers:
            raise typer.BadParameter(f"there is no row {word!r}; choose from {', '.join(makers)}.")
    if model_name not in costs.MODELS:
        raise typer.BadParameter(f"{model_name!r} has no record; choose from {', '.join(costs.MODELS)}.")
    torch.set_num_threads(2)
    model, found = models.use_device_of(models.load(model_name)), list[dict]()
    stamp = {"commit": commit(), "started": datetime.now(UTC).isoformat(timespec="seconds"), "load": os.getloadavg()[0]}
    shapes = not only and model.name == "smollm2"
    for name in (bar := tqdm(list(only or makers), desc="bench")):
        for row in makers[name](model):
            bar.set_postfix_str(f"{row.name} / {row.peer_name}")
            found.append(measure.run(row, measure.matmul_rate()) | stamp)
    if only and record:
        content = with_rows_replaced(costs.load_record(model.name), found) | ({"book": built} if book else {})
    else:
        content = {
            "machine": measure.machine(),
            "lib": __version__,
            "matmul_gflops": measure.matmul_rate() / 1e9,
            **stamp,
            "rows": found,
            "book": built,
            "growth": growth.measure_all(model) if shapes else [],
            "sizes": big.measure_all(model) if shapes else [],
        }
    output = costs.path_of(model.name) if record else output
    write_atomically(output, json.dumps(content, indent=1) + "\n")
    Console(width=180).print(show(found))
    print(f"written to {output}")


def show(found: list[dict]) -> Table:
    table = Table(title="Ours beside a peer, in one process, interleaved")
    for column in (
        "row",
        "beside",
        "times faster (spread)",
        "goal",
        "bound",
        "ours s",
        "peer s",
        "MB",
        "of matmul rate",
        "differ by",
    ):
        table.add_column(column)
    for r in found:
        goal = [f"{r['goal']:.2g} times" if r["goal"] else "", f"{r['limit_s']:g} s" if r["limit_s"] else ""]
        said = " ".join(filter(None, goal)) + ("" if r["met"] is None else " met" if r["met"] else " missed")
        table.add_row(
            r["row"],
            r["peer"],
            f"{r['ratio']:.2f} ({r['least']:.2f} to {r['most']:.2f})",
            said,
            f"{r['bound']:.2f}" if r["bound"] else "-",
            f"{r['ours_s']:.3f}",
            f"{r['peer_s']:.3f}",
            f"{r['ours_mb']:.0f} / {r['peer_mb']:.0f}" if r["ours_mb"] is not None else "-",
            f"{r['matmul_share']:.0%}" if r["matmul_share"] else "-",
            f"{r['difference']:.1e}",
        )
    return table


if __name__ == "__main__":
    app()
