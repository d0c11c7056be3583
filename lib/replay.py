"""Run a model again from one layer up, for many texts at once.

Editing or training one layer leaves everything below it as it was. So the stream that enters the layer is computed
once (`entering`), and only what lies above is run again (`above`).

Texts are packed into one row without padding: each token keeps the position it has in its own text, and a mask keeps
the texts blind to each other. With short texts a forward pass spends its time reading weights from memory; a pack
reads each weight once for all of them. And prompts that a template makes begin alike: what stands before the country is
the same in all, sees only itself, and is run once.

Where only last tokens change, only they are run again (`ends`): nobody stands after a last token, so no other token
can notice. And where an edit's values are tried (`above`), the last layer is run only for what is read of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call
from tqdm.auto import tqdm

from lib.errors import DataError
from lib.subjects import Subject
from lib.weights import Block, Slice

ROOM = 512  # tokens in a pack: attention's cost grows with its square, and beyond a few hundred nothing is gained


@dataclass(frozen=True)
class Pack:
    """Texts in one row of t tokens. position: of each token in its own text. before: row of the token before it in its
    text, -1 at a start. last: row of each text's last token."""

    tokens: Int[Tensor, " t"]
    position: Int[Tensor, " t"]
    before: tuple[int, ...]
    last: Int[Tensor, " text"]

    @cached_property
    def sees(self) -> Bool[Tensor, "t t"]:
        """Where each token may look: back, within its text."""
        sees = np.eye(len(self.before), dtype=bool)
        for row, before in enumerate(self.before):
            if before >= 0:
                sees[row] |= sees[before]
        return torch.tensor(sees)

    def mask(self) -> Float[Tensor, "1 1 t t"]:
        """0 where a token may look, the lowest number elsewhere."""
        return torch.zeros(self.sees.shape).masked_fill(~self.sees, torch.finfo(torch.float32).min)[None, None]


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


def packs(subject: Subject, texts: Sequence[Sequence[int]], room: int = ROOM, *, share: bool = False) -> Iterator[Pack]:
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
        out[order[done : (done := done + len(final))]] = (final @ subject.weights.W_U).float()
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
    values: dict[Slice, Tensor] | None = None, read: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "t_or_n d_model"]:  # fmt: skip
    """The final residual stream, normalised, from the stream that enters a layer. values: put for the layer's own,
    differentiable in them; the model is not written to. read: the rows that are wanted, in this order. With values,
    the last layer is run for these alone, by the view of its weights: changes of these in place are seen; hooks,
    adapters and modules put for its own are not."""
    norm, end = subject.weights.norm_final_module, subject.weights.n_layers - 1
    if read is None or not values or layer == end:
        final = norm(_blocks(subject, texts, stream, range(layer, end + 1), values or {}))
        return final if read is None else final[read]
    stream = _blocks(subject, texts, stream, range(layer, end), values)
    (last,) = ends(subject, texts, {end: stream}, stream[read], end, read)
    return norm(last.stream)


def through(
    subject: Subject, texts: Pack, stream: Float[Tensor, "t d_model"], layer: int
) -> Float[Tensor, "t d_model"]:
    """The stream after one layer, from the stream before it."""
    return _blocks(subject, texts, stream, range(layer, layer + 1), {})


@dataclass(frozen=True)
class Past:
    """What n tokens look back on in one layer (the last ones of texts, or any in the last layer): keys (rotated) and
    values, in a row for each text or in one row for all. before: those that stand before each of the n in its text.
    position: of the n tokens."""

    keys: Float[Tensor, "row n_kv t d_head"]
    values: Float[Tensor, "row n_kv t d_head"]
    before: Bool[Tensor, "n t"]
    position: Int[Tensor, " n"]


def past(
    block: Block, texts: Pack, stream: Float[Tensor, "t d_model"], at: Int[Tensor, " n"] | None = None
) -> Past:
    """What tokens of a pack look back on, from the stream that enters the block. at: their rows; the last tokens', if
    not given."""
    x, attn, at = block.norm_attn(stream), block.attn, texts.last if at is None else at
    keys = attn.rotated(_each(x, attn.W_K, attn.b_K), texts.position)
    before = texts.sees[at].scatter(1, at[:, None], False)
    return Past(keys[None], _each(x, attn.W_V, attn.b_V)[None], before, texts.position[at])


def gathered(block: Block, past: Past, rows: Float[Tensor, "m d_model"]) -> Float[Tensor, "m n_heads d_head"]:
    """z of last tokens, from their own stream and what they look back on. rows: all n texts in their order, as many
    times as there are versions of them."""
    copies, (row, kv, t) = len(rows) // len(past.position), past.keys.shape[:3]
    x, attn, position = block.norm_attn(rows), block.attn, past.position.repeat(copies)
    q = attn.rotated(_each(x, attn.W_Q, attn.b_Q), position)
    k, v = attn.rotated(_each(x, attn.W_K, attn.b_K), position), _each(x, attn.W_V, attn.b_V)
    lead = (len(rows) // row, row, kv)  # (copy, row, kv)
    q, k, v = (y.transpose(0, 1).reshape(*lead, len(y) // kv, y.shape[2]) for y in (q, k, v))
    scores = einsum(q, past.keys, "c n k g h, n k t h -> c n k g t")
    own = einsum(q, k[..., 0, :], "c n k g h, c n k h -> c n k g")
    before = past.before.repeat(copies, 1).view(*lead[:2], 1, 1, t)
    scores = torch.cat((scores.masked_fill(~before, float("-inf")), own[..., None]), -1)
    weights = (scores / q.shape[-1] ** 0.5).softmax(-1)
    z = einsum(weights[..., :-1], past.values, "c n k g t, n k t h -> c n k g h")
    return (z + weights[..., -1:] * v).flatten(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class End:
    """What a layer did with last tokens; `stream` is what leaves it."""

    z: Float[Tensor, "m n_heads d_head"]
    middle: Float[Tensor, "m d_model"]  # the stream between attention and MLP
    neurons: Float[Tensor, "m d_mlp"]
    stream: Float[Tensor, "m d_model"]


def ends(
    subject: Subject, texts: Pack, before: dict[int, Float[Tensor, "t d_model"]], rows: Float[Tensor, "m d_model"],
    start: int, at: Int[Tensor, " n"] | None = None,
) -> Iterator[End]:  # fmt: skip
    """Last tokens in layer `start`, in the next, and so on, from what they are on entering `start`. before: the streams
    that enter these layers, of all tokens. rows: as in `gathered`; differentiable in them. at: as in `past`; other
    tokens than the last ones only from the last layer, for in any other, later ones look back on them."""
    for layer in range(start, subject.weights.n_layers):
        block = subject.weights.blocks[layer]
        z = gathered(block, past(block, texts, before[layer], at), rows)
        middle = rows + block.attn.write(z)
        neurons = block.mlp.neurons(block.norm_mlp(middle))
        rows = middle + block.mlp.write(neurons)
        yield End(z, middle, neurons, rows)


def _each(
    x: Float[Tensor, "m d_model"], W: Float[Tensor, "n d_model d_head"], b: Float[Tensor, "n d_head"] | None
) -> Float[Tensor, "n m d_head"]:
    """A query, key or value of every token."""
    out = einsum(x, W, "m d, n d h -> n m h")
    return out if b is None else out + b[:, None]


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
