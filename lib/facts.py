"""Facts, templates and cases: what is asked of a model. Data alone; what a model makes of them is `lib.recall`.

fact       subject -> answer, judged by the answer's first token, with its leading space
template   a prompt with one hole for the subject
case       a fact set with a template that fails, and the control templates under which its facts may be known
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lib.errors import BookError, DataError
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


class _CaseEntry(BaseModel):
    """A case as the file has it: `facts` and `large` are names of fact files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    facts: str
    large: str
    template: str
    controls: Annotated[tuple[str, ...], Field(min_length=1)]


def _one_hole(text: str) -> str:
    if not text.count("{}") == text.count("{") == text.count("}") == 1:
        raise ValueError(f"{text!r} has {text.count('{}')} holes; write exactly one {{}} for the subject")
    return text


Template = Annotated[str, AfterValidator(_one_hole)]


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
    times = table.subject.value_counts(sort=False)
    if (times > 1).any():
        subject = times[times > 1].index[0]
        raise DataError(f"{path}: {subject!r} stands {times[subject]} times; keep one row.")
    splits = table["split"] if "split" in table else [""] * len(table)
    return tuple(Fact(*row) for row in zip(table.subject, table.answer, splits, strict=True))


def load_templates(path: Path = DATA / "templates.yaml") -> dict[str, str]:
    """Template name -> text with exactly one hole `{}`. Raises DataError."""
    return load_mapping(path, Template)


def load_cases(model_name: str, path: Path = DATA / "cases.yaml") -> tuple[Case, ...]:
    """The cases of a model, or those of `any`. Raises DataError for an entry that is none, or that names an unknown
    template."""
    entries, templates, cases = load_mapping(path, list[_CaseEntry]), load_templates(), []
    for entry in entries.get(model_name, entries["any"]):
        if unknown := [t for t in (entry.template, *entry.controls) if t not in templates]:
            raise DataError(
                f"{path}: case {entry.name!r} names the template {unknown[0]!r}, which data/templates.yaml lacks."
            )
        chosen = {"facts": load_facts(entry.facts), "large": load_facts(entry.large)}
        cases.append(Case(**(dict(entry) | chosen)))
    return tuple(cases)


def prompts(facts: Iterable[Fact], template: str, prefix: str = "") -> list[str]:
    """The text of a template filled with each fact's subject, the prefix before it."""
    return [prefix + template.replace("{}", f.subject) for f in facts]


def load_mapping(path: Path, entry: Any = Any) -> dict[str, Any]:
    """A YAML file that maps names to entries, each as `entry` says: any type that pydantic can check. Raises DataError
    where the file is missing, empty or something else, with every fault."""
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} is empty or not a mapping of names to entries.")
    return validated(dict[str, entry], content, str(path))


def validated(schema: Any, content: Any, where: str, error: type[BookError] = DataError) -> Any:
    """The content as the schema says: a pydantic model, or any type that pydantic can check. Raises the error, which
    says where the content stands and, in one sentence, all that is wrong with it."""
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as invalid:
        known = ", ".join(getattr(schema, "model_fields", ()))
        faults = "; ".join(_fault(fault, known) for fault in invalid.errors())
        raise error(f"{where}: {faults}.") from invalid


def _fault(fault: Any, known: str) -> str:
    """One fault that pydantic found. known: the fields that the outermost entry may have."""
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"unknown key {where!r}" + (f" (known: {known})" if known else "")
    if fault["type"] == "missing":
        return f"{where} is missing"
    if fault["type"] == "too_short":
        return f"{where} is empty; give at least one value"
    if fault["type"] == "value_error":  # of a validator of ours, which says what to do
        return f"{where}: {fault['ctx']['error']}" if where else str(fault["ctx"]["error"])
    return f"{where or 'it'}: {fault['msg']}, not {fault['input']!r}"
