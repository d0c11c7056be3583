"""What a model tells and knows of facts. Measured, never assumed:

    told               the answer's first token is the top-1 next token under the case's template; or that of any of
                       the answers that are accepted
    known              it is top-1 under at least one control template
    routing failure    known and not told

`screen` reports the answers whose first token, with its leading space, does not identify them; they are left out of
every top-1 score, and counted where they are left out.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.errors import DataError
from lib.facts import Case, Fact, OpenFact, load_mapping, prompts
from lib.files import DATA
from lib.forward import logits_by_pack
from lib.models import Model


def load_prefixes(model: Model, path: Path = DATA / "prefixes.yaml") -> dict[str, str]:
    """Neutral prefix name -> text, with this tokenizer's beginning-of-text token put for `<bos>`. Markers that the
    tokenizer lacks, or that repeat another prefix, or what it puts before a text by itself, are left out."""
    prefixes: dict[str, str] = {}
    for name, text in load_mapping(path, str).items():
        text = text.replace("<bos>", "" if model.bos else model.tokenizer.bos_token or "")
        unknown_marker = text.startswith("<|") and len(model.pieces(text)) != 1
        if not unknown_marker and text not in prefixes.values():
            prefixes[name] = text
    return prefixes


def screen(model: Model, facts: Sequence[Fact]) -> pd.DataFrame:
    """One row a fact: its (first) answer's first token, and why it cannot be scored by it (empty: it can).

    odd split        the first token is a single letter, a part of one, or has no letter at all; a syllable or a word
                     that is written as one character (Chinese, Korean, Japanese) is no single letter
    merged           the tokenizer joins the answer to the prompt before it
    echo             the subject starts the answer, so that copying would count as telling
    shared           another answer of the set starts with the same token
    """
    table = pd.DataFrame([(f.subject, f.answer, f.split) for f in facts], columns=["subject", "answer", "split"])
    table["token"] = [model.first_token(answer) for answer in table.answer]
    table["token_text"] = [model.token_text(token) for token in table.token]
    before = model.pieces("is")
    reasons = {
        "odd split": [_letters(text) < 2 for text in table.token_text],
        "merged": [model.pieces(model.joined("is", a)) != before + model.word(a) for a in table.answer],
        "echo": [t.strip().lower() in s.lower() for t, s in zip(table.token_text, table.subject, strict=True)],
        "shared": table.groupby("token").answer.transform("nunique") > 1,
    }
    table["left_out"] = np.select(list(reasons.values()), list(reasons), "").tolist()
    return table


def _letters(text: str) -> int:
    """How many letters a token has: a wide character, which is a syllable or a word, counts as two, and so does a
    letter with a vowel sign; a part of a character is none."""
    wide = [unicodedata.east_asian_width(c) == "W" for c in text if c.isalpha()]
    marks = sum(unicodedata.category(c) == "Mc" for c in text)
    return len(wide) + sum(wide) + marks


def first_tokens(model: Model, facts: Sequence[Fact]) -> Int[Tensor, " fact"]:
    """The token by which each fact's answer is judged."""
    return torch.tensor([model.first_token(f.answer) for f in facts])


def left_out_words(screened: pd.DataFrame) -> str:
    """`45 odd split, 27 shared`: how many facts of a `screen` table are left out, and why; `none` if none is."""
    counts = screened.left_out[screened.left_out != ""].value_counts()
    return ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "none"


