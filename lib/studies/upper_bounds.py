"""How far could an edit at one layer get? The failing prompt is given the stream of a context in which the model tells.

A neutral prefix changes no weight and makes many facts told. Activation patching (Meng et al., 2022) with it:

    1  run with the prefix, and keep the residual stream at two places: the subject's last token, and the last position
    2  write it into the run without the prefix, layer by layer, at one place or both
    3  what a place carries at a layer is the number of facts that this makes told: an edit at that layer which acts at
       that place alone, and does there what the prefix does, could not do better

The sentences stand in `show/words/upper_bounds.yaml`.
"""

from collections.abc import Sequence
from functools import partial
from itertools import compress
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from lib.diagnosis import NoFailure, prescribe
from lib.errors import DataError
from lib.facts import Case, Fact, load_templates, prompts
from lib.forward import Pack, Streams, ends, pack, streams
from lib.models import Model
from lib.recall import first_tokens, known_and_told, load_prefixes, scorable, tell
from lib.results import Results
from lib.show.sentences import say
from lib.studies.knowledge_path import asked_before
from lib.trace import subject_positions

PREFIX = "\n"  # the shortest that helps; it leaves the words after it cut into tokens as they were
PLACES = ("subject's last token", "last position", "both")
SEEN = ("fit", "eight", "selection")  # no held-out fact takes part
sentence = partial(say, "upper_bounds")


def untold_facts(model: Model, case: Case, splits: Sequence[str] = SEEN) -> tuple[Fact, ...]:
    """Facts of some splits that a control template tells and the failing one does not. Raises NoFailure for none."""
    facts, text = [f for f in scorable(model, case.large) if f.split in splits], load_templates()
    chosen = {name: text[name] for name in (case.template, *case.controls)}
    asked = tell(model, facts, chosen, known=asked_before(model)) if facts else None
    out = () if asked is None else tuple(compress(facts, known_and_told(asked, case).routing_failure))
    if not out:
        raise NoFailure(f"case {case.name!r}: no fact of {', '.join(splits)} is known to {model.name} and not told.")
    return out


def told_in(model: Model, case: Case, facts: Sequence[Fact]) -> pd.DataFrame:
    """How many facts each control template tells, and the failing template after each neutral prefix: context, kind,
    told, n. What an edit may hope for at most, if all it does is to bring about such a context."""
    text = load_templates()
    asked = [("control template", text[c], "", text[c]) for c in case.controls]
    asked += [("prefix", repr(p), p, text[case.template]) for p in load_prefixes(model).values()]
    known = asked_before(model)
    told = [tell(model, facts, {"": text}, prefix=prefix, known=known).told.sum() for *_, prefix, text in asked]
    return pd.DataFrame([row[:2] for row in asked], columns=["kind", "context"]).assign(told=told, n=len(facts))


@torch.no_grad()
def carried(
    model: Model, case: Case, facts: Sequence[Fact], prefix: str, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """Facts told when the stream that enters a layer (0-based; all by default) is, at one place, what it is with the
    prefix: layer (counted from 1), place, told, n. Raises DataError where the prefix changes how a prompt's own words
    are cut into tokens, because then its places have no counterparts."""
    template, end = load_templates()[case.template], model.weights.n_layers
    layers = layers or range(end)
    without, with_prefix = ([model.token_ids(p) for p in prompts(facts, template, x)] for x in ("", prefix))
    for fact, ids, longer in zip(facts, without, with_prefix, strict=True):
        own = ids[len(model.bos) :]
        if longer[-len(own) :] != own or len(longer) == len(ids):
            raise DataError(f"after {prefix!r} the prompt of {fact.subject} is cut into other tokens; use another one.")
    short, long = pack(model, without), pack(model, with_prefix)
    at = [subject_positions(model, p, f.subject)[-1] for p, f in zip(prompts(facts, template), facts, strict=True)]
    back = short.last.diff(prepend=torch.tensor([-1])) - 1 - torch.tensor(at)  # tokens after the subject's last one
    answers = first_tokens(model, facts)
    before, source = (streams(model, texts, range(min(layers), end)) for texts in (short, long))
    moved = torch.cat([torch.arange(last - n, last) for last, n in zip(short.last, back, strict=True)])
    alone, rows = _last_alone(model, short, before, {i: source[i][long.last] for i in layers}), []
    for layer in tqdm(layers, desc="patched streams", leave=False):
        later = {i: before[i].clone() for i in range(layer, end)}  # the streams that enter layers, subject patched
        later[layer][short.last - back] = source[layer][long.last - back]
        for i in range(layer, end - 1 if len(moved) else layer):  # no other token sees the subject's last one
            later[i + 1][moved] = next(ends(model, short, later, later[i][moved], i, moved)).stream
        *_, subject = ends(model, short, later, torch.cat((later[layer][short.last], source[layer][long.last])), layer)
        subject_alone, both = subject.stream.split(len(facts))
        for place, final in zip(PLACES, (subject_alone, alone[layer], both), strict=True):
            top = (model.weights.norm_final(final) @ model.weights.W_U).argmax(-1)
            rows.append((layer + 1, place, int((top == answers).sum()), len(facts)))
    return pd.DataFrame(rows, columns=["layer", "place", "told", "n"])


def _last_alone(model: Model, texts: Pack, before: Streams, put: Streams) -> Streams:
    """The final streams of last tokens that are put in place on entering a layer, by that layer. All go up together:
    they look back on the same."""
    rows = before[min(put)][:0]
    for layer in range(min(put), model.weights.n_layers):
        rows = torch.cat((rows, put.get(layer, rows[:0])))
        rows = next(ends(model, texts, before, rows, layer)).stream
    return dict(zip(sorted(put), rows.split(len(texts.last)), strict=True))


# What the chapter says of it


def report_contexts(report: Results, contexts: pd.DataFrame) -> None:
    """The best context of each kind."""
    best = {kind: part.loc[part.told.idxmax()] for kind, part in contexts.groupby("kind", sort=False)}
    control, prefix = best["control template"], best["prefix"]
    counts = {"contexts_n": int(control.n), "contexts_control": int(control.told), "contexts_prefix": int(prefix.told)}
    report.many(counts | {"contexts_verdict": sentence("contexts_verdict", control=control, prefix=prefix)})


def report_carried(report: Results, table: pd.DataFrame, contexts: pd.DataFrame, model: Model, case: Case) -> int:
    """Where what a prefix changes is carried: per place, the layer at which it makes most told. Gives the knowledge
    head's layer, counted from 1."""
    layer, told = prescribe(model, case).knowledge_head.layer + 1, table.pivot(index="layer", columns="place")["told"]
    subject, last = told[PLACES[0]], told[PLACES[1]]
    jump = int(last.diff().idxmax()) - 1  # the layer over which the last position gains most
    counts: dict[str, Any] = {"carried_prefix": repr(PREFIX)}
    counts["carried_whole"] = int(contexts.told[contexts.context == repr(PREFIX)].iloc[0])
    counts["carried_early"] = int(subject[subject.index <= table.layer.max() // 3].max())
    counts |= {"carried_most": int(subject.max()), "carried_most_layer": int(subject.idxmax()), "carried_jump": jump}
    words = counts | {"n": int(table.n.iloc[0]), "layer": layer, "before": last[jump], "after": last[jump + 1]}
    report.many(counts | {"carried_verdict": sentence("carried_verdict", **words)})
    return layer
