"""The book's method for facts of one's own: how many are told and known, where and why they fail.

    findings = diagnose(model, load_facts("mine.csv"), "The capital of {} is", ["I visited {} and its capital,"])
    print(findings)                     # a table

Facts that their first token identifies are split by the hash of their subject (`facts.split_of`), unless their file
splits them: the rule and the search for a cause read the fit and selection part; the held-out part is kept for repairs
(`own_repairs`). Where no control is given, `own_controls` chooses some.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lib.diagnosis import Diagnosis, Verdict, gather
from lib.diagnosis import diagnose as by_rule
from lib.errors import DataError
from lib.facts import Case, Fact, Template, prompts, validated, with_splits
from lib.models import Model
from lib.recall import known_and_told, left_out_words, load_prefixes, scorable, screen, tell
from lib.sites import Site
from lib.static import join, relation_maps
from lib.studies.causes import ENDS, HALF, sink
from lib.studies.localisation import Named, blind
from lib.studies.own_controls import Choice, choose
from lib.trace import subject_stream_norm

FAILING = "failing"  # the name of the template that fails
MOST = 24  # facts that are traced, and that a repair is trained on
Say = Callable[[str], object]


@dataclass(frozen=True)
class Cause:
    """What was tried on the facts that fail, with no weight touched. prefixes: name -> text and told; ends: text ->
    told; sink: by how much the subject's stream is larger in the failing prompt than under the first control."""

    name: str  # first position, format, or none found
    asked: int
    prefixes: dict[str, tuple[str, int]]
    ends: dict[str, int]
    sink: tuple[float, str]

    @property
    def prefix(self) -> str:
        """The name of the best prefix."""
        return max(self.prefixes, key=lambda name: self.prefixes[name][1])

    @property
    def end(self) -> str:
        return max(self.ends, key=self.ends.__getitem__)


@dataclass(frozen=True)
class Findings:
    """states: a row a fact (subject, answer, split, told, known). asked: a row a wording (name, text, told, n). choice:
    how controls were chosen where none was given. diagnosis, named (what chapter 7's joined rule names), cause: None
    where nothing is known and not told, or for a reason."""

    model: Model
    case: Case
    templates: dict[str, str]
    states: pd.DataFrame
    asked: pd.DataFrame
    left_out: str
    choice: Choice | None
    diagnosis: Diagnosis | None
    named: Named | None
    cause: Cause | None
    reason: str

    @property
    def verdict(self) -> Verdict | None:
        return self.diagnosis.verdict if self.diagnosis else None

    @property
    def failed(self) -> pd.DataFrame:
        return self.states[self.states.known & ~self.states.told]

    def count(self, column: str) -> int:
        return int(self.states[column].sum())

    def rows(self) -> list[tuple[str, str]]:
        """What was found, in words: name and value."""
        n, out = len(self.states), list[tuple[str, str]]()
        out.append(("facts scored", f"{n}; left out, because their first token does not tell: {self.left_out}"))
        chosen, best = "chosen by rule" if self.choice else "as given", self.best_control
        out.append(("controls", f"{len(self.case.controls)}, {chosen}: {best.text[-60:]!r} tells {best.told}"))
        out.append(("told", f"{self.count('told')} of {n}"))
        out.append(("known", f"{self.count('known')} of {n}, told under at least one control"))
        out.append(("known, not told", str(len(self.failed))))
        found, cause = self.diagnosis, self.cause
        if not found or not cause:
            return [*out, ("failure", self.why_none())]
        verdict, place = found.verdict, Site(found.layer)
        out.append(("seen at", f"{verdict.knowledge_head}, which still writes {verdict.retention:.0%} of the answer"))
        out.append(("failure kind", verdict.failure_kind))
        out.append(("suppressor", str(verdict.suppressor or "none")))
        stable = f"{found.confidence}: {found.stability:.0%} of resamples agree, static map p = {found.static_p:.3f}"
        out.append(("confidence", stable))
        tried = f"prefix {cause.prefixes[cause.prefix][0]!r}: {cause.prefixes[cause.prefix][1]}"
        tried += f", end {cause.end!r}: {cause.ends[cause.end]}, of {cause.asked} untold"
        out.append(("cause", f"{cause.name} ({tried})"))
        return [*out, ("at the place", f"v_only of {place}"), ("at the cause", self.at_the_cause())]

    @property
    def best_control(self) -> Any:
        """The control that tells most: its row of `asked`."""
        return max(list(self.asked.itertuples())[1:], key=lambda row: row.told)

    def why_none(self) -> str:
        """Why there is no diagnosis."""
        if self.reason:
            return self.reason
        if not self.count("known"):
            return "none to be found: no fact is known under any control, so none is lost between knowing and telling"
        if len(self.failed):
            return f"not diagnosed: all {len(self.failed)} known and not told are held out; give more facts"
        return "none: every fact that is known is told"

    def at_the_cause(self) -> str:
        if self.cause and self.cause.name == "format":
            return f"none is trained: put {self.cause.end!r} at the end of the prompt"
        return "sink_token or sink_kv, before every text"

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())

    def as_json(self) -> dict[str, Any]:
        """What was found, as plain values."""
        found = vars(self.verdict) if self.verdict else {}
        rated = {name: getattr(self.diagnosis, name) for name in ("confidence", "stability", "static_p") if found}
        cause = vars(self.cause) if self.cause else {}
        named = {"joined_rule": vars(self.named)} if self.named else {}
        about = {"model": self.model.name, "templates": self.templates, "left_out": self.left_out, "cause": cause}
        return about | found | rated | named | {"facts": self.states.to_dict("records")}


