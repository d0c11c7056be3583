"""What finished sweeps say: is it the diagnosed layer, and is it the edit?

    by_layer, other_layers, spread    the layer sweep, and how far seeds move it
    correlations                      does a layer's diagnostic score say how well its edit does?
    random_parts                      the named part beside random ones of its size
    rivals, ladder                    every method under one protocol; the fewest parameters that do it

Nothing here runs a model, and no experiment depends on it: a changed sentence voids no run. Rules: a layer does *as
well* as another if it tells at least as many of the trained facts and repairs at least as many held-out ones; a method
*tells* if it tells all trained facts, and *generalises* if it repairs at least half of the held-out countries that were
known and not told.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from jaxtyping import Float

from lib.errors import EditError
from lib.models import Model
from lib.statistics import exact_interval, rho
from lib.studies.location import setting

SUCCESS = {  # column of a run, and whether more is better
    "facts_told": True,
    "steps": False,
    "held_out_repaired": True,
    "kl": False,
    "bled": False,
}
KINDS = {
    "newline": "no training",
    "bos": "no training",
    "example": "no training",
    "head": "no training",
    "opponent": "no training",
    "competitors": "no training",
    "vector": "few parameters",
    "gains": "few parameters",
    "lora": "few parameters",
    "closed_form": "closed form",
    "everything": "everything",
}
GENERAL = 0.5  # share of the held-out, known and untold, that must be told


# Layers


def by_layer(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of a layer sweep: one row a pathway and layer. A diverged run tells nothing and repairs
    nothing."""
    columns = ["facts_told", "held_out_repaired", "held_out_n", "steps", "kl", "bled", "bled_n", "probes_lost"]
    filled = runs.assign(probes_lost=runs.capability_lost + runs.unrelated_lost)
    filled[["facts_told", "held_out_repaired"]] = filled[["facts_told", "held_out_repaired"]].fillna(0)
    means = filled.groupby(["pathway", "layer"], sort=False)[columns].mean()
    return means.assign(reached=runs.groupby(["pathway", "layer"], sort=False).reached.mean()).reset_index()


def other_layers(means: pd.DataFrame, layer: int) -> pd.DataFrame:
    """How many of the other layers do at least as well as one (counted from 1), by pathway: tell as many (told), repair
    as many (repaired), both (as_well), tell as many in no more steps (sooner), tell as many with no more harm to
    neutral text (gentler). Raises EditError if the layer was not tried."""
    if layer not in set(means.layer):
        raise EditError(f"the sweep tried no edit at the diagnosed layer {layer}; add it to data/sweeps/layers.yaml.")
    rows = []
    for pathway, part in means.groupby("pathway", sort=False):
        own, others = part[part.layer == layer].iloc[0], part[part.layer != layer]
        best = part.sort_values(["held_out_repaired", "facts_told", "kl"], ascending=[False, False, True])
        told, repaired = others.facts_told >= own.facts_told, others.held_out_repaired >= own.held_out_repaired
        rows.append(
            {
                "pathway": pathway,
                "others": len(others),
                "told": int(told.sum()),
                "repaired": int(repaired.sum()),
                "as_well": int((told & repaired).sum()),
                "sooner": int((told & (others.steps <= own.steps)).sum()),
                "gentler": int((told & (others.kl <= own.kl)).sum()),
                "own_told": float(own.facts_told),
                "own_repaired": float(own.held_out_repaired),
                "best_layer": int(best.layer.iloc[0]),
                "most_repaired": float(part.held_out_repaired.max()),
            }
        )
    return pd.DataFrame(rows)


