"""The book's method for facts of one's own: how many are told and known, where and why they fail, and a repair.

    findings = diagnose(model, load_facts("mine.csv"), "The capital of {} is", ["I visited {} and its capital,"])
    print(findings)                     # a table
    edit, held = repair(findings, "sink_token")

Facts that their first token identifies are split by the hash of their subject (`facts.split_of`): the rule reads the
fit and selection part, a repair is trained on fit facts that are known, and the held-out part is asked once, after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lib.diagnosis import NoFailure, Verdict, gather
from lib.edits import Edit, applied
from lib.errors import DataError, EditError
from lib.facts import Case, Fact, with_splits
from lib.models import Model
from lib.recall import known_and_told, load_prefixes, screen, tell
from lib.sites import Site
from lib.studies.causes import ENDS, HALF
from lib.training import DEFAULT, chosen, sink_task, summary, tasks_at, train
from lib.weights import PATHWAYS, SINKS

FAILING = "failing"  # the name of the template that fails
MOST = 24  # facts that are traced, and that a repair is trained on


@dataclass(frozen=True)
class Findings:
    """states: a row a fact (subject, answer, split, told, known). verdict: None where nothing is known and not told.
    cause: first position, format, or none found; how many of the untold the best prefix and the best end make told."""

    model: Model
    case: Case
    templates: dict[str, str]
    states: pd.DataFrame
    left_out: int
    verdict: Verdict | None
    cause: str
    prefix: tuple[str, int]
    end: tuple[str, int]

    @property
    def failed(self) -> pd.DataFrame:
        return self.states[self.states.known & ~self.states.told]

    def rows(self) -> list[tuple[str, str]]:
        """What was found, in words: name and value."""
        n, verdict, out = len(self.states), self.verdict, list[tuple[str, str]]()
        out.append(("facts scored", f"{n}, {self.left_out} left out: their first token does not identify the answer"))
        out.append(("told", f"{int(self.states.told.sum())} of {n}"))
        out.append(("known", f"{int(self.states.known.sum())} of {n}, told under at least one control"))
        out.append(("known, not told", str(len(self.failed))))
        if verdict is None:
            return [*out, ("failure", "none: every fact that is known is told")]
        out.append(("seen at", f"{verdict.knowledge_head}, which still writes {verdict.retention:.0%} of the answer"))
        out.append(("failure kind", verdict.failure_kind))
        out.append(("suppressor", str(verdict.suppressor or "none")))
        tried = f"best prefix {self.prefix[0]}: {self.prefix[1]}, best end {self.end[0]}: {self.end[1]}"
        out.append(("cause", f"{self.cause} ({tried}, of the untold that were asked)"))
        place = Site(verdict.knowledge_head.layer)
        return [
            *out,
            ("at the place", f"v_only of {place}"),
            ("at the cause", "sink_token or sink_kv, before every text"),
        ]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:{width}}  {value}" for name, value in self.rows())

    def as_json(self) -> dict[str, Any]:
        """What was found, as plain values."""
        return {"model": self.model.name, **dict(self.rows()), "facts": self.states.to_dict("records")}


def diagnose(model: Model, facts: Sequence[Fact], template: str, controls: Sequence[str]) -> Findings:
    """Ask the facts, and diagnose those that are known and not told. Raises DataError for a template or control without
    one hole, for no control, and where no answer can be scored by its first token."""
    templates = {FAILING: template} | {f"control {i}": text for i, text in enumerate(controls, start=1)}
    if bad := [text for text in templates.values() if text.count("{}") != 1]:
        raise DataError(f"{bad[0]!r} has {bad[0].count('{}')} holes; write exactly one {{}} for the subject.")
    if not controls:
        raise DataError("give at least one control: another wording, under which the facts may be known.")
    kept = [f for f, reason in zip(facts, screen(model, facts).left_out, strict=True) if not reason]
    if not kept:
        raise DataError(
            f"none of the {len(facts)} answers can be told by its first token with {model.name}'s tokenizer."
        )
    split = with_splits(kept)
    case = Case("own", "own", split, split, FAILING, tuple(list(templates)[1:]))
    table = tell(model, split, templates, progress="asking")
    states = known_and_told(table, case).assign(answer=[f.answer for f in split], split=[f.split for f in split])
    seen = states[states.routing_failure & (states.split != "held_out")]
    open_to_study = [f for f in split if f.subject in set(seen.subject)][:MOST]
    columns = ["subject", "answer", "split", "told", "known"]
    found: dict[str, Any] = {"left_out": len(facts) - len(kept), "states": states[columns]}
    if not open_to_study:
        return Findings(model, case, templates, **found, verdict=None, cause="none", prefix=("", 0), end=("", 0))
    return Findings(
        model,
        case,
        templates,
        **found,
        verdict=_verdict(model, case, open_to_study, table),
        **_cause(model, open_to_study, template),
    )


def _verdict(model: Model, case: Case, facts: Sequence[Fact], table: pd.DataFrame) -> Verdict | None:
    try:
        part = table[table.subject.isin([f.subject for f in facts])]
        return gather(
            model, Case(case.name, case.title, tuple(facts), case.large, case.template, case.controls), part
        ).verdict()
    except NoFailure:
        return None


def _cause(model: Model, facts: Sequence[Fact], template: str) -> dict[str, Any]:
    """As `causes.found`, of these facts."""
    prefixes = {
        p: int(tell(model, facts, {"": template}, prefix=p).told.sum()) for p in load_prefixes(model).values() if p
    }
    ends = {end: int(tell(model, facts, {"": template + end}).told.sum()) for end in ENDS}
    best = {name: max(tried, key=tried.__getitem__) for name, tried in (("prefix", prefixes), ("end", ends))}
    counts = {"first position": prefixes[best["prefix"]], "format": ends[best["end"]]}
    cause = next((name for name, told in counts.items() if told >= HALF * len(facts)), "none found")
    return {
        "cause": cause,
        "prefix": (repr(best["prefix"]), counts["first position"]),
        "end": (repr(best["end"]), counts["format"]),
    }


def repair(findings: Findings, pathway: str, *, seed: int = 0) -> tuple[Edit, dict[str, int]]:
    """Train a pathway by chapter 3's rule on fit facts that are known, at the place or the cause that was found; ask
    the held-out facts that are known and not told: untold, repaired. Raises EditError for another pathway, where there
    is nothing to repair, and where every training diverged."""
    model, verdict = findings.model, findings.verdict
    if pathway not in PATHWAYS:
        raise EditError(f"unknown pathway {pathway!r}; choose from {', '.join(PATHWAYS)}.")
    states = findings.states
    fit = set(states[(states.split == "fit") & states.known].subject)
    facts = tuple(f for f in findings.case.facts if f.subject in fit)[:MOST]
    if verdict is None or not facts:
        raise EditError("there is nothing to repair: no fact of the part that trains is known and not told.")
    case = Case("own", "own", facts, findings.case.large, FAILING, findings.case.controls)
    layer = verdict.knowledge_head.layer
    task = tasks_at(model, case, [layer], DEFAULT, templates=findings.templates)[layer]
    task = sink_task(model, task) if pathway in SINKS else task
    runs = [train(model, task, pathway, rate=rate, seed=seed) for rate in task.recipe.rates]
    edit = runs[chosen(summary(runs))].edit
    if edit is None:
        raise EditError(f"every training of {pathway} diverged; try another pathway.")
    lost = set(findings.failed[findings.failed.split == "held_out"].subject)
    held = [f for f in findings.case.facts if f.subject in lost]
    with applied(model, edit) as changed:
        told = int(tell(changed, held, {"": findings.templates[FAILING]}).told.sum()) if held else 0
    counts = {"facts": len(facts), "told_before": sum(edit.told_before), "told_after": sum(edit.told_after)}
    return edit, counts | {"untold": len(held), "repaired": told}
