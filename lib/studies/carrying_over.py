"""What finished runs of `repairs` say: the rule that chooses, and what an edit must touch to carry over.

Nothing here runs a model. The rule was written before any held-out country was asked:

    harmless  as many capability probes and working templates are told as before, and on passages, after their first
              tokens, perplexity does not rise by more than BAND (that it falls is no harm)
    chosen    of a case's runs of a pathway, among the harmless ones (among all, where none is), the one that makes most
              selection countries told that are known and untold; of equals, that with the likelier answers

The sentences stand in `show/words/carrying_over.yaml`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lib.evaluation import BAND
from lib.facts import Case
from lib.results import Results
from lib.show.sentences import listed, say
from lib.sites import Site
from lib.statistics import exact_interval
from lib.weights import SINKS

ORDER = ("newline", "sink_token", "sink_kv", "v_only", "full")  # how tables and figures list them
KINDS = {"newline": "fixed prefix"} | dict.fromkeys(SINKS, "cause") | dict.fromkeys(("v_only", "full"), "place")
COUNTED = ("told", "repaired", "bled", "relations_told", "working_lost", "capability_lost", "capability_told")
sentence = partial(say, "carrying_over")


def harmless(runs: pd.DataFrame) -> pd.Series:
    """Which runs cost no more than they may."""
    kept = [runs[f"{kind}_told"] >= runs[f"{kind}_before"] for kind in ("capability", "working")]
    return kept[0] & kept[1] & (runs.ratio_later <= 1 + BAND)


def chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """The run that the rule chooses for each case and pathway, of those that train."""
    trained = runs[runs.steps > 0]
    worst_last = (-trained.log_probability, -trained.repaired, ~harmless(trained))
    ordered = trained.iloc[np.lexsort([key.to_numpy() for key in worst_last])]
    return ordered.groupby(["case", "pathway"], sort=True).head(1).sort_values(["case", "pathway"], ignore_index=True)


def named(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, with the fixed prefix that a sink starts from under its own name."""
    return runs.assign(pathway=runs.pathway.where(runs.steps > 0, "newline"))


def frontier(runs: pd.DataFrame) -> pd.DataFrame:
    """Every run that chooses, with what the rule reads."""
    best = chosen(runs)
    pick = runs.merge(best[["case", "pathway", "rate", "steps"]], how="left", indicator=True)["_merge"] == "both"
    table = named(runs).assign(chosen=pick.to_numpy() & (runs.steps > 0), harmless=harmless(runs))
    return _ordered(table)


def titled(table: pd.DataFrame, cases: Sequence[Case]) -> pd.DataFrame:
    """A table with the titles of its cases."""
    return table.assign(case_title=[cases[number - 1].title for number in table.case])


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    lessons = {"eight": 0, "sixteen": 1, "fit": 2}
    order = table.assign(_pathway=table.pathway.map(ORDER.index), _facts=table.facts.map(lessons))
    keys = ["case", "_pathway", "_facts", *(k for k in ("rate", "steps", "seed") if k in table)]
    return order.sort_values(keys, kind="stable", ignore_index=True).drop(columns=["_pathway", "_facts"])


