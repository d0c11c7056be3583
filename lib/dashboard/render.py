"""The page: the numbers of `collect` as JSON, Vega-Lite charts, and one HTML file that holds everything."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert
import yaml
from numpy.typing import NDArray

from lib.dashboard.collect import EDITS, ROLE_NUMBERS, TOP, VALUE_ROLES, CaseData, PageData, State
from lib.errors import DataError
from lib.facts import Fact, load_templates
from lib.show.figures import BLUE, GREEN, ORANGE, PINK, RED, SKY, visible
from lib.show.sentences import words

HERE = Path(__file__).parent
PARTS = tuple(HERE / f"page.{kind}" for kind in ("html", "css", "js"))


def render(data: PageData) -> str:
    """One HTML file, complete in itself."""
    content, made = _page(data), data.provenance
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    scripts = {"vega": bundle, "js": PARTS[2].read_text(encoding="utf-8")}
    if odd := [name for name, script in scripts.items() if "</script" in script.lower()]:
        raise DataError(f"the script {odd[0]} would end its own element; it cannot be written into a page.")
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts.values())
    sums = " ".join(f"'sha256-{digest}'" for digest in digests)
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


def _page(data: PageData) -> dict[str, Any]:
    """The data as JSON. Numbers are base64 of little-endian values."""
    first = data.reported["01_static_diagnostics"]
    low, high = first["qk_overlap_band"]
    checked = data.reported["05_cross_validation"]
    lengths = (len(tokens) * (len(tokens) + 1) // 2 for tokens in data.texts.values())
    texts = zip(data.texts.items(), accumulate(lengths, initial=0), strict=False)  # the last start is the end
    return {
        "shape": data.arrays["qk_overlap"].shape[1:],
        "measures": [m | ({"labels": _labels(data, m["key"])} if m["kind"] == "role" else {}) for m in MEASURES],
        "states": [_state(s, data.reported[EDITS]["recommended"]) for s in data.states],
        "cases": [_case(c, data.sources) for c in data.cases],
        "texts": [{"text": text, "tokens": tokens, "start": start} for (text, tokens), start in texts],
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
    if state.key == "none":
        return {"key": state.key, "title": "untouched model", "layer": None, "text": ""}
    name = words(state.key)
    if state.layer is None:
        text = (
            f"{state.reported['parameters']:,} numbers before every text, and no weight changed: the cause, not a layer"
        )
        return {"key": state.key, "title": f"{name} before every text", "layer": None, "text": text}
    layer = f"L{state.layer + 1}"
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
SHAPES = ("circle", "diamond", "triangle-up")
BEFORE = "#3f8fce"  # as blue as figures.BLUE, readable on a dark page too
CATEGORIES = (BLUE, RED, GREEN, ORANGE, PINK, SKY, "#8c6bb1", "#f0e442")
CHARTS: dict[str, Any] = yaml.safe_load((HERE / "charts.yaml").read_text(encoding="utf-8"))
MEASURES: list[dict[str, str]] = yaml.safe_load((HERE / "measures.yaml").read_text(encoding="utf-8"))
OMITTED = object()


def specs(data: PageData) -> dict[str, dict[str, Any]]:
    """Vega-Lite specifications by name, each of the data set `rows`."""
    out = {"attention": CHARTS["attention"]}
    for name, n in (("", 1), (" edited", 2)):
        kinds = {"kinds": KINDS[: n + 1], "colours": (BEFORE, RED, GREEN)[: n + 1], "shapes": SHAPES[: n + 1]}
        states = {"states": STATES[:n], "colours": (BEFORE, GREEN)[:n], "shapes": SHAPES[::2][:n]}
        legend = {"orient": "top", "title": None} if n > 1 else None
        types = {"types": [words(t) for t in data.types], "height": 22 * len(data.types)}
        out[f"points{name}"] = filled(CHARTS["points"], **kinds)
        out[f"norms{name}"] = filled(CHARTS["norms"], **states, **types, legend=legend)
    for measure, layout in product(MEASURES, ("wide", "tall")):
        key, title, unit, kind = (measure[part] for part in ("key", "title", "unit", "kind"))
        if kind == "role":
            out[f"grid {key} {layout}"] = _grid(kind, layout, title, _labels(data, key))
        else:
            out[f"grid {key} {layout}"] = _grid(kind, layout, unit or title)
            out[f"grid {key} change {layout}"] = _grid("signed", layout, f"change {unit}".strip())
    return out


def _grid(kind: str, layout: str, title: str, labels: Sequence[str] = ()) -> dict[str, Any]:
    """labels: of roles. A legend shows them with blanks; a legend of numbers needs no such rule."""
    across, down = ("layer", "head") if layout == "wide" else ("head", "layer")
    label = "replace(datum.label, /_/g, ' ')" if labels else OMITTED
    scale = filled(CHARTS["scales"][kind], labels=labels)
    values = "nominal" if labels else "quantitative"
    return filled(CHARTS["grid"], across=across, down=down, title=title, label=label, scale=scale, type=values)


def filled(part: Any, **values: Any) -> Any:
    """A specification, or a part of it, whose holes (`$name`) hold values."""
    if isinstance(part, dict):
        entries = {key: filled(entry, **values) for key, entry in part.items()}
        return {key: entry for key, entry in entries.items() if entry is not OMITTED}
    if isinstance(part, list):
        return [filled(entry, **values) for entry in part]
    return values[part[1:]] if isinstance(part, str) and part.startswith("$") else part


THEMES = {k: filled(CHARTS["theme"], **c, category=[c["none"], *CATEGORIES]) for k, c in CHARTS["themes"].items()}
