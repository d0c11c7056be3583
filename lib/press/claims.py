"""The source page's statements, held to account: `data/claims.yaml`, and what a run made of each.

Five verdicts. `reproduced`: all that the claim must and should satisfy holds. `not reproduced`: something that it must
satisfy does not. `cannot tell`: that neither, but the same measurement fails where the claim is true by construction
(`control`, a positive control), so that its failing says nothing. `differs`: it holds as the page measured it, and not
by a check that it should survive as well. `not run`: a result is missing, or the claim is about GPT-2's weights and
another model was run. There is no verdict without a run behind it, and `not run` is never a pass.

Three kinds. `empirical`: how a model behaves. `arithmetic`: follows from a model's shape. `design`: what was built or
counted, true of whoever builds it so. Verdicts are counted by kind: the last two cannot fail in an interesting way.
"""

import operator
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pandas as pd
from pydantic import BaseModel, Field, model_validator

from lib.errors import DataError
from lib.facts import load_mapping, validated
from lib.press.texts import chapter_number, fill
from lib.results import NOT_RUN, as_text, reach, results_path

REPRODUCED, NOT_REPRODUCED, DIFFERS, CANNOT_TELL = "reproduced", "not reproduced", "differs", "cannot tell"
VERDICTS = {v: v for v in (REPRODUCED, NOT_REPRODUCED)} | {DIFFERS: "differ", CANNOT_TELL: "cannot tell"}
VERDICTS |= {NOT_RUN: "not run"}
Kind = Literal["empirical", "arithmetic", "design"]
RELATIONS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "equals": ("is {}", operator.eq),
    "within": ("is {} ± {}", lambda value, wanted: abs(value - wanted[0]) <= wanted[1]),
    "at_least": ("is at least {}", operator.ge),
    "at_most": ("is at most {}", operator.le),
    "above": ("is above {}", operator.gt),
    "below": ("is below {}", operator.lt),
    "contains": ("contains {}", lambda value, wanted: wanted in value),
}
Text = Annotated[str, Field(min_length=1)]


class Entry(BaseModel, extra="forbid", frozen=True, str_strip_whitespace=True):
    """A part of data/claims.yaml: what it does not know, it refuses."""


class Check(Entry):
    """One comparison: the value under `key` stands in `relation` to `wanted` (`$key`: to another value). In the file,
    `{key: told, equals: 8}`."""

    key: str
    relation: str
    wanted: Any

    @model_validator(mode="before")
    @classmethod
    def _name_relation(cls, entry: Any) -> Any:
        names = [name for name in entry if name != "key"] if isinstance(entry, dict) else []
        if len(names) != 1 or names[0] not in RELATIONS:
            raise ValueError(f"a comparison needs a `key` and exactly one of {', '.join(RELATIONS)}")
        wanted = entry[names[0]]
        pair = isinstance(wanted, list) and len(wanted) == 2 and all(map(_is_number, wanted))
        if pair != (names[0] == "within"):
            raise ValueError("`within` takes [value, tolerance], the others one value")
        return {name: entry[name] for name in entry if name == "key"} | {"relation": names[0], "wanted": wanted}

    @property
    def reference(self) -> str:
        """The key whose value is wanted, or ""."""
        return self.wanted[1:] if isinstance(self.wanted, str) and self.wanted.startswith("$") else ""

    def __str__(self) -> str:
        text = f"`{self.reference}`" if self.reference else f"“{self.wanted}”"
        numbers = self.wanted if self.relation == "within" else [self.wanted]
        texts = [text if isinstance(n, str) else _shown(n, "," if isinstance(n, int) else "") for n in numbers]
        return f"`{self.key}` {RELATIONS[self.relation][0].format(*texts)}"


class Condition(Entry):
    """At least one of the checks holds. because: what to say where none does, with `{key}` for values. In the file, a
    single check stands without `any_of`."""

    any_of: Annotated[list[Check], Field(min_length=1)]
    because: str = ""

    @model_validator(mode="before")
    @classmethod
    def _list_single_check(cls, entry: Any) -> Any:
        if not isinstance(entry, dict) or "any_of" in entry:
            return entry
        check = {name: value for name, value in entry.items() if name != "because"}
        return {"any_of": [check], "because": entry.get("because", "")}

    def __str__(self) -> str:
        return " or ".join(map(str, self.any_of))


