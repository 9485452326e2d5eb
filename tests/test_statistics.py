"""Intervals, pass@k and paired tests against enumeration and hand-computed values."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest

from dllm_rl.statistics import mcnemar, mean_interval, paired, pass_at_k, resampled_means, sign_flips


@pytest.mark.parametrize(("successes", "n", "low", "high"), [
    (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (128, 256, 0.4392, 0.5608),
    (1, 20, 0.0089, 0.2361),
])
def test_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    found = mean_interval([1.0] * successes + [0.0] * (n - successes))
    assert found == pytest.approx((successes / n, low, high), abs=1e-4)


def test_the_mean_is_never_outside_its_interval() -> None:
    for n in range(1, 40):
        assert mean_interval([0.0] * n).low == 0.0
        assert mean_interval([1.0] * n).high == 1.0


def test_bootstrap_means_have_the_distribution_of_all_resamples() -> None:
    """Of n = 3 values there are 27 resamples; the drawn means have their frequencies."""
    values = np.array([0.0, 0.25, 1.0])
    exact = [sum(draw) / 3 for draw in product(values, repeat=3)]
    drawn = resampled_means(values, 20_000)
    for mean in set(exact):
        assert (np.isclose(drawn, mean)).mean() == pytest.approx(exact.count(mean) / 27, abs=0.01)


def test_bootstrap_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(1).random(2000)
    half = 1.96 * values.std() / math.sqrt(2000)
    found = mean_interval(values.tolist())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.002)


def test_bootstrap_interval_covers_the_mean() -> None:
    """About 95 of 100 intervals of samples with a known mean hold it (binomial: 88 to 100 with probability > 0.998)."""
    rng = np.random.default_rng(2)
    covered = sum(
        found.low <= 0.4 <= found.high
        for found in (mean_interval(rng.beta(2, 3, 60).tolist()) for _ in range(100))
    )
    assert 88 <= covered <= 100


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    for correct in range(n + 1):
        answers = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(combinations(answers, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over the binomial number of right answers is 1 − (1 − p)^k exactly."""
    p, n = 0.3, 6
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("better", "worse", "p"), [
    (5, 1, 2 * 7 / 64), (1, 5, 2 * 7 / 64), (0, 0, 1.0), (3, 3, 1.0), (10, 0, 2 / 1024), (1, 0, 1.0),
])
def test_mcnemar_by_hand(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == pytest.approx(p)


def test_sign_flips_against_all_patterns() -> None:
    differences = np.array([0.5, 0.25, 0.125, -0.1, 0.3, 0.0])
    moved = differences[differences != 0]
    patterns = [abs(sum(s * d for s, d in zip(signs, moved, strict=True))) for signs in product((-1, 1), repeat=5)]
    exact = sum(value >= abs(moved.sum()) - 1e-12 for value in patterns) / 32
    assert sign_flips(differences) == pytest.approx(exact, abs=0.015)
    assert sign_flips(np.zeros(4)) == 1.0


def test_paired_difference() -> None:
    first, second = [1.0] * 8 + [0.0] * 12, [0.0] * 7 + [1.0] + [0.0] * 12
    found = paired(first, second)
    assert found.delta == pytest.approx(0.35) and found.test == "McNemar"
    assert found.p == pytest.approx(2 / 2**7)
    assert 0 < found.low < 0.35 < found.high
    assert paired([0.5, 1.0], [0.25, 1.0]).test == "sign flips"
    swapped = paired(second, first)
    assert (swapped.delta, swapped.p) == (-found.delta, found.p)
