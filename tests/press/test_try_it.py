"""Every chapter shows its method, and ends with something to try: the answers are run, on the organism."""

import ast
import json
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pytest

from lib import diagnosis, results, training
from lib.edits import Edit
from lib.facts import Case
from lib.models import Model
from lib.press.execute import BOOK, chapter_names

ANSWER = ["exercise", "hide-input", "skip-execution"]  # folded on the page, and not executed by the build
TRIED = ["skip-execution", "try"]


def code_cells(chapter: str) -> list[tuple[list[str], str]]:
    """Tags and text of each code cell."""
    nb = json.loads((BOOK / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    cells = (cell for cell in nb["cells"] if cell["cell_type"] == "code")
    return [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in cells]


def names(statements: Sequence[ast.stmt], context: type[ast.expr_context]) -> set[str]:
    """The names that statements read (`ast.Load`), or that they bind (`ast.Store`), imports included; not those that
    exist within a comprehension alone."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    inner = [name for node in nodes if isinstance(node, ast.comprehension) for name in ast.walk(node.target)]
    own = {name.id for name in inner if isinstance(name, ast.Name)}
    found = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
    imported = [x for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for x in node.names]
    imports = {(x.asname or x.name).split(".")[0] for x in imported} if context is ast.Store else set()
    return (found - own) | imports


def needed(before: Sequence[ast.stmt], wanted: set[str]) -> list[ast.stmt]:
    """Of a chapter's statements those on which names depend, in their order: a cell costs what it needs, no more."""
    kept: list[ast.stmt] = []
    for statement in reversed(before):
        if names([statement], ast.Store) & wanted:
            kept.insert(0, statement)
            wanted = wanted | names([statement], ast.Load)
    return kept


def run(statements: list[ast.stmt], space: dict) -> object:
    """Execute statements; what the last one gives, if it is an expression."""
    *first, last = statements
    shown = isinstance(last, ast.Expr)
    exec(compile(ast.Module(first if shown else statements, []), "chapter", "exec"), space)
    return eval(compile(ast.Expression(last.value), "chapter", "eval"), space) if shown else None


def answers(chapter: str, model_name: str) -> list[object]:
    """What the cell to change and each answer show, run one after the other as a reader would."""
    cells = [(tags, ast.parse(text).body) for tags, text in code_cells(chapter)]
    tried = [body for tags, body in cells if "exercise" in tags or "try" in tags]
    rest = [s for tags, body in cells if not {"exercise", "try", "remove-cell"} & {*tags} for s in body]
    parameters = [ast.parse(f"model_name = {model_name!r}").body[0]]
    at = next(i for i, s in enumerate(rest) if "model_name" in names([s], ast.Store)) + 1
    space: dict = {}
    wanted = names([s for body in tried for s in body], ast.Load)
    run([*needed([*rest[:at], *parameters, *rest[at:]], wanted), *ast.parse("None").body], space)
    return [run(body, space) for body in tried]


def one_edit(model: Model, case: Case, *_: object, **__: object) -> dict[str, Edit]:
    """An edit of the kind that chapter 3 leaves."""
    task = training.task_at(model, case, diagnosis.prescribe(model, case).knowledge_head.layer)
    edit = training.train(model, task, "v_only", rate=3e-3).edit
    return {} if edit is None else {"v_only": edit}


@pytest.fixture(params=chapter_names())
def chapter(request) -> str:
    return request.param


def test_a_chapter_ends_with_a_cell_to_change_and_folded_answers(chapter):
    tags = [tags for tags, _ in code_cells(chapter)]
    tried = [t for t in tags if "try" in t or "exercise" in t]
    assert tried == tags[-len(tried) :] and tried[0] == TRIED and 2 <= tried[1:].count(ANSWER) == len(tried) - 1 <= 3


def test_every_answer_shows_something(chapter, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "BUILD", tmp_path)
    monkeypatch.setattr(training, "saved_or_trained", one_edit)  # where chapter 3 left none, six pathways are trained
    try:
        for shown in answers(chapter, "organism"):
            assert shown is not None and len(str(shown)) > 3
    finally:
        plt.close("all")


def test_only_what_a_name_needs_is_run():
    body = ast.parse("import math\na = 1\nb = a + 1\nreport(b)\nc = math.pi\nd = c").body
    assert [ast.unparse(s) for s in needed(body, {"b"})] == ["a = 1", "b = a + 1"]
    assert [ast.unparse(s) for s in needed(body, {"d"})] == ["import math", "c = math.pi", "d = c"]
    body = ast.parse("a = 1\nx = 2\nb = [x for x in range(a)]").body
    assert [ast.unparse(s) for s in needed(body, {"b"})] == ["a = 1", "b = [x for x in range(a)]"]