class Claim(Entry):
    """A statement of the source page; data/claims.yaml says what each entry is, and what a key is."""

    id: Text
    kind: Kind
    says: Text
    paper: Text
    chapter: Text
    judged_on: Literal["any", "gpt2", "shape"]
    found: Text
    must: Annotated[list[Condition], Field(min_length=1)]
    should: list[Condition] = []
    control: list[Condition] = []
    note: str = ""

    @model_validator(mode="after")
    def _close_braces(self) -> "Claim":
        try:
            self.chapters  # noqa: B018
        except ValueError as error:
            raise ValueError(f"a text has a brace that closes or opens nothing ({error})") from error
        return self

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return (*self.must, *self.should, *self.control)

    @property
    def keys(self) -> list[str]:
        """Every key that the claim reads, as `chapter/path`."""
        parts = map(string.Formatter().parse, (self.found, *(c.because for c in self.conditions)))
        keys = [name for _, name, _, _ in chain(*parts)]
        keys += [key for c in self.conditions for check in c.any_of for key in (check.key, check.reference)]
        return list(dict.fromkeys(self.full(key) for key in keys if key))

    @property
    def chapters(self) -> list[str]:
        """The chapters whose results the claim reads, its own first."""
        return list(dict.fromkeys([self.chapter, *(key.partition("/")[0] for key in self.keys)]))

    def full(self, key: str) -> str:
        return key if "/" in key else f"{self.chapter}/{key}"


@dataclass(frozen=True)
class Judged:
    """What became of a claim. found: the value here as text, empty if not run."""

    claim: Claim
    verdict: str
    found: str
    reason: str


def load(path: Path, *, chapters: Sequence[str]) -> tuple[Claim, ...]:
    """The claims of a file, in its order. chapters: those that a claim may name. Raises DataError, naming the claim."""
    entries = load_mapping(path).get("claims")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} has no list `claims`; write one entry a statement under it.")
    claims = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, claim {number} ({entry.get('id', 'no id') if isinstance(entry, dict) else entry!r})"
        claims.append(validated(Claim, entry, where))
        if unknown := [chapter for chapter in claims[-1].chapters if chapter not in chapters]:
            raise DataError(f"{where} names the chapter {unknown[0]!r}; there are {', '.join(chapters)}.")
    if repeated := [name for name, n in Counter(c.id for c in claims).items() if n > 1]:
        raise DataError(f"{path}: two claims have the id {repeated[0]!r}; give each its own.")
    return tuple(claims)


def judge(claim: Claim, model_name: str, results: dict[str, dict[str, Any]], *, case: str = "") -> Judged:
    """The verdict on one claim. results: values by chapter, of those only whose results belong to their present inputs;
    case: what `<case>` in a key stands for. Raises DataError for a value of the wrong type, naming claim, key and file.
    """
    if claim.judged_on == "gpt2" and model_name != "gpt2":
        return Judged(claim, NOT_RUN, "", f"Needs GPT-2's weights; this build ran {model_name}.")
    read = _Reader(claim, model_name, results, case)
    if missing := [key for key in claim.keys if read.value(key) is NOT_RUN]:
        chapter, _, key = missing[0].partition("/")
        known = f"gave no `{key}`" if chapter in results else f"was not run on {model_name} as it stands"
        return Judged(claim, NOT_RUN, "", f"Chapter {chapter_number(chapter)} {known}.")
    broken = [c for c in claim.must if not any(map(read.holds, c.any_of))]
    strained = [c for c in claim.should if not any(map(read.holds, c.any_of))]
    blind = [c for c in claim.control if not any(map(read.holds, c.any_of))]
    verdict = (CANNOT_TELL if blind else NOT_REPRODUCED) if broken else DIFFERS if strained else REPRODUCED
    reasons = [*broken, *blind] if broken else strained
    return Judged(claim, verdict, read.format(claim.found), " ".join(map(read.reason, reasons)))


