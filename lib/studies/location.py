"""Is it the diagnosis that makes an edit work? Edits at every layer (`edit_at`), and at random places of equal size
(`part_at`), all under the one recipe and at one rate.

Localisation need not inform editing (Hase et al. 2023), and edits at random heads can do as well as at localised ones
(Wang and Veitch 2025): so every edit is put beside what it is when the place is drawn. Each run is a plain function of
a model and a few plain values, so that `sweeps` can keep and repeat it; what is read from finished runs is in
`comparisons`, so that a changed sentence does not void them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lib.diagnosis import Verdict, case_table, gather
from lib.errors import EditError
from lib.evaluation import ELSEWHERE, Protocol, bled, build_protocols, kinds, questions, score_questions
from lib.facts import Case, load_cases, load_templates, prompts
from lib.models import Model
from lib.peers import top_neurons
from lib.recall import first_tokens, tell, trainable
from lib.sites import Site
from lib.studies import experiment, once_a_model
from lib.studies.knowledge_path import asked_before
from lib.training import Task, Trained, tasks_at, train
from lib.weights import part_masks

RATE = 1e-3  # the middle of the recipe's grid, for every run here: an equal budget, and no choice to make a layer shine
SPLITS = ("held_out", "selection", "fit")
NEURONS = 128  # of an MLP, in the control of equal size
# What a run's row calls the kinds of questions of `evaluation.kinds`
KINDS = {"facts": "the facts", "neighbours": "neighbours", "capability": "capability", "unrelated": "unrelated"}
KINDS |= {"relations": "other relations", "paraphrases": "paraphrases"}
KINDS |= {"working": "working templates", "elsewhere": ELSEWHERE}


@dataclass(frozen=True)
class Setting:
    """What all runs on a model share. writes: of the answers under the controls, by component. opponent: what pushes
    hardest against the answers under the failing template."""

    case: Case
    verdict: Verdict
    writes: Float[Tensor, " component"]
    opponent: Site


@once_a_model
def setting(model: Model) -> Setting:
    """The first case of a model, diagnosed."""
    case = trainable(model, load_cases(model.name)[0])
    evidence = gather(model, case, case_table(model, case))
    opponent = evidence.sites[int(evidence.failing.difference.mean(0).argmin())]
    return Setting(case, evidence.verdict(), evidence.control.attribution.mean(0), opponent)


@once_a_model
def tasks(model: Model) -> dict[int, Task]:
    """For each layer (0-based) what training the first case there takes: one run of the model for all."""
    return tasks_at(model, setting(model).case, range(model.weights.n_layers))


@once_a_model
def prepared(model: Model) -> dict[int, tuple[Task, Protocol]]:
    """For each layer (0-based) what training and asking need of what lies below it."""
    case, layers = setting(model).case, range(model.weights.n_layers)
    table = questions(model, case)
    failing = table.set.isin(["eight", "large"]) & (table.template == case.template)
    table = table[table.set.isin(["capability", "unrelated"]) | failing]
    asked = protocols(model, case, layers, texts={}, table=table)
    return {layer: (tasks(model)[layer], asked[layer]) for layer in layers}


@once_a_model
def untold(model: Model) -> dict[str, list[str]]:
    """The other countries that are known and not told, by split."""
    case, asked = setting(model).case, prepared(model)[0][1].questions
    failed = set(asked.subject[(asked.set == "large") & ~asked.told_before])
    facts, known, before = [f for f in case.large if f.subject in failed], set[str](), asked_before(model)
    for control in case.controls:  # one that tells is enough
        if left := [f for f in facts if f.subject not in known]:
            known |= set(tell(model, left, {control: load_templates()[control]}, known=before).query("told").subject)
    return {s: [f.subject for f in facts if f.subject in known and f.split == s] for s in SPLITS}


def protocols(model: Model, case: Case, layers: Sequence[int], **options: Any) -> dict[int, Protocol]:
    """As `build_protocols`, with what the untouched model tells among the questions (told_before)."""
    end = model.weights.n_layers
    built = build_protocols(model, case, [*layers, end], **options)
    before = score_questions(model, built[end], None)
    table = built[end].questions.assign(told_before=before.told)
    return {layer: replace(protocol, questions=table) for layer, protocol in built.items()}


@experiment
def edit_at(model: Model, *, layer: int, pathway: str, seed: int = 0) -> dict[str, Any]:
    """Train one pathway at a layer (counted from 1) and ask what it did. Raises EditError for a layer that is not
    there."""
    task, protocol = prepared(model)[_index(model, layer)]
    run = train(model, task, pathway, rate=RATE, seed=seed)
    return outcome(model, protocol, run) | {"parameters": run.edit.parameters if run.edit else 0}


@experiment
def edit_near(model: Model, *, distance: int, pathway: str, seed: int = 0) -> dict[str, Any]:
    """`edit_at` so many layers above the diagnosed one (below, if negative), and which that is (at). Beyond an end of
    the model, twice as far on the other side."""
    layer = setting(model).verdict.knowledge_head.layer + 1 + distance
    layer = layer if 1 <= layer <= model.weights.n_layers else layer - 3 * distance
    return edit_at(model, layer=layer, pathway=pathway, seed=seed) | {"at": layer}


@experiment
def part_at(model: Model, *, part: str, pick: str, seed: int = 0, layer: int | None = None) -> dict[str, Any]:
    """Train a part of a layer (counted from 1; the diagnosed one, if not given), of a size that does not depend on how
    it is picked. part: `head` (one query head's rows of W_Q and columns of W_O), `values` (as many rows of W_V as a
    key/value head has) or `neurons` (NEURONS rows of W_out). pick: `diagnosed` (the knowledge head; its value head's
    rows; the neurons that write most of the answers) or `random`, drawn with the seed. Raises EditError for other
    words."""
    index = _index(model, layer or setting(model).verdict.knowledge_head.layer + 1)
    task, protocol = prepared(model)[index]
    pathway, masks = part_masks(model.module, index, part, _picked(model, index, part, pick, seed))
    run = train(model, task, pathway, rate=RATE, seed=seed, masks=masks)
    return outcome(model, protocol, run) | {"parameters": int(sum(m.sum() for m in masks.values()))}


def outcome(model: Model, protocol: Protocol, run: Trained) -> dict[str, Any]:
    """What a run did, as plain values. kl: on the neutral windows that training does not see. repaired, untold: known
    and untold facts of each split. bled: prompts about other countries answered with a trained answer, wrongly."""
    ran = {"reached": run.reached, "diverged": run.diverged, "steps": run.steps, "kl": float(run.kl)}
    ran["min_margin"] = float(run.history.min_margin.iloc[-1])
    return ran if run.edit is None else ran | summarise_answers(model, score_questions(model, protocol, run.edit))


def summarise_answers(model: Model, asked: pd.DataFrame) -> dict[str, Any]:
    """What a `score_questions` table over the setting's questions, or some of them, comes to. Of the kinds of questions
    that are in it: how many there are (n), told now, and lost since."""
    case, out = setting(model).case, dict[str, Any]()
    picks = kinds(asked, case, asked.told_before)
    for name, kind in KINDS.items():
        part = asked[picks[kind]]
        lost = part.told_before & ~part.told
        out |= {f"{name}_n": len(part), f"{name}_told": int(part.told.sum()), f"{name}_lost": int(lost.sum())}
    out["bled"], out["bled_n"] = bled(model, asked, case)
    told = asked[(asked.set == "large") & (asked.template == case.template)].set_index("subject").told
    for split, names in untold(model).items():
        out |= {f"{split}_n": len(names), f"{split}_repaired": int(told[names].sum())}
    return out


def _index(model: Model, layer: int) -> int:
    if not 1 <= layer <= model.weights.n_layers:
        raise EditError(f"there is no layer {layer}: {model.name} has L1 to L{model.weights.n_layers}.")
    return layer - 1


def _picked(model: Model, layer: int, part: str, pick: str, seed: int) -> list[int]:
    """Heads, rows of W_V or neurons."""
    weights, knowledge, draw = model.weights, setting(model).verdict.knowledge_head, np.random.default_rng(seed)
    head, group, width = knowledge.head or 0, weights.n_heads // weights.n_kv_heads, weights.d_head
    neurons = weights.blocks[layer].mlp.W_out.shape[0]
    sizes = {"head": weights.n_heads, "values": weights.n_kv_heads * width, "neurons": neurons}
    counts = {"head": 1, "values": width, "neurons": min(NEURONS, neurons // 2)}
    if part not in sizes or pick not in ("diagnosed", "random"):
        raise EditError(f"no part {part!r} picked {pick!r}; choose {', '.join(sizes)}, and diagnosed or random.")
    if pick == "random":
        away = [head] if part == "head" and layer == knowledge.layer else []
        return sorted(draw.choice(np.setdiff1d(np.arange(sizes[part]), away), counts[part], replace=False).tolist())
    if part == "neurons":
        case = setting(model).case
        asked = prompts(case.facts, load_templates()[case.controls[0]]), first_tokens(model, case.facts)
        return top_neurons(model, *asked, layer, counts[part])
    return [head] if part == "head" else [head // group * width + i for i in range(width)]
