"""Intervals, rank correlations and paired tests. Every interval is at 95 %; what is drawn is drawn by a seed.

Prompts about one country, tokens of one text and heads that share a key/value head are no independent draws. What is
asked of such clusters counts, flips or resamples whole clusters: `clustered_interval`, `sign_flip`, `cluster_interval`,
and `group` in `top_overlap`. Where every item is a cluster of its own they are the textbooks' tests.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import beta, binomtest, bootstrap, hypergeom, norm, rankdata, spearmanr, t
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


def clustered_interval(hits: pd.Series, cluster: pd.Series) -> Interval:
    """Interval of a share whose items come in clusters: Clopper-Pearson's, of as many items as these are worth by their
    variance between clusters, with its few degrees of freedom (Korn and Graubard 1998). Where all items agree there is
    no variance to go by, and a cluster counts as one item. n = 0 gives (0, 1)."""
    n, k = len(hits), cluster.nunique()
    share, worth = float(hits.mean()) if n else 0.0, float(k)
    if 0 < share < 1 and k > 1:
        between = (hits - share).groupby(cluster.to_numpy()).sum().pow(2).sum() * k / (k - 1) / n**2
        alone = share * (1 - share) / (n - 1)
        freedom = (t.ppf(0.975, n - 1) / t.ppf(0.975, k - 1)) ** 2
        worth = min(n, n * alone / between * freedom) if between > 0 else float(n)
    if not n:
        return 0.0, 1.0
    low = beta.ppf(0.025, share * worth, worth - share * worth + 1) if share > 0 else 0.0
    high = beta.ppf(0.975, share * worth + 1, worth - share * worth) if share < 1 else 1.0
    return float(low), float(high)


def sign_flip(changes: Sequence[int]) -> float:
    """Exact two-sided p of a sum of changes, if each might as well have had the other sign: all patterns of signs are
    counted, by adding one change after another. Of changes of one it is McNemar's exact test; a change may be the net
    change of a cluster, which then flips as a whole."""
    law = np.ones(1)  # of the sum, from its lowest value up in steps of one
    for size in np.abs([change for change in changes if change]):
        law = (np.pad(law, (0, 2 * size)) + np.pad(law, (2 * size, 0))) / 2
    values = np.arange(len(law)) - len(law) // 2
    return float(min(1.0, law[np.abs(values) >= abs(sum(changes))].sum()))


def top_overlap(
    a: ByHead, b: ByHead, k: int = 5, *, group: int = 1, permutations: int = 20_000, seed: int = 0
) -> tuple[int, float]:
    """How many of the top k heads of two gradings are the same, and the chance of as many. group: how many heads of a
    layer share a key/value head. Alone, all heads are exchangeable (hypergeometric); otherwise groups are, as wholes,
    and the chance is that of shuffled groups, which cannot fall below one in all permutations."""
    tops = torch.zeros(2, a.numel(), dtype=torch.bool)
    for top, grid in zip(tops, (a, b), strict=True):
        top[grid.flatten().topk(k).indices.cpu()] = True
    shared = int(tops.all(0).sum())
    if group == 1:
        return shared, float(hypergeom(a.numel(), k, k).sf(shared - 1))
    ours, theirs = tops.view(2, -1, group).numpy()
    rng = np.random.default_rng(seed)
    as_many = sum(int((rng.permutation(ours) & theirs).sum()) >= shared for _ in range(permutations))
    return shared, (1 + as_many) / (1 + permutations)


def paired(before: pd.Series, after: pd.Series, cluster: pd.Series | None = None) -> dict[str, float]:
    """Right before and after, items gained and lost; the `sign_flip` test of gained against lost; and the interval of
    the share lost among those that were right: its upper end is what "none lost" cannot exclude. cluster: of each item
    (its country), whose items gain and lose together; without it each is its own, and the two are McNemar's exact test
    and Clopper and Pearson's interval."""
    was, now = before.to_numpy(bool), after.to_numpy(bool)
    of = np.arange(len(was)) if cluster is None else cluster.to_numpy()
    gained, lost = int((~was & now).sum()), int((was & ~now).sum())
    low, high = clustered_interval(pd.Series(~now[was]), pd.Series(of[was]))
    net = pd.Series(now.astype(int) - was).groupby(of).sum()
    counts = {"n": len(was), "before": int(was.sum()), "after": int(now.sum()), "gained": gained, "lost": lost}
    return counts | {"clusters": len(net), "p": sign_flip(net.tolist()), "lost_low": low, "lost_high": high}


def cluster_interval(change: pd.Series, cluster: pd.Series, seed: int) -> Interval:
    """Bootstrap interval of the mean change, over whole clusters (texts) drawn with replacement, its ends moved out by
    what few clusters fall short of: t instead of normal, and k - 1 for k (Hesterberg 2015). Of seven clusters the plain
    percentiles hold the truth in 87 % of simulated cases, these in 94 %. Raises DataError for fewer than two."""
    k = cluster.nunique()
    if k < 2:
        raise DataError("an interval over clusters needs at least two.")
    low, high = block_interval(change, cluster, seed)
    middle, wider = float(change.mean()), float(t.ppf(0.975, k - 1) / norm.ppf(0.975) * (k / (k - 1)) ** 0.5)
    return middle + wider * (low - middle), middle + wider * (high - middle)


def block_interval(change: pd.Series, block: pd.Series, seed: int) -> Interval:
    """Bootstrap interval of the mean change, over blocks of neighbouring tokens, which are no independent draws. It
    says how sure the change is on these very texts; for texts of their kind there is `cluster_interval`."""
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
