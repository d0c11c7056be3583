"""Is it the diagnosis that makes an edit work? Edits at every layer, and at random places of equal size.

    edit_at   one pathway at any layer, under the one recipe and at one rate for all: the layer sweep
    part_at   an equal number of parameters of that layer, chosen by the diagnosis or at random
    rho       does a layer's diagnostic score say how well its edit does?

Localisation need not inform editing (Hase et al. 2023), and edits at random heads can do as well as at localised ones
(Wang and Veitch 2025): so every edit is put beside what it is when the place is drawn. Each run is a plain function of
a subject and a few plain values, so that `sweep` can keep and repeat it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from lib.diagnosis import Verdict, case_table, decide, gather
from lib.effects import Protocol, ask, prepare
from lib.errors import EditError
from lib.experiments import experiment
from lib.facts import Case, load_cases, load_templates, trainable
from lib.pathways import Kept, Trained, keep, train
from lib.site import Site
from lib.subjects import Subject
from lib.trace import capture
from lib.weights import part_masks

RATE = 1e-3  # the middle of the recipe's grid, for every run here: an equal budget, and no choice to make a layer shine
NEURONS = 128  # of an MLP, in the control of equal size


@dataclass(frozen=True)
class Setting:
    """What all runs on a subject share. writes: of the answers under the controls, by component. opponent: what pushes
    hardest against the answers under the failing template. untold: a row a fact of the large set that is known and not
    told. table: all questions, with what the untouched model says (told_before, top_before)."""

    case: Case
    verdict: Verdict
    writes: Float[Tensor, " component"]
    opponent: Site
    untold: pd.DataFrame
    table: pd.DataFrame


@lru_cache(maxsize=1)
def setting(subject: Subject) -> Setting:
    """The first case of a subject, diagnosed; and what its untouched model says to every question."""
    case = trainable(subject, load_cases(subject.name)[0])
    evidence = gather(subject, case, case_table(subject, case))
    asked = ask(subject, prepare(subject, case, 0, texts={}), None)
    large = asked[asked.set == "large"]
    told = large.pivot(index="subject", columns="template", values="told")
    untold = told.index[told[list(case.controls)].any(axis=1) & ~told[case.template]]
    split = large.drop_duplicates("subject").set_index("subject").split
    return Setting(
        case, decide(evidence), evidence.writes_control.mean(0),
        evidence.sites[int(evidence.pushes_failing.mean(0).argmin())],
        pd.DataFrame({"subject": untold, "split": split.loc[untold].to_numpy()}),
        asked.rename(columns={"told": "told_before", "top": "top_before"}).drop(columns=["prob", "margin"]),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _prepared(subject: Subject, layer: int) -> tuple[Kept, Protocol]:
    """Streams that enter a layer; the runs of one layer follow each other in a sweep."""
    own = setting(subject)
    failing = own.table.set.isin(["eight", "large"]) & (own.table.template == own.case.template)
    table = own.table[own.table.set.isin(["capability", "unrelated"]) | failing]
    return keep(subject, own.case, layer), prepare(subject, own.case, layer, texts={}, table=table)


@experiment
def edit_at(subject: Subject, *, layer: int, pathway: str, seed: int = 0) -> dict[str, Any]:
    """Train one pathway at a layer (counted from 1) and ask what it did. Raises EditError for a layer that is not
    there."""
    kept, protocol = _prepared(subject, _index(subject, layer))
    run = train(subject, kept, pathway, rate=RATE, seed=seed)
    return outcome(subject, protocol, run) | {"parameters": run.edit.parameters if run.edit else 0}


@experiment
def part_at(subject: Subject, *, part: str, pick: str, seed: int = 0, layer: int | None = None) -> dict[str, Any]:
    """Train a part of a layer (counted from 1; the diagnosed one, if not given), of a size that does not depend on how
    it is picked. part: `head` (one query head's rows of W_Q and columns of W_O), `values` (as many rows of W_V as a
    key/value head has) or `neurons` (NEURONS rows of W_out). pick: `diagnosed` (the knowledge head; its value head's
    rows; the neurons that write most of the answers) or `random`, drawn with the seed. Raises EditError for other
    words."""
    index = _index(subject, layer or setting(subject).verdict.knowledge_head.layer + 1)
    kept, protocol = _prepared(subject, index)
    pathway, masks = part_masks(subject.model, index, part, _picked(subject, index, part, pick, seed))
    run = train(subject, kept, pathway, rate=RATE, seed=seed, masks=masks)
    return outcome(subject, protocol, run) | {"parameters": int(sum(m.sum() for m in masks.values()))}


def outcome(subject: Subject, protocol: Protocol, run: Trained) -> dict[str, Any]:
    """What a run did, as plain values. kl: on the neutral windows that training does not see. repaired, untold: known
    and untold facts of each split. bled: prompts about other countries answered with a trained answer, wrongly."""
    own = {"reached": run.reached, "diverged": run.diverged, "steps": run.steps, "kl": float(run.kl),
           "min_margin": float(run.history.min_margin.iloc[-1])}  # fmt: skip
    if run.edit is None:
        return own
    return own | answers(subject, ask(subject, protocol, run.edit))


def answers(subject: Subject, asked: pd.DataFrame) -> dict[str, Any]:
    """What an `ask` table over the setting's questions, or some of them, comes to. Of the kinds of questions that are
    in it: how many there are (n), told now, and lost since."""
    own = setting(subject)
    failing, control = asked.template == own.case.template, asked.template.isin(own.case.controls)
    eight, large = asked.set == "eight", asked.set == "large"
    kinds = {
        "facts": eight & failing, "neighbours": large & failing & asked.told_before,
        "capability": asked.set == "capability", "unrelated": asked.set == "unrelated",
        "relations": asked.set == "relations", "paraphrases": eight & ~failing & ~control,
        "working": eight & control, "elsewhere": large & control,
    }  # fmt: skip
    out: dict[str, Any] = {}
    for kind, pick in kinds.items():
        part = asked[pick]
        out |= {f"{kind}_n": len(part), f"{kind}_told": int(part.told.sum()),
                f"{kind}_lost": int((part.told_before & ~part.told).sum())}  # fmt: skip
    others = asked[large & failing].set_index("subject")
    trained = {subject.token_text(subject.first_token(f.answer)) for f in own.case.facts}
    out |= {"bled": int((others.top.isin(trained) & ~others.told).sum()), "bled_n": len(others)}
    for split in ("held_out", "selection", "fit"):
        names = own.untold.subject[own.untold.split == split]
        out |= {f"{split}_n": len(names), f"{split}_repaired": int(others.told[names].sum())}
    return out


def _index(subject: Subject, layer: int) -> int:
    if not 1 <= layer <= subject.weights.n_layers:
        raise EditError(f"there is no layer {layer}: {subject.name} has L1 to L{subject.weights.n_layers}.")
    return layer - 1


def _picked(subject: Subject, layer: int, part: str, pick: str, seed: int) -> list[int]:
    """Heads, rows of W_V or neurons."""
    weights, verdict, draw = subject.weights, setting(subject).verdict, np.random.default_rng(seed)
    head, group = verdict.knowledge_head.head or 0, weights.n_heads // weights.n_kv_heads
    sizes = {"head": weights.n_heads, "values": weights.n_kv_heads * weights.d_head,
             "neurons": weights.blocks[layer].mlp.W_out.shape[0]}  # fmt: skip
    counts = {"head": 1, "values": weights.d_head, "neurons": min(NEURONS, sizes["neurons"] // 2)}
    if part not in sizes or pick not in ("diagnosed", "random"):
        raise EditError(f"no part {part!r} picked {pick!r}; choose {', '.join(sizes)}, and diagnosed or random.")
    if pick == "random":
        away = [head] if part == "head" and layer == verdict.knowledge_head.layer else []
        return sorted(draw.choice(np.setdiff1d(np.arange(sizes[part]), away), counts[part], replace=False).tolist())
    if part == "neurons":
        return strongest_neurons(subject, layer, counts[part])
    return [head] if part == "head" else [head // group * weights.d_head + i for i in range(weights.d_head)]


def strongest_neurons(subject: Subject, layer: int, k: int) -> list[int]:
    """The neurons of a layer that write most of the case's answers under its first control template."""
    case, weights = setting(subject).case, subject.weights
    texts = [load_templates()[case.controls[0]].replace("{}", f.subject) for f in case.facts]
    seen: list[Tensor] = []
    handle = weights.blocks[layer].mlp_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        state = capture(subject, texts)
    finally:
        handle.remove()
    answer = torch.tensor([subject.first_token(f.answer) for f in case.facts])
    direction = weights.norm_final.fold(weights.W_U[:, answer]).T / weights.norm_final.scale(state.stream[:, -1])
    neurons = seen[0].reshape(*state.tokens.shape, -1)[torch.arange(len(texts)), state.last]
    written = (neurons * (direction @ weights.blocks[layer].mlp.W_out.T)).mean(0)
    return sorted(written.topk(k).indices.tolist())


