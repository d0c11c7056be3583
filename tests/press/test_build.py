"""What is made from the results while the book is staged."""

from threading import Event
from types import SimpleNamespace

import nbformat
import pytest
from typer.testing import CliRunner

from lib import files
from lib.__main__ import app
from lib.errors import ChapterError, SweepError
from lib.press import build, execute, kernel, texts
from lib.sweeps import spot

PROVENANCE = {
    "chapter": "02_x",
    "model": "or`ganism",
    "source": "[a](b) $x$",
    "licence": "MIT",
    "weights_sha256": "ab" * 32,
    "lib": "0.1.0",
    "commit": "c0ffee",
    "python": "3.11",
    "packages": {"torch": "2", "transformers": "5", "numpy": "1"},
    "seed": 3,
    "bos": "nothing",
    "threads": 1,
    "start": "2026-01-02T03:04:05+00:00",
    "seconds": 6.7,
    "timing": {"x": 1.0},
}


def test_the_foot_names_the_run_and_reads_nothing_as_markup():
    foot = texts.fill("foot.md", run=PROVENANCE, chapter="02_knowledge_path", checks={})
    for value in ("`or'ganism`", "`[a](b) $x$`", "ab" * 32, "c0ffee", "2026-01-02T03:04:05", "`6.7`", "`torch 2`"):
        assert value in foot
    assert "02_knowledge_path.json" in foot and "_sources/book/02_knowledge_path.ipynb" in foot


def test_the_foot_says_what_was_recorded_and_what_was_done_again():
    note = {"runs": 60, "date": "2026-11-28", "commit": "abc", "processor": "x86", "seconds": 600.0}
    check = SimpleNamespace(runs=["layer=3, seed=0", "layer=5, seed=0"], outdated="torch")
    run = PROVENANCE | {"sweeps": {"m/layers": note, "m/near": {"runs": 24}}}
    foot = texts.fill("foot.md", run=run, chapter="06_x", checks={"m/layers": check})
    assert "60 runs, recorded on 2026-11-28 by commit `abc` on `x86` in 10 minutes of one core" in foot
    assert "`layer=3, seed=0`; `layer=5, seed=0` (the record is of another version of `torch`)" in foot
    assert "**Done here: `m/near`.** 24 runs." in foot


def staged(tmp_path, injected: str):
    cells = [
        nbformat.v4.new_code_cell('model_name = "smollm2"  # @param\nseed = 0', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"# Parameters\n{injected}", metadata={"tags": ["injected-parameters"]}),
    ]
    notebook = tmp_path / "02_x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    build.add_foot(notebook, PROVENANCE, {})
    return nbformat.read(notebook, as_version=4)


def test_a_chapter_gets_a_foot_and_one_cell_of_parameters(tmp_path):
    book = staged(tmp_path, 'model_name = "smollm2"')
    assert book.cells[1].metadata["tags"] == ["injected-parameters", "remove-cell"]
    assert book.cells[-1].source == texts.fill("foot.md", run=PROVENANCE, chapter="02_x", checks={})
    nbformat.validate(book)


def test_parameters_that_differ_are_shown(tmp_path):
    assert "remove-cell" not in staged(tmp_path, 'model_name = "organism"').cells[1].metadata["tags"]


def test_what_may_differ_elsewhere_is_listed_and_the_rest_counted():
    expected = {
        "01_a": {"heads": {"value": 144, "why": "counted"}, "mean": {"value": 0.5, "tolerance": 0.01, "why": "ties"}},
        "04_b": {"steps": {"min": 6, "max": 16, "why": "rounding"}, "p": {"max": 0.01, "why": "level"}},
    }
    text = build.tolerances("organism", expected)
    assert "Of 4 numbers and names that are expected of `organism`, 3 may" in text
    assert "* - 1\n  - `mean`\n  - 0.5 ± 0.01\n  - ties" in text and "`heads`" not in text
    assert "at least 6, at most 16" in text and "\n  - at most 0.01\n" in text
    assert "nothing is expected" in build.tolerances("my/model", {})


@pytest.mark.parametrize("fault", [None, SweepError("not as recorded"), ChapterError("no page")])
def test_the_dashboard_is_made_beside_the_spot_checks_and_either_can_stop_the_book(monkeypatch, tmp_path, fault):
    """Each waits for the other to have begun. Pages are built after both, and not at all where one of them fails."""
    page, checks, done = Event(), Event(), []

    def met(mine: Event, other: Event, kind: type) -> None:
        mine.set()
        assert other.wait(20), "one after the other"
        done.append(kind)
        if isinstance(fault, kind):
            raise fault

    monkeypatch.delenv("RECORD", raising=False)
    monkeypatch.setattr(files, "BUILD", tmp_path)  # where it is noted that a book was built
    monkeypatch.setattr(kernel, "warm_up", lambda: None)
    monkeypatch.setattr(execute, "run", lambda *a, **k: None)
    monkeypatch.setattr(spot, "spot_check", lambda *a, **k: met(checks, page, SweepError))
    monkeypatch.setattr(build, "dashboard", lambda *a, **k: met(page, checks, ChapterError))
    monkeypatch.setattr(build, "build", lambda *a, **k: done.append("book"))
    ended = CliRunner().invoke(app, ["book", "--model", "organism"])
    assert ended.exception is fault and {SweepError, ChapterError} <= set(done)
    assert (done[-1] == "book") == (fault is None)
