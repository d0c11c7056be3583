"""Sphinx extension: what this book changes of its theme.

Formulas are MathML, set by the browser itself, so that pages need neither network nor script. A captioned table is
called a table: MyST-NB makes a figure of whatever a cell shows; those whose name begins with `tab-` are numbered as
tables (`Table 5.3`) beside the figures, and referred to as such. What is too wide for the column of text may use the
margin beside it. A figure or table of a cell tagged `hide-cell` is folded, under its number and the first sentence of
its caption. Sentences that a run wrote are set as the others. A page carries the definitions of the glossary's words
that it links, which book.js shows where the word stands. Live code (Thebe), which would fetch scripts from the
network, is left out.
"""

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from myst_nb.sphinx_ import HideCodeCellNode
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

GLOSSARY = "book/glossary"
SENTENCE = 40  # letters; what is shorter is a number or a name
SENTENCE_END = re.compile(r"(?<=\w[.:;?])\s")
COLUMNS, TEXT = 5, 530  # a table of more columns, a figure of more points, is wider than the column of text


class TableFigure(nodes.figure):
    """A figure that holds a table."""


class NameTables(SphinxTransform):
    """Figures named `tab-...` -> TableFigure."""

    default_priority = 100

    def apply(self, **kwargs: Any) -> None:
        for figure in list(self.document.findall(nodes.figure)):
            if any(name.startswith("tab-") for name in figure["names"]):
                table = TableFigure("", *figure.children, **figure.attributes)
                table["classes"].append("table-figure")
                figure.replace_self(table)
                self.document.ids.update(dict.fromkeys(table["ids"], table))


def widen(app: Sphinx, document: nodes.document, page: str) -> None:
    """Give cells whose table or figure is wider than the column of text the theme's class for it."""
    for cell in document.findall(lambda node: isinstance(node, nodes.container) and "cell" in node["classes"]):
        tables = [raw.astext().partition("<details")[0] for raw in cell.findall(nodes.raw)]
        columns = max((len(set(re.findall(r"col_heading level0 (col\d+)", table))) for table in tables), default=0)
        pictures = [Path(app.srcdir, image["uri"]) for image in cell.findall(nodes.image)]
        if columns > COLUMNS or any(_width(path) > TEXT for path in pictures):
            cell["classes"].append("tag_full-width")


def fold(app: Sphinx, document: nodes.document, page: str) -> None:
    """Of cells tagged `hide-cell`: the line that opens a figure or table says what it is (another output has a line of
    the cell's own), and what opens is as elsewhere on the page, the code behind a fold of its own."""
    for folded in list(document.findall(HideCodeCellNode)):
        source, *shown = folded.children
        if not shown:
            continue
        if figure := next(iter(folded.findall(nodes.figure)), None):
            kind = "table" if isinstance(figure, TableFigure) else "figure"
            number = ".".join(map(str, app.env.toc_fignumbers[page][kind][figure["ids"][0]]))
            caption = next(iter(figure.findall(nodes.caption))).astext()
            title = f"{app.config.numfig_format[kind] % number}: {SENTENCE_END.split(caption)[0].rstrip('.:;')}"
            folded["prompt_show"] = folded["prompt_hide"] = " ".join(title.split())
        folded["classes"].append("folded")
        code = HideCodeCellNode(prompt_show="Show code cell source", prompt_hide="Hide code cell source")
        code["classes"].append("above-input")
        folded.replace(source, code)
        code.append(source)


def soften(app: Sphinx, document: nodes.document, page: str) -> None:
    """Mark what runs put into the prose as whole sentences: MyST-NB sets all of it bold, which suits a number."""
    for put in document.findall(lambda node: isinstance(node, nodes.inline) and "pasted-text" in node["classes"]):
        if len(put.astext()) > SENTENCE:
            put["classes"].append("sentence")


def _width(picture: Path) -> float:
    """Of an SVG, in its points; 0 for any other picture."""
    start = picture.read_text(encoding="utf-8")[:1000] if picture.suffix == ".svg" and picture.is_file() else ""
    found = re.search(r'<svg [^>]*?width="([\d.]+)pt"', start)
    return float(found[1]) if found else 0.0


def definitions(glossary: nodes.document) -> dict[str, str]:
    """What each word of the glossary means, by its id."""
    return {
        name: " ".join(item.next_node(nodes.definition).astext().split())
        for item in glossary.findall(nodes.definition_list_item)
        for term in item.findall(nodes.term)
        for name in term["ids"]
    }


def _carry_definitions(app: Sphinx, body: str) -> str:
    """The definitions of the words that a page links, as data for its script."""
    linked = set(re.findall(r'href="(?:glossary\.html)?#(term-[^"]+)"', body))
    known = definitions(app.env.get_doctree(GLOSSARY)) if linked and GLOSSARY in app.env.found_docs else {}
    data = json.dumps({name: known[name] for name in sorted(linked & known.keys())}).replace("<", "\\u003c")
    return f'{body}<script type="application/json" id="definitions">{data}</script>'


def finish_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave out Thebe, which Jupyter Book always adds, and roles that docutils gives to a bibliography's parts, which
    screen readers cannot use: a list whose items are no list items."""
    context["script_files"] = [s for s in context["script_files"] if not _is_thebe(s)]
    for role in (' role="list"', ' role="doc-biblioentry"'):
        context["body"] = context.get("body", "").replace(role, "")
    if app is not None and page != GLOSSARY:
        context["body"] = _carry_definitions(app, context["body"])


def _is_thebe(script: Any) -> bool:
    return "thebe" in f"{getattr(script, 'filename', script)} {getattr(script, 'attributes', '')}".lower()


def _inline(visitor, node: nodes.math) -> None:
    visitor.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def _block(visitor, node: nodes.math_block) -> None:
    visitor.body.append(f'<div class="math-block">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    as_figure = (lambda visitor, node: visitor.visit_figure(node), lambda visitor, node: visitor.depart_figure(node))
    app.add_enumerable_node(TableFigure, "table", html=as_figure)
    app.add_transform(NameTables)
    app.connect("doctree-resolved", widen)
    app.connect("doctree-resolved", fold)
    app.connect("doctree-resolved", soften)
    app.connect("html-page-context", finish_page, priority=900)  # after all others have added theirs
    return {"parallel_read_safe": True, "parallel_write_safe": True}
