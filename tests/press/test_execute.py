"""Running chapters: what is refused, what is kept, what a failure leaves behind; and `check`."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from typer.testing import CliRunner

from lib import files, results
from lib.__main__ import app
from lib.errors import BookError, ChapterError
from lib.press import boxes, build, check, execute, kernel

SAVE = """\
import json, pathlib
path = pathlib.Path("../_build/results") / model_name / "01_a.json"
path.parent.mkdir(parents=True, exist_ok=True)
words = ("source", "bos", "start", "lib", "commit", "python", "seed", "threads")
facts = {"model": model_name, "weights_sha256": "sum of " + model_name, "packages": {}} | dict.fromkeys(words, "x")
facts["seconds"] = 1.0
path.write_text(json.dumps({"provenance": facts, "values": {"seed": seed, "x": {"y": 0.5}}}))"""

MAKES = """\
import types, pathlib
folder = pathlib.Path("../_build/results") / model_name
(folder / "01_a").mkdir(parents=True, exist_ok=True)
(folder / "01_a" / "v.safetensors").write_text("x")
report = types.SimpleNamespace(figure=lambda name: (folder / f"{name}.png").write_text("x"))
report.figure("a")"""


def notebook(workshop: Path, name: str, *cells: str, saves: bool = True, own: str = "seed = 0") -> Path:
    """A chapter with these code cells after its parameters, with these of its `own`; saves: its last cell writes
    results."""
    nb, path = nbformat.v4.new_notebook(), workshop / "book" / f"{name}.ipynb"
    nb.cells = [nbformat.v4.new_code_cell(f'model_name = "x"\n{own}', metadata={"tags": ["parameters"]})]
    nb.cells += map(nbformat.v4.new_code_cell, [*cells, SAVE.replace("01_a", name)] if saves else cells)
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, path)
    return path


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A book of its own: chapters in tmp_path/book, output in tmp_path/_build."""
    for name in ("lib", "data", "book"):
        (tmp_path / name).mkdir()
    for name in execute.PINS:
        (tmp_path / name).write_text("")
    places = {"ROOT": tmp_path, "BOOK": tmp_path / "book", "BUILD": tmp_path / "_build"}
    for room in (execute, build, check, results):
        for name, place in places.items():
            monkeypatch.setattr(room, name, place, raising=False)
        monkeypatch.setattr(room, "weights_sha256", lambda name: f"sum of {name}", raising=False)
        monkeypatch.setattr(room, "canonical", lambda name: name, raising=False)
    return tmp_path