def diagnose(
    model: Model, facts: Sequence[Fact], template: str, controls: Sequence[str] = (), *, say: Say = lambda text: None
) -> Findings:
    """Ask the facts, and diagnose those that are known and not told. Raises DataError for a template or control without
    one hole, and where no answer can be scored by its first token."""
    for name, text in (("the template", template), *(("a control", text) for text in controls)):
        validated(Template, text, name)
    screened = screen(model, facts)
    split, choice = with_splits(scorable(model, facts)), None
    if not controls:
        say("no control was given: the book's own forms are tried")
        choice = choose(model, split, template)
        controls, split = choice.controls, tuple(f for f in split if f not in choice.examples)
    templates = {FAILING: template} | {f"control {i}": text for i, text in enumerate(controls, start=1)}
    say(f"{len(split)} facts are asked under {len(templates)} wordings")
    case = Case("own", "your facts", split, split, FAILING, tuple(list(templates)[1:]))
    table = tell(model, split, templates, progress="asking")
    states = known_and_told(table, case).assign(answer=[f.answer for f in split], split=[f.split for f in split])
    counts = table.groupby("template", sort=False).told.agg(["sum", "count"]).to_numpy().tolist()
    rows = [(name, text, *count) for (name, text), count in zip(templates.items(), counts, strict=True)]
    asked = pd.DataFrame(rows, columns=["name", "text", "told", "n"])
    seen = set(states[states.routing_failure & (states.split != "held_out")].subject)
    failing = [f for f in split if f.subject in seen][:MOST]
    found: dict[str, Any] = {"diagnosis": None, "named": None, "cause": None, "reason": ""}
    if failing:
        say(f"{len(failing)} facts that are known and not told are traced")
        found |= _diagnosed(model, case, templates, failing, table) | {"cause": _cause(model, failing, templates)}
    states = states[["subject", "answer", "split", "told", "known"]]
    return Findings(model, case, templates, states, asked, left_out_words(screened), choice, **found)


def _diagnosed(
    model: Model, case: Case, templates: dict[str, str], failing: Sequence[Fact], table: pd.DataFrame
) -> dict[str, Any]:
    """By the rule of chapter 2, and by chapter 7's joined rule; the relation map is of the facts open to study."""
    study = [f for f in case.facts if f.split != "held_out"]
    part = table[table.subject.isin([f.subject for f in failing])]
    try:
        evidence = gather(model, replace(case, facts=tuple(failing)), part)
        named = blind(model, failing, templates[FAILING], [templates[name] for name in case.controls])
    except DataError as reason:  # one answer for all, or known by further answers alone
        return {"reason": f"not diagnosed: {reason}"}
    maps = join(relation_maps(model, study, progress="relation map").values())
    return {"diagnosis": by_rule(evidence, case, maps), "named": named["joined"]}


def _cause(model: Model, failing: Sequence[Fact], templates: dict[str, str]) -> Cause:
    """As `causes.found`, of these facts."""
    text, control = list(templates.values())[:2]

    def told(wording: str, prefix: str = "") -> int:
        return int(tell(model, failing, {"": wording}, prefix=prefix).told.sum())

    prefixes = {name: (prefix, told(text, prefix)) for name, prefix in load_prefixes(model).items() if prefix}
    ends = {end: told(text + end) for end in ENDS}
    best = {"first position": max(count for _, count in prefixes.values()), "format": max(ends.values())}
    name = next((name for name, count in best.items() if count >= HALF * len(failing)), "none found")
    subjects = [f.subject for f in failing]
    lines = {wording: prompts(failing, wording) for wording in (text, control)}
    peaks = {w: float(subject_stream_norm(model, p, subjects).mean(0).max()) for w, p in lines.items()}
    return Cause(name, len(failing), prefixes, ends, sink(peaks))
