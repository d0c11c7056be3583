"""Running chapters: what is refused, what is kept, what a failure leaves behind; and `check`."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from lib import files, results
from lib.__main__ import app
from lib.errors import BookError, ChapterError
from lib.press import build, check, execute


def notebook(path, *cells, parameters='model_name = "x"\nseed = 0'):
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nb.cells += [nbformat.v4.new_code_cell(c) for c in cells]
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A book of its own: chapters in tmp_path/book, output in tmp_path/_build."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "data").mkdir()
    for name in execute.PINS:
        (tmp_path / name).write_text("")
    own = {"ROOT": tmp_path, "BOOK": tmp_path / "book", "BUILD": tmp_path / "_build"}
    for room in (execute, build, check, results):
        for name, value in {
            **own,
            "weights_sha256": lambda name: "sum of " + name,
            "canonical": lambda name: name,
        }.items():
            monkeypatch.setattr(room, name, value, raising=False)
    return tmp_path


SAVE = """\
import json, pathlib
path = pathlib.Path("../_build/results") / model_name / "01_a.json"
path.parent.mkdir(parents=True, exist_ok=True)
words = ("source", "start", "seconds", "lib", "commit", "python", "seed", "threads")
facts = {"model": model_name, "weights_sha256": "sum of " + model_name, "packages": {}} | dict.fromkeys(words, "x")
path.write_text(json.dumps({"provenance": facts, "values": {"seed": seed, "x": {"y": 0.5}}}))"""


def test_misspelt_parameter_is_refused_before_anything_runs(workshop):
    notebook(workshop / "book" / "01_a.ipynb", SAVE)
    with pytest.raises(
        ChapterError, match=r"01_a\.ipynb has no parameter 'sede'; its parameters cell knows model_name, seed"
    ):
        execute.run("s", ["01_a"], {"sede": 1})
    assert not (workshop / "_build").exists()


def test_a_failing_chapter_fails_the_run_and_leaves_nothing(workshop):
    notebook(workshop / "book" / "01_a.ipynb", "x = 1", "raise ValueError('the reason')  # here")
    with pytest.raises(ChapterError) as error:
        execute.run("s", ["01_a"])
    message = str(error.value)
    assert "01_a.ipynb, cell " in message and "ValueError: the reason" in message
    assert "# here" in message and "Traceback" in message
    assert not list((workshop / "_build").rglob("*.ipynb")) and not list((workshop / "_build").rglob("*.key"))


def test_what_a_kernel_says_goes_to_a_log_that_the_error_names(workshop, capfd):
    """Its own words, those of its cells and of its children: nothing of them on the terminal."""
    cells = "import os, sys\nos.system('echo a child >&2')\nprint('a cell')\nprint('a warning', file=sys.stderr)"
    notebook(workshop / "book" / "01_a.ipynb", cells, "raise ValueError('the reason')")
    log = workshop / "_build" / "logs" / "s" / "01_a.log"
    with pytest.raises(ChapterError, match=f"All that it said before stands in {log}"):
        execute.run("s", ["01_a"])
    assert capfd.readouterr() == ("", "")
    assert all(words in log.read_text() for words in ("a child", "a cell", "a warning"))
    assert "TCP" not in log.read_text(), "no other user of this machine can listen"


def test_a_kernel_that_dies_is_told_in_a_sentence(workshop):
    notebook(workshop / "book" / "01_a.ipynb", "import os\nos._exit(1)")
    with pytest.raises(ChapterError, match=r"01_a\.ipynb: Kernel died.* before stands in .*01_a\.log"):
        execute.run("s", ["01_a"])


@pytest.mark.parametrize("place, transport", [("/x", "ipc"), ("/" + "x" * 100, "tcp")])
def test_kernels_are_reached_through_sockets_where_their_names_are_short_enough(place, transport):
    assert execute._kernel_manager(Path(place), sys.stderr, 1)().transport == transport


def test_a_terminal_shows_one_bar_a_chapter_and_nothing_else(workshop, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    for name in ("01_a", "02_b"):
        notebook(
            workshop / "book" / f"{name}.ipynb", "import logging\nlogging.warning('x')", SAVE.replace("01_a", name)
        )
    execute.run("s", ["01_a", "02_b"], bars=True)
    execute.run("s", ["01_a"], bars=True)
    shown, errors = capfd.readouterr()
    last = execute.without_colours(shown).rsplit("01_a", 1)[1]
    assert "4/4 cells" in last and not errors and "executed" not in shown and "WARNING" not in shown


@pytest.mark.parametrize("words", [["--subject", "organism"], ["--subject=organism"], ["-s", "organism"]])
@pytest.mark.parametrize("command", ["run", "check", "sweep"])
def test_an_old_option_is_answered_with_the_new_name(command, words):
    done = CliRunner().invoke(app, [command, *words])
    assert done.exit_code == 2 and done.output.count("\n") == 1
    assert done.output == f"error: {words[0].split('=')[0]} is called --model now (-m for short).\n"


def test_an_old_parameter_and_an_old_variable_are_answered_with_the_new_name():
    done = CliRunner().invoke(app, ["run", "1", "-p", "subject=organism"])
    assert done.exit_code == 2 and "is called model_name now, and --model sets it" in done.output
    done = subprocess.run(["make", "book", "SUBJECT=organism"], cwd=files.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "SUBJECT= is called MODEL= now: make book MODEL=organism." in done.stderr


def test_chapters_run_side_by_side_and_share_the_cores(workshop, monkeypatch):
    """Each waits for a sign of the other: one after the other they would fail. Their threads share the cores."""
    monkeypatch.setattr(execute.os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sign = (
        "import os, pathlib, time\nhere = pathlib.Path('..')\n(here / '{}').write_text(os.environ['OMP_NUM_THREADS'])\n"
        "end = time.time() + 60\nwhile not (here / '{}').exists():\n    assert time.time() < end\n    time.sleep(0.05)"
    )
    for mine, other in (("01_a", "02_b"), ("02_b", "01_a")):
        notebook(workshop / "book" / f"{mine}.ipynb", sign.format(mine, other), SAVE.replace("01_a", mine))
    execute.run("s", ["01_a", "02_b"], say=lambda _: None)
    assert [(workshop / name).read_text() for name in ("01_a", "02_b")] == ["2", "2"]
    assert "OMP_NUM_THREADS" not in execute.os.environ


def test_each_kernel_starts_in_the_folder_of_its_notebook_and_this_process_stays_where_it_is(workshop):
    here, names = Path.cwd(), ["01_a", "02_b", "03_c", "04_d"]
    for name in names:
        tell = f"import os, time\ntime.sleep(0.2 * {int(name[:2])})\nopen('../{name}', 'w').write(os.getcwd())"
        notebook(workshop / "book" / f"{name}.ipynb", tell, SAVE.replace("01_a", name))
    execute.run("s", names, jobs=2, say=lambda _: None)
    assert {(workshop / name).read_text() for name in names} == {str(workshop / "book")}
    assert Path.cwd() == here


def test_the_longest_begin_first_unless_they_wait_for_another(workshop, monkeypatch):
    monkeypatch.setattr(execute, "NEEDS", {"03_c": "02_b"})
    monkeypatch.setattr(execute, "LONGEST", ("03_c", "04_d", "02_b"))
    names, said = ["01_a", "02_b", "03_c", "04_d"], list[str]()
    for name in names:
        notebook(workshop / "book" / f"{name}.ipynb", SAVE.replace("01_a", name))
    execute.run("s", [*names, "04_d"], jobs=1, say=said.append)  # named twice, executed once
    assert [line.split(":")[0] for line in said] == ["04_d", "02_b", "03_c", "01_a"]


def test_after_a_failure_none_is_begun_and_what_needs_it_is_not_executed(workshop, monkeypatch):
    monkeypatch.setattr(execute, "NEEDS", {"02_b": "01_a"})
    notebook(workshop / "book" / "01_a.ipynb", "raise ValueError('the reason')")
    for name in ("02_b", "03_c"):
        notebook(workshop / "book" / f"{name}.ipynb", SAVE.replace("01_a", name))
    with pytest.raises(ChapterError, match="the reason"):
        execute.run("s", ["01_a", "02_b", "03_c"], jobs=1, say=lambda _: None)
    assert not list((workshop / "_build").rglob("*.key"))


def test_a_chapter_waits_for_the_one_that_it_needs(workshop, monkeypatch):
    monkeypatch.setattr(execute, "NEEDS", {"01_a": "02_b"})
    notebook(workshop / "book" / "01_a.ipynb", "assert open('../made').read() == 'by b'", SAVE)
    slow = "import time\ntime.sleep(0.5)\nopen('../made', 'w').write('by b')"
    notebook(workshop / "book" / "02_b.ipynb", slow, SAVE.replace("01_a", "02_b"))
    said: list[str] = []
    execute.run("s", ["01_a", "02_b"], say=said.append)
    assert [line.split(":")[0] for line in said] == ["02_b", "01_a"]


def test_only_what_changed_runs_again(workshop):
    chapter = notebook(workshop / "book" / "01_a.ipynb", "if not seed + 1:\n    from lib import new", SAVE)
    said: list[str] = []

    def run(**options):
        said.clear()
        execute.run("s", ["01_a"], say=said.append, **options)
        return "executed" if "executed on s" in said[0] else "kept"

    assert run() == "executed"
    assert run() == "kept"
    assert run(parameters={"seed": 5}) == "executed"
    for change in ("lib/new.py", "data/facts.csv", "constraints.txt", "requirements.txt"):
        assert run() == "executed" if change == "lib/new.py" else run() == "kept"
        (workshop / change).write_text("changed")
        assert run() == "executed", change
    notebook(chapter, SAVE, "y = 2  # it imports nothing of lib any more")
    assert run() == "executed"
    assert run() == "kept"
    assert run(force=True) == "executed"
    (workshop / "_build" / "results" / "s" / "01_a.json").unlink()
    assert run() == "executed"


def test_a_module_that_no_cell_needs_leaves_a_chapter_alone(workshop):
    """a imports b inside a function; c is imported by nobody."""
    made = {"a": "def f():\n    from lib import b\n", "b": "import lib.d as d", "c": "", "d": "x = 1"}
    for name, code in made.items():
        (workshop / "lib" / f"{name}.py").write_text(code)
    path = notebook(
        workshop / "book" / "01_a.ipynb", "%matplotlib inline\nif model_name == 'never':\n    from lib.a import f"
    )
    assert [p.stem for p in execute.sources(path)] == ["__init__", "a", "b", "d"]
    (workshop / "lib" / "__init__.py").write_text("")
    old = execute.fingerprint("s", "01_a", {}, "")
    (workshop / "lib" / "c.py").write_text("changed")
    assert execute.fingerprint("s", "01_a", {}, "") == old
    (workshop / "lib" / "d.py").write_text("x = 2")
    assert execute.fingerprint("s", "01_a", {}, "") != old


def test_a_chapter_that_shows_a_sweep_depends_on_the_experiments_that_are_specified(workshop):
    """Their modules are found by name when the sweep runs; no import says so."""
    for name in ("sweeps/__init__", "sweeps/runs", "studies/__init__", "studies/trials", "studies/others", "a"):
        (workshop / "lib" / name).parent.mkdir(exist_ok=True)
        (workshop / "lib" / f"{name}.py").write_text("")
    (workshop / "lib" / "studies" / "trials.py").write_text("def edit():\n    import lib.a\n")
    (workshop / "data" / "sweeps").mkdir()
    (workshop / "data" / "sweeps" / "s.yaml").write_text("name: s\nrun: trials.edit  # others.edit\n")
    path = notebook(workshop / "book" / "01_a.ipynb", "from lib import sweeps")
    wanted = ["__init__", "a", "studies/__init__", "studies/trials", "sweeps/__init__"]
    assert rooms(path) == wanted
    path = notebook(workshop / "book" / "01_a.ipynb", "from lib.sweeps.runs import table")
    assert rooms(path) == [*wanted, "sweeps/runs"]


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
    run = subprocess.run(
        [sys.executable, "-c", LOADED, *imports], capture_output=True, text=True, check=True, cwd=files.ROOT
    )
    for path, loaded in zip(notebooks, run.stdout.splitlines(), strict=True):
        assert loaded and set(loaded.split()) <= {name.removesuffix("/__init__") for name in rooms(path)}


def test_other_weights_run_again(workshop, monkeypatch):
    notebook(workshop / "book" / "01_a.ipynb", SAVE)
    execute.run("s", ["01_a"], say=lambda _: None)
    monkeypatch.setattr(execute, "weights_sha256", lambda name: "another sum")
    said: list[str] = []
    execute.run("s", ["01_a"], say=said.append)
    assert "executed" in said[0]


def test_build_folder_that_cannot_be_written(workshop):
    notebook(workshop / "book" / "01_a.ipynb", SAVE)
    (workshop / "_build").write_text("a file in its place")
    with pytest.raises(ChapterError, match=r"cannot write into .*Make .*_build a folder that you may write to"):
        execute.run("s", ["01_a"])


def test_a_failing_chapter_takes_its_old_figures_down(workshop, monkeypatch):
    """Trap: the run fails, and yesterday's numbers go on being built and checked, green."""
    chapter = notebook(workshop / "book" / "01_a.ipynb", SAVE)
    execute.run("s", ["01_a"], say=lambda _: None)
    expect(workshop / "e", {"seed": {"value": 0}})
    assert check.check("s", workshop / "e")[0][-1]
    notebook(chapter, "raise ValueError('broken')")
    assert not check.check("s", workshop / "e")[0][-1], "numbers of other inputs do not count"
    with pytest.raises(ChapterError, match="broken"):
        execute.run("s", ["01_a"])
    assert [p.name for p in (workshop / "_build").rglob("01_a.*")] == ["01_a.log"]
    with pytest.raises(ChapterError, match="not executed on s"):
        build.build("s")


