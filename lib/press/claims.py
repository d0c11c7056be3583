"""The source page's statements, held to account: `data/claims.yaml`, and what a run made of each.

    load     the claims; refused where one lacks a key, names an unknown chapter, or has another's id
    judge    a claim and the results of a model -> verdict, the value found, the reason
    page     all verdicts as a page of the book; `table` gives the same to the terminal

Four verdicts. `reproduced`: all that the claim must and should satisfy holds. `not reproduced`: something that it must
satisfy does not. `differs`: it holds as the page measured it, and not by a check that it should survive as well.
`not run`: a result is missing, or the claim is about GPT-2's weights and another model was run. There is no verdict
without a run behind it, and `not run` is never a pass.
"""

from __future__ import annotations

import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lib.errors import DataError
from lib.facts import load_cases, load_mapping
from lib.results import NOT_RUN, as_text, reach, results_path

REPRODUCED, NOT_REPRODUCED, DIFFERS = "reproduced", "not reproduced", "differs"
VERDICTS = {REPRODUCED: "reproduced", NOT_REPRODUCED: "not reproduced", DIFFERS: "differ", NOT_RUN: "not run"}
BADGES = {REPRODUCED: "success", NOT_REPRODUCED: "danger", DIFFERS: "primary", NOT_RUN: "muted"}
JUDGED_ON = {
    "any": "Judged on the model of the build",
    "gpt2": "About GPT-2's weights: judged only where GPT-2 is run",
    "shape": "About GPT-2's shape: counted in every build, without its weights",
}
FIELDS = ("id", "says", "paper", "chapter", "judged_on", "found", "must", "should", "note")
OPTIONAL = ("should", "note")
RELATIONS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "equals": ("is {}", operator.eq),
    "within": ("is {} ± {}", lambda found, wanted: abs(found - wanted[0]) <= wanted[1]),
    "at_least": ("is at least {}", operator.ge),
    "at_most": ("is at most {}", operator.le),
    "above": ("is above {}", operator.gt),
    "below": ("is below {}", operator.lt),
    "contains": ("contains {}", lambda found, wanted: wanted in found),
}


@dataclass(frozen=True)
class Check:
    """One comparison: the value under `key` stands in `relation` to `wanted` (`$key`: to another value)."""

    key: str
    relation: str
    wanted: Any

    def __str__(self) -> str:
        wanted = self.wanted if self.relation == "within" else [self.wanted]
        return f"`{self.key}` {RELATIONS[self.relation][0].format(*map(_wanted_text, wanted))}"


@dataclass(frozen=True)
class Condition:
    """At least one of the checks holds. because: what to say where none does, with `{key}` for values."""

    checks: tuple[Check, ...]
    because: str

    def __str__(self) -> str:
        return " or ".join(map(str, self.checks))


@dataclass(frozen=True)
class Claim:
    """A statement of the source page. says: in its words; paper: its value; found: the text of the value here, with
    `{key}` for results. A key is a dotted path into the claim's chapter, or `chapter/path`."""

    id: str
    says: str
    paper: str
    chapter: str
    judged_on: str
    found: str
    must: tuple[Condition, ...]
    should: tuple[Condition, ...] = ()
    note: str = ""

    @property
    def keys(self) -> list[str]:
        """Every key that the claim reads, as `chapter/path`."""
        conditions = (*self.must, *self.should)
        keys = [k for t in (self.found, *(c.because for c in conditions)) for k in _placeholders(t)]
        for check in (k for c in conditions for k in c.checks):
            keys += [check.key, *([check.wanted[1:]] if _is_reference(check.wanted) else [])]
        return list(dict.fromkeys(map(self.full, keys)))

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
    claims = tuple(_claim(entry, f"{path}, claim {i}", chapters) for i, entry in enumerate(entries, start=1))
    if repeated := [name for name, n in Counter(c.id for c in claims).items() if n > 1]:
        raise DataError(f"{path}: two claims have the id {repeated[0]!r}; give each its own.")
    return claims


def judge_all(claims: Sequence[Claim], model_name: str, results: dict[str, dict[str, Any]]) -> list[Judged]:
    """Every claim against the results of a model. results: values by chapter, of those chapters only whose results
    belong to their present inputs."""
    case = load_cases(model_name)[0].name
    return [judge(claim, model_name, results, case=case) for claim in claims]


def judge(claim: Claim, model_name: str, results: dict[str, dict[str, Any]], *, case: str = "") -> Judged:
    """The verdict on one claim. case: what `<case>` in a key stands for. Raises DataError for a value of the wrong
    type, naming the claim, the key and the file."""
    if claim.judged_on == "gpt2" and model_name != "gpt2":
        return Judged(claim, NOT_RUN, "", f"Needs GPT-2's weights; this build ran {model_name}.")
    read = _Reader(claim, model_name, results, case)
    if missing := [key for key in claim.keys if read.value(key) is NOT_RUN]:
        chapter, _, key = missing[0].partition("/")
        known = f"gave no `{key}`" if chapter in results else f"was not run on {model_name} as it stands"
        return Judged(claim, NOT_RUN, "", f"Chapter {_number(chapter)} {known}.")
    broken = [c for c in claim.must if not any(map(read.holds, c.checks))]
    strained = [c for c in claim.should if not any(map(read.holds, c.checks))]
    verdict = NOT_REPRODUCED if broken else DIFFERS if strained else REPRODUCED
    return Judged(claim, verdict, read.text(claim.found), " ".join(map(read.reason, broken or strained)))