def counts(judged: Sequence[Judged]) -> str:
    """`empirical: 8 reproduced, 3 not reproduced, ...; arithmetic: 6 reproduced, ...`, of the kinds that there are."""
    texts = {k: ", ".join(f"{n} {VERDICTS[v]}" for v, n in row.items()) for k, row in by_kind(judged).items()}
    return "; ".join(f"{kind}: {text}" for kind, text in texts.items())


def by_kind(judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """How many claims came to which verdict, of the kinds that there are."""
    total = Counter((j.claim.kind, j.verdict) for j in judged)
    kinds = [kind for kind in get_args(Kind) if any(j.claim.kind == kind for j in judged)]
    return {kind: {verdict: total[kind, verdict] for verdict in VERDICTS} for kind in kinds}


def table(judged: Sequence[Judged], model_name: str) -> pd.DataFrame:
    """One row a claim, as text."""
    columns = ["no.", "claim", "kind", "paper (GPT-2 small)", f"this build ({model_name})", "verdict", "reason"]
    claims = ((str(i), j.claim, j) for i, j in enumerate(judged, 1))
    rows = [(i, c.says, c.kind, c.paper, j.found or "–", j.verdict, j.reason) for i, c, j in claims]
    return pd.DataFrame(rows, columns=columns)


def page(judged: Sequence[Judged], model_name: str, others: Mapping[str, Sequence[Judged]] = {}) -> str:
    """The reproduction page of the book, as MyST markdown. others: verdicts on the same claims of models that were run
    before, a column each."""
    beside = {name: (counts(theirs), theirs) for name, theirs in others.items()}
    return fill("reproduction.md", judgements=judged, model_name=model_name, counts=counts(judged), beside=beside)


class _Reader(string.Formatter):
    """Values and texts for one claim, from the results of a model."""

    def __init__(self, claim: Claim, model_name: str, results: dict[str, dict[str, Any]], case: str) -> None:
        self.claim, self.model_name, self.results, self.case = claim, model_name, results, case

    def value(self, key: str) -> Any:
        return reach(self.results, self.claim.full(key).replace("/", ".", 1).replace("<case>", self.case))

    def holds(self, check: Check) -> bool:
        value = self.value(check.key)
        wanted = self.value(check.reference) if check.reference else check.wanted
        if not _fits(check.relation, value, wanted):
            file = results_path(self.model_name, self.claim.full(check.key).partition("/")[0])
            fault = f"cannot be compared by `{check.relation}` with {wanted!r}"
            remedy = "Report another value in the chapter, or mend the rule in data/claims.yaml."
            raise DataError(f"claim {self.claim.id!r}: {check.key} in {file} is {value!r}, which {fault}. {remedy}")
        return bool(RELATIONS[check.relation][1](value, wanted))

    def reason(self, condition: Condition) -> str:
        values = "; ".join(f"{c.key} is {_shown(self.value(c.key))}" for c in condition.any_of)
        return self.format(condition.because) if condition.because else f"{values}. Wanted: {condition}."

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return self.value(field_name), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        try:
            return _shown(value, format_spec)
        except (TypeError, ValueError) as error:
            file = results_path(self.model_name, self.claim.chapter)
            fault = f"cannot be written as {format_spec!r}: {error}. Mend the text in data/claims.yaml."
            raise DataError(f"claim {self.claim.id!r}: the value {value!r} of {file} {fault}") from error


def _fits(relation: str, value: Any, wanted: Any) -> bool:
    """Whether a comparison means anything for these values."""
    if relation == "contains":
        return isinstance(value, list)
    numbers = _is_number(value) and all(map(_is_number, wanted if relation == "within" else [wanted]))
    # of `equals`, `none` is an answer, and another one than that which is wanted
    return numbers or (relation == "equals" and (value is None or type(value) is type(wanted)))


def _shown(value: Any, form: str = "") -> str:
    """`as_text`, with words for what is no number or name."""
    words = {None: "none", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else as_text(value, form)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
