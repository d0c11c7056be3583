"""Hundreds of independent runs of an experiment, kept one by one, so that a sweep can be killed and gone on with.

    spec = sweeps.load("layers", model_name="organism")   # data/sweeps/layers.yaml, or a path
    table = sweep.run(spec)                          # does what is missing, on Dask; nothing is started if nothing is
    table = sweep.table(spec)                        # only reads

1. A specification names a model, an experiment (`lib.studies`) and grids of its parameters. Each combination is
   a run. Its key is the sha256 of experiment, parameters, model, weights, and of the code and data it can depend on.
2. A store is a folder: `sweep.json` says whose results it holds, and each finished run is a file under its key,
   written under another name and renamed. Only the client writes, as results arrive: workers share no disk with it.
   A lock beside the folder keeps a second sweep out; it goes with the process that holds it, however that ends.
   Checkouts share the finished runs of the book's own models, by kind of processor, in the user's cache folder or
   in $QKV_RUNS: what stands under a key is this very run. With QKV_RUNS=off nothing is taken from there or left there.
3. Runs go to a cluster of Dask: this machine's cores, or the scheduler at any address. Workers elsewhere need this
   project in the same version, and the model fetched (`python -m lib fetch`); they say so if not. One thread a run,
   so a number does not depend on how many workers there are; it may on the kind of processor.
4. The table is made from the specification's runs in a fixed order, whatever the order of arrival.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import torch
import yaml
from distributed import KilledWorker
from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from tqdm.auto import tqdm

from lib.errors import ChapterError, SweepError, WorkerError
from lib.files import BUILD, ROOT, cache_folder, make_folder, slug, write_atomically
from lib.models import SPECS as MODELS
from lib.models import canonical, n_layers, weights_sha256
from lib.sweeps.cluster import ask_workers, connect, each, threads
from lib.sweeps.experiments import code, code_sha256, complete, differing, is_unchanged, perform

SPECS = ROOT / "data" / "sweeps"
HEADER = "sweep.json"


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Values = Annotated[list[JsonValue], BeforeValidator(_as_list), Field(min_length=1)]
Grid = Annotated[dict[str, Values], Field(min_length=1)]


class Spec(BaseModel):
    """A sweep. grid: parameter -> values, or one value; every combination is run, with every seed (parameter `seed`)
    if there are any. `layer` counts from 1 and may be `all` or `every 3` (L3, L6, ...). also: further grids for the
    same table. seconds: of one run, a guess until some are done."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    model: Annotated[str, AfterValidator(canonical)]
    run: str
    grid: Grid
    seeds: list[int] = []
    also: list[Grid] = []
    note: str = ""
    seconds: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class Run:
    """One call of the experiment."""

    key: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a specification comes to here and now. header: whose results the store may hold. shared: whether its
    finished runs are shared with other checkouts."""

    spec: Spec
    store: Path
    header: dict[str, Any]
    runs: tuple[Run, ...]
    shared: bool


def load(source: str | Path, *, model_name: str | None = None) -> Spec:
    """The specification of a YAML file, or of data/sweeps/NAME.yaml. model: instead of the one it names.
    Raises SweepError for what is no specification, with every fault."""
    path = Path(source) if str(source).endswith((".yaml", ".yml")) else SPECS / f"{source}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SPECS.glob("*.yaml")))
        raise SweepError(f"there is no specification {path}; give a .yaml file, or one of {known}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} is no mapping; it needs name, model, run and grid.")
    try:
        return Spec.model_validate(content | ({"model": model_name} if model_name else {}))
    except ValidationError as error:
        raise SweepError(f"{path} is no specification of a sweep: {_faults(error)}.") from error


def expand(spec: Spec) -> list[dict[str, Any]]:
    """The parameters of every run, defaults included, each once; the first parameter of a grid changes slowest, the
    seed fastest. Raises SweepError for parameters that the experiment does not take, and layers that are not there."""
    out: dict[str, dict[str, Any]] = {}
    for grid in (spec.grid, *spec.also):
        if spec.seeds and "seed" in grid:
            raise SweepError(f"{spec.name}: seed stands in a grid and in seeds; keep one.")
        axes = {name: _axis(spec, name, values) for name, values in grid.items()}
        axes |= {"seed": spec.seeds} if spec.seeds else {}
        for combination in product(*axes.values()):
            parameters = complete(spec.run, dict(zip(axes, combination, strict=True)))
            out.setdefault(json.dumps(parameters, sort_keys=True), parameters)
    return list(out.values())


def plan(spec: Spec, store: Path | None = None) -> Plan:
    """The runs of a specification with their keys, and where they are kept. Raises SweepError as `expand` does."""
    parameters = expand(spec)  # before the weights are fetched or summed
    own = {"experiment": spec.run, "model": spec.model, "weights_sha256": weights_sha256(spec.model)}
    version = code_sha256(spec.run)
    runs = tuple(Run(_sha256({**own, "code": version, "parameters": p}), p) for p in parameters)
    header = {**own, "code": code(spec.run)}
    shared = store is None and spec.model in MODELS and os.environ.get("QKV_RUNS") != "off"
    return Plan(spec, (store or default_store(spec)).resolve(), header, runs, shared)


def default_store(spec: Spec) -> Path:
    return BUILD / "sweeps" / slug(spec.model) / spec.name


def table(spec: Spec, store: Path | None = None, *, partial: bool = False, timing: bool = False) -> pd.DataFrame:
    """One row a run, sorted by its parameters: parameters, then what the experiment gave. partial: leave out what is
    not finished. timing: with a column `seconds`, which is never twice the same. Raises SweepError if runs are missing,
    or if the store belongs to another model or version."""
    planned = plan(spec, store)
    records = finished(planned)
    if not partial and (missing := len(planned.runs) - len(records)):
        raise SweepError(
            f"{spec.name} on {spec.model}: {missing} of {len(planned.runs)} runs are missing in {planned.store}; "
            "run `python -m lib sweep` to finish them."
        )
    return _frame(planned, records, timing)


def finished(planned: Plan) -> dict[str, dict[str, Any]]:
    """The records of the plan's finished runs, by key. A file that cannot be read is no finished run. Raises SweepError
    if the store is not of this plan."""
    if fault := _fault(planned):
        raise SweepError(
            f"{planned.store} {fault}. Give another folder with --store, or set these results aside with --fresh."
        )
    found = {run.key: _read(planned.store / f"{run.key}.json") for run in planned.runs}
    return {key: record for key, record in found.items() if record is not None}


def run(
    spec: Spec,
    store: Path | None = None,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Do the runs that are missing and return the table. scheduler: the address of a Dask scheduler; otherwise this
    machine, with `workers` processes (one a core unless told). fresh: results of another model or version are set
    aside instead of being an error; those of this one are kept in any case. Raises SweepError at the end if runs
    failed, with their errors; the others are kept."""
    return run_all([spec], [store], scheduler=scheduler, workers=workers, fresh=fresh, say=say)[0]


