"""The quick look: nothing changed is told without a heavy import, and whatever may change a page is seen."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lib import facts, files
from lib.__main__ import app
from lib.press import build, execute, unchanged

MADE = (
    "html/book/01_a.html",
    "html.key",
    "executed/m/01_a.ipynb",
    "results/m/01_a.json",
    "results/m/03_b/v.safetensors",
)
MADE += ("checks/m/layers/ab.json", "checks/organism/plants/cd.json", "dashboard/m.html")
READ = ("book/01_a.ipynb", "data/record/m/layers.csv", "lib/press/foot.md", "constraints.txt", "_toc.yml")


@pytest.fixture
def built(tmp_path, monkeypatch) -> Path:
    """A project with a book of the model `m`, which is a folder, on a case of one's own, as a build has noted it."""
    project = tmp_path / "project"
    for path in [*(project / "_build" / name for name in MADE), *(project / name for name in READ)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("as it was")
    for room in (files, build):
        monkeypatch.setattr(room, "BUILD", project / "_build")
    monkeypatch.setattr(files, "ROOT", project)
    for name, content in {
        "m/model.safetensors": "w",
        "mine.csv": "a,b\n",
        "mine.yaml": "",
        "site/p-1.dist-info/M": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(unchanged, "run_folder", lambda name: "m")
    monkeypatch.setattr(build, "run_folder", lambda name: "m")
    monkeypatch.setattr(unchanged, "slug", lambda name: "m")
    case = facts.CaseFile(
        tmp_path / "mine.yaml", None, {}, {"case": tmp_path / "mine.yaml", "facts": tmp_path / "mine.csv"}
    )
    monkeypatch.setattr(facts, "own_case", lambda name: case)
    monkeypatch.delenv("RECORD", raising=False)
    unchanged.note("m", unchanged.inputs("m"))
    return tmp_path


def is_kept(model_name: str = "m") -> bool:
    return unchanged.since(model_name, unchanged.inputs(model_name))


def rewritten(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("otherwise")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a table that the case names": rewritten("mine.csv"),
    "the case": rewritten("mine.yaml"),
    "the weights": rewritten("m/model.safetensors"),
    "a tokenizer beside the weights": rewritten("m/tokenizer.json"),
    "another version of a package": lambda folder: (folder / "site/p-1.dist-info").rename(
        folder / "site/p-2.dist-info"
    ),
    "a new file of data": rewritten("project/data/record/m/near.csv"),
    **{f"changed: {name}": rewritten(f"project/{name}") for name in READ},
    **{f"gone: {name}": lambda folder, name=name: (folder / "project/_build" / name).unlink() for name in MADE},
    **{f"edited: {name}": rewritten(f"project/_build/{name}") for name in MADE[:1]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_may_change_a_page_is_seen(built, change):
    assert is_kept() and is_kept(), "to look changes nothing"
    CHANGES[change](built)
    assert not is_kept()


def test_so_are_other_settings_and_another_model(built, monkeypatch):
    assert not is_kept("organism")
    for name, value in {"RECORD": "off", "QKV_CASE": "other.yaml", "QKV_CACHE": "/elsewhere", "HF_HOME": "/x"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not is_kept(), name
    assert is_kept()


def test_what_is_edited_while_the_book_is_built_is_seen(built):
    before = unchanged.inputs("m")
    (built / "project/book/01_a.ipynb").write_text("edited meanwhile")
    unchanged.note("m", before)
    assert not is_kept()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"inputs": 1, "seals": null}'])
def test_a_note_that_cannot_be_read_vouches_for_nothing(built, content):
    unchanged._path("m").write_text(content)
    assert not is_kept()


def test_nothing_is_noted_of_a_model_that_only_the_hub_knows(built, monkeypatch):
    unchanged.note("someone/model", unchanged.inputs("someone/model"))
    assert not unchanged._path("m").exists()


def test_a_large_file_is_known_by_its_size_and_time(built, monkeypatch):
    monkeypatch.setattr(unchanged, "SMALL", 0)
    unchanged.note("m", unchanged.inputs("m"))
    assert is_kept()
    (built / "m/model.safetensors").write_text("v")
    assert not is_kept()


def test_the_command_builds_where_the_note_does_not_hold_and_only_there(built, monkeypatch):
    done: list[str] = []
    for room, name in ((execute, "run"), (build, "dashboard"), (build, "build")):
        monkeypatch.setattr(room, name, lambda *a, name=name, **k: done.append(name))
    monkeypatch.setenv("RECORD", "off")  # no spot-checks
    unchanged.note("m", unchanged.inputs("m"))
    ended = CliRunner().invoke(app, ["book", "--model", "m"])
    assert ended.output == "book: nothing changed, kept\n" and not done
    (built / "project/_build/html/book/01_a.html").unlink()
    assert CliRunner().invoke(app, ["book", "--model", "m"]).exit_code == 0
    assert done == ["run", "dashboard", "build"]
    assert CliRunner().invoke(app, ["book", "--model", "m"]).output == ended.output and len(done) == 3


def test_the_look_imports_nothing_heavy():
    look = (
        "import sys; from lib.press import unchanged; unchanged.since('m', unchanged.inputs('m')); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pandas", "numpy", "nbformat", "pydantic"} & {*loaded}
