"""Intervals, rank correlations and paired tests. Every interval is at 95 %; what is drawn is drawn by a seed."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap, hypergeom, rankdata, spearmanr
from torch import Tensor

from lib.errors import DataError

ByHead = Float[Tensor, "n_layers n_heads"]
Interval = tuple[float, float]


def exact_interval(successes: int, n: int) -> Interval:
    """Clopper-Pearson interval of a share. n = 0 gives (0, 1): nothing is known."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(method="exact")
    return float(interval.low), float(interval.high)


def rank_correlation(
    a: ByHead, b: ByHead, *, permutations: int = 10_000, by_layer: bool = False, seed: int = 0
) -> tuple[float, float]:
    """Spearman's rho over all heads and its two-sided permutation p-value. Heads are shuffled, or (by_layer) whole
    layers: heads of a layer are no independent draws, they share key/value heads and what they can read."""
    rng = np.random.default_rng(seed)
    rho = float(spearmanr(a.flatten().cpu().numpy(), b.flatten().cpu().numpy()).statistic)
    rows = a.shape if by_layer else (-1, 1)
    ra, rb = (rankdata(grid.flatten().cpu().numpy()).reshape(rows) for grid in (a, b))
    ra, rb = ra - ra.mean(), rb - rb.mean()
    null = np.array([(rng.permutation(ra) * rb).sum() for _ in range(permutations)]) / np.sqrt(
        (ra**2).sum() * (rb**2).sum()
    )
    return rho, float((1 + (np.abs(null) >= abs(rho) - 1e-12).sum()) / (1 + permutations))


def top_overlap(a: ByHead, b: ByHead, k: int = 5) -> tuple[int, float]:
    """How many of the top k heads of two gradings are the same, and the chance of as many (hypergeometric)."""
    tops = [set(grid.flatten().topk(k).indices.tolist()) for grid in (a, b)]
    shared = len(tops[0] & tops[1])
    return shared, float(hypergeom(a.numel(), k, k).sf(shared - 1))


def paired(before: pd.Series, after: pd.Series) -> dict[str, float]:
    """Right before and after, items gained and lost; McNemar's exact test of gained against lost; and the exact 95 %
    interval of the share lost among those that were right: its upper end is what "none lost" cannot exclude."""
    was, now = before.to_numpy(bool), after.to_numpy(bool)
    gained, lost = int((~was & now).sum()), int((was & ~now).sum())
    low, high = exact_interval(lost, int(was.sum()))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    counts = {"n": len(was), "before": int(was.sum()), "after": int(now.sum()), "gained": gained, "lost": lost}
    return counts | {"p": float(p), "lost_low": low, "lost_high": high}


def block_interval(change: pd.Series, block: pd.Series, seed: int) -> Interval:
    """Bootstrap interval of the mean change, over blocks of neighbouring tokens, which are no independent draws."""
    sums, sizes = change.groupby(block).sum().to_numpy(), change.groupby(block).size().to_numpy()

    def mean(total: NDArray, size: NDArray, axis: int = -1) -> NDArray:
        return total.sum(axis) / size.sum(axis)

    return _resampled((sums, sizes), mean, seed=seed, paired=True, vectorized=True)


def mean_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean with its bootstrap interval. Raises DataError for fewer than two values."""
    if len(values) < 2:
        raise DataError("an interval needs at least two prompts.")
    return float(np.mean(values)), *_resampled((np.asarray(values),), np.mean, seed=seed)


def _resampled(samples: tuple[NDArray, ...], statistic: Callable, *, seed: int, **options: bool) -> Interval:
    law = bootstrap(samples, statistic, n_resamples=2000, method="percentile", random_state=seed, **options)
    return float(law.confidence_interval.low), float(law.confidence_interval.high)


def gaussian(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Standard normal values, drawn on the CPU whatever the device, so that a seed means the same numbers."""
    return torch.randn(tuple(shape), generator=generator, device="cpu").to(torch.get_default_device())


def rho_interval(a: pd.Series, b: pd.Series, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation with its bootstrap interval; NaN where one of them is constant. Resamples in which
    one is constant are left out."""
    if a.nunique() < 2 or b.nunique() < 2:
        return np.nan, np.nan, np.nan
    rng = np.random.default_rng(seed)
    pick = rng.integers(len(a), size=(resamples, len(a)))
    x, y = (rankdata(v.to_numpy(float)[pick], axis=1) for v in (a, b))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    low, high = np.quantile((x * y).sum(1)[scale > 0] / scale[scale > 0], [0.025, 0.975])
    return float(spearmanr(a, b).statistic), float(low), float(high)
