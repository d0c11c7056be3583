from types import SimpleNamespace

from docutils import nodes
from docutils.utils import new_document

from lib.press.theme import NameTables, TableFigure, finish_page


def test_figures_named_as_tables_become_tables_and_keep_their_name():
    document = new_document("page")
    figures = [nodes.figure("", nodes.caption("", "text"), names=[name], ids=[name]) for name in ("tab-a", "fig-b")]
    document.extend(figures)
    document.ids = {f["ids"][0]: f for f in figures}
    NameTables(document).apply()
    table, figure = document.children
    assert isinstance(table, TableFigure) and table["names"] == ["tab-a"] and len(table) == 1
    assert not isinstance(figure, TableFigure) and document.ids == {"tab-a": table, "fig-b": figure}


def test_live_code_is_left_out_and_nothing_else():
    kept = SimpleNamespace(filename="_static/book.js", attributes={})
    thebe = SimpleNamespace(filename="_static/sphinx-thebe.js", attributes={})
    inline = SimpleNamespace(filename=None, attributes={"body": "const THEBE_JS_URL = 1"})
    context = {"script_files": [thebe, kept, inline, "x.js"], "body": '<div role="list" class="c">a</div>'}
    finish_page(None, "page", "page.html", context, None)
    assert context == {"script_files": [kept, "x.js"], "body": '<div class="c">a</div>'}