def spread(runs: pd.DataFrame, near: pd.DataFrame) -> pd.DataFrame:
    """The diagnosed layer and its neighbours over all seeds of both sweeps: a row a pathway and layer, with least and
    most told and repaired, and how many seeds."""
    near = near.drop(columns="distance").rename(columns={"at": "layer"})
    both = pd.concat([runs[runs.layer.isin(set(near.layer))], near]).drop_duplicates(["pathway", "layer", "seed"])
    by = both.fillna({"facts_told": 0, "held_out_repaired": 0}).groupby(["pathway", "layer"], sort=True)
    return by.agg(
        seeds=("seed", "size"),
        told_min=("facts_told", "min"),
        told_max=("facts_told", "max"),
        repaired_min=("held_out_repaired", "min"),
        repaired_max=("held_out_repaired", "max"),
        steps_min=("steps", "min"),
        steps_max=("steps", "max"),
        kl_min=("kl", "min"),
        kl_max=("kl", "max"),
    ).reset_index()


@torch.no_grad()
def layer_scores(model: Model, relation: Float[torch.Tensor, "n_layers n_heads"]) -> pd.DataFrame:
    """How strongly each piece of evidence points to each layer: `static` (the strongest head of the relation map,
    input-free), `writes` (what its heads and MLP write of the answers under the controls, where positive) and
    `knowledge head` (its strongest head alone, the score that the rule prescribes by). One row a layer."""
    own, weights = setting(model), model.weights
    heads = own.writes[: weights.n_layers * weights.n_heads].view(weights.n_layers, -1)
    mlps = own.writes[weights.n_layers * weights.n_heads :]
    return pd.DataFrame(
        {
            "layer": range(1, weights.n_layers + 1),
            "static": relation.max(1).values.tolist(),
            "writes": (heads.relu().sum(1) + mlps.relu()).tolist(),
            "knowledge head": heads.max(1).values.tolist(),
        }
    )