def counts(judged: Sequence[Judged]) -> str:
    """`12 reproduced, 3 not reproduced, 4 differ, 9 not run`."""
    total = Counter(j.verdict for j in judged)
    return ", ".join(f"{total[verdict]} {words}" for verdict, words in VERDICTS.items())


def table(judged: Sequence[Judged], model_name: str) -> pd.DataFrame:
    """One row a claim, as text."""
    return pd.DataFrame(
        {
            "no.": [str(i) for i in range(1, len(judged) + 1)],
            "claim": [j.claim.says for j in judged],
            "paper (GPT-2 small)": [j.claim.paper for j in judged],
            f"this build ({model_name})": [j.found or "–" for j in judged],
            "verdict": [j.verdict for j in judged],
            "reason": [j.reason for j in judged],
        }
    )


def page(judged: Sequence[Judged], model_name: str) -> str:
    """The reproduction page of the book, as MyST markdown."""
    rows = "\n".join(_row(i, j, model_name) for i, j in enumerate(judged, start=1))
    rules = "\n".join(f"{i}. {_rule(j.claim)}" for i, j in enumerate(judged, start=1))
    return _PAGE.format(model=_escape(model_name), counts=counts(judged), rows=rows, rules=rules)


_PAGE = """# Reproduction: what became of each claim

**On {model}: {counts}.**

Each statement of the source page that can be true or false, in the page's order {{cite}}`qkv2026decomposition`. The
page's own values are GPT-2's; this build ran **{model}**. Nobody typed a line of this table: it is made from the
results of the chapters, by rules that stand in one file, `data/claims.yaml`, and below the table.

- **reproduced**: a run of this build shows what the claim says.
- **not reproduced**: a run of this build shows otherwise.
- **differs**: it holds as the page measured it, and not by a further check that it should survive; the reason says
  which.
- **not run**: no run of this build can tell, which is never a pass. Claims about GPT-2's weights need GPT-2.

:::{{list-table}}
:header-rows: 1
:class: claims
:widths: 5 30 14 25 26

* - No.
  - Claim
  - Paper (GPT-2 small)
  - This build
  - Verdict and reason
{rows}
:::

:::{{dropdown}} The rule of each claim
:class-container: claims-rules

A claim *must* satisfy the first part, or it is not reproduced; it *should* satisfy the second, or it differs. Keys name
values in the results files of the chapters; `<case>` stands for the subject's first case.

{rules}
:::
"""


def _row(number: int, judged: Judged, model_name: str) -> str:
    claim = judged.claim
    chapters = dict.fromkeys([claim.chapter, *(key.partition("/")[0] for key in claim.keys)])
    where = ", ".join(f"{{doc}}`chapter {_number(c)} <{c}>`" for c in chapters)
    who = "GPT-2's shape" if claim.judged_on == "shape" else model_name
    found = f"{_escape(who)}: {_escape(judged.found)} ({where})" if judged.found else f"– ({where})"
    note = f" *{_escape(claim.note)}*" if claim.note else ""
    verdict = f"{{bdg-{BADGES[judged.verdict]}}}`{judged.verdict}` {_escape(judged.reason)}{note}"
    cells = (f"“{_escape(claim.says)}”", _escape(claim.paper), found, verdict.rstrip())
    return f"* - {number}\n" + "\n".join(f"  - {cell}" for cell in cells)


def _rule(claim: Claim) -> str:
    parts = [f"*Must*: {'; '.join(map(str, claim.must))}."]
    parts += [f"*Should*: {'; '.join(map(str, claim.should))}."] if claim.should else []
    return f"{JUDGED_ON[claim.judged_on]}, by `{claim.chapter}`. {' '.join(parts)}"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>$|#])", r"\\\1", text)


def _number(chapter: str) -> str:
    return chapter.partition("_")[0].lstrip("0")


class _Reader(string.Formatter):
    """Values and texts for one claim, from the results of a model."""

    def __init__(self, claim: Claim, model_name: str, results: dict[str, dict[str, Any]], case: str) -> None:
        self.claim, self.model_name, self.results, self.case = claim, model_name, results, case

    def value(self, key: str) -> Any:
        chapter, _, path = self.claim.full(key).partition("/")
        return reach(self.results.get(chapter, {}), path.replace("<case>", self.case))

    def holds(self, check: Check) -> bool:
        found = self.value(check.key)
        wanted = self.value(check.wanted[1:]) if _is_reference(check.wanted) else check.wanted
        if not _fits(check.relation, found, wanted):
            chapter = self.claim.full(check.key).partition("/")[0]
            raise DataError(
                f"claim {self.claim.id!r}: {check.key} in {results_path(self.model_name, chapter)} is {found!r}, which "
                f"cannot be compared by `{check.relation}` with {wanted!r}. Report another value in the chapter, or "
                "mend the rule in data/claims.yaml."
            )
        return bool(RELATIONS[check.relation][1](found, wanted))

    def text(self, template: str) -> str:
        return self.vformat(template, (), {})

    def reason(self, condition: Condition) -> str:
        if condition.because:
            return self.text(condition.because)
        found = "; ".join(f"{c.key} is {_shown(self.value(c.key))}" for c in condition.checks)
        return f"{found}. Wanted: {condition}."

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return self.value(field_name), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        try:
            return _shown(value, format_spec)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"claim {self.claim.id!r}: the value {value!r} of {results_path(self.model_name, self.claim.chapter)} "
                f"cannot be written as {format_spec!r}: {error}. Mend the text in data/claims.yaml."
            ) from error


