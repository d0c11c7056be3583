"""What finished sweeps say: which pathway, is it the diagnosed layer, and is it the edit?

    report_pathways, report_control   chapter 3's pathways, with false facts and a planted query as the controls
    by_layer, other_layers, spread    the layer sweep, and how far seeds move it
    correlations                      does a layer's diagnostic score say how well its edit does?
    random_parts                      the named part beside random ones of its size
    rivals, with_sinks, ladder        every method under one protocol; the fewest parameters that do it

Nothing here runs a model, and no experiment depends on it: a changed sentence voids no run. Rules: a layer does *as
well* as another if it tells at least as many of the trained facts and repairs at least as many held-out ones; a method
*tells* if it tells all trained facts, and *generalises* if it repairs at least half of the held-out countries that were
known and not told. The sentences stand in `show/words/comparisons.yaml`.
"""

from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float

from lib.errors import EditError
from lib.models import Model
from lib.results import Results
from lib.show.sentences import listed, say, words
from lib.statistics import exact_interval, rho_interval
from lib.studies.location import setting
from lib.studies.pathways import by_seed
from lib.weights import PAPER, PATHWAYS, SINKS

sentence = partial(say, "comparisons")
# Columns of a run, and whether more is better
SUCCESS = {"facts_told": True, "steps": False, "held_out_repaired": True, "kl": False, "bled": False}
# Kinds of rivals; any other is a pathway
KINDS = dict.fromkeys(("newline", "bos", "example", "head", "opponent", "competitors"), "no training")
KINDS |= dict.fromkeys(("vector", "gains", "lora"), "few parameters")
KINDS |= {"closed_form": "closed form", "everything": "everything"}
SINK = "learned sink"  # changes the cause, not the place
KINDS |= dict.fromkeys(SINKS, SINK)
DIVERGED = {"facts_told": 0, "held_out_repaired": 0}  # what a run did that left no edit
BLIND_QUERY = "planted blind query"  # the organism's case whose fault is one of W_Q
NEVER = 10**12  # more parameters than any model of this book has: where no change of the model tells all
GENERAL = 0.5  # share of the held-out, known and untold, that must be told


# Layers


