"""Make the record, and hold it to account: in every build, runs that the commit draws are done again and compared."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lib.checkpoints.named import canonical, split
from lib.errors import SweepError
from lib.files import BUILD, commit, slug
from lib.models import load as load_model
from lib.studies import pathways
from lib.sweeps import kept_sinks, record
from lib.sweeps.experiments import differing, meaning
from lib.sweeps.runs import Plan, estimate, finish, frame, plan
from lib.sweeps.specification import SPECS, Spec, further, key, load

DRAWN = 2  # runs of each record that a build does again, at least
BESIDE = ("planted", "plants")  # records of the organism that chapters 4 and 7 read on every model
Pair = tuple[Plan, record.Record]  # a record, and the plan of doing its runs again


@dataclass(frozen=True)
class Check:
    """What became of a record here. again: the parameters of the runs that were done again. wrong: what they gave
    otherwise. outdated: files and packages of which the record had another version."""

    header: record.Header
    again: list[dict[str, Any]]
    wrong: list[str]
    outdated: str

    @property
    def name(self) -> str:
        """`<model>/<sweep>`, as a chapter notes what it read."""
        return f"{self.header.model}/{self.header.sweep}"

    @property
    def runs(self) -> list[str]:
        """Those that were done again, in words."""
        return [", ".join(f"{key}={value}" for key, value in run.items()) for run in self.again]


def recordable(model_name: str, names: Sequence[str] = ()) -> list[Spec]:
    """The sweeps of data/sweeps that are recorded of a model: all but those of another model alone. names: only these.
    Raises SweepError for a name that is none of them."""
    specs = {path.stem: load(path.stem) for path in sorted(SPECS.glob("*.yaml"))}
    known = [name for name, spec in specs.items() if spec.model in ("smollm2", model_name)]
    if unknown := [name for name in names if name not in known]:
        raise SweepError(f"there is no sweep {unknown[0]!r} to record of {model_name}; choose from {', '.join(known)}.")
    return [load(name, model_name=model_name) for name in names or known]


def make(
    model_name: str,
    names: Sequence[str] = (),
    *,
    missing: bool = False,
    say: Callable[[str], None] = print,
    **options: Any,
) -> None:
    """Do sweeps of a model and record them, each with what follows from it, and the sinks that `kept_sinks` keeps;
    killed, the same call goes on. missing: what is recorded stays, and only runs are done that it lacks. options: as
    `finish` takes them. Raises SweepError as `recordable` and `finish` do; then what is recorded stays as it was."""
    model_name = canonical(model_name)
    command = " ".join(["python -m lib record", *names, "--model", model_name])
    first = _done(recordable(model_name, names), missing, say, options)
    tables = [frame(record.rows_of(*pair)) for pair in first]
    following = [spec for (p, _), table in zip(first, tables, strict=True) for spec in _followed(p.spec, table)]
    for planned, older in [*first, *_done(following, missing, say, options)]:
        say(f"recorded {record.write(planned, command, older)}: {len(planned.runs)} runs")
        if planned.spec.name == "repairs":
            kept_sinks.keep(load_model(model_name), frame(record.rows_of(planned, older)), missing=missing)


def _done(
    specs: Sequence[Spec], missing: bool, say: Callable[[str], None], options: dict[str, Any]
) -> list[tuple[Plan, record.Record | None]]:
    """Plans whose runs are all finished here or, if only missing ones are done, recorded before."""
    pairs = [(plan(spec), record.read(spec, partly=True) if missing else None) for spec in specs]
    todo = [_without(planned, older) for planned, older in pairs]
    for planned in todo:
        if not planned.store.fault(planned.header):  # otherwise `finish` sets it aside, once it has the lock
            say(estimate(planned, options.get("workers")))
    finish(todo, fresh=True, say=say, **options)
    return pairs


def _without(planned: Plan, older: record.Record | None) -> Plan:
    """The plan of the runs that a record lacks."""
    kept = {key(row["parameters"]) for row in older.rows} if older else set()
    return replace(planned, runs=tuple(run for run in planned.runs if key(run.parameters) not in kept))


def spot_check(model_name: str, *, whole: bool = False, say: Callable[[str], None] = print) -> list[Check]:
    """Do DRAWN runs of every record of a model again, unless as many were done with the present code. whole: every run,
    of which those count that were done here with RECORD=off. Raises SweepError where one of them does not give what is
    recorded, with both values."""
    pairs = kept(model_name, whole=whole)
    due = [p if whole else _drawn(p, recorded) for p, recorded in pairs if whole or not _again(p)]
    finish(due, fresh=True, seconds=_seconds(pairs), say=say)
    checks = [check(*pair) for pair in pairs]
    for c in checks:
        verdict = "NOT as recorded" if c.wrong else "as recorded"
        say(f"{c.header.sweep} on {c.header.model}: {len(c.again)} of {c.header.runs} runs done again, {verdict}")
        if c.outdated:
            say(f"  it was recorded by another version of {c.outdated}; `{c.header.command}` renews it")
    if wrong := [line for c in checks for line in c.wrong]:
        lines = "\n".join(["what is recorded is not what the runs give here:", *wrong])
        raise SweepError(
            f"{lines}\nIf the code is right, renew the record (`python -m lib record --model {model_name}`); if the "
            "record is right, find out what changed the numbers."
        )
    return checks


def check(planned: Plan, recorded: record.Record) -> Check:
    """What the runs that the present code did again say of a record. Raises SweepError where there are none."""
    if not (again := _again(planned)):
        raise SweepError(
            f"no runs of the record of {planned.spec.name} were done again with the present code; run `python -m lib "
            f"spot-check --model {planned.spec.model}`."
        )
    was = {key(row["parameters"]): row["result"] for row in recorded.rows}
    wrong = [
        f"  {planned.spec.name}, {', '.join(f'{k}={v}' for k, v in row['parameters'].items())}: {line}"
        for row in again
        for line in record.differences(
            was[key(row["parameters"])], row["result"], planned.spec.tolerance.for_run(row["parameters"])
        )
    ]
    outdated = differing(recorded.header.code, meaning(planned.spec.run))
    return Check(recorded.header, [r["parameters"] for r in again], wrong, outdated)


def kept(model_name: str, *, whole: bool = False) -> list[Pair]:
    """Every record that the chapters on a model read: those of the model, and of the organism what stands beside every
    model. whole: with the stores in which whole sweeps are done. Raises SweepError as `record.read` does."""
    model_name = canonical(model_name)
    beside = recordable("organism", BESIDE) if split(model_name)[0] != "organism" else []
    pairs: list[Pair] = []
    for spec in [*recordable(model_name), *beside]:
        if record.path_of(spec).is_file():
            pairs.append(_pair(spec, whole))
            pairs += [_pair(next_, whole) for next_ in _followed(spec, frame(pairs[-1][1].rows))]
    return pairs


def draw(recorded: record.Record, commit: str) -> list[dict[str, Any]]:
    """Rows that a commit draws, the same on every machine: each run may come, one that took half the seconds when it
    was recorded 32 times as readily: a race, in which each run's time to arrive is exponential."""
    chance = random.Random(f"{commit} {recorded.header.model} {recorded.header.sweep}")
    return sorted(recorded.rows, key=lambda row: chance.expovariate(max(row["seconds"], 0.1) ** -5))[:DRAWN]


