"""Edits at any layer and at parts of equal size."""

import numpy as np
import pandas as pd
import pytest
import torch

from lib import controls
from lib.errors import EditError
from lib.pathways import keep, train
from lib.weights import part_masks, pathway_slices, view


@pytest.mark.parametrize("part, picked", [("head", [1]), ("values", [0, 5]), ("neurons", [2, 3, 31])])
def test_a_part_is_what_the_view_says(tiny, part, picked):
    """Set to zero, exactly the view's own slices vanish, and nothing else of the layer."""
    model, before = tiny.model, {n: p.clone() for n, p in tiny.model.named_parameters()}
    pathway, masks = part_masks(model, 1, part, picked)
    parameters = dict(model.named_parameters())
    assert set(masks) == set(pathway_slices(model, 1, pathway))
    try:
        with torch.no_grad():
            for s, mask in masks.items():
                s.of(parameters[s.name])[mask] = 0
        attn, mlp = view(model).blocks[1].attn, view(model).blocks[1].mlp
        zero = {
            "head": [attn.W_Q[1], attn.W_O[1]],
            "values": [attn.W_V.transpose(1, 2).flatten(0, 1)[picked] if part == "values" else None],
            "neurons": [mlp.W_out[picked] if part == "neurons" else None],
        }[part]
        assert all((z == 0).all() for z in zero)
        changed = sum(int((p != before[n]).sum()) for n, p in parameters.items())
        assert changed == sum(z.numel() for z in zero) == sum(int(m.sum()) for m in masks.values())
    finally:
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(before[n])


def test_training_under_a_mask_moves_nothing_else(organism):
    case = controls.setting(organism).case
    pathway, masks = part_masks(organism.model, 10, "head", [2])
    run = train(organism, keep(organism, case, 10), pathway, rate=1e-3, masks=masks)
    parameters = dict(organism.model.named_parameters())
    moved = {s: run.edit.values[s] != s.of(parameters[s.name]) for s in masks}
    assert all((moved[s] & ~masks[s]).sum() == 0 for s in masks)
    assert sum(int(m.sum()) for m in moved.values()) > 0.9 * sum(int(m.sum()) for m in masks.values())


def test_the_planted_suppressors_layer_repairs_and_the_last_query_does_not(organism):
    """The organism's first failure is planted in L11 H2; what reads the subject lies below the last layer."""
    planted = controls.edit_at(organism, layer=11, pathway="attention")
    other = controls.edit_at(organism, layer=12, pathway="q_only")
    assert planted["facts_told"] == 8 and planted["held_out_repaired"] == planted["held_out_n"] > 10
    assert other["facts_told"] < 8 and other["held_out_repaired"] == 0


def test_equal_parts_have_equal_sizes_and_random_ones_differ_by_seed(organism):
    layer = controls.setting(organism).verdict.knowledge_head.layer
    for part in ("head", "values", "neurons"):
        picks = [controls._picked(organism, layer, part, p, 0) for p in ("diagnosed", "random")]
        masks = [part_masks(organism.model, layer, part, pick)[1] for pick in picks]
        sizes = [sum(int(m.sum()) for m in some.values()) for some in masks]
        assert sizes[0] == sizes[1] > 0
    assert len({tuple(controls._picked(organism, layer, "values", "random", seed)) for seed in range(4)}) == 4
    heads = {controls._picked(organism, layer, "head", "random", seed)[0] for seed in range(50)}
    assert heads == set(range(12)) - {controls.setting(organism).verdict.knowledge_head.head}


def test_a_part_is_trained_and_counted(organism):
    found = controls.part_at(organism, layer=12, part="values", pick="random", seed=1)
    assert found["parameters"] == 120 * 10 and found["steps"] > 0 and found["held_out_n"] == 19


def test_two_runs_are_the_same(organism):
    first, again = (controls.edit_at(organism, layer=12, pathway="v_only", seed=3) for _ in range(2))
    assert first == again


def test_places_that_are_not_there(organism):
    with pytest.raises(EditError, match="no layer 13: organism has L1 to L12"):
        controls.edit_at(organism, layer=13, pathway="full")
    with pytest.raises(EditError, match="no part 'tail'"):
        controls.part_at(organism, layer=5, part="tail", pick="random")
    with pytest.raises(ValueError, match="unknown part"):
        part_masks(organism.model, 0, "tail", [0])


def runs(**columns):
    base = {
        "pathway": "v_only", "seed": 0, "reached": True, "steps": 10, "kl": 0.1, "bled": 0, "bled_n": 9,
        "facts_told": 8, "held_out_repaired": 0, "held_out_n": 19, "capability_lost": 0, "unrelated_lost": 0,
    }  # fmt: skip
    return pd.DataFrame({**{k: [v] * len(columns["layer"]) for k, v in base.items()}, **columns})


def test_correlations_worked_out():
    """Layers 1 to 4 in the order of their score: told falls, steps fall (which is better), bled is constant."""
    means = controls.by_layer(runs(layer=[1, 2, 3, 4], facts_told=[8, 7, 6, 5], steps=[40, 30, 20, 10]))
    scores = pd.DataFrame({"layer": [1, 2, 3, 4], "score": [0.1, 0.2, 0.3, 0.4]})
    found = controls.correlations(means, scores).set_index("measure")
    assert found.rho["facts_told"] == -1 and found.rho["steps"] == 1
    assert found.low["facts_told"] == -1 and found.high["facts_told"] == -1
    assert found.rho.isna()["bled"] and (found.layers == 4).all()


def test_rho_of_noise_has_a_wide_interval():
    draw = np.random.default_rng(0)
    value, low, high = controls.rho(pd.Series(draw.normal(size=10)), pd.Series(draw.normal(size=10)))
    assert low < 0 < high and low <= value <= high and high - low > 0.5


def test_other_layers_that_do_as_well_are_counted():
    means = controls.by_layer(
        runs(layer=[1, 2, 3], facts_told=[8, 8, 7], steps=[5, 20, 1], kl=[0.2, 0.1, 0.0], held_out_repaired=[3, 0, 5])
    )
    (row,) = controls.at_least_as_good(means, 2).to_dict("records")
    assert (row["others"], row["told"], row["repaired"], row["sooner"], row["gentler"]) == (2, 1, 2, 1, 0)
    assert row["best_layer"] == 3 and row["most_repaired"] == 5


def test_a_diverged_run_tells_nothing():
    means = controls.by_layer(runs(layer=[1, 1], facts_told=[8, None], reached=[True, False]))
    assert means.facts_told.tolist() == [4.0] and means.reached.tolist() == [0.5]


def test_random_parts_beside_the_diagnosed_one():
    table = pd.DataFrame({
        "part": "head", "pick": ["diagnosed", "random", "random"], "parameters": 5, "facts_told": [7, 8, 7],
        "min_margin": [-0.1, 0.2, -0.2], "held_out_repaired": [1, 0, 2], "kl": [0.1, 0.2, 0.4],
    })  # fmt: skip
    (row,) = controls.random_against_diagnosed(table).to_dict("records")
    assert row["better"] == 1 and row["random"] == 2 and row["random_told"] == 7.5
