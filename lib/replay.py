"""Run a model again from one layer up, for many texts at once.

Editing or training one layer leaves everything below it as it was. So the stream that enters the layer is computed
once (`entering`), and only what lies above is run again (`above`).

Texts are packed into one row without padding: each token keeps the position it has in its own text, and a mask keeps
the texts blind to each other. With short texts a forward pass spends its time reading weights from memory; a pack
reads each weight once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from lib.errors import DataError
from lib.subjects import Subject
from lib.weights import Slice

ROOM = 512  # tokens in a pack: attention's cost grows with its square, and beyond a few hundred nothing is gained


@dataclass(frozen=True)
class Pack:
    """Texts in one row of t tokens. position: within its own text. text: which one a token belongs to."""

    tokens: Int[Tensor, " t"]
    position: Int[Tensor, " t"]
    text: Int[Tensor, " t"]

    @property
    def last(self) -> Int[Tensor, " text"]:
        """Index of each text's last token."""
        return torch.unique_consecutive(self.text, return_counts=True)[1].cumsum(0) - 1

    def mask(self) -> Float[Tensor, "1 1 t t"]:
        """0 where a token may look (back, within its text), the lowest number elsewhere."""
        index = torch.arange(len(self.text))
        sees = (self.text[:, None] == self.text) & (index[:, None] >= index)
        return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]


def pack(subject: Subject, texts: Sequence[Sequence[int]]) -> Pack:
    """Token lists in one row. Raises DataError for none, an empty one, or one longer than the model reads."""
    if not texts or not all(texts):
        raise DataError("there is nothing to run: no text was given, or one without a token.")
    if (longest := max(map(len, texts))) > subject.weights.context:
        raise DataError(f"a text has {longest} tokens; {subject.name} reads {subject.weights.context}. Shorten it.")
    return Pack(
        torch.tensor([t for text in texts for t in text]),
        torch.cat([torch.arange(len(text)) for text in texts]),
        torch.repeat_interleave(torch.tensor([len(text) for text in texts])),
    )


def packs(subject: Subject, texts: Sequence[Sequence[int]], room: int = ROOM) -> Iterator[Pack]:
    """The texts in their order, in as many packs as needed, each of at most `room` tokens (or of one text)."""
    row: list[Sequence[int]] = []
    for text in texts:
        if row and sum(map(len, row)) + len(text) > room:
            yield pack(subject, row)
            row = []
        row.append(text)
    yield pack(subject, row)


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