def test_a_chapter_that_stops_saving_fails(workshop):
    chapter = notebook(workshop / "book" / "01_a.ipynb", SAVE)
    execute.run("s", ["01_a"], say=lambda _: None)
    notebook(chapter, "x = 1")
    with pytest.raises(ChapterError, match="saved no results"):
        execute.run("s", ["01_a"])


def test_a_warning_fails_the_build_and_leaves_the_old_book(workshop):
    (workshop / "_config.yml").write_text(
        "title: t\nexecute: {execute_notebooks: 'off'}\n"
        "sphinx: {extra_extensions: [lib.press.mathml], config: {html_math_renderer: mathml}}\n"
    )
    (workshop / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n  - file: book/01_a\n")
    (workshop / "book").mkdir()
    page = workshop / "book" / "index.md"
    page.write_text("# A book\n\n$x = 1$\n")
    notebook(workshop / "book" / "01_a.ipynb", SAVE)
    nb = nbformat.read(workshop / "book" / "01_a.ipynb", 4)
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("# A chapter"))
    nbformat.write(nb, workshop / "book" / "01_a.ipynb")
    execute.run("s", ["01_a"], say=lambda _: None)
    built = build.build("s", say=lambda _: None).parent / "book" / "index.html"
    assert "<math" in built.read_text() and "mathjax@" not in built.read_text(), "no script from elsewhere"
    said: list[str] = []
    build.build("s", say=said.append)
    assert said == ["book: nothing changed, kept"]
    page.write_text("# A book\n\n{glue:text}`missing`, {doc}`nowhere`\n")
    with pytest.raises(ChapterError, match=r"does not build without warnings:\n.*(nowhere|missing)"):
        build.build("s")
    assert "<math" in built.read_text(), "the book that was there still is"