@pytest.fixture
def no_kernel(workshop, monkeypatch):
    """Cells are run in this process: enough where the question is which chapters are executed, and when."""

    def run_cells(notebook, output, values, **_):
        parameters, *cells = (cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code")
        names: dict = {}
        for source in (parameters, "\n".join(f"{name} = {value!r}" for name, value in values.items()), *cells):
            exec(source, names)
        output.write_text(notebook.read_text())

    monkeypatch.chdir(workshop / "book")
    monkeypatch.setattr(execute, "execute", run_cells)


def run(*chapters: str, **options) -> list[str]:
    """Execute chapters on `s`; what is said of each, in turn."""
    said: list[str] = []
    execute.run("s", chapters, say=said.append, **options)
    return said


def test_misspelt_parameter_is_refused_before_anything_runs(workshop):
    notebook(workshop, "01_a")
    unknown = r"01_a\.ipynb has no parameter 'sede'; its parameters cell knows model_name, seed"
    with pytest.raises(ChapterError, match=unknown):
        run("01_a", parameters={"sede": 1})
    assert not (workshop / "_build").exists()


@pytest.mark.parametrize("value", ["1", True, 1.5])
def test_a_value_of_another_kind_is_refused_before_anything_runs(workshop, value):
    notebook(workshop, "01_a")
    with pytest.raises(ChapterError, match=rf"01_a\.ipynb: seed is a whole number, as 0, and not {value!r}\."):
        run("01_a", parameters={"seed": value})
    assert not (workshop / "_build").exists()


@pytest.fixture
def kinds(workshop):
    """A chapter with a parameter of each kind."""
    own = 'seed = 0\nrate = 1e-3\nwikitext = False\nname = "a"  # @param ["a", "b"]\nlayers = [1]'
    path = notebook(workshop, "01_a", own=own)
    return path


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("seed=7", 7),
        ("seed = -7", -7),
        ("rate=2", 2.0),
        ("rate=1e-4", 1e-4),
        *((f"wikitext={word}", True) for word in ("true", "True", "yes", "on", "1")),
        *((f"wikitext={word}", False) for word in ("false", "False", "no", "NO", "off", "0")),
        ("name=no", "no"),
        ("name=7", "7"),
        ("name=a=b", "a=b"),
        ("name=", ""),
        ("layers=[2, 3]", [2, 3]),
    ],
)
def test_parameters_are_what_they_seem(kinds, typed, value):
    (found,) = execute.parse_parameters(["01_a"], [typed]).values()
    assert found == value and type(found) is type(value)
    execute.check_parameters(kinds, {typed.split("=")[0].strip(): found})


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["seed=x"], "--parameter seed=x: in 01_a seed is a whole number, as 0"),
        (["seed=true"], "seed is a whole number, as 0"),
        (["seed=1.5"], "seed is a whole number"),
        (["seed="], "seed is a whole number"),
        (["rate=nan"], r"--parameter rate=nan: in 01_a rate is a number, as 0\.001"),
        (["rate=NaN"], "rate is a number"),
        (["rate=1e999"], "rate is a number"),
        (["wikitext=perhaps"], "--parameter wikitext=perhaps: in 01_a wikitext is true or false, as False"),
        (["layers=1"], r"layers is a list in JSON, as \[1\]"),
        (["sede=1"], r"01_a\.ipynb has no parameter 'sede'; its parameters cell knows layers, model_name"),
        (["seed"], "--parameter 'seed': write NAME=VALUE"),
        (["=1"], "--parameter '=1': write NAME=VALUE"),
        (["seed=1", "seed=2"], "--parameter seed stands twice, as '1' and as '2'; give it once"),
    ],
)
def test_parameters_of_another_kind_are_refused(kinds, typed, message):
    with pytest.raises(ChapterError, match=message):
        execute.parse_parameters(["01_a"], typed)


def test_every_parameter_of_the_book_has_a_kind():
    for chapter in execute.chapter_names():
        known = execute.literals(execute.BOOK / f"{chapter}.ipynb")
        assert known["model_name"] == "smollm2" and {type(v) for v in known.values()} <= set(execute.KINDS)


def test_what_the_command_sets_itself_is_refused():
    done = CliRunner().invoke(app, ["run", "1", "-p", "model_name=organism"])
    assert (done.exit_code, done.output) == (2, "error: --parameter model_name: --model sets it.\n")
    done = CliRunner().invoke(app, ["run", "4", "-p", "wikitext=perhaps"])
    assert done.exit_code == 1 and "wikitext is true or false, as False" in str(done.exception)


def test_an_edited_case_is_executed_again_and_kept_apart_from_the_book(workshop, no_kernel, monkeypatch):
    path = notebook(workshop, "01_a", "from lib.files import run_folder")
    path.write_text(path.read_text().replace("/ model_name /", "/ run_folder(model_name) /"))
    case, mine = workshop / "own.yaml", workshop / "mine.csv"
    mine.write_text("country,capital\n" + "\n".join(f"S{i},A{i}" for i in range(40)))
    case.write_text("facts: mine.csv\ntemplate: 'The capital of {} is'\ncontrols: [in_is]\n")

    def outcome():
        return "executed" if "executed on s" in run("01_a")[0] else "kept"

    assert (outcome(), outcome()) == ("executed", "kept")
    monkeypatch.setenv(files.CASE_VARIABLE, str(case))
    assert (outcome(), outcome()) == ("executed", "kept")
    mine.write_text(mine.read_text().replace("A7", "B7"))
    assert (outcome(), outcome()) == ("executed", "kept")
    case.write_text(case.read_text() + "title: mine\n")
    assert (outcome(), outcome()) == ("executed", "kept")
    assert sorted(p.name for p in (workshop / "_build" / "results").iterdir()) == ["s", "s+own"]
    monkeypatch.delenv(files.CASE_VARIABLE)
    assert outcome() == "kept"


