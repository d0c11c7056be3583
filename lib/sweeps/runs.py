"""Hundreds of independent runs of an experiment, kept one by one, so that a sweep can be killed and gone on with.

1. A specification is expanded into runs. A run's key is the sha256 of experiment, parameters, model, weights, and of
   the code and data that it can depend on.
2. Only what no store holds is run (`store`). This process alone writes, as results arrive: workers need not share its
   disk.
3. Runs go to a cluster of Dask (`cluster`): this machine's cores, or the scheduler at any address. Workers elsewhere
   need this project in the same version, and the model fetched (`python -m lib fetch`); they say so if not. One thread
   a run, so a number does not depend on how many workers there are; it may on the kind of processor.
4. The table is made from the specification's runs in a fixed order, whatever the order of arrival.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from dask.system import CPU_COUNT
from distributed import KilledWorker
from filelock import FileLock
from tqdm.auto import tqdm

from lib.checkpoints.fetching import weights_sha256
from lib.errors import SweepError, WorkerError
from lib.files import BUILD, run_folder
from lib.sweeps.cluster import connect, each
from lib.sweeps.experiments import code, code_sha256, differing, perform
from lib.sweeps.specification import Spec, expand
from lib.sweeps.store import Run, Store, in_turn

PREPARED_BY = {"baselines": "location", "pathways": "location"}  # studies whose runs use what another's prepare
SHOWN = 20  # failed runs that a message lists before it only counts them


@dataclass(frozen=True)
class Plan:
    """What a specification comes to here and now. header: whose results the store may hold."""

    spec: Spec
    store: Store
    header: dict[str, Any]
    runs: tuple[Run, ...]

    def finished(self) -> dict[str, dict[str, Any]]:
        """The records of the finished runs in the store, by key. Raises SweepError if the store is another plan's."""
        if fault := self.store.fault(self.header):
            raise SweepError(
                f"{self.store.folder} {fault}. Give another folder with --store, or set these aside with --fresh."
            )
        return self.store.read(self.runs)

    def count(self) -> str:
        n = len(self.finished())
        return f"{n} of {len(self.runs)} runs of {self.spec.name} are kept in {self.store.folder}"


def plan(spec: Spec, store: Path | None = None) -> Plan:
    """The runs of a specification with their keys, and where they are kept. Raises SweepError as `expand` does."""
    combinations = expand(spec)  # before the weights are fetched or summed
    inputs = {"experiment": spec.run, "model": spec.model, "weights_sha256": weights_sha256(spec.model)}
    version = code_sha256(spec.run)
    texts = [json.dumps({**inputs, "code": version, "parameters": p}, sort_keys=True) for p in combinations]
    runs = [Run(hashlib.sha256(t.encode()).hexdigest(), p) for t, p in zip(texts, combinations, strict=True)]
    place = Store((store or default_store(spec)).resolve())
    return Plan(spec, place, {**inputs, "code": code(spec.run)}, tuple(runs))


def default_store(spec: Spec) -> Path:
    return BUILD / "sweeps" / run_folder(spec.model) / spec.name


def finished(spec: Spec, store: Path | None = None, *, partial: bool = False, timing: bool = False) -> pd.DataFrame:
    """One row a run, sorted by its parameters: parameters, then what the experiment gave. partial: leave out what is
    not finished. timing: with a column `seconds`, which is never twice the same. Raises SweepError if runs are missing,
    or if the store belongs to another model or version."""
    planned = plan(spec, store)
    records = planned.finished()
    if len(records) < len(planned.runs) and not partial:
        raise SweepError(
            f"{spec.name} on {spec.model}: {len(planned.runs) - len(records)} of {len(planned.runs)} runs are missing "
            f"in {planned.store.folder}; run `python -m lib sweep` to finish them."
        )
    return frame(records.values(), timing)


def run(spec: Spec, store: Path | None = None, **options: Any) -> pd.DataFrame:
    """Do the runs of one sweep that are missing and return the table. options, errors: as `finish` has them."""
    return finish([plan(spec, store)], **options)[0]


