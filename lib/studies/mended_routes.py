"""Does an edit that carries over have mended a route? Asked where the route is known, because it was cut there.

A failure is planted on the model itself (`planted`), so that some facts are known and no longer told, all for one
reason. Half of them are trained on, at the very site of the damage or at a layer drawn at random, and the other half
are asked. If no pathway makes these told although one fault lies behind all, then a small number for the countries of
chapter 4 says nothing about whether their failure is one of routing.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.facts import Fact, prompts
from lib.forward import above, pack, resid_pre
from lib.interventions import rerun_from
from lib.models import Model
from lib.recall import first_tokens
from lib.studies import Row, experiment, planted
from lib.studies.localisation import told_by
from lib.training import slice_values
from lib.weights import Slice, pathway_slices

PATHWAYS = ("v_only", "attention", "ffn", "full")  # at the site; of these the whole block is also tried elsewhere
RATE, STEPS, SPARE = 1e-3, 60, 1.0  # Adam; logits by which a trained fact is told: then training stops


@experiment
def mended(model: Model, *, seed: int) -> Row:
    """One plant: how many of its lost facts are trained on and how many are asked (held), and for each pathway how many
    of either are told then. Of a plant with fewer than four lost facts, only that it was not used."""
    plant, lost, runs = _planted(model, seed)
    if len(lost) < 4:
        return {"used": False}
    rng = np.random.default_rng([seed, 7])
    order = rng.permutation(len(lost)).tolist()
    facts = [lost[i] for i in order]
    trained, held = facts[: len(facts) // 2], facts[len(facts) // 2 :]
    site = planted.truth(model, plant)[0].layer
    drawn = int(rng.choice([i for i in range(model.weights.n_layers) if i != site]))
    out: Row = {"used": True, "kind": plant.kind, "layer": site + 1, "drawn": drawn + 1}
    out |= {"trained": len(trained), "held": len(held)}
    with planted.applied(model, plant, runs):
        for name, layer, pathway in [*((p, site, p) for p in PATHWAYS), ("elsewhere", drawn, "full")]:
            values = learned(model, trained, plant.failing, layer, pathway)
            for part, asked in (("trained", trained), ("held", held)):
                out[f"{name} {part} told"] = told_with(model, asked, plant.failing, layer, values)
    return out


def _planted(model: Model, seed: int) -> tuple[planted.Plant, list[Fact], list]:
    """The seed's plant, as `planted.plant_run` accepts one; the facts that it makes untold under the failing template;
    and the runs that it was made from."""
    runs: list = []
    plant = planted.draw(model, seed, 0)
    for attempt in range(planted.ATTEMPTS):
        plant = planted.draw(model, seed, attempt)
        runs, answers = runs or planted.run_on(model, plant), first_tokens(model, plant.facts)
        with planted.applied(model, plant, runs):
            before, after = told_by(runs, answers), told_by([rerun_from(model, r, plant.lowest) for r in runs], answers)
        if planted.accepted(before, after)[2]:
            gone = (before[0] & ~after[0]).tolist()
            return plant, [f for f, lost in zip(plant.facts, gone, strict=True) if lost], runs
    return plant, [], runs


def learned(model: Model, facts: Sequence[Fact], template: str, layer: int, pathway: str) -> dict[Slice, Tensor]:
    """A slice of a layer (0-based) trained with Adam on the answers, until all are told with SPARE logits or STEPS."""
    answers, values = first_tokens(model, facts), slice_values(model, pathway_slices(model.module, layer, pathway))
    texts = pack(model, [model.token_ids(p) for p in prompts(facts, template)])
    stream = resid_pre(model, texts, layer)
    optimiser = torch.optim.Adam([v.requires_grad_() for v in values.values()], lr=RATE)
    for _ in range(STEPS):
        logits = above(model, texts, layer, stream, values, texts.last) @ model.weights.W_U
        right = logits.detach().gather(1, answers[:, None])[:, 0]
        wrong = logits.detach().scatter(1, answers[:, None], float("-inf")).amax(1)
        if bool((right - wrong >= SPARE).all()):
            break
        optimiser.zero_grad()
        F.cross_entropy(logits, answers).backward()
        optimiser.step()
    return {part: v.detach() for part, v in values.items()}


@torch.no_grad()
def told_with(model: Model, facts: Sequence[Fact], template: str, layer: int, values: dict[Slice, Tensor]) -> int:
    """How many facts are told with values in a layer."""
    texts = pack(model, [model.token_ids(p) for p in prompts(facts, template)])
    final = above(model, texts, layer, resid_pre(model, texts, layer), values, texts.last)
    return int(((final @ model.weights.W_U).argmax(1) == first_tokens(model, facts)).sum())
