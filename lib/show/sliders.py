"""A figure that answers while it is moved: Vega-Lite, drawn by the page (book.js), by JupyterLab and by Colab.

What it shows stands in a plain figure beside it, so nothing is lost where no script runs.
"""

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lib.show.figures import PATHWAY_COLOURS, RED
from lib.show.sentences import words

MEASURES = {"facts_told": "facts told", "held_out_repaired": "held-out repaired"}
MEASURES |= {"bled": "trained answers, wrongly", "kl": "KL on neutral text (nats)"}
AT = [  # of each pathway the layer that was tried last before the slider's
    {"filter": "datum.layer <= layer"},
    {"joinaggregate": [{"op": "max", "field": "layer", "as": "at"}], "groupby": ["pathway"]},
    {"filter": "datum.layer == datum.at"},
]


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification that notebooks and the book know how to draw."""

    spec: dict[str, Any]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        text = json.dumps(self.spec, allow_nan=False).replace("<", "\\u003c")
        page = f'<div class="chart"><script type="application/json">{text}</script></div>'
        return {"application/vnd.vegalite.v5+json": self.spec, "text/html": page}


def layer_slider(means: pd.DataFrame, layer: int) -> Chart:
    """What an edit of a layer gives, pathway by pathway, at the layer that the slider chooses. means: of
    `comparisons.by_layer`. layer: the diagnosed one, counted from 1, where the slider stands first."""
    table = means[["pathway", "layer", *MEASURES]].dropna(ignore_index=True)
    rows = [row | {"layer": int(row["layer"]), "pathway": words(row["pathway"])} for row in table.to_dict("records")]
    first, last = int(table.layer.min()), int(table.layer.max())
    slider = {"input": "range", "min": first, "max": last, "step": 1, "name": "Layer "}
    return Chart(
        {
            "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
            "background": "white",
            "params": [{"name": "layer", "value": layer, "bind": slider}],
            "data": {"values": rows},
            "columns": 2,
            "concat": [_panel(name, label, float(table[name].max()), layer) for name, label in MEASURES.items()],
        }
    )


def _panel(name: str, label: str, most: float, layer: int) -> dict[str, Any]:
    """A bar a pathway at the chosen layer, and a red mark for the diagnosed one."""
    value = {"field": name, "type": "quantitative", "title": label, "scale": {"domain": [0, most or 1]}}
    pathway = {"field": "pathway", "type": "nominal", "title": None, "sort": None}
    colours = {"domain": [words(p) for p in PATHWAY_COLOURS], "range": list(PATHWAY_COLOURS.values())}
    tip = [{"field": "pathway"}, {"field": "at", "title": "layer"}, {"field": name, "title": label, "format": ".3g"}]
    bar = {"color": {"field": "pathway", "legend": None, "scale": colours}, "tooltip": tip}
    own = [{"filter": f"datum.layer == {layer}"}]
    layers = [
        {"transform": AT, "mark": {"type": "bar", "height": {"band": 0.7}}, "encoding": bar},
        {"transform": own, "mark": {"type": "tick", "color": RED, "thickness": 3}},
    ]
    return {"width": 250, "height": {"step": 22}, "encoding": {"x": value, "y": pathway}, "layer": layers}
