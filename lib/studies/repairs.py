"""What must an edit touch to carry over? Edits of the place where a failure is seen, beside edits of its cause.

    place  a pathway of the layer that the diagnosis names: v_only, full
    cause  a sink before every text: sink_kv, sink_token; with no step taken, the prefix that both start from

1  `lesson`: which facts are trained on: the case's eight, sixteen, or all fit countries that the model knows
2  `fitted`: Adam for a fixed number of steps, PART facts and one neutral window a step, the pathways' objective
3  the rule chooses rate and steps for each pathway and case, on the eight facts and selection countries
   (`carrying_over.chosen`): of the runs that are harmless there, the one that makes most selection countries told
4  what it chose is judged once on the held-out countries (look `held_out`), with seeds, more facts, and controls

`repair_at` is one run. Perplexity is of passages of WINDOW tokens: at their start, and later on.
"""

from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib import evaluation
from lib.diagnosis import prescribe
from lib.edits import Edit, make
from lib.errors import DataError, EditError
from lib.evaluation import NONE, Protocol, bled, build_protocol, kinds, questions
from lib.facts import Case, Fact, load_cases, load_templates
from lib.models import Model
from lib.recall import known_and_told, scorable, tell, trainable
from lib.sinks import KEYS
from lib.statistics import gaussian
from lib.studies import Row, experiment, once_a_model
from lib.studies.knowledge_path import asked_before
from lib.studies.location import KINDS
from lib.studies.side_effects import kept_streams
from lib.training import Task, false_facts, losses, sink_task, slice_values, task_at, with_facts
from lib.weights import SINKS, Slice, pathway_slices

PART = 8  # facts a step
MORE = 8  # fit countries that make sixteen of the eight
WINDOW, START = 256, 32  # tokens of a passage, and of these what counts as its start
LOOKS = {"selection": ("fit", "selection"), "held_out": ("fit", "selection", "held_out")}  # which countries are asked
LESSONS = ("eight", "sixteen", "fit")
VARIANTS = ("true", "false", "random start", "one layer", "other relation", "in the middle")


@experiment
def repair_at(
    model: Model,
    *,
    case: int,
    pathway: str,
    rate: float,
    steps: int,
    facts: str = "eight",
    variant: str = "true",
    look: str = "selection",
    seed: int = 0,
) -> Row:
    """Train a pathway on a case (counted from 1) and ask what carries over and what it costs. variant: `true`; `false`:
    each fact has the next one's answer; `random start`: a sink that starts from random numbers; `one layer`: of a key
    and value, those of one layer drawn at random alone are trained; `other relation`: not these facts are trained, but
    another relation of their subjects; `in the middle`: the learned row stands there in every text. Raises EditError
    for other words, or a loss that is no number."""
    strange = facts not in LESSONS or variant not in VARIANTS or look not in LOOKS
    if strange or (variant == "in the middle" and pathway != "sink_token"):
        raise EditError(f"no facts {facts!r}, {variant!r} of {pathway} or look {look!r}: see `studies.repairs`.")
    own = _case(model, case)
    edit, learned = fitted(model, case, pathway, rate=rate, steps=steps, facts=facts, variant=variant, seed=seed)
    row = {"parameters": edit.parameters, "facts_n": len(edit.facts)} | judged(model, case, look, own, edit)
    return row | (learned if look == "held_out" else {})  # choosing does not read it


@once_a_model
def _case(model: Model, number: int) -> Case:
    listed = load_cases(model.name)
    if not 1 <= number <= len(listed):
        raise EditError(f"there is no case {number}: {model.name} has {len(listed)}, from 1.")
    return trainable(model, listed[number - 1])


@once_a_model
def _states(model: Model, number: int) -> pd.DataFrame:
    """Of each other country that may be asked: told, known, routing_failure; by subject, with its split."""
    case, text, trained = _case(model, number), load_templates(), {f.subject for f in _case(model, number).facts}
    facts = [f for f in scorable(model, case.large) if f.subject not in trained and f.split != "eight"]
    asked = tell(model, facts, {x: text[x] for x in (case.template, *case.controls)}, known=asked_before(model))
    return known_and_told(asked, case).assign(split=[f.split for f in facts], fact=facts).set_index("subject")


