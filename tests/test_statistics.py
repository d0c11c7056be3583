"""Intervals and tests, held to textbooks, to hand and to what must fail."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from lib.errors import DataError
from lib.statistics import (
    block_interval,
    cluster_interval,
    clustered_interval,
    exact_interval,
    paired,
    rank_correlation,
    rho_interval,
    sign_flip,
    top_overlap,
)


def test_exact_interval_is_the_textbooks():
    low, high = exact_interval(2, 8)
    assert (round(low, 3), round(high, 3)) == (0.032, 0.651)
    assert exact_interval(8, 8)[1] == 1.0
    assert exact_interval(0, 0) == (0.0, 1.0)


@given(st.integers(0, 60), st.integers(1, 60))
def test_exact_interval_holds_the_share(k, n):
    k = min(k, n)
    low, high = exact_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1


def test_top_overlap_by_hand():
    a = torch.arange(20.0).view(4, 5)
    assert top_overlap(a, a) == (5, pytest.approx(1 / 15504))  # 20 choose 5
    assert top_overlap(a, -a) == (0, 1.0)


def test_heads_that_share_a_key_value_head_are_no_independent_coincidence():
    """Two top heads in one group of two, of four groups: whole groups coincide in one of four shuffles, single heads in
    one of 28."""
    a = torch.zeros(4, 2)
    a[1] = torch.tensor([2.0, 1.0])
    assert top_overlap(a, a, k=2) == (2, pytest.approx(1 / 28))
    shared, chance = top_overlap(a, a, k=2, group=2)
    assert shared == 2 and chance == pytest.approx(1 / 4, abs=0.02)
    b = a.roll(1, 0)
    assert top_overlap(a, b, k=2, group=2) == (0, 1.0)


def test_shuffled_single_heads_are_the_hypergeometric_law():
    a = torch.arange(12.0).view(3, 4)
    b = a.clone()
    b[2, 3] = -1.0  # of the top three, two are left
    shared, chance = top_overlap(a, b, k=3)
    assert shared == 2 and chance == pytest.approx((3 * 9 + 1) / 220)


def test_layers_may_be_shuffled_whole():
    """One block of alike heads in the same layer of both: convincing head by head, a single coincidence by layer."""
    a = torch.zeros(6, 5)
    a[2] = 1.0
    b = a.clone()
    assert rank_correlation(a, b, permutations=500)[1] < 0.05
    assert rank_correlation(a, b, permutations=500, by_layer=True)[1] > 0.05


def test_rank_correlation_and_its_control():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 5, generator=generator)
    rho, p = rank_correlation(a, a.exp(), permutations=2000)
    assert rho == pytest.approx(1.0) and p < 0.001
    rho, p = rank_correlation(a, torch.randn(6, 5, generator=generator), permutations=2000)
    assert abs(rho) < 0.5 and p > 0.02


def test_rho_of_noise_has_a_wide_interval():
    draw = np.random.default_rng(0)
    value, low, high = rho_interval(pd.Series(draw.normal(size=10)), pd.Series(draw.normal(size=10)))
    assert low < 0 < high and low <= value <= high and high - low > 0.5


def test_paired_counts_items_not_totals():
    """Two right before and two after, and yet one was lost: a total cannot show it."""
    before, after = pd.Series([True, True, False, False]), pd.Series([True, False, True, False])
    found = paired(before, after)
    assert (found["before"], found["after"], found["gained"], found["lost"]) == (2, 2, 1, 1)
    assert found["p"] == 1.0  # one against one


def test_mcnemar_and_resolution_by_hand():
    nothing = paired(pd.Series([True] * 10), pd.Series([True] * 10))
    assert nothing["p"] == 1.0 and nothing["lost_low"] == 0.0
    assert nothing["lost_high"] == pytest.approx(1 - 0.025 ** (1 / 10))
    five_lost = paired(pd.Series([True] * 5), pd.Series([False] * 5))
    assert five_lost["p"] == pytest.approx(2 / 2**5)  # five of five the same way, two-sided


def test_block_interval_knows_that_neighbours_are_alike():
    """The same changes in long blocks are fewer independent observations than token by token: a wider interval."""
    change = pd.Series(np.repeat(np.random.default_rng(0).normal(size=40), 25))
    own = block_interval(change, pd.Series(np.arange(len(change)) // 25), 0)
    naive = block_interval(change, pd.Series(np.arange(len(change))), 0)
    assert own[1] - own[0] > 3 * (naive[1] - naive[0])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_alone_in_its_cluster_each_item_gives_the_textbooks(pairs):
    before, after = (pd.Series(column) for column in zip(*pairs, strict=True))
    found = paired(before, after)
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    assert found["p"] == pytest.approx(binomtest(gained, gained + lost).pvalue if gained + lost else 1.0)
    low, high = exact_interval(lost, int(before.sum()))
    assert (found["lost_low"], found["lost_high"]) == (pytest.approx(low, abs=1e-9), pytest.approx(high))


def test_sign_flip_by_hand():
    """+3 and +1: of the four patterns of signs, +4 and -4 are as far out. +3 and -1: all but none of them."""
    assert sign_flip([3, 1]) == 2 / 4
    assert sign_flip([3, -1]) == 1.0
    assert sign_flip([2, 1, 1]) == 2 / 8
    assert sign_flip([0, 0]) == sign_flip([]) == 1.0
    assert sign_flip([1] * 5) == 2 / 2**5


def test_a_country_that_gains_with_five_prompts_is_one_gain():
    before, after = pd.Series([False] * 10), pd.Series([True] * 10)
    assert paired(before, after)["p"] == pytest.approx(2 / 2**10)
    assert paired(before, after, pd.Series([0] * 5 + [1] * 5))["p"] == 2 / 2**2


def test_none_lost_of_clusters_counts_clusters():
    was = pd.Series([True] * 40)
    by_country = paired(was, was, pd.Series(np.arange(40) // 5))
    assert by_country["lost_high"] == pytest.approx(1 - 0.025 ** (1 / 8)) and by_country["clusters"] == 8
    assert paired(was, was)["lost_high"] == pytest.approx(1 - 0.025 ** (1 / 40))


def test_clustered_interval_by_hand():
    """Two of four clusters of three all hits: twelve items, of which each three say the same, are worth four, and the
    variance is read off four: 3 degrees of freedom where Clopper and Pearson have 11."""
    hits, cluster = pd.Series([True] * 6 + [False] * 6), pd.Series(np.arange(12) // 3)
    between = 4 * 1.5**2 * 4 / 3 / 12**2
    worth = 12 * (0.25 / 11) / between * (2.200985 / 3.182446) ** 2
    wanted = beta.ppf([0.025, 0.975], [worth / 2, worth / 2 + 1], [worth / 2 + 1, worth / 2])
    assert clustered_interval(hits, cluster) == pytest.approx(tuple(wanted), abs=1e-5)
    assert clustered_interval(hits[:0], cluster[:0]) == (0.0, 1.0)


def test_clustered_interval_holds_the_share_where_the_exact_one_does_not():
    """1,000 draws of 40 countries with five prompts each that mostly agree: 95 % of the intervals are to hold."""
    rng, truth, held = np.random.default_rng(0), 0.3, {"clustered": 0, "exact": 0}
    cluster = pd.Series(np.repeat(np.arange(40), 5))
    for _ in range(1000):
        chance = rng.beta(truth, 1 - truth, size=40)  # correlation 1/2 within a country
        hits = pd.Series(rng.random(200) < np.repeat(chance, 5))
        ends = {"clustered": clustered_interval(hits, cluster), "exact": exact_interval(int(hits.sum()), 200)}
        for name, (low, high) in ends.items():
            held[name] += low <= truth <= high
    assert held["clustered"] >= 935 and held["exact"] < 830


def test_sign_flip_finds_nothing_where_there_is_nothing_and_mcnemar_does():
    """1,000 draws of 30 countries whose five prompts gain or lose together, by a coin: 5 % may be significant."""
    rng, found = np.random.default_rng(0), {"by country": 0, "by prompt": 0}
    for _ in range(1000):
        net = rng.choice([-5, 0, 5], size=30)
        found["by country"] += sign_flip(net.tolist()) < 0.05
        found["by prompt"] += sign_flip(np.repeat(np.sign(net), 5).tolist()) < 0.05
    assert found["by country"] <= 60 and found["by prompt"] > 200


def test_cluster_interval_holds_the_mean_of_seven_texts_where_percentiles_do_not():
    rng, held = np.random.default_rng(1), {"clusters": 0, "percentiles": 0, "blocks": 0}
    text = pd.Series(np.repeat(np.arange(7), [30, 25, 40, 20, 35, 28, 32]))
    for seed in range(400):
        change = pd.Series(rng.normal(rng.normal(size=7)[text], 2.0))
        ends = {
            "clusters": cluster_interval(change, text, seed),
            "percentiles": block_interval(change, text, seed),
            "blocks": block_interval(change, pd.Series(np.arange(len(text)) // 5), seed),
        }
        for name, (low, high) in ends.items():
            held[name] += low <= 0 <= high
    assert held["clusters"] >= 368 and held["percentiles"] < 360 and held["blocks"] < 280


def test_one_text_has_no_interval():
    with pytest.raises(DataError, match="at least two"):
        cluster_interval(pd.Series([0.1, 0.2]), pd.Series(["a", "a"]), 0)
