"""What the book's work costs beside other ways to the same numbers, from a kept run of `make bench`.

Times are one machine's, of one hour; they belong to its record and to no claim. A chapter does not measure them anew:
it would measure what else the machine was doing.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from lib.errors import DataError
from lib.files import BENCH, DATA
from lib.results import Results
from lib.show.sentences import say

RECORD = DATA / BENCH


def load_record(path: Path = RECORD) -> dict[str, Any]:
    """The record. Raises DataError where there is none, or another thing."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if {"machine", "rows", "growth", "sizes", "commit", "started"} <= set(record):
            return record
        reason = "it has no rows"
    except (OSError, ValueError) as error:
        reason = type(error).__name__
    raise DataError(f"{path} is no record of a benchmark ({reason}); make one with `python -m tests.bench --record`.")


def with_rows_replaced(record: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The record with rows measured again in place of those of the same work and peer. Raises DataError for a row that
    it does not have."""
    new = {(row["row"], row["peer"]): row for row in measured}
    if unknown := new.keys() - {(row["row"], row["peer"]) for row in record["rows"]}:
        raise DataError(f"the record has no row {' / '.join(min(unknown))}; make a whole one, without naming rows.")
    return record | {"rows": [new.get((row["row"], row["peer"]), row) for row in record["rows"]]}


def tables(record: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """A row a comparison (bound: how many times fewer floating-point operations ours needs, which is what it could be
    faster if both ran at the same rate; reached: its share of that); a row a point of `growth` (what grows, where it
    stands, seconds of a trace and of a plain forward pass); a row a shape of model that was tried (what it needs by
    arithmetic, and what it did)."""
    rows, growth, sizes = (pd.DataFrame(record[name]) for name in ("rows", "growth", "sizes"))
    bound = rows.peer_gflop.where(rows.peer_gflop > 0) / rows.gflop.where(rows.gflop > 0)
    return rows.assign(bound=bound, reached=rows.ratio / bound), growth, sizes


def builds(record: dict[str, Any]) -> pd.DataFrame:
    """A row a build of the whole book and a row a chapter of it; none, if the record has no such times."""
    rows = record.get("book") or [{"what": "not measured", "seconds": float("nan")}]
    return pd.DataFrame(rows, columns=["what", "seconds", "limit_s", "met", "peak_mb"])


def report_costs(report: Results, record: dict[str, Any], table: pd.DataFrame, points: pd.DataFrame) -> None:
    """What the chapter's prose says of the record. table, points: the first two of its `tables`."""
    machine, judged = record["machine"], table[table.met.notna()]
    missed = list(judged[~judged.met.astype(bool)].itertuples())
    ends = [(name, part.iloc[0], part.iloc[-1]) for name, part in points.groupby("grows", sort=False)]
    grown = [(name, last["at"] / first["at"], last.trace_s / first.trace_s) for name, first, last in ends]
    report("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads")
    report.many({"matmul": (record["matmul_gflops"], ".0f"), "started": record["started"]})
    report.many({"again": measured_again(record), "comparisons": len(table)})
    largest_difference = (table.difference / table.tolerance.where(table.tolerance > 0)).max()
    report("largest_difference", float(largest_difference), ".0%")
    report.many({"goals": len(judged), "met": int(judged.met.sum())})
    report.many({"missed": say("costs", "missed", missed=missed), "growth": say("costs", "growth", growth=grown)})
    ran = [size for size in record["sizes"] if "seconds" in size]
    largest = ran[-1] if ran else {"shape": "none", "precision": "-", "peak_gb": None}
    report.many({"largest": largest["shape"], "largest_precision": largest["precision"]})
    report("largest_gb", float(largest["peak_gb"] or "nan"), ".1f")


def measured_again(record: dict[str, Any]) -> str:
    """Which rows are not of the record's own run, and of when they are."""
    later: dict[str, list[str]] = {}
    for row in record["rows"]:
        if (started := row.get("started", record["started"])) != record["started"]:
            later.setdefault(started, []).append(row["row"])
    return say("costs", "again", later=later)
