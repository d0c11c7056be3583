"""Does this GPT-2 say what others recorded of GPT-2? (`data/gpt2_known_answers.yaml`)

    check      every recorded figure beside the subject's own: a row each, with its convention and its source
    require    the same, raising ModelError at the first miss: a run on GPT-2 begins with it

A checksum proves the weights, not the tokenizer, the convention or the forward pass. Conventions are written out, since
a log-probability without the token before the text is another figure, and no less plausible, than one with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.errors import DataError, ModelError
from lib.facts import load_mapping
from lib.files import DATA
from lib.models import Model
from lib.results import as_text

ANSWERS = DATA / "gpt2_known_answers.yaml"


@dataclass(frozen=True)
class Answer:
    """One recorded figure. ids or text: what is read (where both stand, the tokenizer must agree); bos: the id that
    stands before it, None for nothing; tokens: the two whose logits are compared, as text or ids."""

    id: str
    kind: str
    source: str
    expected: Any
    tolerance: float = 0.0
    bos: int | None = None
    ids: tuple[int, ...] = ()
    text: str = ""
    tokens: tuple[str | int, ...] = ()


def load_answers(path: Path = ANSWERS) -> tuple[Answer, ...]:
    """The recorded figures. Raises DataError for an entry with an unknown kind or source, or without what it reads."""
    content, out = load_mapping(path), []
    if lacking := [k for k in ("answers", "sources", "bos_id") if not content.get(k)]:
        raise DataError(f"{path} has no `{lacking[0]}`; nothing would be checked. Restore it from git.")
    for entry in content["answers"]:
        where = f"{path}, {entry.get('id', 'an entry without id')}"
        if entry.get("kind") not in KINDS or entry.get("source") not in content["sources"]:
            raise DataError(
                f"{where}: kind {entry.get('kind')!r}, source {entry.get('source')!r}; choose a kind of "
                f"{', '.join(KINDS)} and a source that the file lists."
            )
        reads = bool(entry.get("ids") or entry.get("text"))
        if reads == (entry["kind"] in ABOUT_THE_FILE) or "expected" not in entry:
            raise DataError(f"{where}: a {entry['kind']} needs `expected`, and ids or a text to read, or neither.")
        source = content["sources"][entry["source"]]
        fields: dict[str, Any] = {k: tuple(v) if k in ("ids", "tokens") else v for k, v in entry.items()}
        fields["source"] = f"{source['repo']}, {source['path']}, {source['commit'][:12]}"
        fields["bos"] = content["bos_id"] if entry.get("bos") else None
        try:
            out.append(Answer(**fields))
        except TypeError as error:
            raise DataError(f"{where}: {error}. Mend the entry's fields.") from error
    return tuple(out)


def check(model: Model, answers: Sequence[Answer]) -> pd.DataFrame:
    """One row a figure: what, convention, source, expected, found, tolerance, holds."""
    rows = []
    for answer in answers:
        words, find = KINDS[answer.kind]
        if answer.kind not in ABOUT_THE_FILE:
            words += f", {'nothing' if answer.bos is None else '<|endoftext|>'} before the text"
        found, wanted = find(model, answer), _wanted(model, answer)
        rows.append(
            {
                "what": answer.id,
                "convention": words,
                "source": answer.source,
                "expected": wanted,
                "found": found,
                "tolerance": answer.tolerance,
                "holds": _tokens_agree(model, answer) and _close(wanted, found, answer.tolerance),
            }
        )
    return pd.DataFrame(rows)


def require(model: Model, answers: Sequence[Answer] | None = None) -> None:
    """Raises ModelError for the first figure that the model does not give."""
    table = check(model, load_answers() if answers is None else answers)
    if table.holds.all():
        return
    row = table[~table.holds].iloc[0]
    raise ModelError(
        f"{model.name} does not give the known answer {row.what!r} ({row.convention}; {row.source}): expected "
        f"{_short(row.expected)}, found {_short(row.found)}. The weights, the tokenizer or the installed transformers "
        "are not those that the figure is of: fetch the model anew, or install the versions of constraints.txt."
    )


def read(model: Model, answer: Answer) -> list[int]:
    """The token ids that the answer is about, with the one before the text."""
    ids = list(answer.ids) or model.token_ids(answer.text)
    return ids if answer.bos is None else [answer.bos, *ids]


@torch.no_grad()
def log_probs(model: Model, ids: Sequence[int]) -> Float[Tensor, "t vocab"]:
    """Natural logarithm of p(next token | tokens up to here), at every position."""
    tokens = torch.tensor([list(ids)], device=model.weights.W_E.device)
    return model.module(tokens, use_cache=False).logits[0].float().log_softmax(-1).cpu()


def _own(model: Model, answer: Answer) -> list[float]:
    """Position t's distribution is about token t + 1: the first token has no log-probability, and the last
    distribution no token."""
    ids = read(model, answer)
    return log_probs(model, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def _loss(model: Model, answer: Answer) -> float:
    own = _own(model, answer)
    return -sum(own) / len(own)


def _top(model: Model, answer: Answer) -> dict[int, float]:
    best = log_probs(model, read(model, answer))[-1].exp().topk(len(answer.expected))
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _difference(model: Model, answer: Answer) -> float:
    last = log_probs(model, read(model, answer))[-1]
    first, second = (_one_token(model, t) for t in answer.tokens)
    return float(last[first] - last[second])


def _greedy(model: Model, answer: Answer) -> list[int]:
    """The most likely token after each part of the expected continuation. It equals the continuation exactly where
    greedy decoding gives it: up to the first miss both have read the same tokens."""
    ids, more = read(model, answer), _wanted(model, answer)
    return log_probs(model, ids + more)[len(ids) - 1 : -1].argmax(-1).tolist()


ABOUT_THE_FILE = ("parameters", "sha256")
KINDS: dict[str, tuple[str, Callable[[Model, Answer], Any]]] = {
    "logprobs": ("natural log-probability of each token given those before it", _own),
    "loss": ("mean next-token cross-entropy in nats", _loss),
    "top": ("most likely next tokens and their probabilities", _top),
    "difference": ("logit of one next token minus that of another", _difference),
    "greedy": ("greedy continuation", _greedy),
    "parameters": ("tied parameters counted once", lambda model, _: model.parameters),
    "sha256": ("of the weights file", lambda model, _: model.weights_sha256),
}


def _wanted(model: Model, answer: Answer) -> Any:
    """The expectation in the form of what is found: token ids for texts."""
    if answer.kind == "top":
        return {_one_token(model, token): p for token, p in answer.expected}
    if answer.kind == "greedy" and isinstance(answer.expected, str):
        return model.token_ids(answer.expected)
    return answer.expected


def _one_token(model: Model, token: str | int) -> int:
    """The id of a token; -1, which is none, for a text that this tokenizer does not keep whole."""
    if isinstance(token, int):
        return token
    ids = model.token_ids(token)
    return ids[0] if len(ids) == 1 else -1


def _tokens_agree(model: Model, answer: Answer) -> bool:
    return not (answer.ids and answer.text) or model.token_ids(answer.text) == list(answer.ids)


def _close(wanted: Any, found: Any, tolerance: float) -> bool:
    """Numbers within the tolerance, lists and dictionaries entry by entry, anything else equal."""
    if isinstance(wanted, dict):
        return wanted.keys() == found.keys() and all(_close(p, found[t], tolerance) for t, p in wanted.items())
    if isinstance(wanted, list):
        return len(wanted) == len(found) and all(_close(w, f, tolerance) for w, f in zip(wanted, found, strict=True))
    return abs(wanted - found) <= tolerance if isinstance(wanted, int | float) else wanted == found


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{token}: {p:.4f}" for token, p in value.items())
    numbers = value if isinstance(value, list) else [value]
    return as_text(value, ".4f" if isinstance(numbers[0], float) else "")
