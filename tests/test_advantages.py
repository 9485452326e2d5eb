"""Advantages against hand-computed numbers."""

from __future__ import annotations

import numpy
import pytest
import torch

from dllm_rl.advantages import KINDS, AdvantageConfig, compute_advantages
from dllm_rl.errors import UserError


def advantages(
    rewards: list[float], size: int, valid: list[bool] | None = None, kind: str = "group_standardised"
) -> list[float]:
    kept = torch.tensor(valid or [True] * len(rewards))
    values, groups = torch.tensor(rewards, dtype=torch.float64), torch.arange(len(rewards)) // size
    return compute_advantages(values, kept, groups, kind).tolist()


def test_two_rewards() -> None:
    # mean 0.5, unbiased standard deviation sqrt(0.5): 0.5 / sqrt(0.5) = 0.7071
    assert advantages([1.0, 0.0], 2) == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=2e-6)


def test_groups_are_separate() -> None:
    rewards = [0.1, 0.7, 0.4, 5.0, 1.0, 3.0]
    found = advantages(rewards, 3)
    for start in (0, 3):
        group = numpy.array(rewards[start : start + 3])
        assert found[start : start + 3] == pytest.approx((group - group.mean()) / (group.std(ddof=1) + 1e-6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e9])
def test_equal_rewards_give_exact_zeros(value: float, kind: str) -> None:
    assert advantages([value] * 7, 7, kind=kind) == [0.0] * 7


def test_the_other_kinds_by_hand() -> None:
    rewards = [1.0, 0.0, 0.5, 3.0]  # groups of two with means 0.5 and 1.75; the batch has mean 1.125
    assert advantages(rewards, 2, kind="mean_only") == [0.5, -0.5, -1.25, 1.25]
    assert advantages(rewards, 2, kind="leave_one_out") == [1.0, -1.0, -2.5, 2.5]  # minus the other one
    std = numpy.std(rewards, ddof=1)
    expected = [(reward - 1.125) / (std + 1e-6) for reward in rewards]
    assert advantages(rewards, 2, kind="z_score") == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_shifting_rewards_changes_nothing_and_scaling_only_the_unnormalised(kind: str) -> None:
    rewards = [0.3, 0.9, 0.1, 0.7, 0.2, 0.6]
    base = advantages(rewards, 3, kind=kind)
    assert advantages([reward + 5 for reward in rewards], 3, kind=kind) == pytest.approx(base, abs=1e-6)
    scale = 1.0 if kind in ("group_standardised", "z_score") else 10.0
    tripled = advantages([10 * reward for reward in rewards], 3, kind=kind)
    assert tripled == pytest.approx([scale * value for value in base], rel=1e-4)


def test_leave_one_out_counts_the_valid_ones() -> None:
    found = advantages([1.0, 0.0, 100.0, 0.0], 4, [True, True, False, True], kind="leave_one_out")
    assert found == pytest.approx([1.0, -0.5, 0.0, -0.5])


def test_an_unknown_kind_names_its_key() -> None:
    with pytest.raises(UserError, match=r"advantage\.kind=rank: must be group_standardised, mean_only"):
        AdvantageConfig(kind="rank")


def test_invalid_completions_leave_their_group() -> None:
    found = advantages([1.0, 0.0, 100.0, 0.0], 4, [True, True, False, True])
    expected = advantages([1.0, 0.0, 0.0], 3)
    assert found == pytest.approx([expected[0], expected[1], 0.0, expected[2]])


def test_one_or_no_valid_completion_gives_zero() -> None:
    assert advantages([1.0, 0.0], 2, [True, False]) == [0.0, 0.0]
    assert advantages([1.0, 0.0], 2, [False, False]) == [0.0, 0.0]
