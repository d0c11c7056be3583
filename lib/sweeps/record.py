"""The record: finished sweeps as committed tables, which chapters read instead of doing hundreds of runs.

data/record/<model>/<sweep>.csv    a row a run: its parameters, what it gave, its seconds
data/record/<model>/<sweep>.json   the header: what the rows rest on, and when, where and by which commit they were made

1. `tables` gives a chapter the recorded rows; with RECORD=off it does the sweep here.
2. A record is refused where weights, data or specification are not those that it was made with, or where it is not as
   it was written. The code is not among these: whether it still gives these numbers is found out in `spot`.
3. `differences` compares a run that was done again with the recorded one, by the specification's tolerance.
"""

import csv
import hashlib
import io
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict

from lib.checkpoints.fetching import weights_sha256
from lib.checkpoints.named import split
from lib.errors import SweepError
from lib.facts import case_sums, load_mapping, validated
from lib.files import DATA, commit, digest, file_sha256, live, slug, write_atomically
from lib.results import Results
from lib.sweeps.experiments import meaning
from lib.sweeps.runs import Plan, estimate, finish, frame, plan
from lib.sweeps.specification import Spec, Tolerance, expand, key

FOLDER = DATA / "record"
SHARED = ("templates.yaml", "prefixes.yaml", "probes.yaml", "relations.csv", "token_types.yaml")


