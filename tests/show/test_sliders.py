"""The chart with a slider: what it shows at a layer, and that a page can hold it."""

import json

import pandas as pd
import vl_convert

from lib.show import sliders

MEANS = pd.DataFrame(
    [
        {"pathway": p, "layer": layer, "facts_told": told, "held_out_repaired": 1.0, "bled": 3.0, "kl": 0.01}
        for p, layer, told in (("v_only", 2, 7.0), ("v_only", 4, 5.0), ("full", 2, 8.0))
    ]
)


def shown(chart, layer: int) -> str:
    spec = chart.spec | {"params": [chart.spec["params"][0] | {"value": layer}]}
    return vl_convert.vegalite_to_svg(spec)


def test_the_slider_goes_over_the_layers_and_stands_on_the_diagnosed_one():
    [slider] = sliders.layer_slider(MEANS, 4).spec["params"]
    assert (slider["value"], slider["bind"]["min"], slider["bind"]["max"]) == (4, 2, 4)


def test_each_layer_shows_its_own_numbers_and_one_not_tried_that_before_it():
    chart = sliders.layer_slider(MEANS, 2)
    at = {layer: shown(chart, layer) for layer in (2, 3, 4)}
    for label in ("facts told: 7; pathway: v only; layer: 2", "facts told: 8; pathway: full; layer: 2"):
        assert label in at[2] and label in at[3]
    assert "facts told: 5; pathway: v only; layer: 4" in at[4]  # the red mark stays where it was
    assert "facts told: 8; pathway: full; layer: 2" in at[4] and "facts told: 7; pathway: v only; layer: 2" not in at[4]


def test_nothing_in_it_can_end_its_element():
    odd = MEANS.assign(pathway="</script><b>")
    text = sliders.layer_slider(odd, 2)._repr_mimebundle_()["text/html"]
    assert text.count("</script>") == 1 and "<b>" not in text
    inside = text.partition('json">')[2].partition("</script>")[0]
    assert json.loads(inside)["params"][0]["value"] == 2


def test_a_run_that_diverged_has_no_bar_and_breaks_no_page():
    chart = sliders.layer_slider(pd.concat([MEANS, MEANS.assign(layer=6, kl=float("nan"))], ignore_index=True), 2)
    json.dumps(chart.spec, allow_nan=False)
    assert chart.spec["params"][0]["bind"]["max"] == 4
