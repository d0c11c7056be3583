"""Sphinx extension: what this book changes of its theme.

Formulas are MathML, set by the browser itself, so that pages need neither network nor script. A captioned table is
called a table: MyST-NB makes a figure of whatever a cell shows; those whose name begins with `tab-` are numbered as
tables (`Table 5.3`) beside the figures, and referred to as such. Live code (Thebe), which would fetch scripts from the
network, is left out.
"""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


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


def finish_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave out Thebe, which Jupyter Book always adds, and roles that docutils gives to a bibliography's parts, which
    screen readers cannot use: a list whose items are no list items."""
    context["script_files"] = [s for s in context["script_files"] if not _is_thebe(s)]
    for role in (' role="list"', ' role="doc-biblioentry"'):
        context["body"] = context.get("body", "").replace(role, "")


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
    app.connect("html-page-context", finish_page, priority=900)  # after all others have added theirs
    return {"parallel_read_safe": True, "parallel_write_safe": True}
