"""Edits at any layer and at parts of equal size."""

from dataclasses import replace
from operator import attrgetter

import pytest
import torch

from lib.errors import EditError
from lib.evaluation import score_questions
from lib.facts import load_templates
from lib.recall import known_and_told, scorable, tell
from lib.sites import Site
from lib.studies import location
from lib.training import Recipe, task_at, train
from lib.weights import part_masks, pathway_slices, view


@pytest.mark.parametrize("part, picked", [("head", [1]), ("values", [0, 5]), ("neurons", [2, 3, 31])])
def test_a_part_is_what_the_view_says(tiny, part, picked):
    """Set to zero, exactly the view's own slices vanish, and nothing else of the layer."""
    model, before = tiny.module, {n: p.clone() for n, p in tiny.module.named_parameters()}
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
    case = location.setting(organism).case
    pathway, masks = part_masks(organism.module, 10, "head", [2])
    run = train(organism, task_at(organism, case, 10, Recipe(max_steps=3)), pathway, rate=1e-3, masks=masks)
    parameters = dict(organism.module.named_parameters())
    moved = {s: run.edit.values[s] != s.of(parameters[s.name]) for s in masks}
    assert all((moved[s] & ~masks[s]).sum() == 0 for s in masks)
    assert sum(int(m.sum()) for m in moved.values()) > 0.9 * sum(int(m.sum()) for m in masks.values())


def test_the_planted_suppressors_layer_repairs_and_the_last_query_does_not(organism):
    """The organism's first failure is planted in L11 H2; what reads the subject lies below the last layer."""
    planted = location.edit_at(organism, layer=11, pathway="attention")
    other = location.edit_at(organism, layer=12, pathway="q_only")
    assert planted["facts_told"] == 8 and planted["held_out_repaired"] == planted["held_out_n"] > 10
    assert other["facts_told"] < 8 and other["held_out_repaired"] == 0


def test_equal_parts_have_equal_sizes_and_random_ones_differ_by_seed(organism):
    layer = location.setting(organism).verdict.knowledge_head.layer
    for part in ("head", "values", "neurons"):
        picks = [location._picked(organism, layer, part, p, 0) for p in ("diagnosed", "random")]
        masks = [part_masks(organism.module, layer, part, pick)[1] for pick in picks]
        sizes = [sum(int(m.sum()) for m in some.values()) for some in masks]
        assert sizes[0] == sizes[1] > 0
    assert len({tuple(location._picked(organism, layer, "values", "random", seed)) for seed in range(4)}) == 4
    heads = {location._picked(organism, layer, "head", "random", seed)[0] for seed in range(50)}
    assert heads == set(range(12)) - {location.setting(organism).verdict.knowledge_head.head}


def test_a_part_is_trained_and_counted_and_comes_out_the_same_again(organism):
    drawn = {"part": "values", "pick": "random", "seed": 1}
    found, again = (location.part_at(organism, layer=12, **drawn) for _ in range(2))
    assert found == again
    assert found["parameters"] == 120 * 10 and found["steps"] > 0 and found["held_out_n"] == 19


def test_places_that_are_not_there(organism):
    with pytest.raises(EditError, match="no layer 13: organism has L1 to L12"):
        location.edit_at(organism, layer=13, pathway="full")
    with pytest.raises(EditError, match="no part 'tail'"):
        location.part_at(organism, layer=5, part="tail", pick="random")
    with pytest.raises(ValueError, match="unknown part"):
        part_masks(organism.module, 0, "tail", [0])


def test_countries_known_and_not_told_are_those_of_the_definition(organism):
    case = location.setting(organism).case
    facts = [f for f in scorable(organism, case.large) if f.split != "eight" and f not in case.facts]
    text = {name: load_templates()[name] for name in (case.template, *case.controls)}
    state = known_and_told(tell(organism, facts, text), case)
    wanted = set(state.subject[state.routing_failure])
    found = location.untold(organism)
    assert {name for names in found.values() for name in names} == wanted and len(wanted) > 20
    assert {f.split for f in facts if f.subject in found["held_out"]} == {"held_out"}


def test_what_lies_below_every_layer_comes_from_one_run_of_the_model(organism):
    case = location.setting(organism).case
    task, protocol = location.prepared(organism)[9]
    alone = task_at(organism, case, 9)
    for name in ("prompt_stream", "window_streams", "untouched.final", "untouched.log_z", "untouched.mean_unembedding"):
        one, other = (attrgetter(name)(x) for x in (task, alone))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    untouched = score_questions(organism, protocol, None)
    assert (untouched.told == protocol.questions.told_before).all() and 0 < untouched.told.mean() < 1


def test_near_counts_from_the_diagnosed_layer_and_turns_back_at_an_end(organism, monkeypatch):
    """The organism's diagnosed layer is the 8th of 12."""
    asked = []
    monkeypatch.setattr(location, "edit_at", lambda model, **given: asked.append(given["layer"]) or {})
    own = location.setting(organism)
    assert [location.edit_near(organism, distance=d, pathway="full")["at"] for d in (-1, 0, 1)] == [7, 8, 9]
    last = replace(own, verdict=replace(own.verdict, knowledge_head=Site(11, 0)))
    monkeypatch.setattr(location, "setting", lambda model: last)
    assert [location.edit_near(organism, distance=d, pathway="full")["at"] for d in (-1, 0, 1)] == [11, 12, 10]
    assert asked == [7, 8, 9, 11, 12, 10]