def finish(
    plans: Sequence[Plan],
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    fresh: bool = False,
    seconds: Mapping[str, float] | None = None,
    timing: bool = False,
    say: Callable[[str], None] = print,
) -> list[pd.DataFrame]:
    """The tables of planned sweeps, after what is missing was run, on workers that load a model once, keep what they
    know of it, and do not wait for the end of one sweep to begin the next. scheduler: the address of a Dask scheduler;
    otherwise this machine, with `workers` processes (one a core unless told). fresh: results of another model or
    version are set aside instead of being an error; those of this one are kept in any case. seconds: what runs are
    expected to take, by key; if given, those that share what is prepared go to one worker, as few of many do. timing:
    with a column `seconds`. Raises SweepError at the end if runs failed, with their errors; the others are kept."""
    if workers is not None and workers < 1:
        raise SweepError(f"{workers} workers cannot do anything; give at least one.")
    if len({planned.store for planned in plans}) < len(plans):
        raise SweepError("two of these sweeps have one store; give each its own name.")
    with ExitStack() as locks:
        todo = [(planned, run) for planned in plans for run in _missing(planned, locks, fresh, say)]
        try:
            failures = _do(todo, scheduler, workers, seconds, say) if todo else []
        except KeyboardInterrupt:
            say(f"stopped: {_counts(todo)}; the same command goes on from there")
            raise
        except ConnectionError as error:
            raise SweepError(
                f"the scheduler is gone; {_counts(todo)}. Start it again; the same command goes on from there."
            ) from error
    if reports := [text for planned in plans if (text := _report(planned, failures))]:
        raise SweepError("\n".join(reports))
    return [frame(planned.finished().values(), timing) for planned in plans]


def _missing(planned: Plan, locks: ExitStack, fresh: bool, say: Callable[[str], None]) -> list[Run]:
    """The runs to do, after the store is locked and cleared for this plan."""
    foreign = fresh and planned.store.fault(planned.header)
    if not foreign and len(planned.finished()) == len(planned.runs):
        return []
    locks.enter_context(planned.store.lock())
    if foreign:
        say(f"older results are now in {planned.store.set_aside()}")
    planned.store.begin(planned.header)
    records = planned.finished()
    return [run for run in planned.runs if run.key not in records]


def _do(
    todo: Sequence[tuple[Plan, Run]],
    scheduler: str | None,
    workers: int | None,
    seconds: Mapping[str, float] | None,
    say: Callable[[str], None],
) -> list[tuple[Plan, Run, BaseException]]:
    """Run what is to do, write each result as it arrives, return what failed and why."""
    failures: list[tuple[Plan, Run, BaseException]] = []
    waiting, plans = defaultdict(list), list({planned.store: planned for planned, _ in todo}.values())
    for planned, run in todo:  # a run that two sweeps share is done once
        waiting[run.key].append((planned, run))
    n = min(workers or CPU_COUNT, len(waiting))
    homes = None if seconds is None else _homes({key: pairs[0][0].spec for key, pairs in waiting.items()}, seconds, n)
    calls = {key: _call(*waiting[key][0]) for key in homes or waiting}
    with ExitStack() as stack:
        if not scheduler:
            lock = FileLock(plans[0].store.folder.parent / "workers.lock")  # side by side they would end no sooner
            words = "another sweep is running here; this one waits for its workers"
            stack.enter_context(in_turn(lock, say, words))
        client = stack.enter_context(connect(scheduler, workers=n))
        if scheduler:
            for planned in plans:
                _require_same_code(planned, client.run(code, planned.spec.run, on_error="return"), say)
        total, names = sum(len(p.runs) for p in plans), ", ".join(p.spec.name for p in plans)
        bar = stack.enter_context(tqdm(total=total, initial=total - len(todo), desc=names, unit="run"))
        for key, outcome in each(client, perform, calls, homes):
            if isinstance(outcome, WorkerError):
                raise outcome
            for planned, run in waiting[key]:
                if isinstance(outcome, BaseException):
                    failures.append((planned, run, outcome))
                    bar.set_postfix_str(f"{len(failures)} failed")
                else:
                    planned.store.write(run.key, {"parameters": run.parameters, **outcome})
                bar.update()
    return failures


def _homes(specs: Mapping[str, Spec], seconds: Mapping[str, float], n: int) -> dict[str, int]:
    """A worker, of n, for each run, in the order in which to do them. Runs of one study on one model share what is
    prepared, and go together, the longest dealt out first; a worker has all that it does on one model in a row."""
    groups, loads, homes = defaultdict(list), [0.0] * n, dict[str, int]()
    for key, spec in specs.items():
        study = spec.run.split(".")[0]
        groups[spec.model, PREPARED_BY.get(study, study)].append(key)
    costs = {group: sum(seconds[key] for key in keys) for group, keys in groups.items()}
    for group in sorted(groups, key=costs.__getitem__, reverse=True):
        home = loads.index(min(loads))
        loads[home] += costs[group]
        homes |= dict.fromkeys(sorted(groups[group], key=seconds.__getitem__, reverse=True), home)
    return dict(sorted(homes.items(), key=lambda pair: specs[pair[0]].model, reverse=True))