# What chapter 6 shows of finished runs

SUCCESS = {  # column of a run, and whether more is better
    "facts_told": True, "steps": False, "held_out_repaired": True, "kl": False, "bled": False,
}  # fmt: skip


def by_layer(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of a layer sweep: one row a pathway and layer. A diverged run tells nothing and repairs
    nothing."""
    columns = ["facts_told", "held_out_repaired", "held_out_n", "steps", "kl", "bled", "bled_n", "probes_lost"]
    filled = runs.assign(probes_lost=runs.capability_lost + runs.unrelated_lost)
    filled[["facts_told", "held_out_repaired"]] = filled[["facts_told", "held_out_repaired"]].fillna(0)
    means = filled.groupby(["pathway", "layer"], sort=False)[columns].mean()
    return means.assign(reached=runs.groupby(["pathway", "layer"], sort=False).reached.mean()).reset_index()


@torch.no_grad()
def layer_scores(subject: Subject, relation: Float[Tensor, "n_layers n_heads"]) -> pd.DataFrame:
    """How strongly each piece of evidence points to each layer: `static` (the strongest head of the relation map,
    input-free), `writes` (what its heads and MLP write of the answers under the controls, where positive) and
    `knowledge head` (its strongest head alone, the score that the rule prescribes by). One row a layer."""
    own, weights = setting(subject), subject.weights
    heads = own.writes[: weights.n_layers * weights.n_heads].view(weights.n_layers, -1)
    mlps = own.writes[weights.n_layers * weights.n_heads :]
    return pd.DataFrame({
        "layer": range(1, weights.n_layers + 1), "static": relation.max(1).values.tolist(),
        "writes": (heads.relu().sum(1) + mlps.relu()).tolist(), "knowledge head": heads.max(1).values.tolist(),
    })  # fmt: skip


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


def rho(a: pd.Series, b: pd.Series, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation with its bootstrap interval; NaN where one of them is constant. Resamples in which
    one is constant are left out."""
    if a.nunique() < 2 or b.nunique() < 2:
        return np.nan, np.nan, np.nan
    draws, rng = [], np.random.default_rng(seed)
    x, y = a.to_numpy(float), b.to_numpy(float)
    for pick in rng.integers(len(x), size=(resamples, len(x))):
        if len(set(x[pick])) > 1 and len(set(y[pick])) > 1:
            draws.append(np.corrcoef(rankdata(x[pick]), rankdata(y[pick]))[0, 1])
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(spearmanr(x, y).statistic), float(low), float(high)


def at_least_as_good(means: pd.DataFrame, layer: int) -> pd.DataFrame:
    """How many of the other layers do at least as well as one (counted from 1), by pathway: in facts told, in held-out
    facts repaired, and in both the number of steps and the harm to neutral text. Raises EditError if the layer was not
    tried."""
    if layer not in set(means.layer):
        raise EditError(f"the sweep tried no edit at the diagnosed layer {layer}; add it to data/sweeps/layers.yaml.")
    rows = []
    for pathway, part in means.groupby("pathway", sort=False):
        own, others = part[part.layer == layer].iloc[0], part[part.layer != layer]
        best = part.sort_values(["held_out_repaired", "facts_told", "kl"], ascending=[False, False, True])
        rows.append({
            "pathway": pathway, "others": len(others),
            "told": int((others.facts_told >= own.facts_told).sum()),
            "repaired": int((others.held_out_repaired >= own.held_out_repaired).sum()),
            "sooner": int(((others.facts_told >= own.facts_told) & (others.steps <= own.steps)).sum()),
            "gentler": int(((others.facts_told >= own.facts_told) & (others.kl <= own.kl)).sum()),
            "best_layer": int(best.layer.iloc[0]),
            "most_repaired": float(part.held_out_repaired.max()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def random_against_diagnosed(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a sweep of parts: beside each diagnosed one, the random ones of equal size. percentile: share of the random
    ones that do no better than the diagnosed one (told, then margin); with n random ones it cannot be told from 100 %
    to better than 1/n."""
    rows = []
    for part, some in runs.groupby("part", sort=False):
        diagnosed, random = some[some["pick"] == "diagnosed"].iloc[0], some[some["pick"] == "random"]
        better = (random.facts_told > diagnosed.facts_told) | (
            (random.facts_told == diagnosed.facts_told) & (random.min_margin > diagnosed.min_margin)
        )
        rows.append({
            "part": part, "parameters": int(diagnosed.parameters), "random": len(random),
            "told": int(diagnosed.facts_told), "random_told": random.facts_told.mean(),
            "repaired": int(diagnosed.held_out_repaired), "random_repaired": random.held_out_repaired.mean(),
            "margin": diagnosed.min_margin, "random_margin": random.min_margin.mean(),
            "kl": diagnosed.kl, "random_kl": random.kl.mean(), "better": int(better.sum()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def report_layers(report: Callable[..., None], means: pd.DataFrame, others: pd.DataFrame) -> None:
    """What the chapter's prose says of the layer sweep."""
    told, facts = others.told.sum(), others.others.sum()
    whole = means.groupby("pathway", sort=False).apply(lambda p: int((p.reached > 0).sum()), include_groups=False)
    some = ", ".join(f"{_plain(name)} at {n}" for name, n in whole.items())
    elsewhere = "is not special" if 2 * told >= facts else "stands out"
    report("reached_by", some)
    report(
        "layers_verdict",
        f"Of {means.layer.nunique()} layers the goal is reached by {some}. In {told} of {facts} comparisons another "
        f"layer tells at least as many of the eight as the diagnosed one: for telling what was trained, the diagnosed "
        f"layer {elsewhere}.",
    )
    best = others.loc[others.most_repaired.idxmax()]
    n = int(means.held_out_n.max())
    report("most_repaired", best.most_repaired, ".0f")
    report("most_repaired_at", f"L{best.best_layer} ({_plain(best.pathway)})")
    report(
        "repair_verdict",
        f"Of the {n} held-out facts no layer and pathway repairs more than {best.most_repaired:.0f} "
        f"(L{best.best_layer}, {_plain(best.pathway)}).",
    )


def report_correlations(report: Callable[..., None], table: pd.DataFrame) -> None:
    """What the chapter's prose says of the correlations."""
    sure = table[(table.low > 0) | (table.high < 0)]
    valid = table[table.rho.notna()]
    report("correlations_n", len(valid))
    report("correlations_sure", len(sure))
    report("correlations_helpful", int((sure.low > 0).sum()))
    rule = valid[(valid.score == "knowledge head") & (valid.measure == "held_out_repaired")]
    own = "; ".join(f"{_plain(r.pathway)} {r.rho:+.2f} ({r.low:+.2f} to {r.high:+.2f})" for r in rule.itertuples())
    report(
        "correlation_verdict",
        f"Of {len(valid)} correlations {len(sure)} have an interval that excludes zero, {int((sure.low > 0).sum())} of "
        "them in the direction that the diagnosis promises. "
        + (f"The rule's own score against held-out repairs: {own}." if own else "No layer's repairs vary enough to "
           "correlate the rule's own score with them."),
    )  # fmt: skip


def report_parts(report: Callable[..., None], parts: pd.DataFrame) -> None:
    """What the chapter's prose says of random parts."""
    words = "; ".join(f"{r.part}: {r.better} of {r.random} random ones do better" for r in parts.itertuples())
    ahead = int((2 * parts.better < parts.random).sum())
    report("parts_better", words)
    report(
        "parts_verdict",
        f"{words}. The named part beats the middle of its random peers in {ahead} of {len(parts)} kinds.",
    )


def _plain(name: str) -> str:
    return {"ffn": "FFN", "v_only": "V-only", "q_only": "Q-only", "k_only": "K-only"}.get(name, name)