def by_layer(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of a layer sweep: a row a pathway and layer. A diverged run tells and repairs nothing."""
    columns = ["facts_told", "held_out_repaired", "held_out_n", "steps", "kl", "bled", "bled_n", "probes_lost"]
    filled = runs.assign(probes_lost=runs.capability_lost + runs.unrelated_lost).fillna(DIVERGED)
    return filled.groupby(["pathway", "layer"], sort=False)[[*columns, "reached"]].mean().reset_index()


def other_layers(means: pd.DataFrame, layer: int) -> pd.DataFrame:
    """How many of the other layers do at least as well as one (counted from 1), by pathway: tell as many (told), repair
    as many (repaired), both (as_well), tell as many in no more steps (sooner), tell as many with no more harm to
    neutral text (gentler); of pathways that were tried at that layer. Raises EditError if none was."""
    if layer not in set(means.layer):
        raise EditError(f"the sweep tried no edit at the diagnosed layer {layer}; add it to data/sweeps/layers.yaml.")
    own = means[means.layer == layer].set_index("pathway")
    means = means[means.pathway.isin(own.index)]
    best = means.sort_values(["held_out_repaired", "facts_told", "kl"], ascending=[False, False, True])
    best = best.drop_duplicates("pathway").set_index("pathway")
    beside, other = own.loc[means.pathway].set_axis(means.index), means.layer != layer
    told = other & (means.facts_told >= beside.facts_told)
    repaired = other & (means.held_out_repaired >= beside.held_out_repaired)
    counts = {"others": other, "told": told, "repaired": repaired, "as_well": told & repaired}
    counts |= {"sooner": told & (means.steps <= beside.steps), "gentler": told & (means.kl <= beside.kl)}
    table = pd.DataFrame(counts).groupby(means.pathway, sort=False).sum()
    table = table.assign(own_told=own.facts_told, own_repaired=own.held_out_repaired)
    return table.assign(best_layer=best.layer, most_repaired=best.held_out_repaired).reset_index()


def spread(runs: pd.DataFrame, near: pd.DataFrame) -> pd.DataFrame:
    """The diagnosed layer and its neighbours over all seeds of both sweeps: a row a pathway and layer, with least and
    most told and repaired, and how many seeds."""
    near = near.drop(columns="distance").rename(columns={"at": "layer"})
    both = pd.concat([runs[runs.layer.isin(set(near.layer))], near]).drop_duplicates(["pathway", "layer", "seed"])
    by = both.fillna(DIVERGED).groupby(["pathway", "layer"])
    measures = {"told": "facts_told", "repaired": "held_out_repaired", "steps": "steps", "kl": "kl"}
    ends = {f"{name}_{end}": (column, end) for name, column in measures.items() for end in ("min", "max")}
    return by.agg(seeds=("seed", "size"), **ends).reset_index()


@torch.no_grad()
def layer_scores(model: Model, relation: Float[torch.Tensor, "n_layers n_heads"]) -> pd.DataFrame:
    """How strongly each piece of evidence points to each layer: `static` (the strongest head of the relation map,
    input-free), `writes` (what its heads and MLP write of the answers under the controls, where positive) and
    `knowledge head` (its strongest head alone, the score that the rule prescribes by). One row a layer."""
    writes, shape = setting(model).writes, (model.weights.n_layers, model.weights.n_heads)
    heads, mlps = writes[: relation.numel()].view(shape), writes[relation.numel() :]
    scores = {"static": relation.max(1).values, "writes": heads.relu().sum(1) + mlps.relu()}
    scores["knowledge head"] = heads.max(1).values
    layers = {"layer": range(1, len(mlps) + 1)}
    return pd.DataFrame(layers | {name: score.tolist() for name, score in scores.items()})


def correlations(means: pd.DataFrame, scores: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Spearman's rho over layers between each diagnostic score and each measure of an edit's success, turned so that
    more is better, with a 95 % bootstrap interval over layers; a row a pathway, score and measure."""
    rows = []
    for pathway, part in means.groupby("pathway", sort=False):
        joined = part.merge(scores, on="layer")
        for score in scores.columns.drop("layer"):
            for measure, more in SUCCESS.items():
                success = joined[measure] if more else -joined[measure]
                rows.append((pathway, score, measure, len(joined), *rho_interval(joined[score], success, seed=seed)))
    return pd.DataFrame(rows, columns=["pathway", "score", "measure", "layers", "rho", "low", "high"])


# Parts


def random_parts(runs: pd.DataFrame, *, n_kv_heads: int = 2) -> pd.DataFrame:
    """Of a sweep of parts: beside each named one, the random ones of equal size. better: how many of these tell more,
    or as many with a larger margin. n_kv_heads: of a single one there is no other to draw, and values are left out."""
    runs = runs[(runs.part != "values") | (n_kv_heads > 1)]
    measures = {"told": "facts_told", "repaired": "held_out_repaired", "margin": "min_margin", "kl": "kl"}
    rows = []
    for part, picks in runs.groupby("part", sort=False):
        named, random = picks[picks["pick"] == "diagnosed"].iloc[0], picks[picks["pick"] == "random"]
        margin_wins = (random.facts_told == named.facts_told) & (random.min_margin > named.min_margin)
        row = {"part": part, "parameters": named.parameters, "random": len(random), "facts": named.facts_n}
        for name, column in measures.items():
            row |= {name: named[column], f"random_{name}": random[column].mean()}
        rows.append(row | {"better": ((random.facts_told > named.facts_told) | margin_wins).sum()})
    return pd.DataFrame(rows).astype(dict.fromkeys(("parameters", "facts", "told", "repaired"), int))


# Rivals


def rivals(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a sweep over rivals: a row a rival, by number of parameters. kind: of rival, or `pathway`. low, high: the
    exact 95 % interval of the share repaired. local_lost: of what worked before, of neighbours, of the facts under
    working wordings and of other countries under one. general: whether it repairs at least GENERAL."""
    counts = zip(runs.held_out_repaired, runs.held_out_n, strict=True)
    low, high = zip(*(exact_interval(int(repaired), int(n)) for repaired, n in counts), strict=True)
    out = runs.assign(
        kind=runs["name"].map(KINDS).fillna("pathway"),
        low=low,
        high=high,
        local_lost=runs.neighbours_lost + runs.working_lost + runs.elsewhere_lost,
        probes_lost=runs.capability_lost + runs.unrelated_lost,
        whole=runs.facts_told == runs.facts_n,
        general=runs.held_out_repaired >= GENERAL * runs.held_out_n,
    )
    return out.sort_values(["parameters", "rival"], kind="stable").reset_index(drop=True)


def sinks(repairs: pd.DataFrame) -> pd.DataFrame:
    """Of the runs of `repairs` those of learned sinks that were trained on the first case's own facts, first seed, at
    the rate and steps of chapter 8's rule: a row a pathway, the fewest parameters first; none of no runs."""
    if repairs.empty:
        return repairs
    picked = (repairs.case == 1) & (repairs.facts == "eight") & (repairs.variant == "true") & (repairs.steps > 0)
    picked &= repairs.pathway.isin(SINKS) & (repairs.seed == repairs.seed.min())
    return repairs[picked].sort_values("parameters")


def with_sinks(runs: pd.DataFrame, repairs: pd.DataFrame) -> pd.DataFrame:
    """Rivals, and beside them the learned sinks of `repairs`: trained on the same facts of the first case, asked the
    same questions, their rate and steps chosen by chapter 8's rule."""
    learned = sinks(repairs)
    learned = learned.rename(columns={"untold": "held_out_n", "pathway": "name"}).assign(
        rival=learned.pathway.map(words),
        held_out_repaired=learned.repaired,
        strength=[f"rate {rate:g}, {steps} steps" for rate, steps in zip(learned.rate, learned.steps, strict=True)],
    )
    return runs if learned.empty else pd.concat([runs, learned], ignore_index=True)[runs.columns]


def ladder(rows: pd.DataFrame) -> pd.DataFrame:
    """The fewest parameters that tell all, and that generalise: with none changed (free: all that do) and with some
    (changed). `none` where no method does."""
    rows_by_goal = []
    for goal in ("whole", "general"):
        free, changed = (rows[rows[goal] & pick] for pick in (rows.parameters == 0, rows.parameters > 0))
        fewest = changed[changed.parameters == changed.parameters.min()]
        least = "none" if changed.empty else f"{fewest.parameters.iloc[0]:,}"
        names = "none" if changed.empty else f"{'; '.join(fewest.rival)} ({least})"
        rows_by_goal.append((goal, "; ".join(free.rival) or "none", names, least if free.empty else "0"))
    return pd.DataFrame(rows_by_goal, columns=["goal", "free", "changed", "parameters"]).set_index("goal")


# What the chapters' prose says of them


def report_pathways(report: Results, head: pd.DataFrame, seeds: pd.DataFrame, checks: pd.DataFrame) -> None:
    """Chapter 3's comparison: `pathways.head_to_head`, the runs of all seeds, and `pathways.controls`."""
    whole, best = seeds.groupby("pathway", sort=False).reached.all(), by_seed(seeds)
    reached = sum(bool(whole.get(name, False)) for name in PAPER)
    able = head[head.pathway.map(whole)].sort_values("parameters")
    nothing: dict[str, Any] = {"pathway": "none", "parameters": 0, "share": 0.0, "kl": 0.0}
    smallest, *_ = *able.to_dict("records"), nothing
    false, true = checks[checks.control == "false facts"].set_index("pathway"), head.set_index("pathway")
    learned = [name for name in PAPER if name in false.index and false.reached[name]]
    taken = [", ".join(str(int(steps[name])) for name in learned) for steps in (false.steps, true.steps)]
    words = {"pathways": len(PAPER), "reached": reached, "learned": learned, "steps": taken}
    report.many({"paper_pathways_reached": reached, "paper_pathways": len(PAPER)})
    report.many({"smallest": listed([smallest["pathway"]]), "smallest_parameters": (int(smallest["parameters"]), ",")})
    report.many({"smallest_share": (float(smallest["share"]), ".2%"), "smallest_kl": (float(smallest["kl"]), ".4f")})
    report("least_kl", float(min(able.kl, default=0.0)), ".4f")
    report.many({"recommended": listed([best.iloc[0]]), "recommended_seeds": int((best == best.iloc[0]).sum())})
    report("outside_unchanged", "unchanged" if head.outside_unchanged.all() else "NOT unchanged")
    report("q_k_verdict", listed([name for name in ("q_only", "k_only") if whole.get(name, False)]))
    sentences = ("paper_verdict", "false_found", "false_lesson", "false_short")
    report.many({"false_pathways": len(learned)} | {key: sentence(key, **words) for key in sentences})


def positive_control(planted: pd.DataFrame) -> pd.DataFrame:
    """Of the sweep `planted`, the failure whose fault is known to be in a query: what each pathway tells after it was
    trained on the eight. If Q-only cannot repair that, its failing elsewhere says nothing of the query."""
    rows = planted[planted.title == BLIND_QUERY].set_index("pathway")
    return rows.loc[[name for name in PATHWAYS if name in rows.index]].reset_index()


def report_control(report: Results, planted: pd.DataFrame) -> None:
    """What the positive control lets one say of the query's side, and what V-only does with both plants."""
    table = positive_control(planted).set_index("pathway")
    told: dict[str, Any] = {"facts": int(table.facts.iloc[0]), "before": int(table.told_before.iloc[0])}
    told |= {str(name): int(n) for name, n in table.told_after.items()}
    v_only = planted[planted.pathway == "v_only"]
    failed = int((v_only.told_after < v_only.facts).sum())
    report.table("planted_query", told)
    report("q_side_verdict", sentence("q_side_verdict", told=told, failed=failed, plants=len(v_only)))


def report_layers(report: Results, means: pd.DataFrame, others: pd.DataFrame, layer: int) -> None:
    """The layer sweep."""
    whole = (means.reached > 0).groupby(means.pathway, sort=False).agg(["sum", "size"])
    best, bled = others.loc[others.most_repaired.idxmax()], (float(means.bled.min()), float(means.bled.max()))
    reached = ", ".join(f"{plain(name)} {n} of {tried}" for name, n, tried in whole.itertuples())
    counts: dict[str, Any] = {"reached_by": reached}
    counts |= {"as_well": int(others.as_well.sum()), "as_well_of": int(others.others.sum())}
    counts |= {"most_repaired_at": f"L{best.best_layer} ({plain(best.pathway)})"}
    lost, more = float(means.probes_lost.max()), int((means.held_out_repaired == best.most_repaired).sum()) - 1
    words = counts | {"layer": layer, "layers": means.layer.nunique(), "best": best, "more": more, "bled": bled}
    words["few"] = " and ".join(plain(r.pathway) for r in others.itertuples() if 4 * r.as_well <= r.others)
    words["own"] = sorted({f"{end:.0f}" for end in (others.own_repaired.min(), others.own_repaired.max())}, key=int)
    words |= {"best_pathway": plain(best.pathway), "lost": lost, "most": means.max(numeric_only=True)}
    report.many(counts | {"most_repaired": (best.most_repaired, ".0f"), "layers_bled": (bled, ".0f")})
    report("layers_probes_lost", lost, ".0f")
    report.many({key: sentence(key, **words) for key in ("layers_verdict", "repair_verdict", "layers_effects")})


def by_depth(means: pd.DataFrame) -> pd.DataFrame:
    """What the same edit repairs and what it lets bleed, by layer: means over pathways, and their range; of those that
    were tried at most layers, so that every layer stands for the same ones."""
    tried = means.groupby("pathway").layer.transform("nunique")
    means = means[tried == tried.max()]
    columns = {"repaired": "held_out_repaired", "bled": "bled"}
    ends = {f"{name}_{end}": (column, end) for name, column in columns.items() for end in ("mean", "min", "max")}
    return means.groupby("layer").agg(**ends).reset_index()


def depth_correlations(means: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Whether repairs and bleeding go with depth: a row a pathway and measure, Spearman's rho over layers."""
    rows = [
        (plain(pathway), measure, *rho_interval(part.layer, part[measure], seed=seed))
        for pathway, part in means.dropna(subset=["held_out_repaired", "bled"]).groupby("pathway", sort=False)
        for measure in ("held_out_repaired", "bled")
    ]
    return pd.DataFrame(rows, columns=["pathway", "measure", "rho", "low", "high"])


def report_depth(report: Results, table: pd.DataFrame, rhos: pd.DataFrame) -> None:
    """What depth does. table: of `by_depth`; rhos: of `depth_correlations`."""
    report.table("depth", table.to_dict("records"))
    report.table("depth_rho", rhos.astype(object).where(rhos.notna(), None).to_dict("records"))
    each = {name: part.to_dict("records") for name, part in rhos[rhos.rho.notna()].groupby("measure")}
    report("depth_verdict", sentence("depth_verdict", first=table.iloc[0], last=table.iloc[-1], each=each))


def report_spread(report: Results, table: pd.DataFrame) -> None:
    """How far the seed alone moves what is repaired."""
    moved = {name: float((table[f"{name}_max"] - table[f"{name}_min"]).max()) for name in ("repaired", "told")}
    counts = {"spread_seeds": int(table.seeds.min()), "spread_repaired": (moved["repaired"], ".0f")}
    report.many(counts | {"spread_verdict": sentence("spread_verdict", **moved)})


def report_correlations(report: Results, table: pd.DataFrame) -> None:
    """The correlations. By chance, one interval of 95 % in twenty excludes zero."""
    valid = table[table.rho.notna()]
    helpful, against = int((valid.low > 0).sum()), int((valid.high < 0).sum())
    rule = valid[(valid.score == "knowledge head") & (valid.measure == "held_out_repaired")]
    counts = {"correlations_n": len(valid), "correlations_sure": helpful + against, "correlations_helpful": helpful}
    counts |= {"correlations_against": against}
    chance = 0.05 * len(valid)
    verdict = sentence("correlation_verdict", chance=chance, own=rule.to_dict("records"), **counts)
    report.many(counts | {"correlations_chance": (chance, ".0f"), "correlation_verdict": verdict})


def report_parts(report: Results, parts: pd.DataFrame) -> None:
    """Random parts."""
    better = "; ".join(f"{r.part}: {r.better} of {r.random} random ones do better" for r in parts.itertuples())
    ahead = int((2 * parts.better < parts.random).sum())
    verdict = sentence("parts_verdict", better=better, ahead=ahead, kinds=len(parts))
    report.many({"parts_better": better, "parts_verdict": verdict})


def report_rivals(report: Results, rows: pd.DataFrame, *, elsewhere: pd.DataFrame | None = None) -> None:
    """Rivals, and the ladder. elsewhere: the layer sweep's means, whose best edit may repair more than what was trained
    at the diagnosed layer."""
    steps, untrained = ladder(rows), rows.kind == "no training"
    at_place = rows[~untrained & (rows.kind != SINK)]
    best, trained = (part.loc[part.held_out_repaired.idxmax()] for part in (rows, at_place))
    counts: dict[str, Any] = {"rivals": len(rows), "rivals_told": int(rows.whole.sum())}
    counts["rivals_untrained"] = "; ".join(rows.rival[rows.whole & untrained]) or "none"
    counts |= {"fewest_told": steps.changed["whole"], "fewest_general": steps.changed["general"]}
    counts |= {"free_told": steps.free["whole"], "free_general": steps.free["general"]}
    for name, row in (("most_general", best), ("most_general_trained", trained)):
        counts |= {name: row.rival, f"{name}_repaired": int(row.held_out_repaired)}
    v_only, whole = rows[rows["name"] == "v_only"], rows[rows.whole & (rows.parameters > 0)]
    smaller = whole[whole.parameters < v_only.parameters.min()] if len(v_only) else whole[:0]
    counts["smaller_than_v_only"] = listed([f"{r.rival} ({r.parameters:,})" for r in smaller.itertuples()])
    counts["fewest_parameters"] = int(whole.parameters.min()) if len(whole) else NEVER
    beyond = None if elsewhere is None else elsewhere.loc[elsewhere.held_out_repaired.idxmax()]
    beyond = None if beyond is None or beyond.held_out_repaired <= trained.held_out_repaired else beyond
    used: dict[str, Any] = counts | {"beyond": beyond}
    used |= {"plain": plain, "facts": int(rows.facts_n.iloc[0]), "n": int(rows.held_out_n.iloc[0]), "best": best}
    sentences = ("rivals_verdict", "ladder_verdict", "general_verdict")
    report.many(counts | {key: sentence(key, trained=trained, **used) for key in sentences})


def plain(name: str) -> str:
    """A pathway as prose calls it."""
    return {"ffn": "FFN", "v_only": "V-only", "q_only": "Q-only", "k_only": "K-only"}.get(name, name)