class Header(BaseModel):
    """What stands beside a recorded table. data: sums of what the runs read. parameters: the columns that a run was
    given. columns: how a cell is written, as its text or as JSON. sha256: of the table. seconds: of all runs, on one
    core. code: sums of the files, and versions of the packages, that made it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sweep: str
    model: str
    weights_sha256: str
    experiment: str
    runs: int
    data: dict[str, str]
    parameters: list[str]
    columns: dict[str, Literal["text", "json"]]
    sha256: str
    date: str
    commit: str
    processor: str
    seconds: float
    command: str
    code: dict[str, str]


@dataclass(frozen=True)
class Record:
    """A recorded sweep. rows: `parameters`, `result` and `seconds` of each run, as a store keeps them."""

    header: Header
    rows: list[dict[str, Any]]


def tables(report: Results, specs: Sequence[Spec], *, timing: bool = False) -> list[pd.DataFrame]:
    """The rows of several sweeps, from the record, or with RECORD=off after doing here what is missing; the report
    notes which. timing: with a column `seconds`. Raises SweepError as `read` and `finish` do."""
    if live():
        aside = partial(print, file=sys.stderr)  # into the log: what a sweep says of itself is nothing for a page
        found = finish([plan(spec) for spec in specs], fresh=True, timing=timing, say=aside)
        notes = [{"runs": len(table)} for table in found]
    else:
        records = [read(spec) for spec in specs]
        found = [frame(record.rows, timing) for record in records]
        notes = [r.header.model_dump(include={"runs", "date", "commit", "processor", "seconds"}) for r in records]
    kept = report.provenance.setdefault("sweeps", {})
    kept |= {f"{spec.model}/{spec.name}": note for spec, note in zip(specs, notes, strict=True)}
    return found


def recorded(report: Results, spec: Spec) -> pd.DataFrame:
    """The rows of a sweep for a chapter that can do without: none where there is no record, or with RECORD=off."""
    there = not live() and path_of(spec).is_file()
    return tables(report, [spec])[0] if there else pd.DataFrame()


def path_of(spec: Spec) -> Path:
    """Of the recorded table; its header has the suffix .json."""
    return FOLDER / slug(spec.model) / f"{spec.name}.csv"


def rows_of(planned: Plan, older: Record | None = None) -> list[dict[str, Any]]:
    """The runs of a plan, in its order: those that are finished here, and of the others those of an older record."""
    kept = {key(row["parameters"]): row for row in older.rows} if older else {}
    finished = planned.finished()
    return [finished.get(run.key) or kept[key(run.parameters)] for run in planned.runs]


def write(planned: Plan, command: str, older: Record | None = None) -> Path:
    """Record the finished runs of a plan. older: a record whose runs stay; then the code is said to be that of the
    older ones, and commit and processor both. Raises SweepError for a value that a table cannot hold."""
    rows, path = rows_of(planned, older), path_of(planned.spec)
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    cells = [{**row["parameters"], **row["result"], "seconds": row["seconds"]} for row in rows]
    names = list(dict.fromkeys(name for row in cells for name in row))
    columns = {name: _form(row[name] for row in cells if name in row) for name in names}
    text = io.StringIO()
    table = csv.DictWriter(text, names, restval="", lineterminator="\n")
    table.writeheader()
    try:
        table.writerows({name: _cell(value, columns[name]) for name, value in row.items()} for row in cells)
    except ValueError as error:
        raise SweepError(f"a run of {planned.spec.name} gave what no record holds: {error}.") from error
    header = Header(
        sweep=planned.spec.name,
        model=planned.spec.model,
        weights_sha256=planned.header["weights_sha256"],
        experiment=planned.spec.run,
        runs=len(rows),
        data=rests_on(planned.spec.model),
        parameters=list(dict.fromkeys(name for row in rows for name in row["parameters"])),
        columns=columns,
        sha256=hashlib.sha256(text.getvalue().encode()).hexdigest(),
        date=datetime.now(UTC).date().isoformat(),
        commit=f"{older.header.commit}; {len(rows) - older.header.runs} more by {commit()[:12]}" if older else commit(),
        processor=" and ".join(dict.fromkeys([*(older.header.processor.split(" and ") if older else []), processor])),
        seconds=round(sum(row["seconds"] for row in rows), 1),
        command=command,
        code=older.header.code if older else meaning(planned.spec.run),
    )
    write_atomically(path, text.getvalue())
    write_atomically(path.with_suffix(".json"), header.model_dump_json(indent=1) + "\n")
    return path


def read(spec: Spec, *, partly: bool = False) -> Record:
    """The record of a sweep. partly: it may lack runs of the specification. Raises SweepError, with what to do, where
    there is none, where it is damaged, and where it was made of other weights, other data or another specification
    than there are now."""
    path = path_of(spec)
    command = f"python -m lib record {spec.name.removesuffix('-seeds')} --model {spec.model}"
    renew = f"`{command}` renews it; with RECORD=off in the environment the runs are done here."
    if case_sums(spec.model):
        renew = "The record is of the book's cases; with RECORD=off in the environment the runs are done here."
    if not path.is_file() or not path.with_suffix(".json").is_file():
        raise SweepError(f"there is no record {path}. {renew} {estimate(plan(spec))}.")
    try:
        header = validated(Header, json.loads(path.with_suffix(".json").read_text("utf-8")), "the header", SweepError)
        rows = _rows(path.read_text(encoding="utf-8"), header)  # line ends of another system are read as ours
    except (ValueError, SweepError, RecursionError) as error:
        raise SweepError(f"{path} is no record: {error} {renew}") from error
    if fault := _fault(spec, header, rows, partly):
        raise SweepError(f"{path} {fault}. {renew}")
    return Record(header, rows)


def rests_on(model_name: str) -> dict[str, str]:
    """sha256 of each part of data/ that the runs of a model can read: its cases, their facts, what all models share;
    of the files of a case of one's own, where there is one."""
    entries, own_case = load_mapping(DATA / "cases.yaml"), case_sums(model_name)
    cases = entries.get(model_name) or entries["any"]
    facts = {f"facts/{case[key]}.csv" for case in cases for key in ("facts", "large")}
    own = (
        [p.relative_to(DATA).as_posix() for p in (DATA / "organism").glob("*.[cy]*")]
        if split(model_name)[0] == "organism"
        else []
    )
    sums = {name: file_sha256(DATA / name) for name in sorted({*facts, *SHARED, *own})}
    passages = sorted((DATA / "passages").glob("*.txt"))
    cases_sha256 = hashlib.sha256(json.dumps(cases, sort_keys=True).encode()).hexdigest()
    return {**sums, **own_case, "passages": digest(passages, "", DATA), f"cases of {model_name}": cases_sha256}