def test_errors_are_printed_without_a_traceback():
    done = subprocess.run([sys.executable, "-m", "lib", "run", "99"], capture_output=True, text=True)
    assert done.returncode == 1 and "error: there is no chapter '99'" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_exits_1_on_a_miss(monkeypatch):
    cli = CliRunner()
    monkeypatch.setattr(check, "check", lambda model: [("c", "k", "1", 2, False)])
    missed = cli.invoke(app, ["check"])
    assert missed.exit_code == 1 and "0 of 1 hold" in missed.output
    monkeypatch.setattr(check, "check", lambda model: [("c", "k", "1", 1, True)])
    assert cli.invoke(app, ["check"]).exit_code == 0


def test_building_before_running_says_what_to_do(workshop):
    notebook(workshop / "book" / "01_a.ipynb", SAVE)
    with pytest.raises(
        ChapterError, match=r"not executed on s since its inputs changed: 01_a. Run `python -m lib run --model s` first"
    ):
        build.build("s")


def test_chapters_by_number_and_name():
    first = execute.chapter_names()[0]
    assert (
        execute.choose_chapters(["1"]) == execute.choose_chapters(["01"]) == execute.choose_chapters([first]) == [first]
    )
    assert execute.choose_chapters([]) == execute.chapter_names()
    with pytest.raises(ChapterError, match="there is no chapter '99'; choose from 01_static"):
        execute.choose_chapters(["99"])


