"""Intervals and tests for evaluations: Wilson, bootstrap over prompts, unbiased pass@k, paired comparisons.

The prompts are the sample: several completions of a prompt are averaged first, then prompts are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
FLIPS = 10_000
_CHUNK = 200  # resamples drawn at a time: memory stays small for thousands of prompts
_Z = 1.959964


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """The difference of two policies on the same prompts.

    Example: `Paired(0.12, 0.05, 0.19, 0.0013, "McNemar")`
    """

    delta: float
    low: float
    high: float
    p: float
    """Two-sided."""
    test: str
    """McNemar (exact, for 0/1 values) or sign flips."""


def mean_interval(values: Sequence[float]) -> Interval:
    """Wilson's score interval for 0/1 values, the percentile bootstrap over prompts for others.

    Args:
        values: one number per prompt, at least one.
    """
    mean = sum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        return Interval(mean, *wilson(mean, len(values)))
    low, high = np.quantile(resampled_means(np.asarray(values)), (0.025, 0.975))
    return Interval(mean, float(low), float(high))


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share of n."""
    centre = (mean + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(mean * (1 - mean) / n + _Z * _Z / (4 * n * n))
    # At a mean of exactly 0 or 1 rounding would leave the end of the interval beside it.
    return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))


def resampled_means(values: np.ndarray, count: int = RESAMPLES) -> np.ndarray:
    """Means of `count` resamples of [n] values with replacement: [count]. The same ones at every call."""
    rng, n = np.random.default_rng(0), len(values)
    chunks = [values[rng.integers(0, n, (min(_CHUNK, count - start), n))].mean(1) for start in range(0, count, _CHUNK)]
    return np.concatenate(chunks)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that at least one of k completions, drawn from `samples` without replacement, is correct.

    Unbiased for pass@k: 1 − C(n − c, k) / C(n, k) (Chen et al., arXiv 2107.03374, eq. 1).

    Example: `pass_at_k(4, 1, 2)` is 0.5.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """first − second, prompt by prompt: a bootstrap interval of the mean difference and a two-sided p value."""
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    low, high = np.quantile(resampled_means(differences), (0.025, 0.975))
    if {*first, *second} <= {0.0, 1.0}:
        p, test = mcnemar(int((differences > 0).sum()), int((differences < 0).sum())), "McNemar"
    else:
        p, test = sign_flips(differences), "sign flips"
    return Paired(float(differences.mean()), float(low), float(high), p, test)


def mcnemar(better: int, worse: int) -> float:
    """The exact p value of `better` against `worse` changed answers when either is as likely: a binomial test.

    Example: `mcnemar(5, 1)` is 2 × (1 + 6) / 64.
    """
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flips(differences: np.ndarray) -> float:
    """The share of random sign patterns whose mean is at least as far from 0 (the observed one counted in)."""
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    rng, observed, hits = np.random.default_rng(0), abs(moved.sum()) * (1 - 1e-12), 0
    for start in range(0, FLIPS, _CHUNK):
        signs = rng.integers(0, 2, (min(_CHUNK, FLIPS - start), len(moved))) * 2 - 1
        hits += int((np.abs(signs @ moved) >= observed).sum())
    return (hits + 1) / (FLIPS + 1)
