"""What finished runs of `plants.plant_run` come to: right kinds, layers and sites of every rule, and repairs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from lib.blind import RULES
from lib.effects import paired
from lib.facts import exact_interval
from lib.site import Site


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a table of accepted `plant_run` rows of one subject: a row a rule with the shares of right kinds, layers
    (exact, within one), sites and kind and site together, each with its exact 95 % interval; beside them, chance, and
    the best constant answer, which knows the most frequent truth of these very plants."""
    runs = runs[runs.accepted]
    rows = []
    for name in RULES:
        own = {c.removeprefix(f"{name}: "): runs[c] for c in runs if c.startswith(f"{name}: ")}
        hits = {
            "kind": own["kind"], "layer": own["off"] == 0, "within one": own["off"] <= 1, "site": own["site"],
            "kind and site": own["kind"].astype(bool) & own["site"].astype(bool),
        }  # fmt: skip
        rows.append({"rule": name, "n": len(runs), **_shares(hits)})
    return pd.concat([pd.DataFrame(rows), pd.DataFrame([_constant(runs), _chance(runs)])], ignore_index=True)


def _shares(hits: dict[str, pd.Series]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, hit in hits.items():
        low, high = exact_interval(int(hit.sum()), len(hit))
        out |= {name: float(hit.mean()), f"{name} low": low, f"{name} high": high}
    return out


def _constant(runs: pd.DataFrame) -> dict[str, Any]:
    truths = [{Site.parse(s) for s in text.split(", ")} for text in runs.truth]
    best = Counter(s for sites in truths for s in sorted(sites, key=str)).most_common(1)[0][0]
    kind = runs.kind.mode()[0]
    off = pd.Series([min(abs(best.layer - s.layer) for s in sites) for sites in truths], index=runs.index)
    site = pd.Series([best in sites for sites in truths], index=runs.index)
    hits = {"kind": runs.kind == kind, "layer": off == 0, "within one": off <= 1, "site": site,
            "kind and site": site & (runs.kind == kind)}  # fmt: skip
    return {"rule": f"always {best}", "n": len(runs), **_shares(hits)}


def _chance(runs: pd.DataFrame) -> dict[str, Any]:
    site, layer = runs.chance_site.mean(), runs.chance_layer.mean()
    return {"rule": "chance", "n": len(runs), "kind": 0.5, "layer": layer, "site": site, "kind and site": site / 2}


def by_group(runs: pd.DataFrame, rule: str = "joined") -> pd.DataFrame:
    """A rule's hits by failure kind and number of sites."""
    rows = []
    for (kind, sites), some in runs[runs.accepted].groupby(["kind", "sites"]):
        hits = {"kind": some[f"{rule}: kind"], "layer": some[f"{rule}: off"] == 0, "site": some[f"{rule}: site"]}
        rows.append({"planted": kind, "sites": sites, "n": len(some), **{k: int(v.sum()) for k, v in hits.items()}})
    return pd.DataFrame(rows)


def confusion(runs: pd.DataFrame, rule: str = "joined") -> pd.DataFrame:
    """Planted kind against the kind that a rule says."""
    some = runs[runs.accepted]
    return pd.crosstab(some.kind.rename("planted"), some[f"{rule}: says"].rename("said"))


def against(runs: pd.DataFrame, rule: str = "joined") -> pd.DataFrame:
    """A rule beside every other, plant by plant: kind and site right together by the one and not by the other, and
    McNemar's exact p."""
    some, rows = runs[runs.accepted], []
    right = {r: some[f"{r}: kind"].astype(bool) & some[f"{r}: site"].astype(bool) for r in RULES}
    for other in right:
        if other != rule:
            found = paired(right[other], right[rule])
            rows.append({"rule": other, "only it": found["lost"], f"only {rule}": found["gained"], "p": found["p"]})
    return pd.DataFrame(rows)


def repairs(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the rows that were repaired, by planted kind and trained layer: plants of which every untold fact is told
    afterwards, with its exact 95 % interval; the share of facts told; and what the controls still tell."""
    rows = []
    done = runs[runs.accepted & runs.get("repair named: told", pd.Series(index=runs.index, dtype=float)).notna()]
    for kind, some in done.groupby("kind"):
        for name in ("named", "knowledge", "random"):
            told = some[f"repair {name}: told"]
            low, high = exact_interval(int((told == some.untold).sum()), len(some))
            rows.append({
                "planted": kind, "trained layer": name, "n": len(some), "repaired": int((told == some.untold).sum()),
                "low": low, "high": high, "facts told": told.sum() / some.untold.sum(),
                "controls kept": some[f"repair {name}: kept"].mean(),
            })  # fmt: skip
    return pd.DataFrame(rows)
