"""What finished runs of `plants.plant_run` come to: right kinds, layers and sites of every rule, and repairs. And one
plant in close-up. The runs do not depend on this room: it can change without them being done again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.interventions import CachedRun, rerun_from
from lib.models import Model
from lib.sites import Site
from lib.statistics import exact_interval, paired
from lib.studies.localisation import NOT_RETRIEVED, RULES, strongest_wrong
from lib.studies.planted import KINDS, from_row, gather, lowest, planted
from lib.trace import logit_trace

GOALS = {"kind": 0.95, "layer": 0.90}  # set before the scored run
ALONE = ("static alone", "dynamic alone")
REPORTED = ("joined", *ALONE, "chapter 2")  # rules and
SHARES = ("kind", "layer", "within one", "site", "kind and site")  # shares that the prose may quote
SIMPLE = ("most negative attribution", "largest fall", "largest patching effect")


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a table of accepted `plant_run` rows of one model: a row a rule with the shares of right kinds, layers
    (exact, within one), sites and kind and site together, each with its exact 95 % interval; beside them, chance, and
    the best constant answer, which knows the most frequent truth of these very plants."""
    runs = runs[runs.accepted]
    rows = []
    for name in RULES:
        own = {c.removeprefix(f"{name}: "): runs[c] for c in runs if c.startswith(f"{name}: ")}
        hits = {
            "kind": own["kind"],
            "layer": own["off"] == 0,
            "within one": own["off"] <= 1,
            "site": own["site"],
            "kind and site": own["kind"].astype(bool) & own["site"].astype(bool),
        }
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
    hits = {
        "kind": runs.kind == kind,
        "layer": off == 0,
        "within one": off <= 1,
        "site": site,
        "kind and site": site & (runs.kind == kind),
    }
    return {"rule": f"always {best}", "n": len(runs), **_shares(hits)}


def _chance(runs: pd.DataFrame) -> dict[str, Any]:
    site, layer = runs.chance_site.mean(), runs.chance_layer.mean()
    return {"rule": "chance", "n": len(runs), "kind": 0.5, "layer": layer, "site": site, "kind and site": site / 2}


def by_group(runs: pd.DataFrame, rule: str = "joined") -> pd.DataFrame:
    """A rule's hits by failure kind and number of sites."""
    rows = []
    for (kind, sites), some in runs[runs.accepted].groupby(["kind", "sites"]):
        hits = {"kind": some[f"{rule}: kind"], "layer": some[f"{rule}: off"] == 0, "site": some[f"{rule}: site"]}
        rows.append(
            {"planted": kind, "sites": int(sites), "n": len(some), **{k: int(v.sum()) for k, v in hits.items()}}
        )
    return pd.DataFrame(rows)


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
            rows.append(
                {
                    "planted": kind,
                    "trained layer": name,
                    "n": len(some),
                    "repaired": int((told == some.untold).sum()),
                    "low": low,
                    "high": high,
                    "facts told": told.sum() / some.untold.sum(),
                    "controls kept": some[f"repair {name}: kept"].mean(),
                }
            )
    return pd.DataFrame(rows)


def confusions(runs: pd.DataFrame) -> pd.DataFrame:
    """For every rule, how often it says which kind of each planted kind: a row a rule."""
    some, rows = runs[runs.accepted], []
    for rule in RULES:
        counts = pd.crosstab(some.kind, some[f"{rule}: says"]).reindex(index=KINDS, columns=KINDS, fill_value=0)
        pairs = {f"{planted}, said {said}": int(counts[said][planted]) for planted in KINDS for said in KINDS}
        rows.append({"rule": rule, **pairs})
    return pd.DataFrame(rows)


def by_damage(runs: pd.DataFrame, rule: str = "joined") -> pd.DataFrame:
    """A rule's hits by what was damaged; plants of two sites stand together under `two`."""
    some = runs[runs.accepted]
    what = some.damage.str.extract(r"(\w+) \w+ [\d.]+$")[0].where(some.sites == 1, "two sites")
    rows = []
    for (kind, name), part in some.groupby(["kind", what]):
        right = part[f"{rule}: kind"].astype(bool) & part[f"{rule}: site"].astype(bool)
        rows.append({"planted": kind, "damaged": name, "n": len(part), "right": int(right.sum())})
    return pd.DataFrame(rows)


