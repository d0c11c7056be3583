"""What the book's work costs beside other ways to the same numbers, from a kept run of `make bench`.

Times are one machine's, of one hour; they belong to its record and to no claim. A chapter does not measure them anew:
it would measure what else the machine was doing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from lib.errors import DataError
from lib.files import BENCH, DATA

RECORD = DATA / BENCH


def load_record(path: Path = RECORD) -> dict[str, Any]:
    """The record. Raises DataError where there is none, or another thing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {"machine", "rows", "growth", "sizes", "commit", "started"} <= set(found):
            return found
        reason = "it has no rows"
    except (OSError, ValueError) as error:
        reason = type(error).__name__
    raise DataError(f"{path} is no record of a benchmark ({reason}); make one with `python -m tests.bench --record`.")


def with_rows_replaced(record: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """The record with rows measured again in place of those of the same work and peer. Raises DataError for a row that
    it does not have."""
    new = {(row["row"], row["peer"]): row for row in found}
    if unknown := new.keys() - {(row["row"], row["peer"]) for row in record["rows"]}:
        raise DataError(f"the record has no row {' / '.join(min(unknown))}; make a whole one, without naming rows.")
    return record | {"rows": [new.get((row["row"], row["peer"]), row) for row in record["rows"]]}


def rows(record: dict[str, Any]) -> pd.DataFrame:
    """A row a comparison. bound: how many times fewer floating-point operations ours needs, which is what it could be
    faster if both ran at the same rate."""
    table = pd.DataFrame(record["rows"])
    return table.assign(bound=table.peer_gflop.where(table.peer_gflop > 0) / table.gflop.where(table.gflop > 0))


def growth(record: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(record["growth"])


def sizes(record: dict[str, Any]) -> pd.DataFrame:
    """A row a shape of model that was tried: what it needs by arithmetic, and what it did where it was run."""
    return pd.DataFrame(record["sizes"])


def report_costs(
    report: Callable[..., None], record: dict[str, Any], table: pd.DataFrame, points: pd.DataFrame
) -> None:
    """What the chapter's prose says of the record."""
    machine, judged = record["machine"], table[table.met.notna()]
    report("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads")
    report("matmul", record["matmul_gflops"], ".0f")
    report("started", record["started"])
    report("again", _again(record))
    report("comparisons", len(table))
    report("largest_difference", float((table.difference / table.tolerance.where(table.tolerance > 0)).max()), ".0%")
    report("goals", len(judged))
    report("met", int(judged.met.sum()))
    missed = judged[~judged.met.astype(bool)]
    report("missed", "; ".join(_missed(r) for r in missed.itertuples()) or "none")
    words = []
    for name, part in points.groupby("grows", sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        more, longer = last["at"] / first["at"], last.trace_s / first.trace_s
        words.append(f"{more:,.0f} times the {name}, {longer:.0f} times the seconds")
    report("growth", "; ".join(words))
    ran = [size for size in record["sizes"] if "seconds" in size]
    report("largest", ran[-1]["shape"] if ran else "none")
    report("largest_precision", ran[-1]["precision"] if ran else "-")
    report("largest_gb", float((ran[-1]["peak_gb"] if ran else 0) or "nan"), ".1f")
    over = points.trace_s / points.forward_s
    report("trace_over_forward", (float(over.min()), float(over.max())), ".1f")


def _again(record: dict[str, Any]) -> str:
    """Which rows are not of the record's own run, and of when they are."""
    later: dict[str, list[str]] = {}
    for row in record["rows"]:
        if (started := row.get("started", record["started"])) != record["started"]:
            later.setdefault(started, []).append(row["row"])
    words = [f"{' and '.join(dict.fromkeys(names))} {started} (UTC)" for started, names in later.items()]
    return f"Measured again later, with newer code: {'; '.join(words)}." if words else "All rows are of that run."


def _missed(row: Any) -> str:
    wanted = f"{row.goal:.3g} times" if row.goal else f"{row.limit_s:g} seconds"
    got = f"{row.ratio:.2f} times" if row.goal else f"{row.ours_s:.2f} seconds"
    why = f", with {row.bound:.1f} times fewer operations" if row.goal and row.bound == row.bound else ""
    return f"{row.row} beside {row.peer}: {got}{why}, wanted {wanted}"
