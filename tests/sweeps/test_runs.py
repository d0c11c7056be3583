"""Sweeps: what is run, what makes two runs the same, what is refused, and what survives kills."""

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import dask
import pandas as pd
import psutil
import pytest
import torch
import yaml
from distributed import Client, LocalCluster
from filelock import FileLock
from tqdm.auto import tqdm
from typer.testing import CliRunner

from lib.__main__ import app
from lib.checkpoints import fetching
from lib.errors import BookError, SweepError, WorkerError
from lib.files import ROOT
from lib.sweeps import cluster, experiments, runs, specification
from lib.sweeps.store import Store
from tests.sweeps.told import told_under

BASE = {"name": "s", "model": "organism", "run": "told.told_under", "grid": {"layer": [3], "scale": [0.5]}}


def spec(**changes) -> specification.Spec:
    return specification.Spec.model_validate({**BASE, **changes})


def written(tmp_path, **changes) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changes}))
    return path


@pytest.fixture(autouse=True)
def _study(monkeypatch):
    """`told.told_under` is an experiment like those of lib/studies."""
    real = experiments.find
    monkeypatch.setattr(experiments, "find", lambda name: told_under if name == "told.told_under" else real(name))


@pytest.fixture
def here(monkeypatch) -> list[dict]:
    """Calls are made in this process, in a random order; the list holds the parameters of each."""
    called: list[dict] = []

    def each(_, function, calls, homes=None):
        for key in random.sample(list(calls), len(calls)):
            called.append(calls[key]["parameters"])
            try:
                yield key, function(**calls[key])
            except Exception as error:
                yield key, error

    monkeypatch.setattr(runs, "connect", lambda *_, **__: nullcontext())
    monkeypatch.setattr(runs, "each", each)
    return called


def test_runs_that_share_what_is_prepared_go_to_one_worker_the_longest_first():
    """By hand: 50 + 30 seconds to the first, the organism's 70 to the second, 40 + 20 + 9 of three studies that share
    a setting to the second. The organism's are done after all on the other model."""
    given = {"a": ("repairs.x", 30), "b": ("repairs.x", 50), "c": ("location.y", 20), "d": ("baselines.z", 40)}
    given |= {"e": ("pathways.w", 9), "f": ("pathways.w", 70)}
    models = dict.fromkeys("abcde", "smollm2") | {"f": "organism"}
    specs = {k: spec().model_copy(update={"run": run, "model": models[k]}) for k, (run, _) in given.items()}
    homes = runs._homes(specs, {k: seconds for k, (_, seconds) in given.items()}, 2)
    assert list(homes.items()) == [("b", 0), ("a", 0), ("d", 1), ("c", 1), ("e", 1), ("f", 1)]


# What is run


def test_the_runs_of_a_grid_worked_out_by_hand():
    wanted = spec(
        grid={"layer": ["L2", 12], "scale": [0, 0.5], "draws": 2},
        seeds=[7, 8],
        also=[{"layer": 2, "scale": 0.5, "draws": [2, 3], "pathway": ["v_only", "ffn"]}],
    )
    rows = [(r["layer"], r["pathway"], r["scale"], r["draws"], r["seed"]) for r in specification.expand(wanted)]
    first = [(2, "v_only", 0, 2), (2, "v_only", 0.5, 2), (12, "v_only", 0, 2), (12, "v_only", 0.5, 2)]
    second = [(2, "ffn", 0.5, 2), (2, "v_only", 0.5, 3), (2, "ffn", 0.5, 3)]  # v_only with two draws is there already
    assert rows == [(*run, seed) for run in first + second for seed in (7, 8)]


@pytest.mark.parametrize(
    "layer, wanted",
    [("all", list(range(1, 13))), ("every 5", [5, 10]), (["every 5", "L3", 6], [5, 10, 3, 6]), ("L12", [12])],
)
def test_layers_count_from_1(layer, wanted):
    assert [r["layer"] for r in specification.expand(spec(grid={"layer": layer, "scale": 1}))] == wanted