def by_model(table: Callable[[pd.DataFrame], pd.DataFrame], runs: pd.DataFrame) -> pd.DataFrame:
    """One of the tables above for each model, under each other."""
    parts = {name: table(part) for name, part in runs.groupby("model", sort=False)}
    return pd.concat([part.assign(model=name) for name, part in parts.items()], ignore_index=True)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON holds them: nothing where there is no number."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


# Plants in close-up


def close_ups(model: Model, runs: pd.DataFrame) -> pd.DataFrame:
    """`close_up` of the accepted plant of one site that has the lowest seed, for each kind."""
    some = runs[runs.accepted & (runs.sites == 1)].sort_values("seed")
    chosen = [row for _, part in some.groupby("kind") for row in part.head(1).to_dict("records")]
    return pd.concat([close_up(model, row) for row in chosen], ignore_index=True)


@torch.no_grad()
def close_up(model: Model, row: Mapping[str, Any]) -> pd.DataFrame:
    """Plant a row's plant again and trace it. Of the facts that fail: answer minus competitor (the strongest wrong
    token once planted), summed up to each layer, before and after planting, and under the controls after it; long
    form."""
    plant = from_row(model, row)
    inputs = gather(model, plant)
    with planted(model, plant, inputs):  # a trace reads the weights: it is taken while they are in place
        after = [rerun_from(model, seen, lowest(plant)) for seen in inputs.seen]
        pairs = torch.stack((inputs.answers, strongest_wrong(after[0].logits, inputs.answers)), 1)
        failing, *controls = (_curve(model, seen, pairs) for seen in after)
    fails = after[0].logits.argmax(-1) != inputs.answers
    curves = {
        "controls, planted": torch.stack(controls).mean(0),
        "failing template, before": _curve(model, inputs.seen[0], pairs),
        "failing template, planted": failing,
    }
    return pd.DataFrame(
        [
            {
                "seed": plant.seed,
                "planted": plant.kind,
                "template": plant.failing,
                "site": str(plant.damages[0].site),
                "curve": name,
                "fact": fact.subject,
                "layer": layer,
                "logits": value,
            }
            for name, values in curves.items()
            for fact, line, wanted in zip(plant.facts, values.tolist(), fails.tolist(), strict=True)
            if wanted
            for layer, value in enumerate(line)
        ]
    )


def _curve(model: Model, seen: CachedRun, pairs: Tensor) -> Float[Tensor, "fact n_layers+1"]:
    return logit_trace(model, seen.capture(), pairs).difference().cumulative[:, 0]


# What chapter 7's prose says


def key(rule: str, what: str) -> str:
    """The name under which a rule's share is reported."""
    return f"{rule.replace(' alone', '')}_{what}".replace(" ", "_")


def report_scores(report: Callable[..., None], runs: pd.DataFrame, prefix: str = "") -> None:
    """Shares of the rules with their exact intervals, and a sentence for each question. runs: of one model."""
    table, some = summarise(runs).set_index("rule"), runs[runs.accepted]
    report(f"{prefix}accepted", len(some))
    report(f"{prefix}rejected", len(runs) - len(some))
    report(f"{prefix}redrawn", float(runs.rejected.mean()), ".1f")
    for rule, what in product(REPORTED, SHARES):
        report(prefix + key(rule, what), table[what][rule], ".1%")
    for what in ("kind", "layer"):
        row = table.loc["joined"]
        report(f"{prefix}joined_{what}_interval", (row[f"{what} low"], row[f"{what} high"]), ".1%")
    report(f"{prefix}goals_verdict", " ".join(_goal(table.loc["joined"], what) for what in GOALS))
    beside = against(runs).set_index("rule")
    report(f"{prefix}joined_verdict", " ".join(_beside(beside.loc[rule]) for rule in ALONE))
    best = max(SIMPLE, key=lambda rule: table["kind and site"][rule])
    report(f"{prefix}simple_rule", best)
    report(f"{prefix}simple_share", table["kind and site"][best], ".1%")
    words = f"The strongest simple rule, chosen with hindsight, is {best}: {_right(table.loc[best])}."
    report(f"{prefix}simple_verdict", f"{words} {_beside(beside.loc[best])}")
    words = f"Chapter 2's rule is right in {_right(table.loc['chapter 2'])}."
    report(f"{prefix}chapter_2_verdict", f"{words} {_beside(beside.loc['chapter 2'])}")
    constant = next(rule for rule in table.index if rule.startswith("always"))
    site = constant.removeprefix("always ")
    fell = some[some.kind == NOT_RETRIEVED]
    there = sum(site in text.split(", ") for text in fell.truth)
    report(
        f"{prefix}constant_verdict",
        f"The best constant answer, {site} with the more frequent kind, is right in {_right(table.loc[constant])}, "
        f"chance in {table['kind and site']['chance']:.1%}. Of the {len(fell)} plants not retrieved, {site} is a site "
        f"in {there}: where few heads carry the recall, naming one of them proves little.",
    )


