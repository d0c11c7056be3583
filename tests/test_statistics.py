"""Intervals and tests, held to textbooks, to hand and to what must fail."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.statistics import block_interval, exact_interval, paired, rank_correlation, rho_interval, top_overlap


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