def test_a_key_differs_when_any_input_does(monkeypatch):
    def key(**changes):
        (run,) = runs.plan(spec(**changes)).runs
        return run.key

    keys = [key(), key(grid={"layer": 4, "scale": 0.5}), key(grid={"layer": 3, "scale": 0.25}), key(seeds=[1])]
    assert key() == keys[0] and key(name="other", note="n", seconds=3) == keys[0], "what changes no number"
    assert key(seeds=[0]) == keys[0], "0 is the default"
    for name in ("weights_sha256", "code_sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(runs, name, lambda _: "another sum")
            keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(specification, "complete", lambda run, given: experiments.complete("told.told_under", given))
        patch.setattr(runs, "code_sha256", lambda run: "same")
        patch.setattr(runs, "code", lambda run: {})
        keys += [key(), key(run="told.other")]
    monkeypatch.setattr(runs, "weights_sha256", lambda name: "same")
    keys += [key(), key(model=str(ROOT / "data" / "organism"))]
    assert len(set(keys)) == len(keys)


def test_the_code_of_an_experiment_is_what_it_imports_and_the_data(tmp_path, monkeypatch):
    empty = ("lib/__init__.py", "lib/b.py", "lib/c.py", "data/facts.csv", "data/sweeps/s.yaml", "data/expected/s.json")
    for name, text in {**dict.fromkeys(empty, ""), "lib/studies/a.py": "def f():\n    from lib import b\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "_AT_START", {})
    seen = experiments._code.__wrapped__("a.f")
    assert set(seen) == {"lib/__init__.py", "lib/studies/a.py", "lib/b.py", "data/facts.csv", *experiments.PACKAGES}
    (tmp_path / "lib" / "b.py").write_text("x = 1")
    assert experiments.differing(seen, experiments._code.__wrapped__("a.f")) == "lib/b.py"
    monkeypatch.setattr(experiments, "_AT_START", seen)
    with pytest.raises(WorkerError, match=r"started before lib/b\.py was changed, and may run the old one; start it"):
        experiments._code.__wrapped__("a.f")


# One run


def performed(monkeypatch, function, model="organism", parameters=None, **changes):
    monkeypatch.setattr(experiments, "find", lambda name: function)
    given = {"seed": 1, "weights": fetching.weights_sha256("organism"), "code": "sum", **changes}
    monkeypatch.setattr(experiments, "code_sha256", lambda name: "sum")
    return experiments.perform("a.f", model, parameters or {}, **given)


def test_a_run_gives_plain_values_on_one_thread(monkeypatch):
    threads = torch.get_num_threads()

    def function(model, *, x):
        return {"y": (x, model.name), "threads": torch.get_num_threads(), "draw": float(torch.rand(()))}

    one, other = (performed(monkeypatch, function, parameters={"x": 2}) for _ in range(2))
    assert one["result"]["y"] == [2, "organism"] and one["result"]["threads"] == 1
    assert one["result"] == other["result"], "what an experiment does not seed is seeded"
    assert torch.get_num_threads() == threads


def test_bars_of_a_run_do_not_stand_among_those_of_the_sweep(monkeypatch, capsys):
    performed(monkeypatch, lambda model: {"n": len(list(tqdm(range(3))))})
    assert not capsys.readouterr().err


def test_what_an_experiment_must_not_give(monkeypatch):
    for message, result in {
        "gave something that JSON does not hold": {"t": torch.zeros(2)},
        "gave list, not a dictionary": [1],
        "gives x, which it also takes": {"x": 1},
    }.items():
        with pytest.raises(BookError, match=message):
            performed(monkeypatch, lambda model, x, result=result: result, parameters={"x": 1})


def test_an_experiment_that_leaves_the_model_changed_is_told_so_and_harms_no_other(monkeypatch):
    def careless(model):
        with torch.no_grad():
            next(model.module.parameters())[0, 0] += 1e-3
        return {}

    def first(model):
        return {"first": float(next(model.module.parameters())[0, 0])}

    before = performed(monkeypatch, first)["result"]
    with pytest.raises(BookError, match=r"a\.f left the model changed \(transformer\.wte\.weight\)"):
        performed(monkeypatch, careless)
    assert performed(monkeypatch, first)["result"] == before


def test_a_worker_keeps_one_model(monkeypatch):
    performed(monkeypatch, lambda model: {})
    kept = dict(experiments._loaded)

    def load(name):
        assert not experiments._loaded, "the old model is gone before the new one comes"
        return replace(kept["organism"], name=name)

    monkeypatch.setattr(experiments, "load", load)
    performed(monkeypatch, lambda model: {}, model="other")
    assert list(experiments._loaded) == ["other"]
    experiments._loaded.clear()


def test_a_worker_with_other_code_or_weights_says_so(monkeypatch):
    with pytest.raises(WorkerError, match="runs another version of the code; install the same one"):
        performed(monkeypatch, lambda model: {}, code="another")
    with pytest.raises(WorkerError, match=r"has other weights of organism .*python -m lib fetch organism --force"):
        performed(monkeypatch, lambda model: {}, weights="another")
    with pytest.raises(WorkerError, match="cannot load the model: unknown model 'nobody'"):
        performed(monkeypatch, lambda model: {}, model="nobody")


# Bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grids": {}}, r"unknown key 'grids' \(known: name, model, run, grid, seeds"),
        ({"grid": {}}, "grid is empty; give at least one value"),
        ({"grid": {"layer": []}}, "grid.layer is empty"),
        ({"also": [{}]}, r"also\.0 is empty"),
        ({"grid": [1]}, "grid: Input should be a valid dictionary"),
        ({"seeds": ["a"]}, r"seeds\.0: Input should be a valid integer, not 'a'"),
        ({"name": "../up"}, "name: String should match pattern"),
        ({"seconds": 0}, "seconds: Input should be greater than 0"),
        ({"run": "models.load"}, "no experiment 'models.load'; choose from .*location.edit_at"),
        ({"run": "os.system"}, "no experiment 'os.system'"),
        ({"grid": {"layers": "all", "scale": 1}}, "told.told_under takes no 'layers'; it takes layer, pathway, scale"),
        ({"grid": {"layer": "all"}}, "told.told_under needs 'scale'"),
        ({"grid": {"layer": 13, "scale": 1}}, "there is no layer 13: organism has L1 to L12"),
        ({"grid": {"layer": ["L0"], "scale": 1}}, "there is no layer L0"),
        ({"grid": {"layer": "each", "scale": 1}}, "layer 'each' is none; write 10, L10, all, or every 3"),
        ({"grid": {"layer": "every 0", "scale": 1}}, "layer 'every 0' is none"),
        ({"grid": {"layer": True, "scale": 1}}, "layer True is none"),
        ({"grid": {"layer": 1, "scale": "1e-3"}}, "scale is the text '1e-3'; YAML needs the point, as in 1.0e-3"),
        ({"grid": {"layer": 1, "scale": [1, 2, 1]}}, "a value of scale stands twice"),
        ({"grid": {"layer": 1, "scale": 1, "seed": 1}, "seeds": [1]}, "seed stands in a grid and in seeds"),
        ({"model": "nobody"}, "unknown model 'nobody'"),
    ],
)
def test_bad_specifications(tmp_path, changes, message):
    path, store = written(tmp_path, **changes), tmp_path / "store"
    with pytest.raises(BookError, match=message):
        runs.run(specification.load(path), store)
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"


def test_files_that_are_no_specification(tmp_path):
    with pytest.raises(SweepError, match=r"no specification .*nowhere\.yaml; give a \.yaml file, or one of .*near"):
        specification.load("nowhere")
    path = tmp_path / "s.yaml"
    for text, message in {
        "a: [": "is no YAML",
        "- a": "is no mapping",
        "name: s": "model is missing; run is",
        "subject: organism": "has the key `subject`, which is called `model` now",
    }.items():
        path.write_text(text)
        with pytest.raises(SweepError, match=message):
            specification.load(path)


def test_two_sweeps_take_turns_on_this_machines_workers(tmp_path, here):
    """While another one has its turn nothing is run; then all is."""
    said: list[str] = []
    done = threading.Thread(target=lambda: runs.run(spec(), tmp_path / "store", say=said.append))
    with FileLock(tmp_path / "workers.lock"):
        done.start()
        while not said:
            time.sleep(0.01)
        time.sleep(0.2)
        assert said == ["another sweep is running here; this one waits for its workers"] and not here
    done.join(60)
    assert len(here) == 1 and runs.plan(spec(), tmp_path / "store").finished()


def test_shipped_specifications_are_sound():
    for path in specification.SPECS.glob("*.yaml"):
        loaded = specification.load(path)
        assert loaded.name == path.stem and loaded.seconds and specification.expand(loaded)


