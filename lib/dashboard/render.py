"""The page: the numbers of `collect` as JSON, Vega-Lite charts, and one HTML file that holds everything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from numpy.typing import NDArray

from lib.dashboard.collect import EDITS, MEASURES, ROLE_NUMBERS, TOP, VALUE_ROLES, CaseData, Measure, PageData, State
from lib.errors import DataError
from lib.facts import Fact, load_templates
from lib.show.figures import BLUE, GREEN, ORANGE, PINK, RED, SKY, visible
from lib.show.sentences import words

HERE = Path(__file__).parent
PARTS = tuple(HERE / f"page.{kind}" for kind in ("html", "css", "js"))


# Rendering


def render(data: PageData) -> str:
    """One HTML file, complete in itself."""
    content, made = _page(data), data.provenance
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    scripts = {"vega": bundle, "js": PARTS[2].read_text(encoding="utf-8")}
    if odd := [name for name, script in scripts.items() if "</script" in script.lower()]:
        raise DataError(f"the script {odd[0]} would end its own element; it cannot be written into a page.")
    sums = " ".join(f"'sha256-{_sum(script)}'" for script in scripts.values())
    layers, heads = content["shape"]
    parts = {
        "policy": f"default-src 'none'; script-src {sums}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'",
        **{key: escape(str(made[key])) for key in ("model", "source", "weights_sha256", "lib", "commit", "seed")},
        "heads": f"{layers} layers of {heads} heads, {layers * heads} in all.",
        "css": PARTS[1].read_text(encoding="utf-8"),
        # json within a script element: what could end the element is written as an escape
        "board": json.dumps(content, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c"),
        **scripts,
    }
    page = PARTS[0].read_text(encoding="utf-8")
    return re.sub(r"\{(" + "|".join(parts) + r")\}", lambda hole: parts[hole[1]], page)


def _sum(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _page(data: PageData) -> dict[str, Any]:
    """The data as JSON. Numbers are base64 of little-endian values."""
    first = data.reported["01_static_diagnostics"]
    low, high = first["qk_overlap_band"]
    checked = data.reported["05_cross_validation"]
    lengths = [len(tokens) * (len(tokens) + 1) // 2 for tokens in data.texts.values()]
    return {
        "shape": data.arrays["qk_overlap"].shape[1:],
        "measures": [asdict(m) | ({"labels": _labels(data, m.key)} if m.kind == "role" else {}) for m in MEASURES],
        "states": [_state(s, data.reported[EDITS]["recommended"]) for s in data.states],
        "cases": [_case(c, data.sources) for c in data.cases],
        "texts": [
            {"text": text, "tokens": tokens, "start": start}
            for (text, tokens), start in zip(data.texts.items(), np.cumsum([0, *lengths[:-1]]).tolist(), strict=True)
        ],
        "facts": len(data.sources),
        "top": TOP,
        "types": data.types,
        "words": data.words,
        "role_numbers": ROLE_NUMBERS,
        "studied": data.studied,
        "chance": {"mean": first["qk_overlap_chance"], "low": low, "high": high},
        "ablated": {key: checked[key] for key in ("knowledge_head", "head_effect", "head_interval")},
        "arrays": {name: pack(values) for name, values in data.arrays.items()},
        "specs": specs(data),
        "themes": THEMES,
    }


def _labels(data: PageData, role: str) -> list[str]:
    return list(VALUE_ROLES) if role == "value" else ["none", *data.types]


def _state(state: State, recommended: str) -> dict[str, Any]:
    if state.layer is None:
        return {"key": state.key, "title": "untouched model", "layer": None, "text": ""}
    name, layer = words(state.key), f"L{state.layer + 1}"
    text = f"{state.reported['parameters']:,} parameters of {layer}, KL {state.reported['kl']:.4f} on neutral text"
    if name == recommended:
        text += ", recommended by chapter 3"
    return {"key": state.key, "title": f"{name} of {layer}", "layer": state.layer, "text": text}


def _case(case: CaseData, sources: Sequence[Fact]) -> dict[str, Any]:
    texts, finding = load_templates(), case.finding
    marks = {} if finding is None else {"K": finding["knowledge_head"], "S": finding["suppressor"]}
    return {
        "name": case.case.name,
        "title": case.case.title,
        "template": texts[case.case.template].replace("{}", "…"),
        "left_out": case.left_out,
        "facts": [
            {"subject": f.subject, "answer": f.answer, "competitor": visible(c), "source": sources.index(f)}
            for f, c in zip(case.case.facts, case.competitors, strict=True)
        ],
        "failing": case.failing,
        "told_by": [case.told_by(i) for i in range(len(case.case.facts))],
        "means": case.means(),
        "prompts": [asdict(p) for p in case.prompts],
        "marks": {site.replace(" ", ""): mark for mark, site in marks.items() if site and " H" in site},
        "finding": finding,
    }


def pack(values: NDArray) -> dict[str, Any]:
    """An array (state, layer, head, ...) as the page reads it: each layer of a state that differs from state 0 once.
    at: by state and layer, which of the stored layers it is; size: numbers a head."""
    untouched, *edited = values
    stored, at = list(untouched), [list(range(len(untouched)))]
    for state in edited:
        at.append(list(at[0]))
        for layer, (now, before) in enumerate(zip(state, untouched, strict=True)):
            if not np.array_equal(now, before, equal_nan=values.dtype.kind == "f"):
                at[-1][layer] = len(stored)
                stored.append(now)
    block = np.stack(stored)
    if block.dtype.kind == "i" and block.min() >= 0 and block.max() < 2**16:
        block = block.astype(np.uint16)
    data = base64.b64encode(block.astype(block.dtype.newbyteorder("<")).tobytes()).decode()
    size = int(np.prod(values.shape[3:]))
    return {"kind": f"{block.dtype.kind}{block.dtype.itemsize}", "size": size, "at": at, "data": data}


# Charts

KINDS = ("control prompts", "failing prompt", "failing prompt, edited")
STATES = ("untouched", "edited")
SHAPES = ["circle", "diamond", "triangle-up"]
BEFORE = "#3f8fce"  # as blue as figures.BLUE, readable on a dark page too
ROWS = alt.NamedData("rows")
FIT = alt.AutoSizeParams(type="fit-x", contains="padding")
ABOVE: dict[str, Any] = {"title": None, "orient": "top"}
BELOW: dict[str, Any] = {"orient": "bottom", "direction": "horizontal"}


def specs(data: PageData) -> dict[str, dict[str, Any]]:
    """Vega-Lite specifications by name, each of the data set `rows`."""
    out: dict[str, alt.TopLevelMixin] = {"attention": _attention()}
    for name, n in (("", 1), (" edited", 2)):
        out |= {f"points{name}": _points(KINDS[: n + 1]), f"norms{name}": _norms(data.types, STATES[:n])}
    for m in MEASURES:
        for layout in ("wide", "tall"):
            out[f"grid {m.key} {layout}"] = _grid(m, layout, _labels(data, m.key) if m.kind == "role" else [])
            if m.kind != "role":
                out[f"grid {m.key} change {layout}"] = _grid(replace(m, kind="signed"), layout, [], "change")
    return {name: _spec(chart) for name, chart in out.items()}


def _spec(chart: alt.TopLevelMixin) -> dict[str, Any]:
    return {k: v for k, v in chart.to_dict().items() if k not in ("config", "$schema")}


def _grid(measure: Measure, layout: str, labels: Sequence[str], prefix: str = "") -> alt.TopLevelMixin:
    """Layers across and heads down (wide), as in the chapters, or heads across and layers down (tall)."""
    legend = alt.Legend(
        title=" ".join(filter(None, (prefix, measure.unit))) or measure.title,
        **{**BELOW, "gradientLength": 220, "gradientThickness": 10, "tickCount": 4},
        columns=5,
        symbolType="square",
        titleLimit=300,
        labelExpr="replace(datum.label, /_/g, ' ')" if labels else alt.Undefined,
    )
    signed: dict[str, Any] = {
        "domain": [alt.expr("-high"), alt.expr("high")],
        "nice": False,
        "range": "diverging",
        "domainMid": 0,
    }
    shares: dict[str, Any] = {"domain": [0, alt.expr("high")], "nice": False, "range": "heatmap"}
    roles: dict[str, Any] = {"domain": list(labels), "range": "category"}
    scale = alt.Scale(**(roles if labels else signed if measure.kind == "signed" else shares))
    across, down = ("layer", "head") if layout == "wide" else ("head", "layer")
    axis: dict[str, Any] = {"labelAngle": 0, "labelOverlap": True, "ticks": False, "domain": False}
    base = alt.Chart(ROWS).encode(
        x=alt.X(f"{across}:O", title=across, axis=alt.Axis(**axis, orient="top")),
        y=alt.Y(f"{down}:O", title=down, axis=alt.Axis(**axis, orient="left")),
    )
    cells = base.mark_rect(strokeWidth=1, invalid=None).encode(
        color=alt.Color("value:N" if labels else "value:Q", legend=legend, scale=scale),
        opacity=alt.Opacity("shade:Q", scale=None, legend=None),
    )
    dark = "luminance(scale('color', datum.value)) < 0.4"
    marks = base.mark_text(fontWeight="bold", fontSize=13).encode(
        text="mark:N", color=alt.condition(dark, alt.value("white"), alt.value("black"))
    )
    return alt.layer(cells, marks).add_params(alt.param(name="high", value=1))


def _points(kinds: Sequence[str]) -> alt.TopLevelMixin:
    """A row a fact, a mark a prompt."""
    base, n = alt.Chart(ROWS), len(kinds)
    colours = alt.Scale(domain=list(kinds), range=[BEFORE, RED, GREEN][:n])
    told = alt.Tooltip("told:N", title="untouched")
    points = base.mark_point(size=70, filled=True, opacity=0.8).encode(
        x=alt.X("value:Q", axis=alt.Axis(title="logits", tickCount=6)),
        y=alt.Y("fact:N", sort=alt.EncodingSortField("order"), axis=alt.Axis(title=None, grid=True, labelLimit=150)),
        color=alt.Color("kind:N", scale=colours, legend=alt.Legend(**ABOVE, columns=2, symbolOpacity=1)),
        shape=alt.Shape("kind:N", scale=alt.Scale(domain=list(kinds), range=SHAPES[:n])),
        size=alt.condition(f"datum.kind == '{KINDS[0]}'", alt.value(35), alt.value(110)),
        tooltip=[alt.Tooltip("prompt:N"), alt.Tooltip("value:Q", format="+.2f", title="logits"), told],
    )
    zero = base.mark_rule(strokeDash=[3, 3], opacity=0.7).encode(x=alt.datum(0))
    return alt.layer(zero, points).properties(width="container", height=200, autosize=FIT)


def _attention() -> alt.Chart:
    """A query a row, a key a column."""
    axis: dict[str, Any] = {"labelExpr": "slice(datum.label, indexof(datum.label, ' ') + 1)", "labelLimit": 90}
    keys = alt.Axis(title="looked at", **axis, labelAngle=-50, orient="top")
    look: dict[str, Any] = {**BELOW, "gradientLength": 120, "gradientThickness": 8, "format": ".0%", "tickCount": 2}
    weights = alt.Scale(domain=[0, 1], range="heatmap")
    return (
        alt.Chart(ROWS)
        .mark_rect(strokeWidth=0.5)
        .encode(
            x=alt.X("key:N", sort=alt.EncodingSortField("k"), axis=keys),
            y=alt.Y("query:N", sort=alt.EncodingSortField("q"), axis=alt.Axis(title="looks", **axis)),
            color=alt.Color("weight:Q", scale=weights, legend=alt.Legend(title="attention", **look)),
            tooltip=[alt.Tooltip("query:N"), alt.Tooltip("key:N"), alt.Tooltip("weight:Q", format=".1%")],
        )
    )


def _norms(types: Sequence[str], states: Sequence[str]) -> alt.Chart:
    """A row a token type, a mark a state."""
    domain, n = list(states), len(states)
    length = alt.Axis(title="mean length of the key", tickCount=5)
    colours = alt.Scale(domain=domain, range=[BEFORE, GREEN][:n])
    return (
        alt.Chart(ROWS)
        .mark_point(filled=True, size=90, opacity=0.9)
        .encode(
            x=alt.X("norm:Q", scale=alt.Scale(zero=False), axis=length),
            y=alt.Y("type:N", sort=[words(t) for t in types], axis=alt.Axis(title=None, grid=True)),
            color=alt.Color("state:N", scale=colours, legend=alt.Legend(**ABOVE) if n > 1 else None),
            shape=alt.Shape("state:N", scale=alt.Scale(domain=domain, range=SHAPES[::2][:n])),
            tooltip=[alt.Tooltip("type:N"), alt.Tooltip("state:N"), alt.Tooltip("norm:Q", format=".2f")],
        )
        .properties(width="container", height=22 * len(types), autosize=FIT)
    )


def _theme(text: str, quiet: str, line: str, none: str, diverging: str) -> dict[str, Any]:
    """Vega's configuration. Categories: grey for none, then Okabe and Ito's colours."""
    small = {"titleFontWeight": "normal", "labelFontSize": 11}
    lines = {f"{part}Color": line for part in ("grid", "domain", "tick")}
    return {
        "background": None,
        "font": "system-ui, sans-serif",
        "axis": {"labelColor": quiet, "titleColor": quiet, **lines, **small, "titleFontSize": 12},
        "view": {"stroke": None},
        "aria": False,
        "legend": {"labelColor": text, "titleColor": quiet, **small},
        "rule": {"color": quiet},
        "rect": {"stroke": line},
        "range": {
            "heatmap": {"scheme": "viridis"},
            "diverging": diverging.split(),
            "category": [none, BLUE, RED, GREEN, ORANGE, PINK, SKY, "#8c6bb1", "#f0e442"],
        },
    }


BLUE_TO_RED = "#2166ac #67a9cf #d1e5f0 #f7f7f7 #fddbc7 #ef8a62 #b2182b"
BLUE_TO_RED_ON_DARK = "#8ec5f4 #3d86c6 #224765 #20252d #6a3323 #d2603a #ffb38a"
THEMES = {
    "light": _theme("#1b1f24", "#4f5864", "#d9dde3", "#d5d9de", BLUE_TO_RED),
    "dark": _theme("#e8ebef", "#adb6c2", "#363d48", "#3b424d", BLUE_TO_RED_ON_DARK),
}
