"""How far could an edit at one layer get? The failing prompt is given the stream of a context in which the model tells.

A neutral prefix changes no weight and makes many facts told. Run with the prefix, keep the stream at two places, the
subject's last token and the last position, and write it into the run without the prefix, layer by layer. What a place
carries at a layer is the share of facts that this makes told: an edit at that layer which acts at that place alone,
and does there what the prefix does, could not do better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.errors import DataError
from lib.facts import Case, Fact, load_prefixes, load_templates, prompts, scorable, tell
from lib.replay import Pack, above, entering, pack
from lib.subjects import Subject

PLACES = ("subject's last token", "last position", "both")
SEEN = ("fit", "eight", "selection")  # no held-out fact takes part


def untold(subject: Subject, case: Case, splits: Sequence[str] = SEEN) -> tuple[Fact, ...]:
    """Facts of the large set, of some splits, that a control template tells and the failing one does not. Raises
    DataError if there is none."""
    text = load_templates()
    facts = [f for f in scorable(subject, case.large) if f.split in splits]
    names = (*case.controls, case.template)
    told = {n: tell(subject, facts, {n: text[n]}).told.to_numpy() for n in names} if facts else {}
    known = np.any([told[c] for c in case.controls], axis=0) if told else []
    out = tuple(f for f, k, t in zip(facts, known, told.get(case.template, ()), strict=True) if k and not t)
    if not out:
        raise DataError(f"case {case.name!r}: no fact of {', '.join(splits)} is known to {subject.name} and not told.")
    return out


def told_in(subject: Subject, case: Case, facts: Sequence[Fact]) -> pd.DataFrame:
    """How many facts each control template tells, and the failing template after each neutral prefix: context, kind,
    told, n. What an edit may hope for at most, if all it does is to bring about such a context."""
    text = load_templates()
    asked = [("control template", text[c], "", text[c]) for c in case.controls]
    asked += [("prefix", repr(p), p, text[case.template]) for p in load_prefixes(subject).values()]
    rows = [
        (kind, name, int(tell(subject, facts, {"": template}, prefix=prefix).told.sum()), len(facts))
        for kind, name, prefix, template in asked
    ]
    return pd.DataFrame(rows, columns=["kind", "context", "told", "n"])


@torch.no_grad()
def carried(
    subject: Subject, case: Case, facts: Sequence[Fact], prefix: str, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """Facts told when the stream that enters a layer (0-based; all by default) is, at one place, what it is with the
    prefix: layer (counted from 1), place, told, n. Raises DataError where the prefix changes how a prompt's own words
    are cut into tokens, because then its places have no counterparts."""
    template = load_templates()[case.template]
    bare, full = ([subject.token_ids(p) for p in prompts(facts, template, x)] for x in ("", prefix))
    if wrong := [f for f, a, b in zip(facts, bare, full, strict=True) if b[-len(a) :] != a or len(a) == len(b)]:
        raise DataError(f"after {prefix!r} the prompt of {wrong[0].subject} is cut into other tokens; use another one.")
    short, long = pack(subject, bare), pack(subject, full)
    back = torch.tensor([_tail(subject, template, f, a) for f, a in zip(facts, bare, strict=True)])
    spots = {
        "subject's last token": [(short.last - back, long.last - back)], "last position": [(short.last, long.last)],
    }  # fmt: skip
    spots["both"] = [*spots["subject's last token"], *spots["last position"]]
    answers = torch.tensor([subject.first_token(f.answer) for f in facts])
    rows = []
    for layer in range(subject.weights.n_layers) if layers is None else layers:
        own, other = entering(subject, short, layer), entering(subject, long, layer)
        for place in PLACES:
            told = _told(subject, short, layer, _moved(own, other, spots[place]), answers)
            rows.append((layer + 1, place, int(told.sum()), len(facts)))
    return pd.DataFrame(rows, columns=["layer", "place", "told", "n"])


def _tail(subject: Subject, template: str, fact: Fact, tokens: Sequence[int]) -> int:
    """How many tokens after the subject's last one a prompt has."""
    head = template[: template.index("{}")] + fact.subject
    for end in range(1, len(tokens) + 1):
        if len(subject.tokenizer.decode(list(tokens[:end]))) >= len(head):
            return len(tokens) - end
    raise DataError(f"the prompt of {fact.subject} ends before its subject does.")


def _moved(
    own: Float[Tensor, "t d_model"], other: Float[Tensor, "s d_model"], spots: Sequence[tuple[Tensor, Tensor]]
) -> Float[Tensor, "t d_model"]:
    out = own.clone()
    for here, there in spots:
        out[here] = other[there]
    return out


def _told(
    subject: Subject, texts: Pack, layer: int, stream: Float[Tensor, "t d_model"], answers: Int[Tensor, " fact"]
) -> Bool[Tensor, " fact"]:
    final = above(subject, texts, layer, stream)[texts.last]
    return (final @ subject.weights.W_U).argmax(-1) == answers