def judged(runs: pd.DataFrame) -> pd.DataFrame:
    """The centre of the chapter: a row a case, pathway and lesson, from the runs that were asked the held-out
    countries. Counts are means over the seeds; low and high: the exact 95 % interval over countries, for the seed in
    the middle; least and most: of repaired, over the seeds."""
    rows = []
    true = named(runs[runs.variant == "true"])
    for (case, pathway, facts), part in true.groupby(["case", "pathway", "facts"]):
        counts = part.repaired.sort_values(ignore_index=True)
        middle, n = int(counts[len(counts) // 2]), int(part.untold.iloc[0])
        row: dict[str, Any] = {"case": case, "pathway": pathway, "kind": KINDS[str(pathway)], "facts": facts}
        row |= {"parameters": 0 if pathway == "newline" else int(part.parameters.iloc[0]), "seeds": len(part)}
        row |= {name: float(part[name].mean()) for name in COUNTED} | {"untold": n, "middle": middle}
        row |= dict(zip(("low", "high"), exact_interval(middle, n), strict=True))
        row |= {"least": int(counts.min()), "most": int(counts.max())}
        same = ["lesson_n", "bled_n", "bled_before", "relations_before", "relations_n"]
        row |= part[same].iloc[0].to_dict()
        row |= {name: float(part[name].mean()) for name in ("ratio", "ratio_start", "ratio_later")}
        rows.append(row)
    return _ordered(pd.DataFrame(rows))


def variants(runs: pd.DataFrame) -> pd.DataFrame:
    """The controls of the eight-fact runs, each beside the true lesson with the same seed. least, most: of repaired,
    over all of its seeds."""
    eight = runs[(runs.facts == "eight") & (runs.steps > 0) & runs.pathway.isin(SINKS)]
    by = ["case", "pathway", "variant"]
    seeds = eight.groupby(by).repaired.agg(seeds="size", least="min", most="max")
    return eight[eight.seed == runs.seed.min()].join(seeds, on=by).sort_values(by, kind="stable", ignore_index=True)


def report_choice(report: Results, runs: pd.DataFrame) -> None:
    """How many runs chose, and what was chosen."""
    table = frontier(runs)
    report.many({"runs": int((runs.steps > 0).sum()), "harmless": int(harmless(runs[runs.steps > 0]).sum())})
    report.table(
        "choice", table[table.chosen][["case", "pathway", "rate", "steps", "repaired", "untold"]].to_dict("records")
    )


def best_of(table: pd.DataFrame, runs: pd.DataFrame, case: int, kind: str, facts: str) -> pd.Series:
    """Of a kind of edit, trained on a lesson, the row of the pathway that repaired most selection countries (of equals,
    with the likelier answers). runs: those that choose."""
    part = table[(table.case == case) & (table.kind == kind) & (table.facts == facts)]
    worst_first = chosen(runs).query("case == @case").sort_values(["repaired", "log_probability"]).pathway.tolist()
    return part.loc[part.pathway.map({name: i for i, name in enumerate(worst_first)}).fillna(-1).idxmax()]


def report_judged(report: Results, table: pd.DataFrame, runs: pd.DataFrame, titles: list[str]) -> None:
    """What the chapter's prose says of the held-out countries. runs: those that choose."""
    lines, verdicts, best = [], list[str](), partial(best_of, table, runs)
    for case, title in enumerate(titles, start=1):
        cause, place = (best(case, kind, "eight") for kind in ("cause", "place"))
        fit, fixed = best(case, "cause", "fit"), best(case, "fixed prefix", "eight")
        words = {"title": title, "cause": cause, "place": place, "fit": fit, "fixed": fixed}
        for name, row in (("cause", cause), ("place", place), ("fit", fit), ("fixed", fixed)):
            report.many({f"{name}_{case}": float(row.repaired), f"{name}_{case}_pathway": str(row.pathway)})
            report.many({f"{name}_{case}_bled": float(row.bled), f"{name}_{case}_untold": int(row.untold)})
        verdicts.append(sentence("verdict", **words))
        lines.append((cause.repaired / cause.untold, place.repaired / place.untold, fit.repaired / fit.untold))
    halves, thirds = (all(line[i] >= goal for line in lines) for i, goal in ((0, 1 / 2), (2, 2 / 3)))
    report.many({"goal_eight": halves, "goal_fit": thirds, "goals": sentence("goals", eight=halves, fit=thirds)})
    first = best(1, "cause", "eight"), best(1, "place", "eight")
    report("verdict", " ".join(verdicts))
    eight = table[table.facts == "eight"]
    parts = [eight[eight.case == i].set_index("pathway") for i in range(1, len(titles) + 1)]
    told = [{"title": x, **part.repaired, "untold": part.untold.max()} for x, part in zip(titles, parts, strict=True)]
    report("disguise_verdict", sentence("disguise", rows=told))
    report("landing", sentence("landing", cause=first[0], place=first[1]))
    sinks, places = (eight[pick].to_dict("records") for pick in (eight.kind == "cause", eight.pathway == "v_only"))
    report("cost_verdict", sentence("cost", sinks=sinks, places=places))


def report_reading(report: Results, table: pd.DataFrame, site: Site) -> None:
    """Whether the knowledge head reads again where the cause is repaired."""
    rows = table.to_dict("records")
    failing, control, sinks = rows[0], rows[-1], [row for row in rows if row["edited"]]
    report.many({"reading_head": str(site), "reading_n": failing["n"], "reading_before": failing["writes"]})
    if sinks:
        report("reading_after", sinks[-1]["writes"])
    report("reading_verdict", sentence("reading", failing=failing, control=control, sinks=sinks, head=str(site)))
    report.table("reading", rows)


def report_variants(report: Results, table: pd.DataFrame) -> None:
    """What the controls make of the first case."""
    first = table[table.case == 1].set_index(["variant", "pathway"])
    rows = first.drop(index="true", columns="told").rename(columns={"learned": "told", "lesson_n": "n"}).reset_index()
    found = rows[["variant", "pathway", "told", "n", "repaired", "untold", "seeds", "least", "most"]].to_dict("records")
    same = {pathway: row.to_dict() for (variant, pathway), row in first.iterrows() if variant == "true"}
    report.many({f"{key}_verdict": sentence(key, rows=found, same=same) for key in ("variants", "middle")})
    report(
        "false_told", listed([f"{r['told']} of {r['n']} ({r['pathway']})" for r in found if r["variant"] == "false"])
    )


def report_mended(report: Results, runs: pd.DataFrame) -> pd.DataFrame:
    """The planted routes: a row a way of training, with trained and held facts told over all plants."""
    used = runs[runs.used.astype(bool)]
    names = dict.fromkeys(c.removesuffix(" held told") for c in used if c.endswith(" held told"))
    rows = []
    for name in names:
        told, held = (int(used[f"{name} {part} told"].sum()) for part in ("trained", "held"))
        trained_n, held_n = int(used.trained.sum()), int(used.held.sum())
        rows.append({"way": name, "trained_told": told, "trained_n": trained_n, "held_told": held, "held_n": held_n})
    table = pd.DataFrame(rows)
    table["plants"] = [int((used[f"{name} held told"] > 0).sum()) for name in names]
    report.many({"mended_plants": len(used), "mended_asked": int(used.held.sum())})
    ways = {"site": "full", "values": "v_only", "elsewhere": "elsewhere"}
    by = {name: table[table.way == way].iloc[0] for name, way in ways.items()}
    report("mended_verdict", sentence("mended", **by, n=len(used)))
    report.table("mended", table.to_dict("records"))
    return table
