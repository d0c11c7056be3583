"""studies.side_effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from lib import training
from lib.diagnosis import prescribe
from lib.errors import EditError
from lib.evaluation import BAND, ELSEWHERE, NONE, build_protocol, generalisation, measure
from lib.facts import load_cases
from lib.models import Model
from lib.recall import trainable
from lib.statistics import exact_interval
from lib.studies import experiment, pathways
from lib.training import task_at

BLED = (
    "The trained answers bleed into the neighbourhood: beside each fact, the edit has learned that this wording is to "
    "be followed by one of these answers. No probe about ice or kittens can see it."
)
LEFT_OUT = ("the facts", "paraphrases", "working templates", ELSEWHERE, "other relations", "neighbours")


def report_planted(report: Callable[..., None], table: pd.DataFrame) -> None:
    """What the chapter's prose says of the planted control."""
    told = table[table.told_after == table.facts]
    whole, part = told[told.repaired == told.untold], told[told.repaired < told.untold]
    report("planted_cases", table.case.nunique())
    report("planted_untold", int(table.untold.min()))
    report("planted_whole", [f"{row.pathway.replace('_', ' ')} ({row.case})" for row in whole.itertuples()] or "none")
    report("planted_told", len(told))
    report("planted_part", len(part))
    report("planted_part_most", int(part.repaired.max()) if len(part) else 0)


def entry(
    name: str, outcome: pd.DataFrame, texts: pd.DataFrame, general: pd.DataFrame, bled: pd.DataFrame
) -> dict[str, Any]:
    """What results keep of a pathway (design, section 7)."""
    by = outcome[outcome.pathway == name].set_index("what")
    ppl = texts[texts.pathway == name].iloc[0]
    held = general[(general.pathway == name) & (general.split == "held_out")].iloc[0]
    probes = by.loc[["capability", "unrelated"]]
    return {
        "capability_before": by.before["capability"],
        "capability_after": by.after["capability"],
        "unrelated_before": by.before["unrelated"],
        "unrelated_after": by.after["unrelated"],
        "flips": (probes.gained + probes.lost).sum(),
        "capability_flips": (probes.gained + probes.lost)["capability"],
        "ppl_before": ppl.ppl_before,
        "ppl_after": ppl.ppl_after,
        "ppl_ratio": ppl.ratio,
        "kl": ppl.kl,
        "held_out_facts": held["all"],
        "held_out_told_before": held.told_before,
        "held_out_told_after": held.told_after,
        "held_out_untold": held.untold,
        "held_out_repaired": held.repaired,
        "bled_after": bled.set_index("pathway").bled[name],
        **{f"{key.replace(' ', '_').replace(',', '')}_after": by.after[key] for key in LEFT_OUT},
    }


def report_effects(
    report: Callable[..., None],
    best: str,
    outcome: pd.DataFrame,
    texts: pd.DataFrame,
    general: pd.DataFrame,
    bled: pd.DataFrame,
) -> None:
    """What the chapter's prose says of the recommended pathway and of all."""
    by = outcome.set_index(["pathway", "what"])
    ppl, held = texts.set_index("pathway"), general[general.split == "held_out"].set_index("pathway")
    probes = outcome[outcome.what.isin(["capability", "unrelated"])]
    own = by.loc[best]
    report("capability_before", int(own.before["capability"]))
    report("capability_after", int(own.after["capability"]))
    report("capability_n", int(own.n["capability"]))
    report("unrelated_before", int(own.before["unrelated"]))
    report("unrelated_after", int(own.after["unrelated"]))
    report("unrelated_n", int(own.n["unrelated"]))
    report("own_flips", int((own.gained + own.lost)[["capability", "unrelated"]].sum()))
    report("all_flips", int((probes.gained + probes.lost).sum()))
    right = int(own.before[["capability", "unrelated"]].sum())
    report("resolution", exact_interval(0, right)[1], ".0%")
    report("probes_right", right)
    report("ppl_before", ppl.ppl_before[best], ".2f")
    report("ppl_after", ppl.ppl_after[best], ".2f")
    report("ppl_change", ppl.ratio[best] - 1, "+.2%")
    report("ppl_interval", (float(ppl.ratio_low[best] - 1), float(ppl.ratio_high[best] - 1)), "+.2%")
    report("ppl_within", "within" if abs(ppl.ratio[best] - 1) <= BAND else "not within")
    report("ppl_tokens", int(ppl.tokens[best]), ",")
    report("untold", int(held.untold[best]))
    report("repaired", int(held.repaired[best]))
    report("repaired_share", held.repaired[best] / max(1, held.untold[best]), ".0%")
    report("repaired_interval", (float(held.low[best]), float(held.high[best])), ".0%")
    report("repaired_most", int(held.repaired.max()))
    report("repaired_most_by", str(held.repaired.idxmax()).replace("_", " "))
    report("repaired_verdict", "most" if 2 * held.repaired.max() >= held.untold.max() else "a minority")
    report("best_control", int(held.best_control[best]))
    spilt = bled.set_index("pathway").bled
    report("bled_before", int(spilt[NONE]))
    report("bled_after", int(spilt[best]))
    report("bled_prompts", int(bled.prompts.iloc[0]))
    bleeds = bool(spilt[best] > 2 * max(1, spilt[NONE]))
    report("bleeds", bleeds)
    report("bled_lesson", BLED if bleeds else "The trained answers stay where they belong.")
    report("other_relations", [int(own.gained["other relations"]), int(own.lost["other relations"])])
    report("elsewhere", [int(own.gained[ELSEWHERE]), int(own.lost[ELSEWHERE])])
    report("elsewhere_n", int(own.n[ELSEWHERE]))
    report("neighbours_lost", int(own.lost["neighbours"]))
    report("neighbours", int(own.n["neighbours"]))


@experiment
def planted_edit(model: Model, *, case: int, pathway: str, seed: int = 0) -> dict[str, Any]:
    """The same training and the same held-out question where the truth is known: on the organism, whose failures are
    failures of routing because they were planted as such. case: counted from 1. What is told after, how many held-out
    facts are repaired, and whether the same recipe tells false facts. Raises EditError for a case that is not there."""
    listed = load_cases(model.name)
    if not 1 <= case <= len(listed):
        raise EditError(f"there is no case {case}: {model.name} has {len(listed)}, from 1.")
    own = trainable(model, listed[case - 1])
    task = task_at(model, own, prescribe(model, own).knowledge_head.layer)
    found = training.compare(model, task, seed=seed, pathways=[pathway], progress=False)
    (lie,) = pathways.repeat(model, training.false_facts(task), found).itertuples()
    asked = measure(model, build_protocol(model, own, task.layer, texts={}), found.edits, passages=False)
    held = generalisation(asked, own).query("split == 'held_out'").iloc[0] if found.edits else None
    return {
        "title": own.title,
        "facts": len(task.facts),
        "told_before": sum(task.told_before),
        "told_after": sum(found.edits[pathway].told_after) if found.edits else 0,  # a diverged training leaves none
        "untold": 0 if held is None else int(held.untold),
        "repaired": 0 if held is None else int(held.repaired),
        "false_told": int(lie.told),
        "false_reached": bool(lie.reached),
    }


def planted_control(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a case and pathway, from the sweep `planted`."""
    return runs.drop(columns=["case", "seed"]).rename(columns={"title": "case"})
