"""How far could an edit at one layer get? The failing prompt is given the stream of a context in which the model tells.

A neutral prefix changes no weight and makes many facts told. Run with the prefix, keep the stream at two places, the
subject's last token and the last position, and write it into the run without the prefix, layer by layer. What a place
carries at a layer is the share of facts that this makes told: an edit at that layer which acts at that place alone,
and does there what the prefix does, could not do better.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lib import evaluation
from lib.diagnosis import prescribe
from lib.errors import DataError
from lib.evaluation import BAND, NONE
from lib.facts import Case, Fact, load_cases, load_templates, prompts
from lib.forward import Pack, ends, pack, resid_post, streams
from lib.models import Model, load
from lib.recall import first_tokens, known_and_told, load_prefixes, scorable, tell, trainable
from lib.results import Results
from lib.studies.distillation import again, choose, harmless, learn_at
from lib.trace import subject_positions

PREFIX = "\n"  # the shortest that helps; it leaves the words after it cut into tokens as they were
PLACES = ("subject's last token", "last position", "both")
SEEN = ("fit", "eight", "selection")  # no held-out fact takes part


def untold(model: Model, case: Case, splits: Sequence[str] = SEEN) -> tuple[Fact, ...]:
    """Facts of the large set, of some splits, that a control template tells and the failing one does not. Raises
    DataError if there is none."""
    text = load_templates()
    facts = [f for f in scorable(model, case.large) if f.split in splits]
    out: tuple[Fact, ...] = ()
    if facts:
        states = known_and_told(tell(model, facts, {n: text[n] for n in (case.template, *case.controls)}), case)
        out = tuple(f for f, failed in zip(facts, states.routing_failure, strict=True) if failed)
    if not out:
        raise DataError(f"case {case.name!r}: no fact of {', '.join(splits)} is known to {model.name} and not told.")
    return out


def told_in(model: Model, case: Case, facts: Sequence[Fact]) -> pd.DataFrame:
    """How many facts each control template tells, and the failing template after each neutral prefix: context, kind,
    told, n. What an edit may hope for at most, if all it does is to bring about such a context."""
    text = load_templates()
    asked = [("control template", text[c], "", text[c]) for c in case.controls]
    asked += [("prefix", repr(p), p, text[case.template]) for p in load_prefixes(model).values()]
    rows = [
        (kind, name, int(tell(model, facts, {"": template}, prefix=prefix).told.sum()), len(facts))
        for kind, name, prefix, template in asked
    ]
    return pd.DataFrame(rows, columns=["kind", "context", "told", "n"])


@torch.no_grad()
def carried(
    model: Model, case: Case, facts: Sequence[Fact], prefix: str, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """Facts told when the stream that enters a layer (0-based; all by default) is, at one place, what it is with the
    prefix: layer (counted from 1), place, told, n. Raises DataError where the prefix changes how a prompt's own words
    are cut into tokens, because then its places have no counterparts."""
    template = load_templates()[case.template]
    bare, full = ([model.token_ids(p) for p in prompts(facts, template, x)] for x in ("", prefix))
    if wrong := [f for f, a, b in zip(facts, bare, full, strict=True) if b[-len(a) :] != a or len(a) == len(b)]:
        raise DataError(f"after {prefix!r} the prompt of {wrong[0].subject} is cut into other tokens; use another one.")
    short, long = pack(model, bare), pack(model, full)
    at = [subject_positions(model, p, f.subject)[-1] for p, f in zip(prompts(facts, template), facts, strict=True)]
    back = short.last.diff(prepend=torch.tensor([-1])) - 1 - torch.tensor(at)  # tokens after the subject's last one
    answers = first_tokens(model, facts)
    layers = range(model.weights.n_layers) if layers is None else layers
    own, other = (streams(model, p, range(min(layers), model.weights.n_layers)) for p in (short, long))
    rows = []
    for layer in tqdm(layers, desc="patched streams", leave=False):
        patched, given = own[layer].clone(), other[layer][long.last]
        patched[short.last - back] = other[layer][long.last - back]
        later = _later(model, short, layer, patched)
        *_, one = ends(model, short, own, given, layer)
        *_, two = ends(model, short, later, torch.cat((patched[short.last], given)), layer)
        alone, both = two.stream.split(len(facts))
        for place, final in zip(PLACES, (alone, one.stream, both), strict=True):
            said = (model.weights.norm_final(final) @ model.weights.W_U).argmax(-1)
            rows.append((layer + 1, place, int((said == answers).sum()), len(facts)))
    return pd.DataFrame(rows, columns=["layer", "place", "told", "n"])


def _later(
    model: Model, texts: Pack, layer: int, stream: Float[Tensor, "t d_model"]
) -> dict[int, Float[Tensor, "t d_model"]]:
    """The streams that enter a layer and those above it, from the one that enters it."""
    out = {layer: stream}
    for i in range(layer, model.weights.n_layers - 1):
        out[i + 1] = resid_post(model, texts, out[i], i)
    return out


def where_it_can_be_done(*, layers: Sequence[int] = (4, 8), seed: int = 0) -> dict[str, int]:
    """The positive control: the same training, rule and look on the organism, whose failure was planted in one head.
    Layers counted from 1. layer, untold, repaired: of the chosen run, on the held-out facts."""
    model = load("organism")
    runs = pd.DataFrame([{"layer": x} | learn_at(model, layer=x, steps=20, seed=seed) for x in layers])
    runs = runs.assign(pathway="full", rank=0, steps=20, seed=seed)
    run, case = again(model, runs.loc[choose(runs)]), trainable(model, load_cases(model.name)[0])
    measured = evaluation.measure(
        model, evaluation.build_protocol(model, case, run.edit.layer, texts={}), {"edit": run.edit}, passages=False
    )
    row = evaluation.generalisation(measured, case).query("split == 'held_out'").iloc[0]
    return {"layer": run.edit.layer + 1, "untold": int(row.untold), "repaired": int(row.repaired)}


# What the chapter says of it


def report_contexts(report: Results, contexts: pd.DataFrame) -> None:
    """The best context of each kind."""
    best = {kind: part.loc[part.told.idxmax()] for kind, part in contexts.groupby("kind", sort=False)}
    control, prefix = best["control template"], best["prefix"]
    report("contexts_n", int(control.n))
    report("contexts_control", int(control.told))
    report("contexts_prefix", int(prefix.told))
    helped = f"{prefix.told} of them after the prefix {prefix.context}" if prefix.told else "none after any prefix"
    report(
        "contexts_verdict",
        f"The best control template tells {control.told} of {control.n}; the failing template itself tells {helped}, "
        "with no weight touched.",
    )


def report_carried(report: Results, table: pd.DataFrame, contexts: pd.DataFrame, model: Model, case: Case) -> int:
    """Where what a prefix changes is carried: per place, the layer at which it makes most told. Gives the knowledge
    head's layer, counted from 1."""
    layer, n = prescribe(model, case).knowledge_head.layer + 1, int(table.n.iloc[0])
    whole = int(contexts.told[contexts.context == repr(PREFIX)].iloc[0])
    parts = {place: part.set_index("layer").told for place, part in table.groupby("place", sort=False)}
    at, end = parts[PLACES[0]], parts[PLACES[1]]
    early = int(at[at.index <= table.layer.max() // 3].max())
    report("carried_prefix", repr(PREFIX))
    report("carried_whole", whole)
    report("carried_early", early)
    report("carried_most", int(at.max()))
    report("carried_most_layer", int(at.idxmax()))
    jump = int(end.diff().idxmax()) - 1
    report("carried_jump", jump)
    if not whole:
        report("carried_verdict", f"Here the prefix tells none of the {n}: there is nothing that it could carry.")
        return layer
    report(
        "carried_verdict",
        f"With the prefix {whole} of {n} are told. The stream at the subject's last token carries at most {early} of "
        f"them in the lower third of the layers and at most {at.max()} anywhere (entering L{at.idxmax()}). What the "
        f"last position carries jumps from {end[jump]} to {end[jump + 1]} over L{jump}"
        + (", the layer that chapter 2 diagnoses." if jump == layer else f"; chapter 2 diagnoses L{layer}."),
    )
    return layer


def report_frontier(report: Results, runs: pd.DataFrame, pick: int) -> None:
    """The chosen run among all, on the selection countries."""
    row, fine = runs.loc[pick], harmless(runs)
    report("teacher", str(row.teacher))
    report("runs", len(runs))
    report("harmless", int(fine.sum()))
    report("chosen_layer", int(row.layer))
    report("chosen_rank", int(row["rank"]))
    report("chosen_repaired", int(row.repaired))
    report("frontier_best", int(runs.repaired.max()))
    report.table("frontier", runs.to_dict("records"))
    how = f"a change of rank {row['rank']}" if row["rank"] else "all its matrices, freely"
    report(
        "frontier_verdict",
        f"{fine.sum()} of {len(runs)} configurations are harmless. The rule chooses L{row.layer}, {how}: "
        f"{row.repaired} of {row.untold} selection countries. The most that any configuration repairs, harmless or "
        f"not, is {runs.repaired.max()}.",
    )


def report_held_out(
    report: Results,
    found: pd.DataFrame,
    costs: pd.DataFrame,
    text: pd.DataFrame,
    bled: pd.DataFrame,
    free: pd.DataFrame,
) -> None:
    """The one look: repaired of the held-out, the limits, and what a prefix tells of the same countries for nothing."""
    by = found[found.split == "held_out"].set_index("pathway")
    edit, noise = by.loc["edit"], by.loc["noise"]
    lost = costs[costs.pathway == "edit"].set_index("what").lost
    ratio = text.set_index("pathway").loc["edit"]
    prefix = free[free.kind == "prefix"].sort_values("told", kind="stable").iloc[-1]
    reached = 2 * edit.repaired >= edit.untold
    within = abs(ratio.ratio - 1) <= BAND and not lost["capability"] and not lost["working templates"]
    report("held_out_untold", int(edit.untold))
    report("held_out_repaired", int(edit.repaired))
    report("held_out_noise", int(noise.repaired))
    report("held_out_best_control", int(edit.best_control))
    report("held_out_goal", bool(reached))
    report("held_out_prefix", int(prefix.told))
    report("ppl_ratio", float(ratio.ratio))
    report("capability_lost", int(lost["capability"]))
    report("working_lost", int(lost["working templates"]))
    report("harmless_held_out", bool(within))
    report("bled_before", int(bled.bled[bled.pathway == NONE].iloc[0]))
    report("bled_after", int(bled.bled[bled.pathway == "edit"].iloc[0]))
    report(
        "held_out_verdict",
        f"The chosen edit makes {edit.repaired} of {edit.untold} held-out countries told that were known and not told "
        f"({edit.low:.0%} to {edit.high:.0%}); noise of the same size {noise.repaired}. The goal, half of them, is "
        f"{'reached' if reached else 'not reached'}. The single best control template tells {edit.best_control}.",
    )
    report(
        "cost_verdict",
        f"Perplexity on passages that nothing was chosen on changes by {ratio.ratio - 1:+.2%} "
        f"({ratio.ratio_low - 1:+.2%} to {ratio.ratio_high - 1:+.2%}); of general capability {lost['capability']} and "
        f"of the working templates {lost['working templates']} items are lost: the limits are "
        f"{'kept' if within else 'not kept'}.",
    )
    report(
        "free_verdict",
        f"The prefix {prefix.context} before the prompt tells {prefix.told} of the same {prefix.n} held-out countries, "
        "with no parameter changed.",
    )
