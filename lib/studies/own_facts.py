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
from lib.show.sentences import say as say_of
from lib.static import join, relation_maps
from lib.studies.causes import ENDS, cause_of, sink
from lib.studies.localisation import Named, blind
from lib.studies.own_controls import Choice, choose
from lib.trace import subject_stream_norm

FAILING = "failing"  # the name of the template that fails
MOST = 24  # facts that are traced, and that a repair is trained on
Say = Callable[[str], object]
COUNTS = ("facts scored", "controls", "told", "known", "known, not told")  # rows of the table
FOUND = ("seen at", "failure kind", "suppressor", "confidence", "cause", "at the place", "at the cause")


@dataclass(frozen=True)
class Cause:
    """What was tried on the facts that fail, with no weight touched. prefixes: name -> text and told; ends: text ->
    told; sink: by how much the subject's stream is larger in the failing prompt than under the first control."""

    name: str  # first position, format, or none found
    asked: int
    prefixes: dict[str, tuple[str, int]]
    ends: dict[str, int]
    sink: tuple[float, str]
    prefix: str  # the name of the best
    end: str


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
        return [(name, self.say(name)) for name in (*COUNTS, *(FOUND if self.diagnosis else ("failure",)))]

    def say(self, key: str) -> str:
        """A sentence of words/own.yaml."""
        return say_of("own", key, f=self)

    @property
    def best_control(self) -> Any:
        """The control that tells most: its row of `asked`."""
        return max(list(self.asked.itertuples())[1:], key=lambda row: row.told)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())

    def as_json(self) -> dict[str, Any]:
        """What was found, as plain values."""
        about = {"model": self.model.name, "templates": self.templates, "left_out": self.left_out}
        found = self.diagnosis.summary() if self.diagnosis else {"failure": self.say("failure")}
        parts = {"joined_rule": self.named, "cause": self.cause}
        parts = {name: vars(part) for name, part in parts.items() if part}
        return about | found | parts | {"facts": self.states.to_dict("records")}


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
        return {"reason": str(reason)}
    maps = join(relation_maps(model, study, progress="relation map").values())
    return {"diagnosis": by_rule(evidence, case, maps), "named": named["joined"]}


def _cause(model: Model, failing: Sequence[Fact], templates: dict[str, str]) -> Cause:
    """As `causes.found`, of these facts."""
    text, control = list(templates.values())[:2]

    def told(wording: str, prefix: str = "") -> int:
        return int(tell(model, failing, {"": wording}, prefix=prefix).told.sum())

    prefixes = {name: (prefix, told(text, prefix)) for name, prefix in load_prefixes(model).items() if prefix}
    ends = {end: told(text + end) for end in ENDS}
    prefix, end = max(prefixes, key=lambda name: prefixes[name][1]), max(ends, key=ends.__getitem__)
    best = {"first position": prefixes[prefix][1], "format": ends[end]}
    name = cause_of(best, len(failing))
    subjects = [f.subject for f in failing]
    lines = {wording: prompts(failing, wording) for wording in (text, control)}
    peaks = {w: float(subject_stream_norm(model, p, subjects).mean(0).max()) for w, p in lines.items()}
    return Cause(name, len(failing), prefixes, ends, sink(peaks), prefix, end)
