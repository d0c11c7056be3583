"""Sphinx extension: formulas as MathML, set by the browser itself, so that pages need neither network nor script."""

from __future__ import annotations

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(visitor, node: nodes.math) -> None:
    visitor.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def _block(visitor, node: nodes.math_block) -> None:
    visitor.body.append(f'<div class="math-block">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode
