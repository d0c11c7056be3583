"""Facts, templates and cases: what is asked of a model. Data alone; what a model makes of them is `lib.recall`.

fact       subject -> answer, judged by the answer's first token, with its leading space
template   a prompt with one hole for the subject
case       a fact set with a template that fails, and the control templates under which its facts may be known
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lib.checkpoints.named import split
from lib.errors import BookError, DataError
from lib.files import DATA


@dataclass(frozen=True)
class Fact:
    """subject -> answer. split: fit, selection, held_out, eight, or empty where a set is not split."""

    subject: str
    answer: str
    split: str = ""


def _one_hole(text: str) -> str:
    if not text.count("{}") == text.count("{") == text.count("}") == 1:
        raise ValueError(f"{text!r} has {text.count('{}')} holes; write exactly one {{}} for the subject")
    return text


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
    columns = [table.subject, table.answer, table.get("split", pd.Series("", table.index))]
    facts = tuple(Fact(*row) for row in zip(*columns, strict=True))
    for line, fact in enumerate(facts, start=2):
        if not fact.subject.strip() or not fact.answer.strip():
            cells = f"subject {fact.subject!r} with answer {fact.answer!r}"
            raise DataError(f"{path}, line {line}: {cells}; neither may be empty.")
    subject, times = Counter(table.subject).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path}: {subject!r} stands {times} times; keep one row.")
    return facts


Template = Annotated[str, AfterValidator(_one_hole)]
_named = BeforeValidator(lambda facts: load_facts(facts) if isinstance(facts, str) else facts)  # as in a file of cases
Facts = Annotated[tuple[Fact, ...], _named]


@dataclass(frozen=True)
class Case:
    """template and controls: names of templates; large: the set on which the case is studied beyond its own facts."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    title: str
    facts: Facts
    large: Facts
    template: str
    controls: Annotated[tuple[str, ...], Field(min_length=1)]


def load_templates(path: Path = DATA / "templates.yaml") -> dict[str, str]:
    """Template name -> text with exactly one hole `{}`. Raises DataError."""
    return load_mapping(path, Template)


def load_cases(model_name: str, path: Path = DATA / "cases.yaml") -> tuple[Case, ...]:
    """The cases of a model, or those of `any`. Raises DataError for an entry that is none, or that names an unknown
    template."""
    entries, templates = load_mapping(path), load_templates()
    cases = validated(
        list[Case], entries.get(split(model_name)[0], entries.get("any")), f"{path}, cases of {model_name}"
    )
    for case in cases:
        if unknown := [t for t in (case.template, *case.controls) if t not in templates]:
            named = f"case {case.name!r} names the template {unknown[0]!r}"
            raise DataError(f"{path}: {named}, which data/templates.yaml lacks.")
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
    where, kind = ".".join(map(str, fault["loc"])), fault["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {where!r}" + (f" (known: {known})" if known else "")
    if kind == "value_error":  # of a validator of ours, which says what to do
        return f"{where}: {fault['ctx']['error']}" if where else str(fault["ctx"]["error"])
    said = {"missing": f"{where} is missing", "too_short": f"{where} is empty; give at least one value"}
    return said.get(kind, f"{where or 'it'}: {fault['msg']}, not {fault['input']!r:.200}")