def lesson(model: Model, number: int, facts: str) -> tuple[Fact, ...]:
    """The facts of a lesson. Raises DataError for one without a fact."""
    own, states = _case(model, number).facts, _states(model, number)
    fit = tuple(states[(states.split == "fit") & states.known].fact)
    out = {"eight": own, "sixteen": own + fit[:MORE], "fit": fit}[facts]
    if not out:
        raise DataError(f"no fit country of case {number} is known to {model.name}: there is nothing to train on.")
    return out


@once_a_model
def _task(model: Model, number: int, sink: bool, middle: bool = False) -> Task:
    """What training takes on the case's own facts: at the layer that the diagnosis names, or with a sink."""
    case = _case(model, number)
    if sink:
        return sink_task(model, _task(model, number, False), middle=middle)
    return task_at(model, case, prescribe(model, case).knowledge_head.layer)


def fitted(
    model: Model,
    number: int,
    pathway: str,
    *,
    rate: float,
    steps: int,
    facts: str = "eight",
    variant: str = "true",
    seed: int = 0,
) -> tuple[Edit, dict[str, int]]:
    """The edit of one run, and how many of the prompts that it was trained on get the answer that they were given
    (learned, of lesson_n). seed: of the order of facts and neutral windows, and of what a variant draws."""
    middle, learned = variant == "in the middle", lesson(model, number, facts)
    task = _task(model, number, True, True) if middle else _task(model, number, pathway in SINKS)
    generator = torch.Generator().manual_seed(seed)
    tasks = _tasks(model, task, learned, variant, generator)
    values = _start(model, task, pathway, variant, generator)
    final = _descended(model, tasks, values, rate, steps, generator, one_layer=variant == "one layer")
    told = tuple(tell(model, learned, {"failing": task.template}).told.tolist())
    about: dict[str, Any] = {"layer": task.layer, "facts": learned, "template": task.template, "told_before": told}
    recipe = {"objective": "the pathways'", "rate": rate, "steps": steps, "facts": facts, "variant": variant}
    recipe |= {"middle": True} if middle else {}
    edit = make(model, final, pathway=pathway, seed=seed, recipe=recipe, **about)
    with torch.no_grad():
        margins = torch.cat([losses(model, part, final, torch.tensor([0]))[2] for part in tasks])
    return edit, {"learned": int((margins > 0).sum()), "lesson_n": len(margins)}


def _tasks(model: Model, task: Task, facts: tuple[Fact, ...], variant: str, generator: torch.Generator) -> list[Task]:
    """What the steps take in turn."""
    tasks = [with_facts(model, task, part) for part in _parts(facts, generator)]
    if variant == "false":
        return [false_facts(part) for part in tasks]
    if variant == "other relation":
        return [with_facts(model, replace(task, template=text), part) for text, part in other_relations(model, task)]
    return tasks


def _descended(
    model: Model,
    tasks: list[Task],
    values: dict[Slice, Tensor],
    rate: float,
    steps: int,
    generator: torch.Generator,
    *,
    one_layer: bool,
) -> dict[Slice, Tensor]:
    """The values after so many steps of Adam. one_layer: of a key and value, only those of one drawn at random move."""
    leaves = {part: v.requires_grad_() for part, v in values.items()}
    if one_layer:
        layer = int(torch.randint(model.weights.n_layers, (), generator=generator))
        for leaf in leaves.values():
            leaf.register_hook(lambda gradient: gradient * (torch.arange(len(gradient)) == layer)[:, None, None])
    optimiser = torch.optim.Adam(leaves.values(), lr=rate)
    for part in islice(cycle(tasks), steps):
        windows = torch.randperm(part.n_training, generator=generator, device="cpu")[: part.recipe.windows]
        cross_entropy, kl, _ = losses(model, part, leaves, windows)
        loss = cross_entropy + part.recipe.kl_weight * kl
        if not bool(loss.isfinite()):
            raise EditError(f"the loss at rate {rate:g} is {loss.item()}; try a smaller rate.")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {part: v.detach() for part, v in leaves.items()}


def _parts(facts: tuple[Fact, ...], generator: torch.Generator) -> list[tuple[Fact, ...]]:
    """Facts in parts of PART, in an order drawn at random; the last part is filled up with the first ones."""
    order = torch.randperm(len(facts), generator=generator, device="cpu").tolist()
    order += order[: -len(order) % PART]
    return [tuple(facts[i] for i in order[start : start + PART]) for start in range(0, len(order), PART)]