def _call(planned: Plan, run: Run) -> dict[str, Any]:
    """What `perform` is given."""
    spec, seed = planned.spec, int(run.key[:8], 16)
    given = {"name": spec.run, "model_name": spec.model, "parameters": run.parameters, "seed": seed}
    return given | {"weights": planned.header["weights_sha256"], "code": code_sha256(spec.run)}


def _require_same_code(planned: Plan, answers: dict[str, Any], say: Callable[[str], None]) -> None:
    """Raises WorkerError where a worker has other code or data, or cannot say. Those that come later say so themselves.
    answers: what `code` gave on each worker, or the exception that it raised, by the worker's address."""
    if not answers:
        say("the scheduler has no worker yet; the runs wait for one")
    for address, theirs in answers.items():
        if isinstance(theirs, Exception):
            raise WorkerError(
                f"the worker at {address} cannot run this project ({type(theirs).__name__}: {theirs}). Install it "
                "there in the same version (`pip install --editable .` in a checkout), and start the worker again."
            )
        if names := differing(planned.header["code"], theirs):
            raise WorkerError(
                f"the worker at {address} has another version of {names}. Install the same version of the project "
                "and of its packages there, and start the worker again."
            )


def estimate(planned: Plan, workers: int | None = None) -> str:
    """How many runs there are, how many are finished, and how long the others will take."""
    records = planned.finished()
    left, n = len(planned.runs) - len(records), workers or CPU_COUNT
    measured = [record["seconds"] for record in records.values()]
    seconds = median(measured) if measured else planned.spec.seconds
    text = f"{planned.spec.name} on {planned.spec.model}: {len(planned.runs)} runs, {len(records)} finished"
    if seconds is None:
        return f"{text}, {left} to do; how long one takes is not known yet"
    source, minutes = "measured" if measured else "estimated", seconds * -(-left // n) / 60
    wall = f"{minutes:.3g} min" if minutes < 90 else f"{minutes / 60:.1f} h"
    return f"{text}, {left} to do at {seconds:.3g} s each ({source}): {wall} on {n} worker{'s' * (n != 1)}"


def frame(rows: Iterable[dict[str, Any]], timing: bool = False) -> pd.DataFrame:
    """The table of finished runs: sorted by their parameters, whatever the order in which they are given."""
    rows = sorted(rows, key=lambda row: _order(row["parameters"]))
    table = pd.DataFrame([row["parameters"] | row["result"] for row in rows])
    return table.assign(seconds=[row["seconds"] for row in rows]) if timing else table


def _order(parameters: dict[str, Any]) -> list[tuple[int, float, str]]:
    """Numbers before everything else, by size; the rest by its text."""
    values = parameters.values()
    return [(0, v, "") if isinstance(v, int | float) else (1, 0.0, json.dumps(v, sort_keys=True)) for v in values]


def _counts(todo: Sequence[tuple[Plan, Run]]) -> str:
    return ", ".join(planned.count() for planned in {p.store: p for p, _ in todo}.values())


def _report(planned: Plan, failures: Sequence[tuple[Plan, Run, BaseException]]) -> str:
    """What failed of a plan and why, in the order of the table; empty if nothing did."""
    failed = sorted(
        ((run, error) for p, run, error in failures if p is planned), key=lambda pair: _order(pair[0].parameters)
    )
    if not failed:
        return ""
    lines = [f"{len(failed)} run{'s' * (len(failed) != 1)} failed, {planned.count()}:"]
    for run, error in failed[:SHOWN]:
        given = ", ".join(f"{key}={value}" for key, value in run.parameters.items())
        dead = isinstance(error, KilledWorker)
        reason = "its worker died each time; is there memory enough?" if dead else f"{type(error).__name__}: {error}"
        lines.append(f"  {given}: {reason}")
    lines += [f"  and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
    return "\n".join([*lines, "Mend the cause and give the same command again; only what is missing is run."])
