"""What a model says next, over its whole vocabulary, with one reading of the unembedding.

With few rows, a product with W_U spends its time fetching W_U from memory, and a loss needs it twice: for the logits,
and for the gradient. But both need only a sum over the vocabulary, which can be taken a few thousand tokens at a time
while these are at hand (Milakov and Gimelshein 2018; in attention, Dao et al. 2022):

    level(x) = log sum_v exp(x . W_U[:, v])        grad level(x) = sum_v p_v(x) W_U[:, v]

the mean unembedding under what is said. Any loss over the vocabulary follows from it. Cross-entropy of a token is
`level(x) - x . W_U[:, token]`; and the divergence of what is said at x from what was said at y is how far `level` lies
above its tangent at y (a Bregman divergence), so that of y three small things must be kept (`Said`), not a number for
each token:

    KL(y || x) = level(x) - level(y) - (x - y) . grad level(y)

It is a small difference of large numbers: rounding leaves some 1e-5 nats a position, of either sign, and less in a
mean. Sums are in fp32, whatever the model is read in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 2048  # tokens of the vocabulary at a time: their part of W_U stays in a processor's cache


@dataclass(frozen=True)
class Said:
    """What a model says at some positions, as far as a divergence from it needs: its final stream (normalised), the
    level there, and the mean unembedding."""

    final: Float[Tensor, "*n d_model"]
    level: Float[Tensor, "*n"]
    mean: Float[Tensor, "*n d_model"]

    def divergence(self, final: Float[Tensor, "*n d_model"], level: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """KL(this || what is said at `final`), in nats; not clamped at zero."""
        return level - self.level - ((final - self.final) * self.mean).sum(-1)

    def __getitem__(self, rows: Any) -> Said:
        return Said(self.final[rows], self.level[rows], self.mean[rows])


def said(final: Float[Tensor, "n d_model"], W_U: Float[Tensor, "d_model vocab"]) -> Said:
    """What is said at n final streams (normalised)."""
    level, mean, _ = _swept(final, W_U, None, mean=True)
    return Said(final.detach(), level, mean)


def levels(
    final: Float[Tensor, "n d_model"], W_U: Float[Tensor, "d_model vocab"], apart: Int[Tensor, " m"] | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """The level of each final stream (normalised), differentiable in it, once. apart: a token for each of the first m
    rows; for these also the largest logit of any other token, not differentiable."""
    return _Levels.apply(final, W_U, apart)


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, final: Tensor, W_U: Tensor, apart: Tensor | None) -> tuple[Tensor, Tensor]:
        level, mean, other = _swept(final, W_U, apart, mean=ctx.needs_input_grad[0])
        ctx.save_for_backward(mean)
        ctx.dtype = final.dtype
        ctx.mark_non_differentiable(other)
        return level, other

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (mean,) = ctx.saved_tensors
        return (slope[:, None] * mean).to(ctx.dtype), None, None


@torch.no_grad()
def _swept(final: Tensor, W_U: Tensor, apart: Tensor | None, *, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Levels; mean unembeddings, zero unless asked for; and the largest logits of tokens that are not set apart."""
    final, at = final.float(), 0
    top, total = torch.full((len(final),), float("-inf")), torch.zeros(len(final))
    weighed, other = torch.zeros_like(final), top[: 0 if apart is None else len(apart)]
    for part in W_U.T.split(CHUNK):
        part = part.float()
        logits = final @ part.T
        if apart is not None:
            own = torch.arange(at, at + len(part)) == apart[:, None]
            other = torch.maximum(other, logits[: len(apart)].masked_fill(own, float("-inf")).amax(1))
        new = torch.maximum(top, logits.amax(1))
        shrunk, share = (top - new).exp(), (logits - new[:, None]).exp()
        total = total * shrunk + share.sum(1)  # relative to the largest logit so far: logarithms would add up rounding
        if mean:
            weighed = torch.addmm(weighed * shrunk[:, None], share, part)
        top, at = new, at + len(part)
    return top + total.log(), weighed / total[:, None], other
