"""Facts, templates and cases: what is asked of a model. Data alone; what a model makes of them is `lib.recall`.

fact       subject -> answer, judged by the answer's first token, with its leading space; some have several answers
template   a prompt with one hole for the subject
case       a fact set with a template that fails, and the control templates under which its facts may be known

The book's cases stand in data/cases.yaml. A case of one's own is a file that names its facts and its templates
(`read_case`); with $QKV_CASE, which `--case` sets, it stands in the place of the book's for every model but the
organism, whose cases are its planted failures.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic_core import core_schema

from lib.checkpoints.named import split
from lib.errors import DataError
from lib.files import DATA, case_file, file_sha256
from lib.inputs.mappings import is_file, load_mapping, read_yaml, validated
from lib.inputs.rows import read_rows

CASES, TEMPLATES = DATA / "cases.yaml", DATA / "templates.yaml"


@dataclass(frozen=True)
class Fact:
    """subject -> answer. split: fit, selection, held_out, eight, or empty where a set is not split."""

    subject: str
    answer: str
    split: str = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The answers that count as telling it; the first one is trained."""
        return (self.answer,)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """One with further answers is read as such."""

        def read(value: Any, as_fact: Any) -> "Fact":
            if not isinstance(value, dict) or "also" not in value:
                return as_fact(value)
            fact, also = as_fact({k: v for k, v in value.items() if k != "also"}), value["also"]
            return OpenFact(**vars(fact), also=TypeAdapter(tuple[str, ...]).validate_python(also))

        return core_schema.no_info_wrap_validator_function(read, handler(source))


@dataclass(frozen=True)
class OpenFact(Fact):
    """A fact that has further answers. It is told if any of them is; `answer` is the one that training teaches."""

    also: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        return (self.answer, *self.also)


def load_facts(name: str | Path, folder: Path = Path()) -> tuple[Fact, ...]:
    """Facts of data/facts/NAME.csv, or of a file of any kind that `lib.inputs` reads, relative to a folder;
    FILE#RELATION: of that relation. Raises DataError for a file that is missing or that cannot be read right."""
    path, relation = fact_path(name, folder)
    if not is_file(path):
        raise DataError(f"there is no fact file {path}; make one with the columns subject,answer.")
    rows = read_rows(path, relation)
    return tuple(
        OpenFact(row.subject, first, row.split, tuple(also)) if also else Fact(row.subject, first, row.split)
        for row in rows
        for first, *also in [row.answers]
    )


def fact_path(name: str | Path, folder: Path = Path()) -> tuple[Path, str]:
    """The file that a name means, and the relation after its #. A plain word is one of data/facts."""
    text, _, relation = str(name).rpartition("#")
    if not text or is_file(folder / str(name)):
        text, relation = str(name), ""
    if re.fullmatch(r"[\w-]+", text):
        return DATA / "facts" / f"{text}.csv", relation
    return folder / text, relation


def split_of(subject: str) -> str:
    """The part of a set to which a subject belongs, by its hash, so that nobody chooses who is held out: four tenths
    fit, two tenths selection, four tenths held_out, as the book's countries by their code."""
    tenth = int(hashlib.sha256(subject.encode()).hexdigest(), 16) % 10
    return "fit" if tenth < 4 else "selection" if tenth < 6 else "held_out"


def with_splits(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """The facts, those without a split put where their subject's hash says."""
    return tuple(f if f.split else replace(f, split=split_of(f.subject)) for f in facts)


def _one_hole(text: str) -> str:
    if not text.count("{}") == text.count("{") == text.count("}") == 1:
        raise ValueError(f"{text!r} has {text.count('{}')} holes; write exactly one {{}} for the subject")
    return _plain(text)


def _plain(text: str) -> str:
    if odd := [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]:
        raise ValueError(f"{text!r:.60} holds the control character {odd[0]!a}; leave it out")
    return text


PlainText = Annotated[str, AfterValidator(_plain)]
Template = Annotated[str, AfterValidator(_one_hole)]
Word = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=60)]
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


class CaseEntry(BaseModel):
    """What a file of one case says. facts, large: files of facts, relative to it, or names of data/facts; large left
    out: the facts themselves, of which the case's own are then the fit part. template, controls: texts with a hole, or
    names of `templates` or of data/templates.yaml. name: of the file, if left out; title: the name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    facts: PlainText
    template: PlainText
    controls: Annotated[list[PlainText], Field(min_length=1)]
    large: PlainText | None = None
    templates: dict[Word, Template] = {}
    name: Word | None = None
    title: PlainText | None = None


@dataclass(frozen=True)
class CaseFile:
    """A case of one's own. templates: those that are asked, by name; files: all that it is read from."""

    path: Path
    case: Case
    templates: dict[str, str]
    files: dict[str, Path]


