"""Run a model again from one layer up, for many texts at once.

Editing or training one layer leaves everything below it as it was. So the stream that enters the layer is computed
once (`entering`), and only what lies above is run again (`above`).

Texts are packed into one row without padding: each token keeps the position it has in its own text, and a mask keeps
the texts blind to each other. With short texts a forward pass spends its time reading weights from memory; a pack
reads each weight once for all of them. And prompts that a template makes begin alike: what stands before the country is
the same in all, sees only itself, and is run once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from tqdm.auto import tqdm

from lib.errors import DataError
from lib.subjects import Subject
from lib.weights import Slice

ROOM = 512  # tokens in a pack: attention's cost grows with its square, and beyond a few hundred nothing is gained


@dataclass(frozen=True)
class Pack:
    """Texts in one row of t tokens. position: of each token in its own text. before: row of the token before it in its
    text, -1 at a start. last: row of each text's last token."""

    tokens: Int[Tensor, " t"]
    position: Int[Tensor, " t"]
    before: tuple[int, ...]
    last: Int[Tensor, " text"]

    def mask(self) -> Float[Tensor, "1 1 t t"]:
        """0 where a token may look (back, within its text), the lowest number elsewhere."""
        sees = np.eye(len(self.before), dtype=bool)
        for row, before in enumerate(self.before):
            if before >= 0:
                sees[row] |= sees[before]
        return torch.zeros(sees.shape).masked_fill(~torch.from_numpy(sees), torch.finfo(torch.float32).min)[None, None]


class _Row:
    """A pack in the making. share: texts that begin alike share these tokens; each keeps a last token of its own, so
    that what is read or changed there is its own."""

    def __init__(self, share: bool) -> None:
        self.share, self.nodes = share, dict[tuple[int, int], int]()
        self.tokens: list[int] = []
        self.position: list[int] = []
        self.before: list[int] = []
        self.last: list[int] = []

    def shared(self, text: Sequence[int]) -> list[int]:
        """Rows that hold the text's beginning."""
        rows: list[int] = []
        for token in text[:-1] if self.share else ():
            node = self.nodes.get((rows[-1] if rows else -1, token))
            if node is None:
                break
            rows.append(node)
        return rows

    def add(self, text: Sequence[int]) -> None:
        rows = self.shared(text)
        at = rows[-1] if rows else -1
        for i in range(len(rows), len(text)):
            if i < len(text) - 1:
                self.nodes[at, text[i]] = len(self.tokens)
            self.before.append(at)
            at = len(self.tokens)
            self.tokens.append(text[i])
            self.position.append(i)
        self.last.append(at)

    def pack(self) -> Pack:
        tokens, position, last = (torch.tensor(x) for x in (self.tokens, self.position, self.last))
        return Pack(tokens, position, tuple(self.before), last)


def pack(subject: Subject, texts: Sequence[Sequence[int]], *, share: bool = False) -> Pack:
    """Token lists in one row, one after the other, or sharing their beginnings (`_Row`). Raises DataError for none, an
    empty one, or one longer than the model reads."""
    (whole,) = packs(subject, texts, room=sum(map(len, texts)), share=share)
    return whole


def packs(
    subject: Subject, texts: Sequence[Sequence[int]], room: int = ROOM, *, share: bool = False
) -> Iterator[Pack]:
    """The texts in their order, in as many packs as needed, each of at most `room` tokens (or of one text). Raises as
    `pack` does."""
    if not texts or not all(texts):
        raise DataError("there is nothing to run: no text was given, or one without a token.")
    if (longest := max(map(len, texts))) > subject.weights.context:
        raise DataError(f"a text has {longest} tokens; {subject.name} reads {subject.weights.context}. Shorten it.")
    row = _Row(share)
    for text in texts:
        if row.tokens and len(row.tokens) + len(text) - len(row.shared(text)) > room:
            yield row.pack()
            row = _Row(share)
        row.add(text)
    yield row.pack()


@torch.no_grad()
def next_token_logits(
    subject: Subject, prompts: Sequence[str], *, progress: str | None = None
) -> Float[Tensor, "prompt vocab"]:
    """Logits of the token after each prompt, in fp32. Prompts that begin alike are run together once. progress: a
    label for a bar. Raises DataError for an empty or too long prompt, or for none."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    rows = list(packs(subject, [subject.token_ids(prompts[i]) for i in order], share=True))
    out, done = torch.empty(len(prompts), subject.weights.W_U.shape[1]), 0
    for some in tqdm(rows, desc=progress, disable=progress is None or len(rows) < 2, leave=False):
        final = above(subject, some, 0, entering(subject, some, 0))[some.last]
        out[order[done : (done := done + len(final))]] = (final @ subject.weights.W_U).float().cpu()
    return out


@torch.no_grad()
def entering(subject: Subject, texts: Pack, layer: int) -> Float[Tensor, "t d_model"]:
    """The residual stream before a layer (0-based)."""
    return streams(subject, texts, [layer])[layer]


@torch.no_grad()
def streams(subject: Subject, texts: Pack, layers: Iterable[int]) -> dict[int, Float[Tensor, "t d_model"]]:
    """The residual stream before each of some layers, in one pass; before the layer that would follow the last one, it
    is the final stream, not yet normalised."""
    weights, out, done = subject.weights, {}, 0
    stream = weights.W_E[texts.tokens] + (0 if weights.W_pos is None else weights.W_pos[texts.position])
    for layer in sorted(set(layers)):
        stream = out[layer] = _blocks(subject, texts, stream, range(done, layer), {})
        done = layer
    return out


def above(
    subject: Subject, texts: Pack, layer: int, stream: Float[Tensor, "t d_model"],
    values: dict[Slice, Tensor] | None = None,
) -> Float[Tensor, "t d_model"]:  # fmt: skip
    """The final residual stream, normalised, from the stream that enters a layer. values: put for the layer's own,
    differentiable in them; the model is not written to."""
    stream = _blocks(subject, texts, stream, range(layer, subject.weights.n_layers), values or {})
    return subject.weights.norm_final_module(stream)


def through(
    subject: Subject, texts: Pack, stream: Float[Tensor, "t d_model"], layer: int
) -> Float[Tensor, "t d_model"]:
    """The stream after one layer, from the stream before it."""
    return _blocks(subject, texts, stream, range(layer, layer + 1), {})


def _blocks(
    subject: Subject, texts: Pack, stream: Float[Tensor, "t d_model"], layers: range, values: dict[Slice, Tensor]
) -> Float[Tensor, "t d_model"]:
    """The model's own blocks; the first one with the values in place."""
    weights, stream = subject.weights, stream[None]
    extra = {"attention_mask": texts.mask(), **weights.block_inputs(stream, texts.position)}
    for layer in layers:
        module = weights.blocks[layer].module
        own = _own(subject, layer, values) if layer == layers.start else {}
        out = functional_call(module, own, (stream,), extra) if own else module(stream, **extra)
        stream = out[0] if isinstance(out, tuple) else out
    return stream[0]


def _own(subject: Subject, layer: int, values: dict[Slice, Tensor]) -> dict[str, Tensor]:
    """The block's parameters, by their names within it, with the values put in."""
    prefix = f"{subject.weights.prefix}.{layer}."
    module = subject.weights.blocks[layer].module
    return {
        (short := part.name.removeprefix(prefix)): _put(module.get_parameter(short), part, value)
        for part, value in values.items()
    }


def _put(parameter: Tensor, part: Slice, value: Tensor) -> Tensor:
    if part.start is None:
        return value
    return torch.cat((parameter[..., : part.start], value, parameter[..., part.stop :]), -1)