def _followed(spec: Spec, table: pd.DataFrame) -> list[Spec]:
    """The sweeps that follow from a finished one: of the pathways, the chosen rates with further seeds and controls."""
    return [further(spec, pathways.further(table, seeds=spec.chosen_seeds))] if spec.name == "pathways" else []


def _pair(spec: Spec, whole: bool) -> Pair:
    return plan(spec, None if whole else BUILD / "checks" / slug(spec.model) / spec.name), record.read(spec)


def _drawn(planned: Plan, recorded: record.Record) -> Plan:
    """The plan of the drawn runs alone."""
    keys = {key(row["parameters"]) for row in draw(recorded, commit().partition("+")[0])}
    return replace(planned, runs=tuple(run for run in planned.runs if key(run.parameters) in keys))


def _seconds(pairs: Sequence[Pair]) -> dict[str, float]:
    """What each run took when it was recorded, by its key."""
    tables = [(p.runs, {key(row["parameters"]): row["seconds"] for row in recorded.rows}) for p, recorded in pairs]
    return {run.key: took[key(run.parameters)] for runs, took in tables for run in runs}


def _again(planned: Plan) -> list[dict[str, Any]]:
    """The runs that the present code has done again, if they are enough."""
    done = [] if planned.store.fault(planned.header) else list(planned.finished().values())
    return done if len(done) >= min(DRAWN, len(planned.runs)) else []