def read_case(path: str | Path) -> CaseFile:
    """The case of a YAML file (see `CaseEntry`). Raises DataError, with the file, what is wrong and what to do."""
    path = Path(path)
    entry, names, templates = _entry(path)
    whole = with_splits(load_facts(entry.large or entry.facts, path.parent))
    facts = load_facts(entry.facts, path.parent) if entry.large else tuple(f for f in whole if f.split == "fit")
    apart = {f.subject for f in facts}
    others = [f.split for f in whole if f.subject not in apart]
    counts = {part: others.count(part) for part in ("selection", "held_out")}
    if not facts or not all(counts.values()):
        found = ", ".join(f"{n} {part}" for part, n in {"fit": len(facts), **counts}.items())
        raise DataError(f"{path}: its facts fall into {found}; give more of them, or a larger set as `large`.")
    name = entry.name or re.sub(r"[^\w.-]+|^[.-]+", "_", path.stem)[:60]
    case = Case(name, entry.title or name, facts, whole, names[0], tuple(names[1:]))
    return CaseFile(path, case, templates, _files(path, entry))


def _files(path: Path, entry: CaseEntry) -> dict[str, Path]:
    """What a case is read from, by its part in it."""
    named = {"facts": entry.facts, "large": entry.large}
    return {"case": path, **{part: fact_path(name, path.parent)[0] for part, name in named.items() if name}}


def _entry(path: Path) -> tuple[CaseEntry, list[str], dict[str, str]]:
    """A file of a case: what it says, the names of its template and of its controls, and the templates that are asked:
    those that it gives and names, or all of the book's where it gives none of its own."""
    entry = validated(CaseEntry, read_yaml(path), str(path))
    book, own = load_mapping(TEMPLATES, Template), dict(entry.templates)
    names, places = [], ["template", *(f"control_{i}" for i in range(1, len(entry.controls) + 1))]
    if taken := [name for name, text in own.items() if name in places or book.get(name, text) != text]:
        raise DataError(f"{path}: templates.{taken[0]}: the book calls another template so; choose another name.")
    for place, text in zip(places, (entry.template, *entry.controls), strict=True):
        if "{" in text or "}" in text:
            own[place] = validated(Template, text, f"{path}: {place}")
            names.append(place)
        elif text in own or text in book:
            names.append(text)
        else:
            raise DataError(f"{path}: {place} names the template {text!r}, which neither it nor {TEMPLATES.name} has.")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a template stands twice among template and controls; keep one.")
    return entry, names, own | {name: book[name] for name in names if name in book} if own else book


def own_case(model_name: str) -> CaseFile | None:
    """The case of one's own that stands for the book's; None for the organism, or where there is none."""
    path = case_file()
    return read_case(path) if path and split(model_name)[0] != "organism" else None


def case_sums(model_name: str = "") -> dict[str, str]:
    """sha256 of every file of the case of one's own, by its part in it; empty where there is none, and for the
    organism."""
    path = case_file() if split(model_name)[0] != "organism" else None
    files = _files(path, _entry(path)[0]) if path else {}
    return {f"case/{part}": file_sha256(p) if is_file(p) else "" for part, p in files.items()}


class _Templates(dict[str, str]):
    """The templates of a case of one's own; those of the book are found by name, and not listed."""

    def __missing__(self, name: str) -> str:
        return load_mapping(TEMPLATES, Template)[name]


def load_templates(path: Path = TEMPLATES) -> dict[str, str]:
    """Template name -> text with exactly one hole `{}`; of the case of one's own, where there is one. Raises
    DataError."""
    own = case_file() if path == TEMPLATES else None
    return _Templates(_entry(own)[2]) if own else load_mapping(path, Template)


def load_cases(model_name: str, path: Path = CASES) -> tuple[Case, ...]:
    """The cases of a model, or those of `any`; the case of one's own, where there is one. Raises DataError for an entry
    that is none, or that names an unknown template."""
    if path == CASES and (own := own_case(model_name)):
        return (own.case,)
    entries, templates = load_mapping(path), load_mapping(TEMPLATES, Template)
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
