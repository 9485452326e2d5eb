"""Group-standardised advantages against hand-computed numbers."""

from __future__ import annotations

import numpy
import pytest
import torch

from dllm_rl.advantages import group_standardised


def advantages(rewards: list[float], size: int, valid: list[bool] | None = None) -> list[float]:
    kept = torch.tensor(valid or [True] * len(rewards))
    return group_standardised(torch.tensor(rewards, dtype=torch.float64), kept, size).tolist()


def test_two_rewards() -> None:
    # mean 0.5, unbiased standard deviation sqrt(0.5): 0.5 / sqrt(0.5) = 0.7071
    assert advantages([1.0, 0.0], 2) == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=2e-6)


def test_groups_are_separate() -> None:
    rewards = [0.1, 0.7, 0.4, 5.0, 1.0, 3.0]
    found = advantages(rewards, 3)
    for start in (0, 3):
        group = numpy.array(rewards[start : start + 3])
        assert found[start : start + 3] == pytest.approx((group - group.mean()) / (group.std(ddof=1) + 1e-6))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e9])
def test_equal_rewards_give_exact_zeros(value: float) -> None:
    assert advantages([value] * 7, 7) == [0.0] * 7


def test_invalid_completions_leave_their_group() -> None:
    found = advantages([1.0, 0.0, 100.0, 0.0], 4, [True, True, False, True])
    expected = advantages([1.0, 0.0, 0.0], 3)
    assert found == pytest.approx([expected[0], expected[1], 0.0, expected[2]])


def test_one_or_no_valid_completion_gives_zero() -> None:
    assert advantages([1.0, 0.0], 2, [True, False]) == [0.0, 0.0]
    assert advantages([1.0, 0.0], 2, [False, False]) == [0.0, 0.0]
