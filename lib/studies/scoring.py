"""What finished runs of `planted.plant_run` come to: right kinds, layers and sites of every rule, and repairs. And one
plant in close-up. The runs do not depend on this room: it can change without them being done again."""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain, product
from typing import Any

import pandas as pd
import torch

from lib.diagnosis import NOT_RETRIEVED
from lib.errors import DataError
from lib.facts import load_cases, load_templates
from lib.interventions import rerun_from
from lib.models import Model
from lib.recall import first_tokens, trainable
from lib.results import Results
from lib.show.sentences import say
from lib.sites import Site
from lib.statistics import exact_interval, paired
from lib.studies.localisation import RULES, blind, with_competitors
from lib.studies.planted import KINDS, applied, from_row, run_on
from lib.trace import logit_trace

GOALS = {"kind": 0.95, "layer": 0.90}  # set before the scored run
ALONE = ("static alone", "dynamic alone")
REPORTED = ("joined", *ALONE, "chapter 2")  # rules and
SHARES = ("kind", "layer", "within one", "site", "kind and site")  # shares that the prose may quote
SIMPLE = ("most negative attribution", "largest fall", "largest patching effect")
TRAINED = {"named": "the named layer", "knowledge": "the knowledge head's layer", "random": "a random layer"}


def hits(runs: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Of accepted runs, a row each: what a rule has right, by SHARES."""
    kind, site, off = runs[f"{rule}: kind"].astype(bool), runs[f"{rule}: site"].astype(bool), runs[f"{rule}: off"]
    return pd.concat([kind, off == 0, off <= 1, site, kind & site], axis=1, keys=SHARES)


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a table of accepted `plant_run` rows of one model: a row a rule with the shares of right kinds, layers
    (exact, within one), sites and kind and site together, each with its exact 95 % interval; beside them, chance, and
    the best constant answer, which knows the most frequent truth of these very plants."""
    runs = runs[runs.accepted]
    site, layer = runs.chance_site.mean(), runs.chance_layer.mean()  # of one drawn evenly; of the kind, a coin
    chance = {"rule": "chance", "n": len(runs), "kind": 0.5, "layer": layer, "site": site, "kind and site": site / 2}
    return pd.DataFrame([*(_shares(runs, rule) for rule in RULES), _constant(runs), chance])


def _shares(runs: pd.DataFrame, rule: str) -> dict[str, Any]:
    row: dict[str, Any] = {"rule": rule, "n": len(runs)}
    for name, right in hits(runs, rule).items():
        low, high = exact_interval(int(right.sum()), len(right))
        row |= {name: float(right.mean()), f"{name} low": low, f"{name} high": high}
    return row


def _constant(runs: pd.DataFrame) -> dict[str, Any]:
    truths = [[Site.parse(site) for site in sorted(text.split(", "))] for text in runs.truth]
    best = Counter(chain.from_iterable(truths)).most_common(1)[0][0]
    parts = {"kind": runs.kind == runs.kind.mode()[0], "site": [best in sites for sites in truths]}
    parts["off"] = [min(abs(best.layer - site.layer) for site in sites) for sites in truths]
    rule = f"always {best}"
    return _shares(runs.assign(**{f"{rule}: {part}": values for part, values in parts.items()}), rule)


def by_group(runs: pd.DataFrame, rule: str = "joined") -> pd.DataFrame:
    """A rule's hits by failure kind and number of sites."""
    runs = runs[runs.accepted]
    groups = hits(runs, rule).groupby([runs.kind.rename("planted"), runs.sites.astype(int)])
    return groups.size().to_frame("n").join(groups[["kind", "layer", "site"]].sum()).reset_index()


def against(runs: pd.DataFrame, rule: str = "joined") -> pd.DataFrame:
    """A rule beside every other, plant by plant: kind and site right together by the one and not by the other, and
    McNemar's exact p."""
    right = {r: hits(runs[runs.accepted], r)["kind and site"] for r in RULES}
    table = pd.DataFrame([{"rule": other, **paired(right[other], right[rule])} for other in right if other != rule])
    return table[["rule", "lost", "gained", "p"]].rename(columns={"lost": "only it", "gained": f"only {rule}"})


def repaired(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a plant that was retrained: True where every fact that failed is told afterwards, by trained layer."""
    runs = runs[runs.accepted]
    retrained = runs[runs["repair named: told"].notna()]
    told = {name: retrained[f"repair {name}: told"] == retrained.untold for name in TRAINED}
    return pd.DataFrame({"kind": retrained.kind, **told})


def repairs(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the rows that were repaired, by planted kind and trained layer: plants of which every untold fact is told
    afterwards, with its exact 95 % interval; the share of facts told; and what the controls still tell."""
    rows = []
    for kind, whole in repaired(runs).groupby("kind") if "repair named: told" in runs else ():
        plants = runs.loc[whole.index]
        for name in TRAINED:
            n, share = int(whole[name].sum()), plants[f"repair {name}: told"].sum() / plants.untold.sum()
            kept = plants[f"repair {name}: kept"].mean()
            rows.append((kind, name, len(plants), n, *exact_interval(n, len(plants)), share, kept))
    columns = ["planted", "trained layer", "n", "repaired", "low", "high", "facts told", "controls kept"]
    return pd.DataFrame(rows, columns=columns)


def confusions(runs: pd.DataFrame) -> pd.DataFrame:
    """For every rule, how often it says which kind of each planted kind: a row a rule."""
    runs, table = runs[runs.accepted], pd.DataFrame({"rule": RULES.keys()})
    for planted, said in product(KINDS, KINDS):
        of_kind = runs[runs.kind == planted]
        table[f"{planted}, said {said}"] = [int((of_kind[f"{rule}: says"] == said).sum()) for rule in RULES]
    return table


def by_damage(runs: pd.DataFrame, rule: str = "joined") -> pd.DataFrame:
    """A rule's hits by what was damaged; plants of two sites stand together under `two sites`."""
    runs = runs[runs.accepted]
    what = runs.damage.str.extract(r"(\w+) \w+ [\d.]+$")[0].where(runs.sites == 1, "two sites")
    groups = hits(runs, rule)["kind and site"].groupby([runs.kind.rename("planted"), what.rename("damaged")])
    return groups.agg(n="size", right="sum").reset_index()


def by_model(table: Callable[[pd.DataFrame], pd.DataFrame], runs: pd.DataFrame) -> pd.DataFrame:
    """One of the tables above for each model, under each other."""
    parts = [table(part).assign(model=name) for name, part in runs.groupby("model", sort=False)]
    return pd.concat(parts, ignore_index=True)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON holds them: nothing where there is no number."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


# Plants in close-up


def close_ups(model: Model, runs: pd.DataFrame) -> pd.DataFrame:
    """`close_up` of the accepted plant of one site that has the lowest seed, for each kind."""
    chosen = runs[runs.accepted & (runs.sites == 1)].sort_values("seed").groupby("kind").head(1).sort_values("kind")
    return pd.concat([close_up(model, row) for row in chosen.to_dict("records")], ignore_index=True)


@torch.no_grad()
def close_up(model: Model, row: Mapping[str, Any]) -> pd.DataFrame:
    """Plant a row's plant again and trace it. Of the facts that fail: answer minus competitor (the strongest wrong
    token once planted), summed up to each layer, before and after planting, and under the controls after it; long
    form."""
    plant = from_row(model, row)
    before, answers = run_on(model, plant), first_tokens(model, plant.facts)
    with applied(model, plant, before):  # a trace reads the weights: it is taken while they are in place
        after = [rerun_from(model, run, plant.lowest) for run in before]
        pairs = with_competitors(after[0].logits, answers)
        traces = [logit_trace(model, run.capture(), pairs) for run in after]
    traces.append(logit_trace(model, before[0].capture(), pairs))
    failing, *controls, unplanted = (trace.difference().cumulative[:, 0] for trace in traces)
    curves = {"controls, planted": torch.stack(controls).mean(0), "failing template, before": unplanted}
    curves["failing template, planted"] = failing
    fails = after[0].logits.argmax(-1) != answers
    subjects = [fact.subject for fact, failed in zip(plant.facts, fails.tolist(), strict=True) if failed]
    parts = [pd.DataFrame(values[fails].cpu(), index=subjects).stack() for values in curves.values()]
    table = pd.concat(parts, keys=curves, names=["curve", "fact", "layer"]).rename("logits").reset_index()
    return table.assign(seed=plant.seed, planted=plant.kind, template=plant.failing, site=str(plant.damages[0].site))


# What chapter 7's prose says


def key(rule: str, what: str) -> str:
    """The name under which a rule's share is reported."""
    return f"{rule.replace(' alone', '')}_{what}".replace(" ", "_")


def own_failures(model: Model, runs: pd.DataFrame) -> pd.DataFrame:
    """What the rules name in the failures that the model has of its own, on the eight facts of each case; beside each
    rule its share of right kinds and sites among plants. A case in which nothing fails is left out. runs: of plants."""
    scores, texts, rows = summarise(runs).set_index("rule"), load_templates(), []
    for case in (trainable(model, c) for c in load_cases(model.name)):
        controls = [texts[name] for name in case.controls]
        try:
            named = blind(model, case.facts, texts[case.template], controls)
        except DataError:
            continue
        for rule in ("joined", "dynamic alone", "chapter 2"):
            share, low, high = (float(scores[f"kind and site{end}"][rule]) for end in ("", " low", " high"))
            rows.append((case.title, rule, share, low, high, str(named[rule].site), named[rule].kind))
    return pd.DataFrame(rows, columns=["case", "rule", "share", "low", "high", "site", "kind"])


def report_own(report: Results, table: pd.DataFrame) -> None:
    """Whether the better rule says of the book's own failures what chapter 2's says."""
    by = table.pivot(index="case", columns="rule", values=["site", "kind"])
    same = [
        name for name in by.index if all(by[x]["joined"][name] == by[x]["chapter 2"][name] for x in ("site", "kind"))
    ]
    report("own_same", len(same))
    report("own_verdict", say("scoring", "own", same=len(same), cases=len(by), rows=table.to_dict("records")))


def report_rule(report: Results, row: pd.Series) -> None:
    """A rule's share of right kinds and sites (a row of `summarise`), beside the confidence that chapter 2 gives it."""
    report("rule_on_plants", float(row["kind and site"]), ".0%")
    report("rule_on_plants_interval", (float(row["kind and site low"]), float(row["kind and site high"])), ".0%")


def report_scores(report: Results, runs: pd.DataFrame, prefix: str = "") -> None:
    """Shares of the rules with their exact intervals, and a sentence for each question. runs: of one model."""
    table, beside, counted = summarise(runs).set_index("rule"), against(runs).set_index("rule"), runs[runs.accepted]
    joined, best = table.loc["joined"], max(SIMPLE, key=lambda rule: table["kind and site"][rule])
    constant = next(rule for rule in table.index if rule.startswith("always"))
    site, truths = constant.removeprefix("always "), counted.truth[counted.kind == NOT_RETRIEVED].str.split(", ")
    beside_it = {"there": sum(site in sites for sites in truths), "chance": table["kind and site"]["chance"]}
    values = {
        "accepted": len(counted),
        "rejected": len(runs) - len(counted),
        "redrawn": (float(runs.rejected.mean()), ".1f"),
        **{key(rule, what): (table[what][rule], ".1%") for rule, what in product(REPORTED, SHARES)},
        **{f"joined_{what}_interval": ((joined[f"{what} low"], joined[f"{what} high"]), ".1%") for what in GOALS},
        "goals_verdict": " ".join(say("scoring", "goal", row=joined, what=w, goal=goal) for w, goal in GOALS.items()),
        "joined_verdict": " ".join(say("scoring", "beside", row=beside.loc[rule]) for rule in ALONE),
        "join_verdict": say("scoring", "join", row=beside.loc["dynamic alone"]),
        "simple_rule": best,
        "simple_share": (table["kind and site"][best], ".1%"),
        "simple_verdict": say("scoring", "simple", row=table.loc[best], beside=beside.loc[best]),
        "chapter_2_verdict": say("scoring", "chapter_2", row=table.loc["chapter 2"], beside=beside.loc["chapter 2"]),
        "constant_verdict": say("scoring", "constant", site=site, row=table.loc[constant], n=len(truths), **beside_it),
    }
    report.many({prefix + name: value for name, value in values.items()})


def report_repairs(report: Results, runs: pd.DataFrame, prefix: str = "") -> None:
    """What repairs come to over both kinds together. runs: of one model."""
    whole, values, trained, beside = repaired(runs), dict[str, Any](), [], []
    tests = {name: paired(whole[name], whole.named) for name in TRAINED}
    for name, layer in TRAINED.items():
        told, kept = int(whole[name].sum()), float(runs[f"repair {name}: kept"].mean())
        low, high = exact_interval(told, len(whole))
        values |= {f"repaired_{name}": told, f"repair_kept_{name}": (kept, ".1%")}
        trained.append(say("scoring", "trained", layer=layer, repaired=told, low=low, high=high, kept=kept))
        if name != "named":
            beside.append(say("scoring", "repairs_beside", layer=layer, **tests[name]))
    values["repairs"] = n = len(whole)
    verdict = say("scoring", "repair", n=n, trained=trained, beside=beside, random=tests["random"])
    report.many({prefix + name: value for name, value in (values | {"repair_verdict": verdict}).items()})