def listening(reply: bytes) -> tuple[socket.socket, str]:
    """A port where something other than a scheduler listens."""
    server, connections = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        with suppress(OSError):  # closed at the end
            while True:
                connections.append(server.accept()[0])
                connections[-1].sendall(reply)

    threading.Thread(target=serve, daemon=True).start()
    return server, f"tcp://127.0.0.1:{server.getsockname()[1]}"


def test_a_scheduler_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "TIMEOUT", 0.5)
    silent, silent_address = listening(b"")
    page, page_address = listening(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with silent, page:
        for address in ("tcp://127.0.0.1:1", silent_address, page_address, "nonsense", "foo://x"):
            start = time.perf_counter()
            with pytest.raises(SweepError, match=f"no Dask scheduler answers at '{address}'.*`dask scheduler`"):
                runs.run(spec(), tmp_path / "store", scheduler=address)
            assert time.perf_counter() - start < 5, address
    with pytest.raises(SweepError, match="0 workers cannot do anything"):
        runs.run(spec(), tmp_path / "store", workers=0)


# The store


def test_the_table_is_the_same_whatever_the_order_of_arrival(tmp_path, here, organism):
    wanted = spec(grid={"pathway": ["v_only", "k_only"], "scale": [2, 0.5], "layer": [11, 2]})
    tables = [runs.run(wanted, tmp_path / str(i), say=print) for i in range(2)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    table = tables[0]
    assert table[["layer", "pathway", "scale"]].values.tolist() == [
        [layer, pathway, scale] for layer in (2, 11) for pathway in ("k_only", "v_only") for scale in (0.5, 2)
    ]
    first = {"layer": 2, "pathway": "k_only", "scale": 0.5, "draws": 1, "seed": 0}
    assert table.iloc[0].to_dict() == first | told_under(organism, **first)
    timed = runs.finished(wanted, tmp_path / "0", timing=True)
    assert (timed.seconds > 0).all()
    pd.testing.assert_frame_equal(timed.drop(columns="seconds"), table)


def test_finished_runs_are_never_repeated(tmp_path, here):
    store = tmp_path / "store"
    runs.run(spec(), store)
    runs.run(spec(), store)
    assert len(here) == 1
    runs.run(spec(also=[{"layer": 3, "scale": 1}]), store)
    assert [p["scale"] for p in here] == [0.5, 1]
    (path,) = (store / f"{run.key}.json" for run in runs.plan(spec()).runs)
    path.write_text(path.read_text()[:20])
    (store / "x.json.part").write_text("half of")
    assert len(runs.run(spec(), store)) == 1
    assert [p["scale"] for p in here] == [0.5, 1, 0.5], "what was cut short is run again"
    assert not list(store.glob("*.part"))


def test_no_cluster_is_started_when_nothing_is_to_do(tmp_path, here, monkeypatch):
    table = runs.run(spec(), tmp_path / "store")
    monkeypatch.setattr(runs, "connect", lambda *_, **__: pytest.fail("a cluster was asked for"))
    pd.testing.assert_frame_equal(runs.run(spec(), tmp_path / "store"), table)
    with pytest.raises(pytest.fail.Exception):
        runs.run(spec(seeds=[1]), tmp_path / "store")


def test_a_table_of_an_unfinished_sweep(tmp_path, here):
    runs.run(spec(), tmp_path / "store")
    more = spec(seeds=[0, 1, 2])
    with pytest.raises(SweepError, match=r"s on organism: 2 of 3 runs are missing in .*store"):
        runs.finished(more, tmp_path / "store")
    assert runs.finished(more, tmp_path / "store", partial=True).seed.tolist() == [0]
    assert "3 runs, 1 finished, 2 to do at" in runs.estimate(runs.plan(more, tmp_path / "store"))


def test_a_failing_run_is_reported_and_the_others_go_on(tmp_path, here):
    wanted = spec(grid={"layer": 3, "scale": [-1, 0.5, 1]})
    with pytest.raises(SweepError) as error:
        runs.run(wanted, tmp_path / "store")
    assert "1 run failed, 2 of 3 runs of s are kept in" in str(error.value)
    assert "  layer=3, pathway=v_only, scale=-1, draws=1, seed=0: DataError: scale -1 and" in str(error.value)
    assert len(runs.finished(wanted, tmp_path / "store", partial=True)) == 2


def test_an_unfit_worker_stops_the_sweep(tmp_path, here, monkeypatch):
    monkeypatch.setattr(experiments, "code_sha256", lambda name: "another")
    with pytest.raises(WorkerError, match="runs another version of the code"):
        runs.run(spec(seeds=[1, 2, 3]), tmp_path / "store")
    assert len(here) == 1


def test_ctrl_c_leaves_what_is_finished_and_says_so(tmp_path, here, monkeypatch):
    real = runs.each

    def each(*arguments):
        yield next(real(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "each", each)
    path = written(tmp_path, seeds=[1, 2, 3])
    done = CliRunner().invoke(app, ["sweep", str(path), "--store", str(tmp_path / "store")])
    assert done.exit_code == 130 and "stopped: 1 of 3 runs of s are kept in" in done.output
    monkeypatch.setattr(runs, "each", real)
    assert len(runs.run(specification.load(path), tmp_path / "store")) == 3 and len(here) == 3


def test_a_store_of_something_else_is_refused_and_set_aside_on_request(tmp_path, here, monkeypatch):
    store = tmp_path / "store"
    table = runs.run(spec(), store)
    kept = {p.name: p.read_bytes() for p in store.iterdir()}

    def altered(key, value):
        header = json.loads(kept["sweep.json"])
        header[key] = value
        return json.dumps(header)

    code = experiments.code("told.told_under")
    for content, message in {
        altered("model", "gpt2"): "holds results for the model gpt2, not organism",
        altered("weights_sha256", "0" * 64): "holds results for the weights 000",
        altered("experiment", "told.other"): "holds results for the run told.other, not told.told_under",
        altered("code", code | {"lib/facts.py": "0"}): r"holds results of another version of lib/facts\.py\.",
        altered("code", code | {"torch": "1.0"}): r"holds results of another version of torch\.",
        "{": r"has a damaged sweep\.json",
        "[1]": r"has a damaged sweep\.json",
    }.items():
        (store / "sweep.json").write_text(content)
        for attempt in (runs.run, runs.finished, lambda s, f: runs.estimate(runs.plan(s, f))):
            with pytest.raises(SweepError, match=message + r".*Give another folder with --store, or .* --fresh"):
                attempt(spec(), store)
    assert len(here) == 1 and {p.name for p in store.iterdir()} == set(kept)
    said: list[str] = []
    pd.testing.assert_frame_equal(runs.run(spec(), store, fresh=True, say=said.append), table)
    assert len(here) == 2 and said == [f"older results are now in {tmp_path / 'store.old-1'}"]
    assert len(list((tmp_path / "store.old-1").glob("*.json"))) == 2
    runs.run(spec(), store, fresh=True)
    assert len(here) == 2, "results of this version are not set aside"
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    for fresh in (False, True):
        with pytest.raises(SweepError, match="home is no store of a sweep, and not empty; give another folder"):
            runs.run(spec(), foreign, fresh=fresh)
    assert [p.name for p in foreign.iterdir()] == ["letter.txt"]


def test_two_sweeps_on_one_store(tmp_path, here):
    with Store(tmp_path / "store").lock(), pytest.raises(SweepError, match=r"another sweep is writing into .*store"):
        runs.run(spec(), tmp_path / "store")
    assert not here
    (tmp_path / "store.lock").write_text("left by a process that died")
    assert len(runs.run(spec(), tmp_path / "store")) == 1


def test_several_sweeps_share_workers_and_a_run_of_two_is_done_once(tmp_path, here):
    def finish(specs, stores):
        return runs.finish([runs.plan(*pair) for pair in zip(specs, stores, strict=True)])

    one, two = spec(name="one", seeds=[0, 1]), spec(name="two", seeds=[1, 2])
    stores = [tmp_path / "one", tmp_path / "two"]
    found = finish([one, two], stores)
    assert sorted(p["seed"] for p in here) == [0, 1, 2]
    for wanted, store, table in zip((one, two), stores, found, strict=True):
        pd.testing.assert_frame_equal(table, runs.run(wanted, store), check_exact=True)
        pd.testing.assert_frame_equal(table, runs.run(wanted, tmp_path / "alone" / wanted.name), check_exact=True)
    with pytest.raises(SweepError, match="two of these sweeps have one store"):
        finish([one, two], [stores[0]] * 2)
    with Store(stores[1]).lock(), pytest.raises(SweepError, match=r"another sweep is writing into .*two"):
        finish([one, spec(name="two", seeds=[3])], stores)
    bad = spec(name="two", grid={"layer": 3, "scale": [-1, 0.5]})
    with pytest.raises(SweepError, match="1 run failed, 1 of 2 runs of two are kept in"):
        finish([one, bad], stores)


def test_command_line(tmp_path, here):
    path, store = written(tmp_path, seconds=30, seeds=list(range(8))), tmp_path / "store"
    cli = CliRunner()
    given = [str(path), "--store", str(store), "--workers", "2"]
    dry = cli.invoke(app, ["sweep", *given, "--dry-run"])
    assert dry.output == "s on organism: 8 runs, 0 finished, 8 to do at 30 s each (estimated): 2 min on 2 workers\n"
    assert not store.exists() and not here
    done = cli.invoke(app, ["sweep", *given])
    assert done.exit_code == 0 and "s on organism: 8 runs, all finished; the table is" in done.output
    assert pd.read_csv(store / "table.csv").seed.tolist() == list(range(8))
    assert "8 finished, 0 to do" in cli.invoke(app, ["sweep", *given, "--dry-run"]).output
    assert "install --editable" in cli.invoke(app, ["sweep", "--help"]).output


# Real clusters


def test_a_call_that_kills_its_workers_takes_no_other_with_it():
    """A scheduler as Dask starts it sends a worker one call more than it can do, and blames that one as well when the
    worker dies; it is tried again alone."""

    def call(n):
        import os
        import time

        if n == 0:
            time.sleep(0.3)  # by then the next call waits here
            os._exit(1)
        raise ValueError("its own")

    few = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": logging.CRITICAL}
    first_death = dask.config.set({"distributed.scheduler.allowed-failures": 0})  # a worker takes seconds to come back
    with first_death, LocalCluster(**few) as usual, Client(usual, set_as_default=False) as client:
        outcomes = dict(cluster.each(client, call, {str(n): {"n": n} for n in range(3)}))
    assert all(isinstance(outcomes[key], ValueError) for key in "12")
    assert type(outcomes["0"]).__name__ == "KilledWorker"
    planned = runs.plan(spec(), Path("nowhere"))
    assert "layer=3, pathway=v_only, scale=0.5, draws=1, seed=0: its worker died each time" in runs._report(
        planned, [(planned, planned.runs[0], outcomes["0"])]
    )


def copied(folder: Path) -> Path:
    """A copy of the project in a folder, without data, whose studies have one more."""
    shutil.copytree(ROOT / "lib", folder / "project" / "lib")
    shutil.copy(Path(__file__).with_name("told.py"), folder / "project" / "lib" / "studies")
    return folder / "project"


@contextmanager
def started(project: Path, *words, **options):
    """A process of its own group in a project, which is killed at the end with all that it started."""
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, words)]
    process = subprocess.Popen(command, env=environment, cwd=project, start_new_session=True, text=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(condition, what: str, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


def results(store: Path) -> dict[str, int]:
    """Finished runs and when they were written."""
    return {p.name: p.stat().st_mtime_ns for p in store.glob("*.json") if p.name != "sweep.json"}


def workers_of(pid: int) -> list[psutil.Process]:
    """Processes that compute for a sweep: those that multiprocessing spawned, or forked from its server."""
    workers = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, AttributeError):  # one that has just ended
            forked = all("forkserver" in " ".join(p.cmdline()) for p in (child, child.parent()))
            workers += [child] if forked or "spawn_main" in " ".join(child.cmdline()) else []
    return workers


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # where nobody has asked for its exit code yet
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_a_record_that_is_killed_while_it_is_made_stays_as_it_was_and_the_same_command_goes_on(tmp_path):
    project = copied(tmp_path)
    shutil.copytree(ROOT / "data", project / "data", ignore=shutil.ignore_patterns("sweeps", "record"))
    (project / "data" / "sweeps").mkdir()
    written(project / "data" / "sweeps", grid={"layer": "all", "scale": 0.5, "draws": 4}, seeds=[0, 1])
    store, quiet = project / "_build" / "sweeps" / "organism" / "s", {"stdout": subprocess.DEVNULL}
    table = project / "data" / "record" / "organism" / "s.csv"
    table.parent.mkdir(parents=True)
    table.write_text("what was there")
    command = "lib", "record", "--model", "organism", "--workers", 1
    with started(project, *command, **quiet) as process:
        until(lambda: len(results(store)) >= 2, "two runs")
        process.kill()
    first = results(store)
    assert 2 <= len(first) < 24 and [p.name for p in table.parent.iterdir()] == ["s.csv"]
    assert table.read_text() == "what was there"
    with started(project, *command, **quiet) as process:
        assert process.wait(300) == 0
    assert first.items() <= results(store).items(), "none is repeated"
    assert len(table.read_text().splitlines()) == 25
    assert sorted(p.name for p in table.parent.iterdir()) == ["s.csv", "s.json"], "nothing is half-written"


def test_a_worker_of_another_version_is_named():
    planned, said = runs.plan(spec()), list[str]()
    other = planned.header["code"] | {"lib/facts.py": "other"}
    with pytest.raises(WorkerError, match=r"worker at tcp://x has another version of lib/facts\.py\. Install"):
        runs._require_same_code(planned, {"tcp://x": other}, said.append)
    with pytest.raises(
        WorkerError, match=r"worker at tcp://x cannot run this project \(ImportError: no lib\)\. Install"
    ):
        runs._require_same_code(planned, {"tcp://x": ImportError("no lib")}, said.append)
    runs._require_same_code(planned, {"tcp://x": planned.header["code"]}, said.append)
    assert not said
    runs._require_same_code(planned, {}, said.append)
    assert said == ["the scheduler has no worker yet; the runs wait for one"]


@pytest.mark.slow
def test_killed_at_every_place_and_resumed_the_table_is_that_of_an_undisturbed_run(tmp_path, here):
    """In a copy of the project whose studies have one more, by the command `python -m lib sweep`:
    1. On a scheduler and a worker that Dask's own command line started: the scheduler is killed.
    2. On this machine: one of its workers is killed, then all of it. While it runs, no other sweep may write there.
    3. With one worker, the rest. No finished run was repeated, and the table is that of the same runs made here."""
    project, store = copied(tmp_path), tmp_path / "store"
    (project / "data").symlink_to(ROOT / "data")
    path = written(tmp_path, grid={"layer": "all", "scale": 0.5, "draws": 4}, seeds=[0, 1])
    at, near = ("--scheduler-file", tmp_path / "dask.json"), ("--host", "127.0.0.1", "--no-dashboard")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def sweep(*options, **pipes):
        return started(project, "lib", "sweep", path, "--store", store, *options, **pipes)

    with (
        started(project, "dask", "scheduler", "--port", 0, *near, *at, **quiet) as scheduler,
        started(
            project, "dask", "worker", "--no-nanny", "--nthreads", 1, "--local-directory", tmp_path, *near, *at, **quiet
        ),
    ):
        until(lambda: at[1].exists() and at[1].read_text().endswith("}"), "the scheduler")
        address = json.loads(at[1].read_text())["address"]
        with sweep("--scheduler", address, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            until(lambda: len(results(store)) >= 2, "two runs")
            os.killpg(scheduler.pid, signal.SIGKILL)
            assert "the scheduler is gone" in process.communicate(timeout=300)[1] and process.returncode == 1
    first = results(store)
    assert 2 <= len(first) < 24

    with sweep("--workers", 2, **quiet) as process:
        until(lambda: len(results(store)) > len(first), "a run on this machine")
        workers_of(process.pid)[0].kill()
        with pytest.raises(SweepError, match="another sweep is writing into"):
            Store(store).lock()
        now = len(results(store))
        until(lambda: len(results(store)) > now, "a run after the death of a worker")
        alive = workers_of(process.pid)
        process.kill()
        process.wait()
        until(lambda: all(map(ended, alive)), "the end of its workers")
    second = results(store)
    assert first.items() <= second.items() and len(first) + 2 <= len(second) < 24

    with sweep("--workers", 1, **quiet) as process:
        assert process.wait(300) == 0
    assert second.items() <= results(store).items() and len(results(store)) == 24
    undisturbed = runs.run(specification.load(path), tmp_path / "undisturbed")
    assert (store / "table.csv").read_text() == undisturbed.to_csv(index=False)
    assert undisturbed.margin.nunique() == 24


def test_a_model_whose_runs_cost_more_may_have_a_smaller_sweep(tmp_path):
    path = written(
        tmp_path, seeds=[1, 2], instead={"smollm2": {"seeds": [1], "chosen_seeds": 3, "grid": {"scale": [0.5]}}}
    )
    whole, small = (specification.load(path, model_name=name) for name in ("organism", "smollm2"))
    assert (whole.seeds, whole.chosen_seeds, whole.grid["layer"]) == ([1, 2], 10, [3])
    assert (small.seeds, small.chosen_seeds, small.grid) == ([1], 3, {"scale": [0.5]})
    with pytest.raises(SweepError, match="instead"):
        specification.load(written(tmp_path, instead=["smollm2"]))
    with pytest.raises(SweepError, match="no model 'gemma'"):
        specification.load(written(tmp_path, instead={"gemma": {"seeds": [1]}}))
    with pytest.raises(SweepError, match="seedz"):
        specification.load(written(tmp_path, instead={"organism": {"seedz": [1]}}))
