"""What the book's work costs beside other ways to the same numbers, from kept runs of `make bench`, one a model.

Times are one machine's, of one hour; they belong to its record and to no claim. A chapter does not measure them anew:
it would measure what else the machine was doing.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from lib.errors import DataError
from lib.files import DATA, slug
from lib.results import Results
from lib.show.sentences import say

MODELS = ("smollm2", "gemma3")  # that have a record, the first with what grows and sizes; else those are empty

SHARE = 0.8  # of the speed-up that the counts of operations allow: what a row is to reach


def path_of(model_name: str) -> Path:
    return DATA / ("bench.json" if model_name == MODELS[0] else f"bench-{slug(model_name)}.json")


def load_record(model_name: str) -> dict[str, Any]:
    """A model's record. Raises DataError where there is none, or another thing."""
    path = path_of(model_name)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if {"machine", "rows", "growth", "sizes", "commit", "started"} <= set(record):
            return record
        reason = "it has no rows"
    except (OSError, ValueError) as error:
        reason = type(error).__name__
    make = f"python -m tests.bench --model {model_name} --record"
    raise DataError(f"{path} is no record of a benchmark ({reason}); make one with `{make}`.")


def tables(records: dict[str, dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Of the records by model: a row a comparison (model; bound: how many times fewer floating-point operations ours
    needs, which is what it could be faster if both ran at the same rate; reached: its share of that); a row a point of
    `growth` (what grows, where it stands, seconds of a trace and of a plain forward pass); a row a shape of model that
    was tried (what it needs by arithmetic, and what it did)."""
    rows = pd.DataFrame([row | {"model": name} for name, record in records.items() for row in record["rows"]])
    growth, sizes = (pd.DataFrame(records[MODELS[0]][name]) for name in ("growth", "sizes"))
    bound = rows.peer_gflop.where(rows.peer_gflop > 0) / rows.gflop.where(rows.gflop > 0)
    before = rows.goal.notna() & rows.reindex(columns=["bound"]).bound.isna()  # measured against other goals, then
    goal = rows.goal.mask(before, SHARE * bound)
    met = rows.met.mask(before, rows.ratio >= goal)
    return rows.assign(bound=bound, reached=rows.ratio / bound, goal=goal, met=met), growth, sizes


def builds(record: dict[str, Any]) -> pd.DataFrame:
    """A row a build of the whole book and a row a chapter of it; none, if the record has no such times."""
    rows = record.get("book") or [{"what": "not measured", "seconds": float("nan")}]
    return pd.DataFrame(rows, columns=["what", "seconds", "limit_s", "met", "peak_mb"])


def report_costs(report: Results, records: dict[str, Any], table: pd.DataFrame, points: pd.DataFrame) -> None:
    """What the chapter's prose says of the records by model. table, points: the first two of their `tables`."""
    judged = table[table.met.notna()]
    missed = list(judged[~judged.met.astype(bool)].itertuples())
    ends = [(name, part.iloc[0], part.iloc[-1]) for name, part in points.groupby("grows", sort=False)]
    grown = [(name, last["at"] / first["at"], last.trace_s / first.trace_s) for name, first, last in ends]
    runs = [
        say("costs", "run", **{"load": None, "model": name, "again": measured_again(record)} | record)
        for name, record in records.items()
    ]
    report.many({"runs": " ".join(runs), "comparisons": len(table)})
    largest_difference = (table.difference / table.tolerance.where(table.tolerance > 0)).max()
    report("largest_difference", float(largest_difference), ".0%")
    report.many({"goals": len(judged), "met": int(judged.met.sum())})
    report.many({"missed": say("costs", "missed", missed=missed), "growth": say("costs", "growth", growth=grown)})
    ran = [size for size in records[MODELS[0]]["sizes"] if "seconds" in size]
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