def _right(row: pd.Series, what: str = "kind and site") -> str:
    return f"{row[what]:.1%} of {row.n:.0f} plants ({row[f'{what} low']:.1%} to {row[f'{what} high']:.1%})"


def _goal(row: pd.Series, what: str) -> str:
    goal, label = GOALS[what], {"kind": "failure kind", "layer": "exact layer"}[what]
    below = ", though the interval reaches below it"
    verdict = "missed" if row[what] < goal else f"reached{below if row[f'{what} low'] < goal else ''}"
    return f"The joined rule's {label} is right in {_right(row, what)}: the goal of {goal:.0%} is {verdict}."


def _beside(row: pd.Series) -> str:
    """In words, how the joined rule does beside another, plant by plant."""
    ours, theirs = int(row["only joined"]), int(row["only it"])
    if not ours + theirs:
        return f"Joined and {row.name} are right about the same plants."
    clear = row.p < 0.05
    verdict = "better" if clear and ours > theirs else "worse" if clear else "no clear difference"
    return (
        f"Of the plants that only one of joined and {row.name} gets right: {ours} to {theirs}, {verdict} ({_p(row.p)})."
    )


def _p(p: float) -> str:
    return f"McNemar, p = {p:.3f}" if p >= 0.001 else "McNemar, p < 0.001"


def report_repairs(report: Callable[..., None], runs: pd.DataFrame, prefix: str = "") -> None:
    """What repairs come to over both kinds together. runs: of one model."""
    done = repaired(runs)
    n, words = len(done), []
    for name, label in TRAINED.items():
        told, kept = int(done[name].sum()), float(runs[f"repair {name}: kept"].mean())
        low, high = exact_interval(told, n)
        report(f"{prefix}repaired_{name}", told)
        report(f"{prefix}repair_kept_{name}", kept, ".1%")
        words.append(f"{label}: {told} ({low:.0%} to {high:.0%}), and {kept:.0%} of what the controls told stays told")
    report(f"{prefix}repairs", n)
    beside = " ".join(_repairs_beside(done, name) for name in ("knowledge", "random"))
    lesson = "A random layer repairs about as many, so that a repair is no proof of a diagnosis."
    clear = paired(done.random, done.named)["p"] < 0.05
    report(
        f"{prefix}repair_verdict",
        f"Repaired, of {n} plants, by training {'; '.join(words)}. {beside}{'' if clear else ' ' + lesson}",
    )


def _repairs_beside(done: pd.DataFrame, other: str) -> str:
    found, label = paired(done[other], done.named), TRAINED[other]
    if not found["gained"] + found["lost"]:
        return f"The named layer and {label} repair the same plants."
    return f"Only the named layer repairs {found['gained']}, only {label} {found['lost']} ({_p(found['p'])})."


TRAINED = {"named": "the named layer", "knowledge": "the knowledge head's layer", "random": "a random layer"}


def repaired(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a plant that was retrained: True where every fact that failed is told afterwards, by trained layer."""
    runs = runs[runs.accepted]
    done = runs[runs["repair named: told"].notna()]
    told = {name: done[f"repair {name}: told"] == done.untold for name in TRAINED}
    return pd.DataFrame({"kind": done.kind, **told})
