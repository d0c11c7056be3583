"""The rooms: imports point one way, and no room is larger than can be read."""

import ast
from pathlib import Path

import pytest

import lib
from lib.files import ROOT, imports, modules

LIB = ROOT / "lib"
CORE = [p for p in LIB.glob("*.py") if not p.stem.startswith("__")]
FOLDERS = ("show", "studies", "sweeps", "press", "dashboard")
ABOVE = {  # what a folder may import, beside the core and itself
    "show": set(),
    "studies": {"show"},
    "sweeps": {"studies"},
    "dashboard": {"show", "studies", "sweeps"},
    "press": {"show", "studies", "sweeps", "dashboard"},
}


def rooms_of(path: Path) -> set[str]:
    """The rooms that a file imports, anywhere in it."""
    return {name.split("/")[0] for name in imports(path.read_text(encoding="utf-8"))}


def order() -> list[str]:
    """The core's rooms as the docstring of `lib` lists them."""
    lines = [line[4:].split("  ")[0] for line in (lib.__doc__ or "").splitlines() if line.startswith("    ")]
    return [room for line in lines for room in line.split(", ") if room.isidentifier() and room != "__main__"]


def test_the_docstring_lists_every_room_once_and_in_an_order_that_imports_keep():
    rooms = order()
    assert sorted(rooms) == sorted(p.stem for p in CORE)
    for path in CORE:
        later = {name for name in rooms_of(path) if name in rooms and rooms.index(name) >= rooms.index(path.stem)}
        assert not later, f"{path.stem} imports {later}, which stand below it"


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_the_core_imports_no_folder(path):
    assert not rooms_of(path) & set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_stands_above_it(folder):
    for path in (LIB / folder).glob("*.py"):
        wrong = rooms_of(path) & set(FOLDERS) - ABOVE[folder] - {folder}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_checkpoints_stand_below_the_models():
    below = {"errors", "files", "weights", "checkpoints"}
    assert all(rooms_of(path) <= below for path in (LIB / "checkpoints").glob("*.py"))


def test_inputs_stand_below_the_facts():
    assert all(rooms_of(path) <= {"errors", "inputs"} for path in (LIB / "inputs").glob("*.py"))


def test_an_experiment_depends_on_nothing_that_only_shows():
    """Its runs are kept by a digest of the files it imports."""
    rooms = [f"studies/{p.stem}" for p in (LIB / "studies").glob("*.py") if "\n@experiment" in p.read_text("utf-8")]
    reached = {p.relative_to(LIB).parts[0] for p in modules(rooms, ROOT)}
    assert len(rooms) > 4 and not reached & {"show", "press", "dashboard"}


def test_a_wrong_import_would_be_seen(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from lib.press import pdf\n    import lib.studies.planted\n")
    assert rooms_of(tmp_path / "a.py") == {"press", "studies"}


def test_the_core_can_be_read_in_one_sitting():
    assert len(list(LIB.glob("*.py"))) <= 21
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in LIB.glob("*.py")) <= 5410
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in LIB.rglob("*.py")) <= 16_810


def test_no_function_is_longer_than_forty_lines():
    for path in LIB.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path.relative_to(ROOT)}: {node.name}"