def _start(model: Model, task: Task, pathway: str, variant: str, generator: torch.Generator) -> dict[Slice, Tensor]:
    """What training starts from; `random start`: numbers drawn at random, as large as these are in each layer."""
    values = slice_values(model, pathway_slices(model.module, task.layer, pathway))
    if variant != "random start":
        return values
    return {
        part: gaussian(v.shape, generator) * v.pow(2).mean((-1, -2) if part == KEYS else -1, keepdim=True).sqrt()
        for part, v in values.items()
    }


def other_relations(model: Model, task: Task) -> list[tuple[str, tuple[Fact, ...]]]:
    """Other relations of the facts' subjects, those with most facts that can be scored first: template and facts."""
    table = evaluation.load_relations(model, task.facts)
    out = []
    for template, rows in table.groupby("template", sort=False):
        facts = [Fact(row.subject, row.answer) for row in rows.itertuples()]
        try:
            out.append((str(template), scorable(model, facts)))
        except DataError:
            continue
    return sorted(out, key=lambda pair: -len(pair[1]))


# What it did


def passage_starts(model: Model) -> dict[str, str]:
    """The first WINDOW tokens of each passage, by name."""
    return {
        name: str(model.tokenizer.decode(model.pieces(t)[:WINDOW])) for name, t in evaluation.load_passages().items()
    }


@once_a_model
def _asked(model: Model, number: int, look: str) -> Protocol:
    """What a run is asked: probes, other relations, the case's own facts under every template, other countries under
    the failing template and the first control, and the passages. With told_before and untold among the questions."""
    case, states = _case(model, number), _states(model, number)
    table = questions(model, case)
    rare = (table.set == "large") & ~table.template.isin([case.template, case.controls[0]])
    barred = (table.set == "large") & ~table.split.isin(LOOKS[look])
    layer = _task(model, number, False).layer
    protocol = build_protocol(
        model, case, layer, texts=passage_starts(model), table=table[~rare & ~barred], run=kept_streams
    )
    before = evaluation.score_questions(model, protocol, None)
    failed = states.index[states.routing_failure]
    untold = (before.set == "large") & (before.template == case.template) & before.subject.isin(failed)
    return replace(
        protocol, questions=protocol.questions.assign(told_before=before.told, top_before=before.top, untold=untold)
    )


def judged(model: Model, number: int, look: str, case: Case, edit: Edit) -> Row:
    """What an edit does, as plain values. told: of the facts trained on. Of each kind of question how many there are
    (n), told before and now, and lost since. untold, repaired: countries that are known and not told, of the look's
    split. bled: other countries answered with a trained answer, wrongly. ratio: of perplexities, at the start of
    passages and later."""
    protocol = _asked(model, number, look)
    asked, out = evaluation.score_questions(model, protocol, edit), Row(told=sum(edit.told_after))
    picks = kinds(asked, case, asked.told_before)
    for name, kind in KINDS.items():
        part = asked[picks[kind]]
        lost = part.told_before & ~part.told
        counts = {"n": len(part), "before": part.told_before.sum(), "told": part.told.sum(), "lost": lost.sum()}
        out |= {f"{name}_{key}": int(value) for key, value in counts.items()}
    trained = {f.subject for f in edit.facts}
    others = asked[~asked.subject.isin(trained)]
    out["bled"], out["bled_n"] = bled(model, others, replace(case, facts=edit.facts))
    before = others.assign(told=others.told_before, top=others.top_before)
    out["bled_before"] = bled(model, before, replace(case, facts=edit.facts))[0]
    failed = asked[asked.untold & (asked.split == look)]
    out |= {"untold": len(failed), "repaired": int(failed.told.sum())}
    out["log_probability"] = float(np.log(failed.prob.clip(1e-30)).mean())
    return out | perplexity(model, protocol, edit)


def perplexity(model: Model, protocol: Protocol, edit: Edit) -> Row:
    """Ratios of perplexities, after over before: of all tokens, of those at the START of a passage, and later; the
    mean change of loss later in each passage; and KL(untouched || edited)."""
    tokens = evaluation.score_passages(model, protocol, {NONE: None, "edit": edit})
    passage, change = tokens[NONE].passage, tokens["edit"].nll - tokens[NONE].nll
    start = change.groupby(passage).cumcount() < START
    ratios = {"ratio": change.mean(), "ratio_start": change[start].mean(), "ratio_later": change[~start].mean()}
    by_passage = change[~start].groupby(passage[~start]).mean()
    return {name: float(np.exp(value)) for name, value in ratios.items()} | {
        "tokens": len(change),
        "changes": [float(x) for x in by_passage],
        "kl": float(tokens["edit"].kl.mean()),
    }
