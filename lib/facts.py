"""Facts, templates and cases, and what a model tells and knows of them (design, section 3).

    told    the answer's first token is the top-1 next token under the case's template
    known   it is top-1 under at least one control template
    routing failure: known and not told. Measured, never assumed.

An answer is judged by its first token, with its leading space. `screen` reports the answers for which that token
does not identify the answer; they are left out of every top-1 score, and counted where they are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import yaml
from scipy.stats import binomtest

from lib.errors import DataError
from lib.replay import next_token_logits
from lib.subjects import ROOT, Subject

DATA = ROOT / "data"


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


def load_prefixes(subject: Subject, path: Path = DATA / "prefixes.yaml") -> dict[str, str]:
    """Neutral prefix name -> text, with this tokenizer's beginning-of-text token put for `<bos>`. Markers that the
    tokenizer lacks, or that repeat another prefix, are left out."""
    out: dict[str, str] = {}
    for name, text in load_mapping(path).items():
        text = text.replace("<bos>", subject.tokenizer.bos_token or "")
        marker = text.startswith("<|")
        if text in out.values() or (marker and len(subject.token_ids(text)) != 1):
            continue
        out[name] = text
    return out


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


def screen(subject: Subject, facts: Sequence[Fact]) -> pd.DataFrame:
    """One row a fact: its first token, and why it cannot be scored by it (empty: it can).

    odd split        the first token is a single letter or has no letter at all
    merged           the tokenizer joins the answer to the prompt before it
    echo             the subject starts the answer, so that copying would count as telling
    shared           another answer of the set starts with the same token
    """
    firsts = [subject.first_token(f.answer) for f in facts]
    owners: dict[int, set[str]] = {}
    for token, fact in zip(firsts, facts, strict=True):
        owners.setdefault(token, set()).add(fact.answer)
    rows = []
    for fact, token in zip(facts, firsts, strict=True):
        text, reason = subject.token_text(token), ""
        if sum(c.isalpha() for c in text) < 2:
            reason = "odd split"
        elif subject.token_ids(f"is {fact.answer}") != subject.token_ids("is") + subject.token_ids(f" {fact.answer}"):
            reason = "merged"
        elif text.strip().lower() in fact.subject.lower():
            reason = "echo"
        elif len(owners[token]) > 1:
            reason = "shared"
        rows.append((fact.subject, fact.answer, fact.split, token, text, reason))
    return pd.DataFrame(rows, columns=["subject", "answer", "split", "token", "token_text", "left_out"])


def left_out_words(screened: pd.DataFrame) -> str:
    """`45 odd split, 27 shared`: how many facts of a `screen` table are left out, and why; `none` if none is."""
    counts = screened.left_out[screened.left_out != ""].value_counts()
    return ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "none"


def scorable(subject: Subject, facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts that `screen` leaves in. Raises DataError where none is left."""
    kept = tuple(f for f, reason in zip(facts, screen(subject, facts).left_out, strict=True) if not reason)
    if not kept:
        raise DataError(
            f"none of the {len(facts)} answers can be told by its first token with {subject.name}'s tokenizer."
        )
    return kept


def trainable(subject: Subject, case: Case) -> Case:
    """The case with those of its facts that can be scored. Raises DataError where none is left."""
    return replace(case, facts=scorable(subject, case.facts))


def study_facts(subject: Subject, case: Case) -> tuple[Fact, ...]:
    """The scorable part of a case's large set on which anything may be looked at: neither held out for the judging
    of edits, nor among the case's own facts."""
    own = {f.subject for f in case.facts}
    return tuple(
        f for f in scorable(subject, case.large) if f.split not in ("held_out", "eight") and f.subject not in own
    )


def prompts(facts: Iterable[Fact], template: str, prefix: str = "") -> list[str]:
    """template: its text. The prefix stands before the filled template."""
    return [prefix + template.replace("{}", f.subject) for f in facts]


def tell(
    subject: Subject, facts: Sequence[Fact], templates: dict[str, str], *, prefix: str = "", progress: str | None = None
) -> pd.DataFrame:
    """What the model says: one row a template and fact. told; rank of the answer (1 is the top); prob of the
    answer; top token; competitor (the strongest wrong token) and margin (answer minus competitor, in logits)."""
    texts = [p for t in templates.values() for p in prompts(facts, t, prefix)]
    logits = next_token_logits(subject, texts, progress=progress)
    rows = []
    for i, (name, fact) in enumerate((n, f) for n in templates for f in facts):
        answer, row = subject.first_token(fact.answer), logits[i]
        own = row[answer].item()
        wrong = row.clone()
        wrong[answer] = float("-inf")
        best = int(wrong.argmax())
        rows.append({
            "template": name, "subject": fact.subject, "answer": fact.answer, "split": fact.split,
            "prompt": texts[i], "told": own > wrong[best].item(), "rank": int((row > own).sum()) + 1,
            "prob": (row[answer] - row.logsumexp(-1)).exp().item(), "top": subject.token_text(int(row.argmax())),
            "answer_token": answer, "competitor_token": best, "competitor": subject.token_text(best),
            "margin": own - wrong[best].item(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def known_and_told(table: pd.DataFrame, case: Case) -> pd.DataFrame:
    """One row a fact of the case, from a `tell` table that has the case's template and its controls:
    told, known, the controls that tell it, and routing_failure = known and not told."""
    told = table[table.template == case.template].set_index("subject").told
    controls = table[table.template.isin(case.controls) & table.told].groupby("subject").template.agg(tuple)
    out = pd.DataFrame({"told": told, "told_by": controls.reindex(told.index)})
    out["told_by"] = [t if isinstance(t, tuple) else () for t in out.told_by]
    out["known"] = [len(t) > 0 for t in out.told_by]
    out["routing_failure"] = out.known & ~out.told
    return out.reset_index()


def exact_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share. n = 0 gives (0, 1): nothing is known."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def load_mapping(path: Path) -> dict:
    """A YAML file that maps names to entries. Raises DataError where it is missing, empty or something else."""
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} is empty or not a mapping of names to entries.")
    return content
