"""Facts, templates and cases, and what a model tells and knows of them (design, section 3).

    told    the answer's first token is the top-1 next token under the case's template
    known   it is top-1 under at least one control template
    routing failure: known and not told. Measured, never assumed.

An answer is judged by its first token, with its leading space. `screen` reports the answers for which that token
does not identify the answer; they are left out of every top-1 score, and counted where they are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from lib.errors import DataError
from lib.files import DATA


@dataclass(frozen=True)
class Fact:
    """subject -> answer. split: fit, selection, held_out, eight, or empty where a set is not split."""

    subject: str
    answer: str
    split: str = ""


@dataclass(frozen=True)
class Case:
    """A fact set with a template that fails, and the control templates under which a fact may be known."""

    name: str
    title: str
    facts: tuple[Fact, ...]
    large: tuple[Fact, ...]
    template: str
    controls: tuple[str, ...]


def load_facts(name: str | Path) -> tuple[Fact, ...]:
    """Facts of data/facts/NAME.csv, or of a file: columns `subject`, `answer`, optionally `split`.
    Raises DataError for a missing or empty file, a missing column, a duplicate subject or an empty cell."""
    path = Path(name) if str(name).endswith(".csv") else DATA / "facts" / f"{name}.csv"
    if not path.is_file():
        raise DataError(f"there is no fact file {path}; make one with the columns subject,answer.")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty; it needs a line subject,answer and a row for each fact.") from None
    if missing := [c for c in ("subject", "answer") if c not in table]:
        raise DataError(f"{path} has no column {' and no column '.join(missing)}; it needs subject,answer.")
    if table.empty:
        raise DataError(f"{path} holds no fact: add at least one row subject,answer.")
    for line, row in enumerate(table.itertuples(), start=2):
        if not row.subject.strip() or not row.answer.strip():
            raise DataError(
                f"{path}, line {line}: subject {row.subject!r} with answer {row.answer!r}; neither may be empty."
            )
    if repeated := [s for s, n in Counter(table.subject).items() if n > 1]:
        raise DataError(
            f"{path}: {repeated[0]!r} stands {table.subject.tolist().count(repeated[0])} times; keep one row."
        )
    splits = table["split"] if "split" in table else [""] * len(table)
    return tuple(Fact(*row) for row in zip(table.subject, table.answer, splits, strict=True))


def load_templates(path: Path = DATA / "templates.yaml") -> dict[str, str]:
    """Template name -> text with exactly one hole `{}`. Raises DataError."""
    templates = load_mapping(path)
    for name, text in templates.items():
        holes = str(text).count("{}")
        if holes != 1 or str(text).count("{") != 1 or str(text).count("}") != 1:
            raise DataError(
                f"{path}: the template {name!r} ({text!r}) has {holes} holes; write exactly one {{}} for the subject."
            )
    return templates


def load_cases(subject_name: str, path: Path = DATA / "cases.yaml") -> tuple[Case, ...]:
    """The cases of a subject, or those of `any`. Raises DataError where one names an unknown template."""
    entries, templates = load_mapping(path), load_templates()
    cases = []
    for entry in entries.get(subject_name, entries["any"]):
        if unknown := [t for t in (entry["template"], *entry["controls"]) if t not in templates]:
            raise DataError(
                f"{path}: case {entry['name']!r} names the template {unknown[0]!r}, which data/templates.yaml lacks."
            )
        facts, large = load_facts(entry["facts"]), load_facts(entry["large"])
        cases.append(Case(entry["name"], entry["title"], facts, large, entry["template"], tuple(entry["controls"])))
    return tuple(cases)


def prompts(facts: Iterable[Fact], template: str, prefix: str = "") -> list[str]:
    """template: its text. The prefix stands before the filled template."""
    return [prefix + template.replace("{}", f.subject) for f in facts]


def load_mapping(path: Path) -> dict:
    """A YAML file that maps names to entries. Raises DataError where it is missing, empty or something else."""
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} is empty or not a mapping of names to entries.")
    return content