def expect(folder, keys):
    folder.mkdir(exist_ok=True)
    (folder / "s.json").write_text(json.dumps({"01_a": keys}))


def test_check_holds_and_misses(workshop):
    notebook(workshop / "book" / "01_a.ipynb", SAVE)
    execute.run("s", ["01_a"], say=lambda _: None)
    wanted = {"seed": {"value": 0}, "x.y": {"value": 0.51, "tolerance": 0.02}, "x": {"value": {"y": 0.5}}}
    expect(workshop / "e", wanted)
    assert [row[-1] for row in check.check("s", workshop / "e")] == [True, True, True]
    misses = {
        "seed": {"value": 1},
        "x.y": {"value": 0.6, "tolerance": 0.02},
        "x.z": {"min": 0},
        "absent": {"value": None},
    }
    expect(workshop / "e", misses)
    rows = check.check("s", workshop / "e")
    assert [row[-1] for row in rows] == [False] * 4
    assert rows[-1][3] == "not run"
    with pytest.raises(ChapterError, match="nothing is expected of 't'"):
        check.check("t", workshop / "e")


def test_command_line_teaches_and_reports():
    cli = CliRunner()
    assert "fetch a model" in cli.invoke(app, ["--help"]).output
    assert (
        "SmolLM2" in cli.invoke(app, ["fetch", "--help"]).output
        or "smollm2" in cli.invoke(app, ["fetch", "--help"]).output
    )
    failed = cli.invoke(app, ["run", "99"])
    assert isinstance(failed.exception, BookError) and "no chapter '99'" in str(failed.exception)
    failed = cli.invoke(app, ["run", "1", "-p", "seed"])
    assert "write NAME=VALUE" in str(failed.exception)


def test_results_of_another_model_are_not_mixed_in(workshop):
    notebook(workshop / "book" / "01_a.ipynb", SAVE)
    execute.run("s", ["01_a"])
    assert check.current_values("s") == {"01_a": {"seed": 0, "x": {"y": 0.5}}}
    path = results.results_path("s", "01_a")
    path.write_text(path.read_text().replace('"model": "s"', '"model": "other"'))
    with pytest.raises(ChapterError, match=r"was made by other .*, not by s .*Run `python -m lib run 01_a"):
        check.current_values("s")
