"""Does this GPT-2 say what others recorded of GPT-2? (`data/gpt2_known_answers.yaml`)

    check      every recorded figure beside the model's own: a row each, with its convention and its source
    require    the same, raising ModelError at the first miss: a run on GPT-2 begins with it

A checksum proves the weights, not the tokenizer, the convention or the forward pass. Conventions are written out, since
a log-probability without the token before the text is another figure, and no less plausible, than one with it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from lib.errors import DataError, ModelError
from lib.facts import load_mapping, validated
from lib.files import DATA
from lib.models import Model
from lib.results import as_text

KINDS = {
    "logprobs": "natural log-probability of each token given those before it",
    "loss": "mean next-token cross-entropy in nats",
    "top": "most likely next tokens and their probabilities",
    "difference": "logit of one next token minus that of another",
    "greedy": "greedy continuation",
    "parameters": "tied parameters counted once",
    "sha256": "of the weights file",
}
ABOUT_THE_FILE = ("parameters", "sha256")  # these read no text


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Answer:
    """One recorded figure. ids or text: what is read (where both stand, the tokenizer must agree); bos: the id that
    stands before it, None for nothing; tokens: the two whose logits are compared, as text or ids."""

    id: str
    kind: Literal["logprobs", "loss", "top", "difference", "greedy", "parameters", "sha256"]
    source: str
    expected: Any
    tolerance: float = 0.0
    bos: int | None = None
    ids: tuple[int, ...] = ()
    text: str = ""
    tokens: tuple[str | int, ...] = ()

    @model_validator(mode="after")
    def _reads_what_it_needs(self) -> "Answer":
        if bool(self.ids or self.text) == (self.kind in ABOUT_THE_FILE):
            wanted = "nothing" if self.kind in ABOUT_THE_FILE else "ids or a text"
            raise ValueError(f"a {self.kind} needs {wanted} to read")
        return self


class _Source(BaseModel):
    repo: str
    path: str
    commit: str


class _File(BaseModel):
    bos_id: int
    sources: Annotated[dict[str, _Source], Field(min_length=1)]
    answers: Annotated[list[dict[str, Any]], Field(min_length=1)]


def load_answers(path: Path = DATA / "gpt2_known_answers.yaml") -> tuple[Answer, ...]:
    """The recorded figures. Raises DataError for an entry with an unknown kind or source, or without what it reads."""
    file, answers = validated(_File, load_mapping(path), str(path)), []
    for entry in file.answers:
        where = f"{path}, {entry.get('id', 'an entry without id')}"
        if not (source := file.sources.get(entry.get("source"))):
            raise DataError(f"{where}: source {entry.get('source')!r}; choose from {', '.join(file.sources)}.")
        entry["source"] = f"{source.repo}, {source.path}, {source.commit[:12]}"
        entry["bos"] = file.bos_id if entry.get("bos") else None
        answers.append(validated(Answer, entry, where))
    return tuple(answers)


def check(model: Model, answers: Sequence[Answer]) -> pd.DataFrame:
    """One row a figure: what, convention, source, expected, found, tolerance, holds."""
    rows = []
    for answer in answers:
        convention = KINDS[answer.kind]
        if answer.kind not in ABOUT_THE_FILE:
            convention += f", {'nothing' if answer.bos is None else '<|endoftext|>'} before the text"
        found, expected = _found(model, answer), _expected(model, answer)
        same_tokens = not (answer.ids and answer.text) or model.pieces(answer.text) == list(answer.ids)
        holds = same_tokens and _close(expected, found, answer.tolerance)
        rows.append([answer.id, convention, answer.source, expected, found, answer.tolerance, holds])
    return pd.DataFrame(rows, columns=["what", "convention", "source", "expected", "found", "tolerance", "holds"])


def require(model: Model, answers: Sequence[Answer] | None = None) -> None:
    """Raises ModelError for the first figure that the model does not give."""
    table = check(model, load_answers() if answers is None else answers)
    for row in table[~table.holds].itertuples():
        raise ModelError(
            f"{model.name} does not give the known answer {row.what!r} ({row.convention}; {row.source}): expected "
            f"{_short(row.expected)}, found {_short(row.found)}. The weights, the tokenizer or the installed "
            "transformers are not those that the figure is of: fetch the model anew, or install the versions of "
            "constraints.txt."
        )


@torch.no_grad()
def _found(model: Model, answer: Answer) -> Any:
    """What the model gives, in the form of what is expected. Position t's distribution is about token t + 1: the first
    token has no log-probability, and the last distribution no token. The most likely token after each part of a
    continuation equals it exactly where greedy decoding gives it: up to the first miss both have read the same."""
    if answer.kind in ABOUT_THE_FILE:
        return model.parameters if answer.kind == "parameters" else model.weights_sha256
    text = list(answer.ids) or model.pieces(answer.text)
    ids = text if answer.bos is None else [answer.bos, *text]
    read = ids + (_expected(model, answer) if answer.kind == "greedy" else [])
    logits = model.module(torch.tensor([read], device=model.device), use_cache=False).logits[0]
    log_p = logits.float().log_softmax(-1).cpu()  # (len(read), vocabulary)
    if answer.kind == "greedy":
        return log_p[len(ids) - 1 : -1].argmax(-1).tolist()
    if answer.kind == "top":
        best = log_p[-1].exp().topk(len(answer.expected))
        return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    if answer.kind == "difference":
        first, second = (_one_token(model, token) for token in answer.tokens)
        return float(log_p[-1][first] - log_p[-1][second])
    of_each_token = log_p[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return of_each_token if answer.kind == "logprobs" else -sum(of_each_token) / len(of_each_token)


def _expected(model: Model, answer: Answer) -> Any:
    """The expectation in the form of what is found: token ids for texts."""
    if answer.kind == "top":
        return {_one_token(model, token): p for token, p in answer.expected}
    if answer.kind == "greedy" and isinstance(answer.expected, str):
        return model.pieces(answer.expected)
    return answer.expected


def _one_token(model: Model, token: str | int) -> int:
    """The id of a token; -1, which is none, for a text that this tokenizer does not keep whole."""
    if isinstance(token, int):
        return token
    ids = model.pieces(token)
    return ids[0] if len(ids) == 1 else -1


def _close(expected: Any, found: Any, tolerance: float) -> bool:
    """Numbers within the tolerance, lists and dictionaries entry by entry, anything else equal."""
    if isinstance(expected, str):
        return expected == found
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and _close([*expected.values()], [found[t] for t in expected], tolerance)
    return np.shape(expected) == np.shape(found) and np.allclose(found, expected, rtol=0, atol=tolerance)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{token}: {p:.4f}" for token, p in value.items())
    numbers = value if isinstance(value, list) else [value]
    return as_text(value, ".4f" if isinstance(numbers[0], float) else "")
