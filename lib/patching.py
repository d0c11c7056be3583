"""Give one component of a prompt what it did in another one, at the last position, and run what follows.

Nothing before the last position can notice, so its keys and values are computed once and only the last row of each
prompt is run again, from the patched layer up. All heads and all MLPs of a model of 30 layers take seconds where
whole forward passes would take minutes. (`crosscheck.sweep` patches the same heads by whole passes; a test holds the
two against each other.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, repeat
from jaxtyping import Float, Int
from torch import Tensor

from lib.site import Site
from lib.subjects import Subject
from lib.trace import Capture
from lib.weights import Block


@dataclass(frozen=True)
class Memory:
    """What one layer keeps of n prompts (padded on the right to t tokens): rotated keys and values of every position,
    and the last position's stream between attention and MLP."""

    keys: Float[Tensor, "n n_kv t d_head"]
    values: Float[Tensor, "n n_kv t d_head"]
    middle: Float[Tensor, "n d_model"]


@torch.no_grad()
def remember(subject: Subject, seen: Capture) -> list[Memory]:
    """The memories of all layers. The capture must be `everywhere`."""
    assert seen.everywhere is not None, "capture(..., everywhere=True)"
    out = []
    for i, block in enumerate(subject.weights.blocks):
        x, attn = block.norm_attn(seen.everywhere[:, i]), block.attn
        _, keys = attn.queries_keys(x)
        values = einsum(x, attn.W_V, "b t d, n d h -> b n t h")
        values = values if attn.b_V is None else values + attn.b_V[:, None]
        heads = einsum(seen.z[:, i], attn.W_O, "b n h, n h d -> b d")
        middle = seen.stream[:, i] + heads + (0 if attn.b_O is None else attn.b_O)
        out.append(Memory(keys[:, :: keys.shape[1] // attn.W_K.shape[0]], values, middle))
    return out


@torch.no_grad()
def patched_margins(
    subject: Subject, seen: Capture, z: Float[Tensor, "n n_layers n_heads d_head"],
    mlps: Float[Tensor, "n n_layers d_model"], pairs: Int[Tensor, "n 2"],
) -> Float[Tensor, "component n"]:  # fmt: skip
    """Margin (first token of a pair minus the second) of each prompt of the capture, with one component at a time
    made to put out what z or mlps say: all heads layer by layer, then all MLPs, as `diagnosis.components` orders them."""
    weights, memories, n = subject.weights, remember(subject, seen), len(seen.prompts)
    rows = seen.stream[:0, 0]
    order: list[tuple[int, Site]] = []
    for i, (block, memory) in enumerate(zip(weights.blocks, memories, strict=True)):
        rows = _attend(block, memory, rows, seen.last)
        change = einsum(z[:, i] - seen.z[:, i], block.attn.W_O, "b n h, n h d -> n b d")
        middle = torch.cat((rows, (memory.middle + change).flatten(0, 1)))
        rows = middle + block.mlp(block.norm_mlp(middle))
        rows = torch.cat((rows, memory.middle + mlps[:, i]))
        order += [(i, Site(i, h)) for h in range(weights.n_heads)] + [(i, Site(i, mlp=True))]
    final = weights.norm_final(rows).view(-1, n, weights.d_model)
    directions = (weights.W_U[:, pairs[:, 0]] - weights.W_U[:, pairs[:, 1]]).T
    margins = (final * directions).sum(-1)
    by_layer = margins.view(weights.n_layers, weights.n_heads + 1, n)
    return torch.cat((by_layer[:, :-1].flatten(0, 1), by_layer[:, -1]))


def _attend(
    block: Block, memory: Memory, rows: Float[Tensor, "m d_model"], last: Int[Tensor, " n"]
) -> Float[Tensor, "m d_model"]:
    """The attention of a layer for changed last rows, m of them: so many times the n prompts in their order."""
    if not len(rows):
        return rows
    attn, copies = block.attn, len(rows) // len(last)
    x = block.norm_attn(rows)
    q, k, v = (einsum(x, W, "m d, n d h -> m n h") for W in (attn.W_Q, attn.W_K, attn.W_V))
    q, k, v = (y if b is None else y + b for y, b in ((q, attn.b_Q), (k, attn.b_K), (v, attn.b_V)))
    if attn.rotary is not None:
        cos, sin = (y[0].repeat(copies, 1)[:, None] for y in attn.rotary(x, last[None]))
        q, k = (y * cos + _rotate_half(y) * sin for y in (q, k))
    return rows + _mixed(block, memory, q, k, v, last)


def _mixed(block: Block, memory: Memory, q: Tensor, k: Tensor, v: Tensor, last: Int[Tensor, " n"]) -> Tensor:
    """What the heads put out, given each row's own query, key and value (m, heads, d_head) and its prompt's others."""
    attn, n, t = block.attn, len(last), memory.keys.shape[2]
    kv = attn.W_K.shape[0]
    q = q.view(-1, n, kv, q.shape[1] // kv, q.shape[2])  # (copy, prompt, kv, group, d_head)
    k, v = (y.view(-1, n, kv, y.shape[2]) for y in (k, v))
    scores = einsum(q, memory.keys, "c n k g h, n k t h -> c n k g t")
    own = einsum(q, k, "c n k g h, c n k h -> c n k g")
    before = torch.arange(t) < last[:, None]
    scores = scores.masked_fill(~before[None, :, None, None], float("-inf"))
    weights = (torch.cat((scores, own[..., None]), -1) / q.shape[-1] ** 0.5).softmax(-1)
    z = einsum(weights[..., :-1], memory.values, "c n k g t, n k t h -> c n k g h")
    z = z + weights[..., -1:] * v[:, :, :, None]
    out = einsum(z.flatten(0, 1).flatten(1, 2), attn.W_O, "m n h, n h d -> m d")
    return out if attn.b_O is None else out + attn.b_O


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