def correlations(means: pd.DataFrame, scores: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Spearman's rho over layers between each diagnostic score and each measure of an edit's success, turned so that
    more is better, with a 95 % bootstrap interval over layers; a row a pathway, score and measure."""
    rows = []
    for pathway, part in means.groupby("pathway", sort=False):
        joined = part.merge(scores, on="layer")
        for score in scores.columns.drop("layer"):
            for measure, more in SUCCESS.items():
                success = joined[measure] if more else -joined[measure]
                rows.append((pathway, score, measure, len(joined), *rho(joined[score], success, seed=seed)))
    return pd.DataFrame(rows, columns=["pathway", "score", "measure", "layers", "rho", "low", "high"])


# Parts


def random_parts(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a sweep of parts: beside each named one, the random ones of equal size. better: how many of these tell more,
    or as many with a larger margin."""
    rows = []
    for part, some in runs.groupby("part", sort=False):
        named, random = some[some["pick"] == "diagnosed"].iloc[0], some[some["pick"] == "random"]
        better = (random.facts_told > named.facts_told) | (
            (random.facts_told == named.facts_told) & (random.min_margin > named.min_margin)
        )
        rows.append(
            {
                "part": part,
                "parameters": int(named.parameters),
                "random": len(random),
                "facts": int(named.facts_n),
                "told": int(named.facts_told),
                "random_told": random.facts_told.mean(),
                "repaired": int(named.held_out_repaired),
                "random_repaired": random.held_out_repaired.mean(),
                "margin": named.min_margin,
                "random_margin": random.min_margin.mean(),
                "kl": named.kl,
                "random_kl": random.kl.mean(),
                "better": int(better.sum()),
            }
        )
    return pd.DataFrame(rows)


# Rivals


def rivals(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a sweep over rivals: a row a rival, by number of parameters. kind: of rival, or `pathway`. low, high: the
    exact 95 % interval of the share repaired. local_lost: of what worked before, of neighbours, of the facts under
    working wordings and of other countries under one. general: whether it repairs at least GENERAL."""
    ends = [exact_interval(int(k), int(n)) for k, n in zip(runs.held_out_repaired, runs.held_out_n, strict=True)]
    out = runs.assign(
        kind=runs["name"].map(KINDS).fillna("pathway"),
        low=[e[0] for e in ends],
        high=[e[1] for e in ends],
        local_lost=runs.neighbours_lost + runs.working_lost + runs.elsewhere_lost,
        probes_lost=runs.capability_lost + runs.unrelated_lost,
        whole=runs.facts_told == runs.facts_n,
        general=runs.held_out_repaired >= GENERAL * runs.held_out_n,
    )
    return out.sort_values(["parameters", "rival"], kind="stable").reset_index(drop=True)


def ladder(rows: pd.DataFrame) -> pd.DataFrame:
    """The fewest parameters that tell all, and that generalise: with none changed (free: all that do) and with some
    (changed). `none` where no method does."""

    def fewest(goal: str) -> dict[str, str]:
        does = rows[rows[goal]]
        some = does[does.parameters > 0]
        first = some[some.parameters == some.parameters.min()]
        names, least = "; ".join(first.rival), "none" if some.empty else f"{first.parameters.iloc[0]:,}"
        return {
            "goal": goal,
            "free": "; ".join(does.rival[does.parameters == 0]) or "none",
            "changed": "none" if some.empty else f"{names} ({least})",
            "parameters": "0" if len(does) > len(some) else least,
        }

    return pd.DataFrame([fewest("whole"), fewest("general")]).set_index("goal")


# What the chapter's prose says of them


def report_layers(report: Callable[..., None], means: pd.DataFrame, others: pd.DataFrame, layer: int) -> None:
    """Sentences on the layer sweep."""
    whole = means.groupby("pathway", sort=False).apply(lambda p: int((p.reached > 0).sum()), include_groups=False)
    layers = means.layer.nunique()
    some = ", ".join(f"{plain(name)} at {n}" for name, n in whole.items())
    well, n = int(others.as_well.sum()), int(others.others.sum())
    each = ", ".join(f"{plain(r.pathway)} {r.as_well} of {r.others}" for r in others.itertuples())
    said = (
        "no other layer does as well: the diagnosed layer stands out"
        if well == 0
        else "most other layers do as well: the diagnosed layer is not special"
        if 2 * well >= n
        else "some other layers do as well"
    )
    best = others.loc[others.most_repaired.idxmax()]
    held_out = int(means.held_out_n.max())
    report("reached_by", some)
    report("as_well", well)
    report("as_well_of", n)
    report("most_repaired", best.most_repaired, ".0f")
    report("most_repaired_at", f"L{best.best_layer} ({plain(best.pathway)})")
    report(
        "layers_verdict",
        f"Of {layers} layers the goal is reached by {some}. In {well} of {n} comparisons another "
        f"layer does as well as the diagnosed L{layer} ({each}): {said}.",
    )
    more = int((means.held_out_repaired == best.most_repaired).sum()) - 1
    report(
        "repair_verdict",
        f"Of the {held_out} held-out facts no layer and pathway repairs more than "
        f"{best.most_repaired:.0f} (L{best.best_layer}, {plain(best.pathway)}"
        + (f", and {more} more" if more else "")
        + f"); at L{layer} it is "
        f"{', '.join(f'{r.own_repaired:.0f} ({plain(r.pathway)})' for r in others.itertuples())}.",
    )
    lost = means.sort_values("probes_lost").iloc[-1]
    report("layers_probes_lost", float(lost.probes_lost), ".0f")
    report("layers_bled", (float(means.bled.min()), float(means.bled.max())), ".0f")
    said = f"no run loses more than {lost.probes_lost:.0f} of the probes" if lost.probes_lost else "no probe is lost"
    report(
        "layers_effects",
        f"{said}, and wrong trained answers appear on {means.bled.min():.0f} to "
        f"{means.bled.max():.0f} of {means.bled_n.max():.0f} prompts about other countries.",
    )


def report_spread(report: Callable[..., None], table: pd.DataFrame) -> None:
    """How far the seed alone moves what is repaired."""
    repaired = float((table.repaired_max - table.repaired_min).max())
    told = float((table.told_max - table.told_min).max())
    report("spread_seeds", int(table.seeds.min()))
    report("spread_repaired", repaired, ".0f")
    where = "At the diagnosed layer and beside it, the seed alone"
    report(
        "spread_verdict",
        f"{where} moves the number repaired by up to {repaired:.0f} and the number told by up to "
        f"{told:.0f}: smaller differences between layers say nothing."
        if repaired or told
        else f"{where} changes neither the number told nor the number repaired.",
    )


def report_correlations(report: Callable[..., None], table: pd.DataFrame) -> None:
    """Sentences on the correlations. By chance, one interval of 95 % in twenty excludes zero."""
    valid = table[table.rho.notna()]
    sure = valid[(valid.low > 0) | (valid.high < 0)]
    helpful = int((sure.low > 0).sum())
    rule = valid[(valid.score == "knowledge head") & (valid.measure == "held_out_repaired")]
    own = "; ".join(f"{plain(r.pathway)} {r.rho:+.2f} ({r.low:+.2f} to {r.high:+.2f})" for r in rule.itertuples())
    report("correlations_n", len(valid))
    report("correlations_sure", len(sure))
    report("correlations_helpful", helpful)
    report("correlations_chance", 0.05 * len(valid), ".0f")
    own_score = (
        f"The rule's own score against held-out repairs: {own}."
        if own
        else "No layer's repairs vary enough to correlate the rule's own score with them."
    )
    report(
        "correlation_verdict",
        f"Of {len(valid)} correlations {len(sure)} have an interval that excludes zero "
        f"(chance alone would give {0.05 * len(valid):.0f}; they share layers and runs), {helpful} of them in the "
        f"direction that the diagnosis promises. {own_score}",
    )


def report_parts(report: Callable[..., None], parts: pd.DataFrame) -> None:
    """Sentences on random parts."""
    words = "; ".join(f"{r.part}: {r.better} of {r.random} random ones do better" for r in parts.itertuples())
    ahead = int((2 * parts.better < parts.random).sum())
    report("parts_better", words)
    report(
        "parts_verdict",
        f"Parts of equal size: {words}. The named part beats the middle of its random peers in "
        f"{ahead} of {len(parts)} kinds.",
    )


def report_rivals(report: Callable[..., None], rows: pd.DataFrame) -> None:
    """Sentences on rivals and on the ladder."""
    steps, n, facts = ladder(rows), int(rows.held_out_n.iloc[0]), int(rows.facts_n.iloc[0])
    best = rows.loc[rows.held_out_repaired.idxmax()]
    trained = rows[rows.kind != "no training"]
    top = trained.loc[trained.held_out_repaired.idxmax()]
    untrained = "; ".join(rows.rival[rows.whole & (rows.kind == "no training")]) or "none"
    report("rivals", len(rows))
    report("rivals_told", int(rows.whole.sum()))
    report("rivals_untrained", untrained)
    report("fewest_told", steps.changed["whole"])
    report("fewest_general", steps.changed["general"])
    report("free_told", steps.free["whole"])
    report("free_general", steps.free["general"])
    report("most_general", best.rival)
    report("most_general_repaired", int(best.held_out_repaired))
    report("most_general_trained", top.rival)
    report("most_general_trained_repaired", int(top.held_out_repaired))
    report(
        "rivals_verdict",
        f"{int(rows.whole.sum())} of {len(rows)} methods make all {facts} told. Without any "
        f"training these do: {untrained}.",
    )
    free, changed = steps.free, steps.changed
    report(
        "ladder_verdict",
        f"Fewest parameters that tell all {facts}: with the model as it is, {free['whole']}; with "
        f"a change, {changed['whole']}. Fewest that generalise (at least half of the {n} held-out facts): with the "
        f"model as it is, {free['general']}; with a change, {changed['general']}.",
    )
    report(
        "general_verdict",
        f"Most held-out facts are repaired by {best.rival} ({int(best.held_out_repaired)} of {n}"
        f", {best.low:.0%} to {best.high:.0%}), and among what is trained by {top.rival} "
        f"({int(top.held_out_repaired)} of {n}, {top.low:.0%} to {top.high:.0%}).",
    )


def plain(name: str) -> str:
    """A pathway as prose calls it."""
    return {"ffn": "FFN", "v_only": "V-only", "q_only": "Q-only", "k_only": "K-only"}.get(name, name)