def differences(recorded: dict[str, Any], again: dict[str, Any], tolerance: Tolerance) -> list[str]:
    """What a run gave otherwise than the recorded one, beyond the tolerance, as `column: recorded, now`."""
    names = dict.fromkeys([*recorded, *again])
    pairs = {name: (recorded.get(name), again.get(name)) for name in names}
    return [
        f"{name}: recorded {_short(was)}, now {_short(now)}"
        for name, (was, now) in pairs.items()
        if not _agree(was, now, tolerance, next((v for k, v in tolerance.columns.items() if fnmatch(name, k)), None))
    ]


def _agree(was: Any, now: Any, tolerance: Tolerance, own: float | None) -> bool:
    """Whether two values are the same. own: the largest difference of this column's numbers, if it has one."""
    if isinstance(was, dict) and isinstance(now, dict):
        return was.keys() == now.keys() and all(_agree(was[k], now[k], tolerance, own) for k in was)
    if isinstance(was, list) and isinstance(now, list):
        pairs = list(zip(was, now, strict=False))
        near = abs(len(was) - len(now)) <= tolerance.lengths
        return near and all(_agree(a, b, tolerance, own) for a, b in pairs)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (was, now))
    if not numbers:
        return bool(was == now)
    whole = isinstance(was, int) and isinstance(now, int)
    room = tolerance.counts if whole else tolerance.absolute + tolerance.relative * max(abs(was), abs(now))
    return bool(abs(was - now) <= (room if own is None else own))


def _fault(spec: Spec, header: Header, rows: list[dict[str, Any]], partly: bool) -> str:
    """What keeps a record from standing for a sweep as it is now, as the end of a sentence; empty if nothing."""
    for name, is_now in (("sweep", spec.name), ("model", spec.model), ("experiment", spec.run)):
        if (was := getattr(header, name)) != is_now:
            return f"was made of the {name} {was}, not {is_now}"
    if header.weights_sha256 != (weights := weights_sha256(spec.model)):
        return f"was made with weights {header.weights_sha256[:12]}..., not {weights[:12]}..."
    now = rests_on(spec.model)
    if changed := [name for name in sorted(now) if now[name] != header.data.get(name)]:
        return f"was made of other data ({', '.join(changed)})"
    recorded, wanted = {key(row["parameters"]) for row in rows}, {key(parameters) for parameters in expand(spec)}
    if recorded != wanted and not (partly and recorded < wanted):
        return f"lacks {len(wanted - recorded)} runs of the specification, and has {len(recorded - wanted)} others"
    return ""


def _rows(text: str, header: Header) -> list[dict[str, Any]]:
    """The runs of a table. Raises ValueError for one that is not what the header says, with the line."""
    if hashlib.sha256(text.encode()).hexdigest() != header.sha256:
        raise ValueError("it is not as it was written: its sum is another than the header's, so it was cut or edited.")
    table = csv.DictReader(io.StringIO(text))
    if missing := [name for name in (*header.columns, "seconds") if name not in (table.fieldnames or ())]:
        raise ValueError(f"it has no column {', '.join(missing)}.")
    rows, seen = list[dict[str, Any]](), set[str]()
    for line, cells in enumerate(table, start=2):
        try:
            row = {name: _value(cells[name], form) for name, form in header.columns.items() if cells[name]}
            parameters = {name: row.pop(name) for name in header.parameters if name in row}
            rows.append({"parameters": parameters, "seconds": row.pop("seconds"), "result": row})
        except (ValueError, KeyError, RecursionError) as error:
            raise ValueError(f"line {line} cannot be read ({error}).") from error
        if key(parameters) in seen:
            raise ValueError(f"line {line} is a run that stands before it already.")
        seen.add(key(parameters))
    if len(rows) != header.runs:
        raise ValueError(f"it has {len(rows)} runs, not {header.runs}.")
    return rows


def _form(values: Iterable[Any]) -> Literal["text", "json"]:
    return "text" if all(isinstance(v, str) and v and v.isprintable() for v in values) else "json"


def _cell(value: Any, form: str) -> str:
    return value if form == "text" else json.dumps(value, ensure_ascii=False, allow_nan=False)


def _value(cell: str, form: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number")

    return cell if form == "text" else json.loads(cell, parse_constant=refuse)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