def scorable(model: Model, facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts that `screen` leaves in, with those of their further answers that it would leave in as well. Raises
    DataError where none is left."""
    left = tuple(f for f, reason in zip(facts, screen(model, facts).left_out, strict=True) if not reason)
    if not left:
        raise DataError(f"{model.name}'s tokenizer tells none of the {len(facts)} answers by its first token.")
    if not any(isinstance(f, OpenFact) for f in left):
        return left
    every = [Fact(f.subject, answer) for f in left for answer in f.accepted]
    fit = {(f.subject, f.answer) for f, why in zip(every, screen(model, every).left_out, strict=True) if not why}
    kept = {f.subject: tuple(a for a in f.accepted[1:] if (f.subject, a) in fit) for f in left}
    return tuple(replace(f, also=kept[f.subject]) if isinstance(f, OpenFact) else f for f in left)


def trainable(model: Model, case: Case) -> Case:
    """The case with those of its facts that can be scored. Raises DataError where none is left."""
    return replace(case, facts=scorable(model, case.facts))


def study_facts(model: Model, case: Case) -> tuple[Fact, ...]:
    """The scorable part of a case's large set on which anything may be looked at: neither held out for the judging
    of edits, nor among the case's own facts."""
    apart = {f.subject for f in case.facts}
    open_to_study = [f for f in scorable(model, case.large) if f.split not in ("held_out", "eight")]
    return tuple(f for f in open_to_study if f.subject not in apart)


def tell(
    model: Model,
    facts: Sequence[Fact],
    templates: dict[str, str],
    *,
    prefix: str = "",
    known: pd.DataFrame | None = None,
    progress: str | None = None,
) -> pd.DataFrame:
    """What the model says: one row a template and fact. told; rank of the answer (1 is the top); prob of the
    answer; top token; competitor (the strongest wrong token) and margin (answer minus competitor, in logits). Of a fact
    with several answers, these are of the one that the model ranks highest; answer_token is always that of the first.
    known: a table of the same model; no prompt of it is asked again."""
    asked = [(name, fact, prompts([fact], text, prefix)[0]) for name, text in templates.items() for fact in facts]
    rows = {} if known is None else {(row["prompt"], _accepted(row)): row for row in known.to_dict("records")}
    new = [(prompt, fact.accepted) for _, fact, prompt in asked if (prompt, fact.accepted) not in rows]
    for at, logits in logits_by_pack(model, [prompt for prompt, _ in new], progress=progress) if new else ():
        rows |= {new[i]: _said(model, *new[i], logits=row) for i, row in zip(at.tolist(), logits, strict=True)}
    questions = [({"template": name, **asdict(fact)}, rows[prompt, fact.accepted]) for name, fact, prompt in asked]
    return pd.DataFrame([question | row | question for question, row in questions])  # first, and as asked here


def _accepted(row: dict[str, Any]) -> tuple[str, ...]:
    """The accepted answers of a row of a `tell` table, which has further ones only where some fact has."""
    also = row.get("also")
    return (row["answer"], *also) if isinstance(also, tuple) else (row["answer"],)


def _said(model: Model, prompt: str, answers: tuple[str, ...], logits: Float[Tensor, " vocab"]) -> dict[str, Any]:
    """The columns of a `tell` table that the model's answer to one prompt fills."""
    tokens, wrong = [model.first_token(answer, prompt) for answer in answers], logits.clone()
    best, wrong[tokens] = logits[tokens].max(), float("-inf")
    logit = best.item()
    strongest = int(wrong.argmax())
    other = wrong[strongest].item()
    prob = (best - logits.logsumexp(-1)).exp().item()
    top = {"rank": int((logits > logit).sum()) + 1, "prob": prob, "top": model.token_text(int(logits.argmax()))}
    rival = {"competitor_token": strongest, "competitor": model.token_text(strongest), "margin": logit - other}
    return {"prompt": prompt, "told": logit > other, **top, "answer_token": tokens[0], **rival}


def known_and_told(table: pd.DataFrame, case: Case) -> pd.DataFrame:
    """One row a fact of the case, from a `tell` table that has the case's template and its controls:
    told, known, the controls that tell it, and routing_failure = known and not told."""
    told = table[table.template == case.template].set_index("subject").told
    telling = table[table.template.isin(case.controls) & table.told].groupby("subject").template.agg(tuple).to_dict()
    states = pd.DataFrame({"told": told, "told_by": [telling.get(subject, ()) for subject in told.index]})
    states["known"] = states.told_by.map(len) > 0
    states["routing_failure"] = states.known & ~states.told
    return states.reset_index()


def best_controls(table: pd.DataFrame, template: str, n: int = 3) -> tuple[str, ...]:
    """The n templates besides a case's own that tell most facts of a `tell` table; of equals, the one asked first. The
    rule for controls where nobody chose them by hand, asked of countries on which anything may be looked at."""
    told = table[table.template != template].groupby("template", sort=False).told.sum()
    return tuple(told.sort_values(ascending=False, kind="stable").index[:n])


def first_failing(case: Case, table: pd.DataFrame) -> pd.Series:
    """The row of a `tell` table for the case's first fact known and not told, or its first fact."""
    states = known_and_told(table, case)
    rows = table[table.template == case.template].reset_index(drop=True)
    return rows.loc[int(states.routing_failure.to_numpy().argmax())]
