"""Run prompts and keep what patching needs; then give one component what it did elsewhere, and run what follows.

A run keeps, of every layer, the stream at all positions and the last position's heads and MLP output, its attention,
and the keys and values that it saw. So

    rerun     after a change of weights in some layer, everything below it is not computed again
    patched   nothing before the last position can notice a patch there: only last rows are run, from the patched
              layer up, all components of a model in one sweep

`crosscheck.sweep` patches the same heads by whole forward passes; a test holds the two against each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from lib.replay import Past, gathered
from lib.subjects import Subject
from lib.trace import Capture
from lib.weights import Block


@dataclass(frozen=True)
class Layer:
    """What one layer did with n prompts (padded on the right to t tokens)."""

    stream: Float[Tensor, "n t d_model"]  # before the layer, at all positions
    keys: Float[Tensor, "n n_kv t d_head"]  # rotated to their positions
    values: Float[Tensor, "n n_kv t d_head"]
    pattern: Float[Tensor, "n n_heads t"]  # attention from the last position
    z: Float[Tensor, "n n_heads d_head"]  # of the last position, as all below
    middle: Float[Tensor, "n d_model"]  # the stream between attention and MLP
    mlp: Float[Tensor, "n d_model"]


@dataclass(frozen=True)
class Run:
    """A forward pass over n prompts."""

    prompts: tuple[str, ...]
    tokens: Int[Tensor, "n t"]
    last: Int[Tensor, " n"]
    layers: tuple[Layer, ...]
    final: Float[Tensor, "n d_model"]  # the last position's stream before the final norm
    logits: Float[Tensor, "n vocab"]

    @property
    def z(self) -> Float[Tensor, "n n_layers n_heads d_head"]:
        return torch.stack([layer.z for layer in self.layers], 1)

    @property
    def mlps(self) -> Float[Tensor, "n n_layers d_model"]:
        return torch.stack([layer.mlp for layer in self.layers], 1)

    @property
    def patterns(self) -> Float[Tensor, "n n_layers n_heads t"]:
        return torch.stack([layer.pattern for layer in self.layers], 1)

    def capture(self) -> Capture:
        """As `trace.capture` would have it."""
        rows = torch.arange(len(self.prompts))
        stream = torch.stack([*(layer.stream[rows, self.last] for layer in self.layers), self.final], 1)
        return Capture(self.prompts, self.tokens, self.last, stream, self.z, self.mlps, self.logits, None)

    def take(self, rows: Sequence[int]) -> Run:
        """Some of the prompts."""
        at = torch.tensor(list(rows), dtype=torch.long)
        layers = tuple(Layer(*(x[at] for x in vars(layer).values())) for layer in self.layers)
        prompts = tuple(self.prompts[i] for i in rows)
        return Run(prompts, self.tokens[at], self.last[at], layers, self.final[at], self.logits[at])


@torch.no_grad()
def run(subject: Subject, prompts: Sequence[str]) -> Run:
    """All layers, by the weight view. Raises DataError for an empty or too long prompt."""
    tokens, last = subject.encode(prompts)
    return _upwards(subject, tuple(prompts), tokens, last, (), subject.weights.embed(tokens))


@torch.no_grad()
def rerun(subject: Subject, before: Run, layer: int) -> Run:
    """The run again from a layer up (0-based), after a change of weights there or above."""
    below = before.layers[:layer]
    return _upwards(subject, before.prompts, before.tokens, before.last, below, before.layers[layer].stream)


def _upwards(
    subject: Subject, prompts: tuple[str, ...], tokens: Tensor, last: Tensor, below: tuple[Layer, ...], stream: Tensor
) -> Run:
    layers, rows, weights = list(below), torch.arange(len(last)), subject.weights
    for block in weights.blocks[len(below) :]:
        done, stream = _layer(block, stream, last)
        layers.append(done)
    final = stream[rows, last]
    return Run(prompts, tokens, last, tuple(layers), final, weights.norm_final(final) @ weights.W_U)


def _layer(block: Block, stream: Float[Tensor, "n t d_model"], last: Int[Tensor, " n"]) -> tuple[Layer, Tensor]:
    attn, rows, x = block.attn, torch.arange(len(last)), block.norm_attn(stream)
    q, k = attn.queries_keys(x)
    v = einsum(x, attn.W_V, "b t d, n d h -> b n t h")
    v = v if attn.b_V is None else v + attn.b_V[:, None]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(future, float("-inf")).softmax(-1)
    z = pattern @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    middle = stream + attn.out(z)
    mlp = block.mlp(block.norm_mlp(middle))
    kept = Layer(
        stream, k[:, :: q.shape[1] // v.shape[1]], v, pattern[rows, :, last], z[rows, :, last], middle[rows, last],
        mlp[rows, last],
    )  # fmt: skip
    return kept, middle + mlp


def margins(run: Run, pairs: Int[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """First token's logit minus the second's."""
    return -run.logits.gather(1, pairs).diff()[:, 0]


@torch.no_grad()
def patched(
    subject: Subject,
    run: Run,
    z: Float[Tensor, "n n_layers n_heads d_head"],
    mlps: Float[Tensor, "n n_layers d_model"],
    pairs: Int[Tensor, "n 2"],
    *,
    lowest: int = 0,
) -> Float[Tensor, "component n"]:
    """Margin of each prompt with one component at a time made to put out what z or mlps say: all heads layer by layer,
    then all MLPs, as `diagnosis.components` orders them. Below the layer `lowest` nothing is patched."""
    weights, n = subject.weights, len(run.prompts)
    rows = deque(climb(subject, run, z, mlps, start=lowest), maxlen=1)[0]  # what leaves the last layer
    own = margins(run, pairs).expand(lowest, weights.n_heads + 1, n)
    found = torch.cat((own, read(subject, rows, pairs).view(-1, weights.n_heads + 1, n)))
    return torch.cat((found[:, :-1].flatten(0, 1), found[:, -1]))


@torch.no_grad()
def climb(
    subject: Subject,
    run: Run,
    z: Float[Tensor, "n n_layers n_heads d_head"],
    mlps: Float[Tensor, "n n_layers d_model"] | None = None,
    *,
    start: int = 0,
    below: Float[Tensor, "m d_model"] | None = None,
) -> Iterator[Float[Tensor, "m d_model"]]:
    """The patched last rows that leave each layer from `start` up: those of the layers below, one layer further, then a
    head each (and the MLP, if mlps are given), the n prompts together. below: those that enter `start`, from a model
    with the same weights up to there."""
    rows = run.final[:0] if below is None else below
    before = torch.arange(run.tokens.shape[1]) < run.last[:, None]
    for i in range(start, subject.weights.n_layers):
        block, layer = subject.weights.blocks[i], run.layers[i]
        change = einsum(z[:, i] - layer.z, block.attn.W_O, "b n h, n h d -> n b d")
        seen = Past(layer.keys, layer.values, before, run.last)
        below = rows + block.attn.write(gathered(block, seen, rows))
        middle = torch.cat((below, (layer.middle + change).flatten(0, 1)))
        rows = middle + block.mlp(block.norm_mlp(middle))
        if mlps is not None:
            rows = torch.cat((rows, layer.middle + mlps[:, i]))
        yield rows


def read(subject: Subject, rows: Float[Tensor, "m d_model"], pairs: Int[Tensor, "n 2"]) -> Float[Tensor, "copy n"]:
    """Margins of patched rows that left the last layer."""
    weights = subject.weights
    directions = (weights.W_U[:, pairs[:, 0]] - weights.W_U[:, pairs[:, 1]]).T
    return (weights.norm_final(rows).view(-1, *directions.shape) * directions).sum(-1)
