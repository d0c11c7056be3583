"""X"""

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


KINDS = {"newline": "no training", "bos": "no training", "example": "no training", "head": "no training",
         "opponent": "no training", "competitors": "no training", "vector": "few parameters", "gains": "few parameters",
         "lora": "few parameters", "closed_form": "closed form", "everything": "everything"}  # fmt: skip


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a sweep over `rival`: a row a rival, by number of parameters. kind: of rival, or `pathway`. lost: of other
    relations, working wordings and neighbours together, of `lost_n` told before."""
    kept = ["relations", "working", "neighbours"]
    out = runs.assign(
        kind=runs["name"].map(KINDS).fillna("pathway"), lost=sum(runs[f"{k}_lost"] for k in kept),
        probes_lost=runs.capability_lost + runs.unrelated_lost,
    )  # fmt: skip
    return out.sort_values(["parameters", "rival"], kind="stable").reset_index(drop=True)


def report_rivals(report: Callable[..., None], rows: pd.DataFrame) -> None:
    """What the chapter's prose says of the rivals."""
    whole = rows[rows.facts_told == rows.facts_n]
    free, small = whole[whole.kind == "no training"], whole[whole.parameters > 0]
    best = rows.loc[rows.held_out_repaired.idxmax()]
    n = int(rows.held_out_n.iloc[0])
    trained = rows[~rows.kind.isin(["no training"])]
    top = trained.loc[trained.held_out_repaired.idxmax()]
    names = "; ".join(free.rival) or "none"
    report("rivals", len(rows))
    report("rivals_told", len(whole))
    report("rivals_free", names)
    report("fewest", "none" if small.empty else f"{small.rival.iloc[0]} ({small.parameters.iloc[0]:,})")
    report("most_general", best.rival)
    report("most_general_repaired", int(best.held_out_repaired))
    report("most_general_trained", top.rival)
    report("most_general_trained_repaired", int(top.held_out_repaired))
    report(
        "rivals_verdict",
        f"{len(whole)} of {len(rows)} methods make all {int(rows.facts_n.iloc[0])} told. Without any training these "
        f"do: {names}.",
    )
    report(
        "ladder_verdict",
        f"The fewest changed parameters that tell all are those of {_first(small)}. The most held-out facts are "
        f"repaired by {best.rival} ({int(best.held_out_repaired)} of {n}), and among the trained by {top.rival} "
        f"({int(top.held_out_repaired)} of {n}).",
    )


def _first(rows: pd.DataFrame) -> str:
    return "no method here" if rows.empty else f"{rows.rival.iloc[0]} ({rows.parameters.iloc[0]:,})"
