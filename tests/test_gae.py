"""Advantage estimation on the denoising trajectory: its identities, a sum written out, and numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dllm_rl.gae import explained_variance, token_advantages, whiten

DOUBLE = torch.float64


def random_trajectories(seed: int = 0, batch: int = 5, length: int = 9, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Values, steps (some tokens are no action; one sequence is shorter, one skips a step) and rewards."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, length, generator=generator, dtype=DOUBLE)
    steps = torch.randint(0, count, (batch, length), generator=generator)
    steps[0, :2] = -1
    steps[1] = steps[1].clamp(max=1)
    steps[2][steps[2] == 1] = 2
    rewards = torch.randn(batch, count, generator=generator, dtype=DOUBLE)
    present = torch.stack([(steps == step).any(1) for step in range(count)], 1)
    return values, steps, torch.where(present, rewards, 0.0)


def test_by_hand() -> None:
    # Step 0 writes tokens 0 and 1 (values 0.2 and 0.4), step 1 writes token 2 (value 0.5); rewards 0.1 and 1.
    values, steps = torch.tensor([[0.2, 0.4, 0.5, 9.0]]), torch.tensor([[0, 0, 1, -1]])
    advantages, returns = token_advantages(values, steps, torch.tensor([[0.1, 1.0]]), gamma=0.9, lam=0.8)
    last = 1.0 - 0.5
    first = 0.1 + 0.9 * 0.5 + 0.9 * 0.8 * last  # return of step 0
    assert returns[0].tolist() == pytest.approx([first, first, 1.0, 0.0])
    assert advantages[0].tolist() == pytest.approx([first - 0.2, first - 0.4, last, 0.0])


def test_gamma_and_lambda_of_one_give_the_rewards_still_to_come() -> None:
    values, steps, rewards = random_trajectories()
    advantages, returns = token_advantages(values, steps, rewards, 1.0, 1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    for b in range(len(values)):
        for t in range(values.shape[1]):
            if steps[b, t] >= 0:
                expected = to_come[b, steps[b, t]].item()
                assert returns[b, t].item() == pytest.approx(expected)
                assert advantages[b, t].item() == pytest.approx(expected - values[b, t].item())
    assert not advantages[steps < 0].any()


def test_lambda_of_zero_gives_the_one_step_error() -> None:
    values, steps, rewards = random_trajectories()
    advantages, _ = token_advantages(values, steps, rewards, 0.9, 0.0)
    for b in range(len(values)):
        present = [step for step in range(4) if (steps[b] == step).any()]
        means = {step: values[b][steps[b] == step].mean().item() for step in present}
        for index, step in enumerate(present):
            following = means[present[index + 1]] if index + 1 < len(present) else 0.0
            for t in (steps[b] == step).nonzero().flatten().tolist():
                expected = rewards[b, step].item() + 0.9 * following - values[b, t].item()
                assert advantages[b, t].item() == pytest.approx(expected)


def test_the_recursion_is_the_discounted_sum_of_one_step_errors() -> None:
    values, steps, rewards = random_trajectories(seed=3)
    gamma, lam = 0.9, 0.7
    advantages, _ = token_advantages(values, steps, rewards, gamma, lam)
    for b in range(len(values)):
        present = [step for step in range(4) if (steps[b] == step).any()]
        means = [values[b][steps[b] == step].mean().item() for step in present]
        errors = [rewards[b, step].item() + gamma * (means[i + 1] if i + 1 < len(present) else 0.0) - means[i]
                  for i, step in enumerate(present)]
        for index, step in enumerate(present):
            total = sum((gamma * lam) ** k * error for k, error in enumerate(errors[index:]))
            of_tokens = advantages[b][steps[b] == step]
            assert of_tokens.mean().item() == pytest.approx(total)  # tokens differ from it by V_i - V_t only


def test_without_a_critic_every_token_has_the_final_reward() -> None:
    _, steps, _ = random_trajectories()
    rewards = torch.zeros(5, 4, dtype=DOUBLE)
    final = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=DOUBLE)
    rewards.scatter_(1, steps.amax(1, keepdim=True), final.unsqueeze(1))
    advantages, _ = token_advantages(torch.zeros(5, 9), steps, rewards, 1.0, 1.0)
    assert torch.equal(advantages, torch.where(steps >= 0, final.unsqueeze(1), 0.0))


def test_one_step_is_the_bandit() -> None:
    values, rewards = torch.tensor([[0.2, 0.6]]), torch.tensor([[1.0]])
    advantages, returns = token_advantages(values, torch.zeros(1, 2, dtype=torch.int64), rewards, 0.5, 0.5)
    assert advantages.mean().item() == pytest.approx(1.0 - 0.4) and returns.tolist() == [[1.0, 1.0]]


def test_whitening_by_hand() -> None:
    where = torch.tensor([[True, True, False]])
    found = whiten(torch.tensor([[1.0, 3.0, 100.0]], dtype=DOUBLE), where)  # mean 2, unbiased variance 2
    assert found[0].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2), 0.0])
    assert not whiten(torch.ones(1, 3), torch.tensor([[True, False, False]])).any()


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0])
    assert explained_variance(returns, returns) == pytest.approx(1.0)
    assert explained_variance(torch.full((3,), 5.0), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(3)) is None