def test_a_failing_chapter_leaves_a_log_that_the_error_names_and_nothing_else(workshop, capfd):
    """In the log are its own words, those of its cells and of its children: nothing of them is on the terminal."""
    cells = "import os, sys\nos.system('echo a child >&2')\nprint('a cell')\nprint('a warning', file=sys.stderr)"
    notebook(workshop, "01_a", cells, "raise ValueError('the reason')  # here")
    log = workshop / "_build" / "logs" / "s" / "01_a.log"
    with pytest.raises(ChapterError, match=f"All that it said before stands in {log}") as error:
        run("01_a")
    message = str(error.value)
    assert all(w in message for w in ("01_a.ipynb, cell ", "ValueError: the reason", "# here", "Traceback"))
    assert capfd.readouterr() == ("", "")
    assert all(words in log.read_text() for words in ("a child", "a cell", "a warning"))
    assert "TCP" not in log.read_text(), "no other user of this machine can listen"
    assert {p for p in (workshop / "_build").rglob("*") if p.is_file()} - {workshop / "_build" / "build.lock"} == {log}


def test_a_kernel_that_dies_is_told_in_a_sentence(workshop):
    notebook(workshop, "01_a", "import os\nos._exit(1)")
    said = r"01_a\.ipynb: Kernel died; [\d.]+ of [\d.]+ GB of memory are free now, .*--jobs 1.* stands in .*01_a\.log"
    with pytest.raises(ChapterError, match=said):
        run("01_a")


NEW = """\
import builtins, sys
assert "torch" in sys.modules and not hasattr(builtins, "left")
assert {m for m in sys.modules if m.startswith("lib.")} <= {"lib.press", "lib.press.kernel"}
builtins.left = "by another kernel"
"""


@pytest.mark.skipif(not kernel.FORKS, reason="kernels are not forked here")
def test_a_kernel_has_packages_from_a_server_of_one_thread_and_nothing_from_another_kernel(workshop):
    notebook(workshop, "01_a", NEW)
    notebook(workshop, "02_b", NEW)
    run("01_a", "02_b", jobs=1)
    [server] = [p for p in psutil.Process().children() if "forkserver" in p.cmdline()[-1]]
    assert server.num_threads() == 1 and not server.children()