def _claim(entry: Any, where: str, chapters: Sequence[str]) -> Claim:
    """One entry of the file. Raises DataError for a field that is missing, unknown or of the wrong kind."""
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {entry!r}; write an entry with {', '.join(FIELDS)}.")
    where = f"{where} ({entry.get('id', 'no id')!r})"
    if missing := [f for f in FIELDS if f not in OPTIONAL and not entry.get(f)]:
        needed = [f for f in FIELDS if f not in OPTIONAL]
        raise DataError(f"{where} has no `{missing[0]}`; every claim needs {', '.join(needed)}.")
    if unknown := sorted(set(entry) - set(FIELDS)):
        raise DataError(f"{where} has the unknown field `{unknown[0]}`; a claim knows {', '.join(FIELDS)}.")
    if wrong := [f for f in FIELDS if f not in ("must", "should") and not isinstance(entry.get(f, ""), str)]:
        raise DataError(f"{where}: `{wrong[0]}` is {entry[wrong[0]]!r}; put it in quotes.")
    if entry["judged_on"] not in JUDGED_ON:
        raise DataError(f"{where} is judged_on {entry['judged_on']!r}; choose from {', '.join(JUDGED_ON)}.")
    conditions = {f: _conditions(entry.get(f, []), f"{where}, `{f}`") for f in ("must", "should")}
    fields: dict[str, Any] = {k: v.strip() for k, v in entry.items() if isinstance(v, str)} | conditions
    claim = Claim(**fields)
    try:
        named = [claim.chapter, *(key.partition("/")[0] for key in claim.keys)]
    except ValueError as error:  # a brace that is not closed
        raise DataError(f"{where}: a text has a brace that closes or opens nothing ({error}).") from error
    for chapter in named:
        if chapter not in chapters:
            raise DataError(f"{where} names the chapter {chapter!r}; there are {', '.join(chapters)}.")
    return claim


def _conditions(entries: Any, where: str) -> tuple[Condition, ...]:
    if not isinstance(entries, list):
        raise DataError(f"{where} is {entries!r}; write a list of conditions.")
    return tuple(_condition(entry, where) for entry in entries)


def _condition(entry: Any, where: str) -> Condition:
    """`{key: ..., <relation>: ..., because: ...}`, or `{any_of: [...], because: ...}`."""
    entry = dict(entry) if isinstance(entry, dict) else {}
    because = str(entry.pop("because", "")).strip()
    tests = entry.pop("any_of", None) if "any_of" in entry else [entry]
    if not isinstance(tests, list) or not tests:
        raise DataError(f"{where}: `any_of` needs a list of comparisons.")
    return Condition(tuple(_check(t, where) for t in tests), because)


def _check(entry: Any, where: str) -> Check:
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        raise DataError(f"{where}: {entry!r} has no `key`; name the value that it reads.")
    relations = [name for name in entry if name != "key"]
    if len(relations) != 1 or relations[0] not in RELATIONS:
        raise DataError(f"{where}: {entry['key']} needs exactly one of {', '.join(RELATIONS)}, and has {relations}.")
    name, wanted = relations[0], entry[relations[0]]
    pair = isinstance(wanted, list) and len(wanted) == 2 and all(map(_is_number, wanted))
    if pair != (name == "within"):
        raise DataError(
            f"{where}: {entry['key']} {name} {wanted!r}; `within` takes [value, tolerance], the others one value."
        )
    return Check(entry["key"], name, wanted)


def _fits(relation: str, found: Any, wanted: Any) -> bool:
    """Whether a comparison means anything for these values."""
    if relation == "contains":
        return isinstance(found, list)
    if relation == "equals":
        same = type(found) is type(wanted) or (_is_number(found) and _is_number(wanted))
        return same or found is None  # `none` is an answer, and another one than that which is wanted
    return _is_number(found) and all(map(_is_number, wanted if relation == "within" else [wanted]))


def _shown(value: Any, form: str = "") -> str:
    """`as_text`, with words for what is no number or name."""
    words = {None: "none", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else as_text(value, form)


def _wanted_text(wanted: Any) -> str:
    if isinstance(wanted, str):
        return f"`{wanted[1:]}`" if _is_reference(wanted) else f"“{wanted}”"
    return _shown(wanted, "," if isinstance(wanted, int) else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_reference(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted.startswith("$")


def _placeholders(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]