def run_all(
    specs: Sequence[Spec],
    stores: Sequence[Path | None] | None = None,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> list[pd.DataFrame]:
    """As `run`, of several sweeps, in their order, on the same workers: these load a model once, keep what they know
    of it, and none waits for the end of one sweep to begin the next."""
    if workers is not None and workers < 1:
        raise SweepError(f"{workers} workers cannot do anything; give at least one.")
    plans = [plan(spec, store) for spec, store in zip(specs, stores or [None] * len(specs), strict=True)]
    if len({p.store for p in plans}) < len(plans):
        raise SweepError("two of these sweeps have one store; give each its own name.")
    with ExitStack() as locks:
        todo: list[tuple[Plan, Run]] = []
        for planned in plans:
            if not (fresh and _fault(planned)) and len(finished(planned)) == len(planned.runs):
                continue
            locks.enter_context(_locked(planned.store))
            if fresh and _fault(planned):
                _set_aside(planned.store, say)
            write_atomically(planned.store / HEADER, json.dumps(planned.header, indent=1) + "\n")
            records = finished(planned)
            for key, record in _elsewhere(planned, records).items():
                write_atomically(planned.store / f"{key}.json", json.dumps(record) + "\n")
                records[key] = record
            for left_over in planned.store.glob("*.part"):
                left_over.unlink()
            todo += [(planned, r) for r in planned.runs if r.key not in records]
        try:
            failed = _do(todo, scheduler, workers, say) if todo else {}
        except KeyboardInterrupt:
            say(f"stopped: {_counts(todo)}; the same command goes on from there")
            raise
        except ConnectionError as error:
            raise SweepError(
                f"the scheduler is gone; {_counts(todo)}. Start it again; the same command goes on from there."
            ) from error
    if failed:
        raise SweepError(
            "\n".join(_report(planned, failed[planned.store]) for planned in plans if planned.store in failed)
        )
    return [_frame(planned, finished(planned)) for planned in plans]


def estimate(planned: Plan, workers: int | None = None) -> str:
    """How many runs there are, how many are finished, and how long the others will take."""
    records = finished(planned)
    records |= _elsewhere(planned, records)
    left, n = len(planned.runs) - len(records), workers or threads()
    measured = [record["seconds"] for record in records.values()]
    each_run = median(measured) if measured else planned.spec.seconds
    text = f"{planned.spec.name} on {planned.spec.model}: {len(planned.runs)} runs, {len(records)} finished"
    if each_run is None:
        return f"{text}, {left} to do; how long one takes is not known yet"
    source = "measured" if measured else "estimated"
    wall = each_run * -(-left // n)
    return f"{text}, {left} to do at {each_run:.3g} s each ({source}): {_duration(wall)} on {_plural(n, 'worker')}"


def hours(spec: Spec) -> float:
    """What a whole sweep costs on one core, by the specification's own guess of a run. Raises SweepError for none."""
    if spec.seconds is None:
        raise SweepError(f"{spec.name} does not say how many seconds a run takes; give it `seconds`.")
    return len(expand(spec)) * spec.seconds / 3600


def _do(
    todo: Sequence[tuple[Plan, Run]], scheduler: str | None, workers: int | None, say: Callable[[str], None]
) -> dict[Path, list[tuple[Run, BaseException]]]:
    """Run what is to do, write each result as it arrives, return what failed, by store."""
    plans, by_key = {p.store: p for p, _ in todo}, defaultdict(list)
    for planned, one in todo:  # a run that two sweeps share is done once
        by_key[one.key].append((planned, one))
    failed: dict[Path, list[tuple[Run, BaseException]]] = defaultdict(list)
    turn = nullcontext() if scheduler else _in_turn(next(iter(plans)).parent, say)
    with turn, connect(scheduler, workers=min(workers or threads(), len(by_key))) as client:
        if scheduler:
            for planned in plans.values():
                _same_code(planned, ask_workers(client, code, planned.spec.run), say)
        total = sum(len(planned.runs) for planned in plans.values())
        name = ", ".join(planned.spec.name for planned in plans.values())
        with tqdm(total=total, initial=total - len(todo), desc=name, unit="run") as bar:
            for key, outcome in each(client, perform, {r.key: _call(p, r) for p, r in todo}):
                if isinstance(outcome, WorkerError):
                    raise outcome
                for planned, one in by_key[key]:
                    if isinstance(outcome, BaseException):
                        failed[planned.store].append((one, outcome))
                        bar.set_postfix_str(f"{sum(map(len, failed.values()))} failed")
                    else:
                        content = {"parameters": one.parameters, **outcome}
                        _keep(planned, key, content, share=planned.shared and not scheduler)
                    bar.update()
    return failed


def _call(planned: Plan, one: Run) -> dict[str, Any]:
    """What `perform` is given."""
    return {
        "name": planned.spec.run,
        "model_name": planned.spec.model,
        "parameters": one.parameters,
        "weights": planned.header["weights_sha256"],
        "code": code_sha256(planned.spec.run),
        "seed": int(one.key[:8], 16),
    }


def _same_code(planned: Plan, answers: dict[str, dict[str, str]], say: Callable[[str], None]) -> None:
    """Raises WorkerError where a worker has other code or data. Those that come later say so themselves."""
    if not answers:
        say("the scheduler has no worker yet; the runs wait for one")
    for address, theirs in answers.items():
        if differs := differing(planned.header["code"], theirs):
            raise WorkerError(
                f"the worker at {address} has another version of {differs}. Install the same version of the project "
                "and of its packages there, and start the worker again."
            )


def _fault(planned: Plan) -> str:
    """What makes the store another one's, as the end of a sentence; empty if it is the plan's, or still to be made.
    Raises SweepError for a folder that is no store at all."""
    path = planned.store / HEADER
    if not path.exists():
        others = [p.name for p in planned.store.glob("*") if p.suffix != ".part"]
        if others or planned.store.is_file():
            raise SweepError(f"{planned.store} is no store of a sweep, and not empty; give another folder.")
        return ""
    if not any(path != planned.store / HEADER for path in planned.store.glob("*.json")):
        return ""  # whatever it was for, nothing came of it
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        for key, what in (("model", "the model"), ("weights_sha256", "the weights"), ("experiment", "the run")):
            if theirs[key] != planned.header[key]:
                return f"holds results for {what} {theirs[key]}, not {planned.header[key]}"
        differs = differing(theirs["code"], planned.header["code"])
        return f"holds results of another version of {differs}" if differs else ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"has a damaged {HEADER}"


def _keep(planned: Plan, key: str, content: dict[str, Any], *, share: bool) -> None:
    """Write a finished run into its store. share: and for other checkouts, if that can be written, and if no file was
    changed meanwhile: the run may have read it."""
    text = json.dumps(content) + "\n"
    write_atomically(planned.store / f"{key}.json", text)
    if share and is_unchanged(planned.spec.run):
        with suppress(ChapterError):
            write_atomically(_shared(key), text)


def _elsewhere(planned: Plan, own: Container[str]) -> dict[str, dict[str, Any]]:
    """The records of the plan's runs that are not its own and that another checkout has shared, by key."""
    lacking = [run for run in planned.runs if run.key not in own] if planned.shared else []
    found = {run.key: (run, _read(_shared(run.key))) for run in lacking}
    return {key: r for key, (run, r) in found.items() if r is not None and r.get("parameters") == run.parameters}


def _shared(key: str) -> Path:
    folder = os.environ.get("QKV_RUNS") or cache_folder() / "runs"
    device = "cuda" if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return Path(folder) / f"{platform.machine()}-{device}" / key[:2] / f"{key}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or cut short by a full disk: it is run again
        return None
    return record if isinstance(record, dict) and {"result", "seconds"} <= record.keys() else None


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Only one at a time. The lock is the operating system's, so a dead holder is no obstacle."""
    make_folder(store.parent)
    lock = FileLock(store.with_name(f"{store.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise SweepError(
            f"another sweep is writing into {store}; wait until it is done, or give another folder with --store."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _in_turn(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Sweeps whose stores are in one folder use this machine's workers one after the other: side by side they would be
    done no sooner, and need the memory of both."""
    lock = FileLock(folder / "workers.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say("another sweep is running here; this one waits for its workers")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _set_aside(store: Path, say: Callable[[str], None]) -> None:
    aside = next(p for i in range(1, 10_000) if not (p := store.with_name(f"{store.name}.old-{i}")).exists())
    store.rename(aside)
    say(f"older results are now in {aside}")


def _frame(planned: Plan, records: dict[str, dict[str, Any]], timing: bool = False) -> pd.DataFrame:
    runs = sorted(
        (r for r in planned.runs if r.key in records), key=lambda r: [_rank(v) for v in r.parameters.values()]
    )
    rows = [r.parameters | records[r.key]["result"] for r in runs]
    if timing:
        rows = [row | {"seconds": records[r.key]["seconds"]} for r, row in zip(runs, rows, strict=True)]
    return pd.DataFrame(rows)


def _rank(value: Any) -> tuple[int, float, str]:
    """Numbers before everything else, by size; the rest by its text."""
    if isinstance(value, int | float):
        return 0, value, ""
    return 1, 0.0, json.dumps(value, sort_keys=True)


def _axis(spec: Spec, name: str, values: list[Any]) -> list[Any]:
    """The values of one parameter. Raises SweepError for a number that YAML takes for text, and a value given twice."""
    if name == "layer":
        return list(dict.fromkeys(layer for value in values for layer in _layers(spec, value)))
    for value in values:
        if isinstance(value, str) and _is_number(value):
            raise SweepError(f"{spec.name}: {name} is the text {value!r}; YAML needs the point, as in 1.0e-3.")
    if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
        raise SweepError(f"{spec.name}: a value of {name} stands twice in {values}; keep one.")
    return values


def _layers(spec: Spec, value: Any) -> list[int]:
    """`all`, `every 3`, `L10` or 10 -> layers counted from 1. Raises SweepError for one that the model lacks."""
    there = range(1, n_layers(spec.model) + 1)
    if value == "all":
        return list(there)
    word, _, number = str(value).partition(" ")
    if word == "every" and number.isdecimal() and int(number):
        return list(there[int(number) - 1 :: int(number)])
    number = str(value).removeprefix("L")
    if isinstance(value, bool) or not number.isdecimal():
        raise SweepError(f"{spec.name}: layer {value!r} is none; write 10, L10, all, or every 3 (they count from 1).")
    if int(number) not in there:
        raise SweepError(f"{spec.name}: there is no layer {value}: {spec.model} has L1 to L{there[-1]}.")
    return [int(number)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _faults(error: ValidationError) -> str:
    """Every fault of a specification, in a sentence."""
    known, out = ", ".join(Spec.model_fields), []
    for fault in error.errors():
        where = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            out.append(f"unknown key {where!r} (known: {known})")
        elif fault["type"] == "missing":
            out.append(f"{where} is missing")
        elif fault["type"] == "too_short":
            out.append(f"{where} is empty; give at least one value")
        else:
            out.append(f"{where}: {fault['msg']}, not {fault['input']!r}")
    return "; ".join(out)


def _counts(todo: Sequence[tuple[Plan, Run]]) -> str:
    return ", ".join(_count(planned) for planned in {p.store: p for p, _ in todo}.values())


def _count(planned: Plan) -> str:
    return f"{len(finished(planned))} of {len(planned.runs)} runs of {planned.spec.name} are kept in {planned.store}"


def _report(planned: Plan, failed: list[tuple[Run, BaseException]]) -> str:
    """What failed and why, in the order of the table."""
    lines = []
    for one, error in sorted(failed, key=lambda pair: [_rank(v) for v in pair[0].parameters.values()]):
        given = ", ".join(f"{key}={value}" for key, value in one.parameters.items())
        dead = isinstance(error, KilledWorker)
        reason = "its worker died each time; is there memory enough?" if dead else f"{type(error).__name__}: {error}"
        lines.append(f"  {given}: {reason}")
    if len(lines) > 20:
        lines = [*lines[:20], f"  and {len(lines) - 20} more"]
    return "\n".join(
        [
            f"{_plural(len(failed), 'run')} failed, {_count(planned)}:",
            *lines,
            "Mend the cause and give the same command again; only what is missing is run.",
        ]
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _plural(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _sha256(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