@pytest.mark.slow
def test_a_kernel_goes_when_whoever_started_it_is_killed(workshop):
    sleeps = "import os, time\nopen('../pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    path, pid = notebook(workshop, "01_a", sleeps), workshop / "pid"
    code = (
        "import pathlib, sys\nfrom lib.press import execute\nfolder = pathlib.Path(sys.argv[1])\n"
        "execute.execute(folder / 'book' / '01_a.ipynb', folder / 'x.ipynb', {}, log=folder / 'log', threads=1, "
        "tick=lambda *_, **__: None)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code, str(workshop)], cwd=files.ROOT)
    try:
        assert until(lambda: pid.is_file() and pid.read_text()), path
        process = psutil.Process(int(pid.read_text()))
    finally:
        starter.kill()
        starter.wait()
    assert until(lambda: not process.is_running(), 20)


FOREIGN = {"PYTHONPATH": "/nowhere", "OMP_NUM_THREADS": "7", "FOREIGN": "1"}
WHERE = """\
import os, sys
import lib
assert sys.executable == {python!r} and lib.__file__ == {lib!r}, (sys.executable, lib.__file__)
assert "FOREIGN" not in os.environ and not hasattr(lib, "foreign") and "started" not in globals()
assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == {root!r}"""


@pytest.mark.parametrize("forks", {False, kernel.FORKS})
def test_a_chapter_runs_in_this_python_and_this_checkout_whatever_else_is_installed(workshop, monkeypatch, forks):
    """A kernel of the same name, a package of the same name, and a start-up file of IPython stand in the way."""
    foreign = workshop / "share" / "kernels" / "python3" / "kernel.json"
    spec = {"argv": ["/bin/false", "-f", "{connection_file}"], "display_name": "x", "language": "python"}
    put(foreign, json.dumps(spec | {"env": FOREIGN}))
    put(workshop / "other" / "lib" / "__init__.py", "foreign = True")
    put(workshop / "ipython" / "profile_default" / "startup" / "00.py", "started = True")
    monkeypatch.setenv("JUPYTER_PATH", str(workshop / "share"))
    monkeypatch.setenv("PYTHONPATH", str(workshop / "other"))
    monkeypatch.setenv("IPYTHONDIR", str(workshop / "ipython"))
    monkeypatch.setattr(execute, "FORKS", forks)
    monkeypatch.setattr(execute, "ROOT", files.ROOT)
    checks = WHERE.format(python=sys.executable, lib=str(files.ROOT / "lib" / "__init__.py"), root=str(files.ROOT))
    nb = notebook(workshop, "01_a", checks)
    execute.execute(nb, workshop / "x.ipynb", {}, log=workshop / "log", threads=1, tick=lambda *_, **__: None)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


BUILDER = """\
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in its background ignore Ctrl-C
from lib.press import execute
folder = pathlib.Path(sys.argv[1])
for name, place in {"ROOT": folder, "BOOK": folder / "book", "BUILD": folder / "_build"}.items():
    setattr(execute, name, place)
execute.weights_sha256 = execute.canonical = lambda name: name
from lib import __main__
sys.argv = ["lib", "run", "1", "--model", "s"]
__main__.main()
"""


@pytest.mark.slow
def test_a_build_that_is_told_to_stop_says_so_and_leaves_nothing_and_another_one_waits_for_it(workshop):
    """What waits is told by Ctrl-C, and what works by SIGTERM, which is made the same."""
    notebook(workshop, "01_a", "open('../pid', 'w').write('here')\nimport time\ntime.sleep(600)")
    pid, temporary = workshop / "pid", workshop / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-c", BUILDER, str(workshop)]
    options = {"cwd": files.ROOT, "env": os.environ | {"TMPDIR": str(temporary)}, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    first = subprocess.Popen(command, **options)
    assert until(pid.is_file) and first.poll() is None
    second = subprocess.Popen(command, **options)
    assert "another build is at work in" in (second.stdout.readline() if second.stdout else "")
    children = psutil.Process(first.pid).children(recursive=True)
    second.send_signal(signal.SIGINT), first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]
    assert "stopped: the chapters that were executed are kept" in said[0] and "Traceback" not in said[0]
    assert until(lambda: not any(map(works, children)), 20)
    assert not list(temporary.glob("qkv*")) and not list(temporary.glob("pymp*"))
    assert not [p for p in workshop.rglob("*") if ".part" in p.name or p.suffix == ".key"]


def works(process: psutil.Process) -> bool:
    """Whether a process still does something; one that ended may be listed until it is asked for."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def until(holds, seconds: float = 200) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(holds())


@pytest.mark.parametrize("place, transport", [("/x", "ipc"), ("/" + "x" * 100, "tcp")])
def test_kernels_are_reached_through_sockets_where_their_names_are_short_enough(place, transport):
    assert execute._kernel_manager(Path(place), sys.stderr, 1)().transport == transport


def test_a_terminal_shows_one_bar_a_chapter_and_nothing_else(workshop, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    for name in ("01_a", "02_b"):
        notebook(workshop, name, "import logging\nlogging.warning('x')")
    run("01_a", "02_b", bars=True)
    run("01_a", bars=True)
    shown, errors = capfd.readouterr()
    last = execute.without_colours(shown).rsplit("01_a", 1)[1]
    assert "4/4 cells" in last and not errors and "executed" not in shown and "WARNING" not in shown


@pytest.mark.parametrize("words", [["--subject", "organism"], ["--subject=organism"], ["-s", "organism"]])
@pytest.mark.parametrize("command", ["run", "check", "sweep"])
def test_an_old_option_is_answered_with_the_new_name(command, words):
    done = CliRunner().invoke(app, [command, *words])
    assert done.exit_code == 2
    assert done.output == f"error: {words[0].split('=')[0]} is called --model now (-m for short).\n"


def test_an_old_parameter_and_an_old_variable_are_answered_with_the_new_name():
    done = CliRunner().invoke(app, ["run", "1", "-p", "subject=organism"])
    assert done.exit_code == 2 and "is called model_name now, and --model sets it" in done.output
    done = subprocess.run(["make", "book", "SUBJECT=organism"], cwd=files.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "SUBJECT= is called MODEL= now: make book MODEL=organism." in done.stderr


def test_chapters_run_side_by_side_share_the_cores_and_start_in_the_folder_of_their_notebook(workshop, monkeypatch):
    """Each waits for a sign of the other: one after the other they would fail. Their threads share the cores, and this
    process stays where it is."""
    monkeypatch.setattr(execute.os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    here = Path.cwd()
    sign = (
        "import os, pathlib, time\nhere = pathlib.Path('..')\n"
        "(here / '{}').write_text(os.environ['OMP_NUM_THREADS'] + ' ' + os.getcwd())\n"
        "end = time.time() + 60\nwhile not (here / '{}').exists():\n    assert time.time() < end\n    time.sleep(0.05)"
    )
    for name, other in (("01_a", "02_b"), ("02_b", "01_a")):
        notebook(workshop, name, sign.format(name, other))
    run("01_a", "02_b")
    assert [(workshop / name).read_text() for name in ("01_a", "02_b")] == [f"2 {workshop / 'book'}"] * 2
    assert "OMP_NUM_THREADS" not in execute.os.environ and Path.cwd() == here


def test_the_longest_begin_first_unless_they_wait_for_another(workshop, no_kernel, monkeypatch):
    monkeypatch.setattr(execute, "NEEDS", {"03_c": "02_b"})
    monkeypatch.setattr(execute, "LONGEST", ("03_c", "04_d", "02_b"))
    names = ["01_a", "02_b", "03_c", "04_d"]
    for name in names:
        notebook(workshop, name)
    said = run(*names, "04_d", jobs=1)  # named twice, executed once
    assert [line.split(":")[0] for line in said] == ["04_d", "02_b", "03_c", "01_a"]


def test_after_a_failure_none_is_begun_and_what_needs_it_is_not_executed(workshop, no_kernel, monkeypatch):
    monkeypatch.setattr(execute, "NEEDS", {"02_b": "01_a"})
    notebook(workshop, "01_a", "raise ValueError('the reason')")
    notebook(workshop, "02_b")
    notebook(workshop, "03_c")
    with pytest.raises(ValueError, match="the reason"):
        run("01_a", "02_b", "03_c", jobs=1)
    assert not list((workshop / "_build").rglob("*.key"))


def test_a_model_without_a_failure_is_a_result_that_the_pages_state(workshop, monkeypatch, organism):
    """What needs such a chapter is not executed; another error of the same kind stays one."""
    monkeypatch.setattr(execute, "NEEDS", {"02_b": "01_a"})
    monkeypatch.setattr(execute, "load", lambda name: dataclasses.replace(organism, name=name))
    monkeypatch.setattr(execute, "use_device_of", lambda model: model)
    raised = "from lib.{} import {} as E\nraise E('8 of 8 facts are told.')"
    for name, error in (("01_a", ("diagnosis", "NoFailure")), ("02_b", None), ("03_c", ("errors", "DataError"))):
        nb = nbformat.read(notebook(workshop, name, raised.format(*error) if error else "1 / 0"), 4)
        nb.cells.insert(0, nbformat.v4.new_markdown_cell("# A title\n\n**Question.** Where?"))
        nbformat.write(nb, workshop / "book" / f"{name}.ipynb")
    run("01_a", "02_b")
    for name in ("01_a", "02_b"):
        values = json.loads((workshop / "_build" / "results" / "s" / f"{name}.json").read_text())["values"]
        assert values == {"no_failure": "8 of 8 facts are told."}
        page = workshop / "_build" / "executed" / "s" / f"{name}.ipynb"
        texts = [cell.source for cell in nbformat.read(page, 4).cells]
        assert texts[0].startswith("# A title") and texts[2].startswith("**There is no failure to study on `s`.**")
        boxes.add_box(page, "s", {"values": values, "provenance": {"seconds": 1}}, [])
        assert "**Answer.** **There is no failure to study on `s`.** 8 of 8" in nbformat.read(page, 4).cells[0].source
    assert run("01_a", "02_b") == [f"{name}: nothing changed, kept" for name in ("01_a", "02_b")]
    with pytest.raises(ChapterError, match="DataError: 8 of 8"):
        run("03_c")


def test_a_chapter_waits_for_the_one_that_it_needs(workshop, no_kernel, monkeypatch):
    monkeypatch.setattr(execute, "NEEDS", {"01_a": "02_b"})
    notebook(workshop, "01_a", "assert open('../made').read() == 'by b'")
    notebook(workshop, "02_b", "import time\ntime.sleep(0.5)\nopen('../made', 'w').write('by b')")
    assert [line.split(":")[0] for line in run("01_a", "02_b")] == ["02_b", "01_a"]


def test_only_what_changed_runs_again(workshop, no_kernel, monkeypatch):
    notebook(workshop, "01_a", "if not seed + 1:\n    from lib import new")

    def outcome(**options):
        return "executed" if "executed on s" in run("01_a", **options)[0] else "kept"

    assert outcome() == "executed"
    assert outcome() == "kept"
    assert outcome(parameters={"seed": 5}) == "executed"
    assert outcome() == "executed"
    for change in ("lib/new.py", "data/facts.csv", "constraints.txt", "requirements.txt"):
        (workshop / change).write_text("changed")
        assert (outcome(), outcome()) == ("executed", "kept"), change
    notebook(workshop, "01_a", "y = 2  # it imports nothing of lib any more")
    assert outcome() == "executed"
    assert outcome() == "kept"
    assert outcome(force=True) == "executed"
    (workshop / "_build" / "results" / "s" / "01_a.json").unlink()
    assert outcome() == "executed"
    notebook(workshop, "01_a", f"if False:\n    report.figure('never')\n{MAKES}")
    assert (outcome(), outcome()) == ("executed", "kept")
    for name in ("a.png", "01_a/v.safetensors"):
        (workshop / "_build" / "results" / "s" / name).unlink()
        assert (outcome(), outcome()) == ("executed", "kept"), name
    monkeypatch.setattr(execute, "weights_sha256", lambda name: "another sum")
    assert outcome() == "executed"


def test_a_module_that_no_cell_needs_leaves_a_chapter_alone(workshop):
    """a imports b inside a function; c is imported by nobody."""
    made = {"a": "def f():\n    from lib import b\n", "b": "import lib.d as d", "c": "", "d": "x = 1"}
    for name, code in made.items():
        (workshop / "lib" / f"{name}.py").write_text(code)
    path = notebook(workshop, "01_a", "%matplotlib inline\nif model_name == 'never':\n    from lib.a import f")
    assert [p.stem for p in execute.sources(path)] == ["__init__", "a", "b", "d"]
    (workshop / "lib" / "__init__.py").write_text("")
    old = execute.fingerprint("s", "01_a", {}, "")
    (workshop / "lib" / "c.py").write_text("changed")
    assert execute.fingerprint("s", "01_a", {}, "") == old
    (workshop / "lib" / "d.py").write_text("x = 2")
    assert execute.fingerprint("s", "01_a", {}, "") != old


def test_a_chapter_that_shows_a_sweep_depends_on_the_record_or_on_the_experiments_that_are_specified(
    workshop, monkeypatch
):
    """Their modules are found by name when the sweep runs; no import says so."""
    monkeypatch.setenv("RECORD", "off")
    for name in ("sweeps/__init__", "sweeps/runs", "studies/__init__", "studies/trials", "studies/others", "a"):
        (workshop / "lib" / name).parent.mkdir(exist_ok=True)
        (workshop / "lib" / f"{name}.py").write_text("")
    (workshop / "lib" / "studies" / "trials.py").write_text("def edit():\n    import lib.a\n")
    (workshop / "data" / "sweeps").mkdir()
    (workshop / "data" / "sweeps" / "s.yaml").write_text("name: s\nrun: trials.edit  # others.edit\n")
    path = notebook(workshop, "01_a", "from lib import sweeps")
    wanted = ["__init__", "a", "studies/__init__", "studies/trials", "sweeps/__init__"]
    assert rooms(path) == wanted
    path = notebook(workshop, "01_a", "from lib.sweeps.runs import table")
    assert rooms(path) == [*wanted, "sweeps/runs"]
    monkeypatch.delenv("RECORD")
    (workshop / "data" / "record" / "s").mkdir(parents=True)
    (workshop / "data" / "record" / "s" / "layers.csv").write_text("")
    assert [p.name for p in execute.sources(path)] == ["layers.csv", "__init__.py", "__init__.py", "runs.py"]


def rooms(notebook: Path) -> list[str]:
    """The modules of lib/ that a chapter depends on."""
    paths = [p.relative_to(execute.ROOT / "lib") for p in execute.sources(notebook) if p.suffix == ".py"]
    return [p.with_suffix("").as_posix() for p in paths]


LOADED = """
import sys
from pathlib import Path
for lines in sys.argv[1:]:
    for name in [m for m in sys.modules if m.partition(".")[0] == "lib"]:
        del sys.modules[name]
    exec(lines)
    print(*(m[4:].replace(".", "/") for m in sys.modules if m.startswith("lib.")))
"""


def test_every_chapter_depends_on_what_it_loads():
    """What Python really loads for a chapter's imports is what the fingerprint holds."""
    notebooks = [execute.BOOK / f"{chapter}.ipynb" for chapter in execute.chapter_names()]
    imports = []
    for path in notebooks:
        lines = {line for c in nbformat.read(path, 4).cells for line in c.source.splitlines()}
        imports.append("\n".join(sorted(line for line in lines if line.startswith(("from lib", "import lib")))))
    loaded_by = subprocess.check_output([sys.executable, "-c", LOADED, *imports], text=True, cwd=files.ROOT)
    for path, loaded in zip(notebooks, loaded_by.splitlines(), strict=True):
        assert loaded and set(loaded.split()) <= {name.removesuffix("/__init__") for name in rooms(path)}


def test_build_folder_that_cannot_be_written(workshop):
    notebook(workshop, "01_a")
    (workshop / "_build").write_text("a file in its place")
    with pytest.raises(ChapterError, match=r"cannot write into .*Make .*_build a folder that you may write to"):
        run("01_a")


def test_a_failing_chapter_takes_its_old_figures_down(workshop, no_kernel):
    """Trap: the run fails, and yesterday's numbers go on being built and checked, green."""
    notebook(workshop, "01_a")
    run("01_a")
    expect(workshop / "e", {"seed": {"value": 0}})
    assert check.check("s", workshop / "e")[0][-1]
    notebook(workshop, "01_a", "raise ValueError('broken')")
    assert not check.check("s", workshop / "e")[0][-1], "numbers of other inputs do not count"
    with pytest.raises(ValueError, match="broken"):
        run("01_a")
    assert not list((workshop / "_build").rglob("01_a.*"))
    advice = "not executed on s since its inputs changed: 01_a. Run `python -m lib run --model s` first"
    with pytest.raises(ChapterError, match=advice):
        build.build("s")


def test_a_chapter_whose_prose_names_a_number_that_it_did_not_report_fails(workshop, no_kernel):
    path = notebook(workshop, "01_a")
    nb = nbformat.read(path, 4)
    nb.cells.append(nbformat.v4.new_markdown_cell("{glue:text}`seed` of {glue:text}`tolled` and {glue:text}`sead`"))
    nbformat.write(nb, path)
    with pytest.raises(ChapterError, match="01_a ran, but its prose names tolled, sead, which it did not report"):
        run("01_a")
    assert not list((workshop / "_build").rglob("01_a.*"))


def test_a_chapter_that_stops_saving_fails(workshop, no_kernel):
    notebook(workshop, "01_a")
    run("01_a")
    notebook(workshop, "01_a", "x = 1", saves=False)
    with pytest.raises(ChapterError, match="saved no results"):
        run("01_a")


def test_a_warning_fails_the_build_and_leaves_the_old_book(workshop, no_kernel, monkeypatch):
    (workshop / "_config.yml").write_text(
        "title: t\nexecute: {execute_notebooks: 'off'}\n"
        "sphinx: {extra_extensions: [lib.press.theme], config: {html_math_renderer: mathml}}\n"
    )
    (workshop / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n  - file: book/01_a\n")
    page = workshop / "book" / "index.md"
    page.write_text("# A book\n\n$x = 1$\n")
    chapter = notebook(workshop, "01_a")
    nb = nbformat.read(chapter, 4)
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("# A chapter"))
    nbformat.write(nb, chapter)
    run("01_a")
    built = build.build("s", say=lambda _: None).parent / "book" / "index.html"
    assert "<math" in built.read_text() and "mathjax@" not in built.read_text(), "no script from elsewhere"
    said: list[str] = []
    build.build("s", say=said.append)
    assert said == ["book: nothing changed, kept"]
    (built.parents[1] / "genindex.html").unlink()
    with monkeypatch.context() as patch, pytest.raises(ChapterError, match="built again"):
        patch.setattr(build, "_html", lambda *_: (_ for _ in ()).throw(ChapterError("built again")))
        build.build("s")
    page.write_text("# A book\n\n{glue:text}`missing`, {doc}`nowhere`\n")
    with pytest.raises(ChapterError, match=r"does not build without warnings:\n.*(nowhere|missing)"):
        build.build("s")
    assert "<math" in built.read_text(), "the book that was there still is"


def test_check_exits_1_on_a_miss(monkeypatch):
    cli = CliRunner()
    monkeypatch.setattr(check, "check", lambda model: [("c", "k", "1", 2, False)])
    missed = cli.invoke(app, ["check"])
    assert missed.exit_code == 1 and "0 of 1 hold" in missed.output
    monkeypatch.setattr(check, "check", lambda model: [("c", "k", "1", 1, True)])
    assert cli.invoke(app, ["check"]).exit_code == 0


def test_chapters_by_number_and_name():
    first = execute.chapter_names()[0]
    assert all(execute.choose_chapters([word]) == [first] for word in ("1", "01", first))
    assert execute.choose_chapters([]) == execute.chapter_names()
    with pytest.raises(ChapterError, match="there is no chapter '99'; choose from 01_static"):
        execute.choose_chapters(["99"])


def expect(folder, keys):
    folder.mkdir(exist_ok=True)
    (folder / "s.json").write_text(json.dumps({"01_a": keys}))


def test_check_holds_and_misses(workshop, no_kernel):
    notebook(workshop, "01_a")
    run("01_a")
    wanted = {"seed": {"value": 0}, "x.y": {"value": 0.51, "tolerance": 0.02}, "x": {"value": {"y": 0.5}}}
    expect(workshop / "e", wanted)
    assert [row[-1] for row in check.check("s", workshop / "e")] == [True, True, True]
    far = {"value": 0.6, "tolerance": 0.02}
    expect(workshop / "e", {"seed": {"value": 1}, "x.y": far, "x.z": {"min": 0}, "absent": {"value": None}})
    rows = check.check("s", workshop / "e")
    assert [row[-1] for row in rows] == [False] * 4
    assert rows[-1][3] == "not run"
    with pytest.raises(ChapterError, match="nothing is expected of 't'"):
        check.check("t", workshop / "e")


def test_command_line_teaches_and_reports():
    cli = CliRunner()
    assert "fetch a model" in cli.invoke(app, ["--help"]).output
    assert "smollm2" in cli.invoke(app, ["fetch", "--help"]).output
    failed = cli.invoke(app, ["run", "1", "-p", "seed"])
    assert isinstance(failed.exception, BookError) and "write NAME=VALUE" in str(failed.exception)


def test_results_of_another_model_are_not_mixed_in(workshop, no_kernel):
    notebook(workshop, "01_a")
    run("01_a")
    assert check.current_values("s") == {"01_a": {"seed": 0, "x": {"y": 0.5}}}
    path = results.results_path("s", "01_a")
    path.write_text(path.read_text().replace('"model": "s"', '"model": "other"'))
    with pytest.raises(ChapterError, match=r"was made by other .*, not by s .*Run `python -m lib run 01_a"):
        check.current_values("s")
