"""recall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lib.errors import DataError
from lib.facts import Case, Fact, load_mapping, prompts
from lib.files import DATA
from lib.forward import next_token_logits
from lib.models import Model


def load_prefixes(model: Model, path: Path = DATA / "prefixes.yaml") -> dict[str, str]:
    """Neutral prefix name -> text, with this tokenizer's beginning-of-text token put for `<bos>`. Markers that the
    tokenizer lacks, or that repeat another prefix, are left out."""
    out: dict[str, str] = {}
    for name, text in load_mapping(path).items():
        text = text.replace("<bos>", model.tokenizer.bos_token or "")
        marker = text.startswith("<|")
        if text in out.values() or (marker and len(model.token_ids(text)) != 1):
            continue
        out[name] = text
    return out


def screen(model: Model, facts: Sequence[Fact]) -> pd.DataFrame:
    """One row a fact: its first token, and why it cannot be scored by it (empty: it can).

    odd split        the first token is a single letter or has no letter at all
    merged           the tokenizer joins the answer to the prompt before it
    echo             the subject starts the answer, so that copying would count as telling
    shared           another answer of the set starts with the same token
    """
    firsts = [model.first_token(f.answer) for f in facts]
    owners: dict[int, set[str]] = {}
    for token, fact in zip(firsts, facts, strict=True):
        owners.setdefault(token, set()).add(fact.answer)
    rows = []
    for fact, token in zip(facts, firsts, strict=True):
        text, reason = model.token_text(token), ""
        if sum(c.isalpha() for c in text) < 2:
            reason = "odd split"
        elif model.token_ids(f"is {fact.answer}") != model.token_ids("is") + model.token_ids(f" {fact.answer}"):
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


def scorable(model: Model, facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts that `screen` leaves in. Raises DataError where none is left."""
    kept = tuple(f for f, reason in zip(facts, screen(model, facts).left_out, strict=True) if not reason)
    if not kept:
        raise DataError(
            f"none of the {len(facts)} answers can be told by its first token with {model.name}'s tokenizer."
        )
    return kept


def trainable(model: Model, case: Case) -> Case:
    """The case with those of its facts that can be scored. Raises DataError where none is left."""
    return replace(case, facts=scorable(model, case.facts))


def study_facts(model: Model, case: Case) -> tuple[Fact, ...]:
    """The scorable part of a case's large set on which anything may be looked at: neither held out for the judging
    of edits, nor among the case's own facts."""
    own = {f.subject for f in case.facts}
    return tuple(
        f for f in scorable(model, case.large) if f.split not in ("held_out", "eight") and f.subject not in own
    )


def tell(
    model: Model, facts: Sequence[Fact], templates: dict[str, str], *, prefix: str = "", progress: str | None = None
) -> pd.DataFrame:
    """What the model says: one row a template and fact. told; rank of the answer (1 is the top); prob of the
    answer; top token; competitor (the strongest wrong token) and margin (answer minus competitor, in logits)."""
    texts = [p for t in templates.values() for p in prompts(facts, t, prefix)]
    logits = next_token_logits(model, texts, progress=progress)
    rows = []
    for i, (name, fact) in enumerate((n, f) for n in templates for f in facts):
        answer, row = model.first_token(fact.answer), logits[i]
        own = row[answer].item()
        wrong = row.clone()
        wrong[answer] = float("-inf")
        best = int(wrong.argmax())
        rows.append(
            {
                "template": name,
                "subject": fact.subject,
                "answer": fact.answer,
                "split": fact.split,
                "prompt": texts[i],
                "told": own > wrong[best].item(),
                "rank": int((row > own).sum()) + 1,
                "prob": (row[answer] - row.logsumexp(-1)).exp().item(),
                "top": model.token_text(int(row.argmax())),
                "answer_token": answer,
                "competitor_token": best,
                "competitor": model.token_text(best),
                "margin": own - wrong[best].item(),
            }
        )
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


def first_failing(case: Case, table: pd.DataFrame) -> pd.Series:
    """The row of a `tell` table for the case's first fact known and not told, or its first fact."""
    states = known_and_told(table, case)
    rows = table[table.template == case.template].reset_index(drop=True)
    return rows.loc[int(states.routing_failure.to_numpy().argmax())]
