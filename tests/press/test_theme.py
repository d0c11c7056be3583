from types import SimpleNamespace

from docutils import nodes
from docutils.utils import new_document
from myst_nb.sphinx_ import HideCodeCellNode

from lib.press.theme import NameTables, TableFigure, definitions, finish_page, fold, soften, widen


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


def test_words_of_the_glossary_have_their_definitions_as_text():
    term, meaning = nodes.term("", "Head", ids=["term-Head"]), nodes.paragraph("", "One of\nmany; see ")
    meaning += nodes.reference("", "layer", refuri="#term-Layer")
    document = new_document("glossary")
    document += nodes.definition_list("", nodes.definition_list_item("", term, nodes.definition("", meaning)))
    assert definitions(document) == {"term-Head": "One of many; see layer"}


def test_a_wide_picture_and_a_table_of_many_columns_use_the_margin(tmp_path):
    def cell(*children):
        return nodes.container("", *children, classes=["cell"])

    def table(n):
        heads = "".join(f'<th class="col_heading level0 col{i}">' for i in range(n))
        return cell(nodes.raw("", heads + '<details><th class="col_heading level0 col99">', format="html"))

    for name, width in (("narrow", "300.5"), ("wide", "713.9")):
        (tmp_path / f"{name}.svg").write_text(f'<svg xmlns="x" width="{width}pt" height="3pt">')
    document = new_document("page")
    pictures = [cell(nodes.image("", uri=f"{name}.svg")) for name in ("narrow", "wide", "missing")]
    document.extend([table(5), table(6), *pictures, nodes.container("", nodes.image("", uri="wide.svg"))])
    widen(SimpleNamespace(srcdir=tmp_path), document, "page")
    assert ["tag_full-width" in child["classes"] for child in document] == [False, True, False, True, False, False]


def test_only_what_is_short_of_what_runs_put_into_the_prose_is_bold():
    document = new_document("page")
    number, told = (nodes.inline("", "8 of 8"), nodes.inline("", "Of 19 countries that were asked it tells none."))
    for node in (number, told):
        node["classes"].append("pasted-text")
    document += nodes.paragraph("", "", number, told)
    soften(None, document, "page")
    assert number["classes"] == ["pasted-text"] and told["classes"] == ["pasted-text", "sentence"]


def test_a_folded_figure_is_called_by_its_number_and_the_first_sentence_of_its_caption():
    def folded(kind, name, caption):
        shown = nodes.container("", kind("", nodes.caption("", caption), ids=[name]))
        return HideCodeCellNode("", nodes.container("", nodes.literal_block("", "1")), shown)

    document = new_document("page")
    document += folded(nodes.figure, "fig-a", "Logit lens: the rank of 0.5. More.")
    document += folded(TableFigure, "tab-b", "The same in numbers, of\n6.5 billion. More: this.")
    document += HideCodeCellNode("", nodes.container("", nodes.literal_block("", "1")), prompt_show="Show")
    numbers = {"page": {"figure": {"fig-a": (2, 4)}, "table": {"tab-b": (2, 1)}}}
    config = SimpleNamespace(numfig_format={"figure": "Fig. %s", "table": "Table %s"})
    fold(SimpleNamespace(env=SimpleNamespace(toc_fignumbers=numbers), config=config), document, "page")
    figure, table, code = document.children
    assert figure["prompt_show"] == figure["prompt_hide"] == "Fig. 2.4: Logit lens"
    assert table["prompt_show"] == "Table 2.1: The same in numbers, of 6.5 billion"
    assert code["prompt_show"] == "Show" and "folded" not in code["classes"] and len(code.children) == 1
    inner, shown = table.children
    assert isinstance(inner, HideCodeCellNode) and inner.astext() == "1" and isinstance(shown[0], TableFigure)
    assert "folded" in table["classes"] and "folded" not in inner["classes"]
