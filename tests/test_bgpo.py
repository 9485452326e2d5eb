"""BGPO against the formulas of the paper (arXiv 2510.11683): bound, equality on-policy, limits, and safety."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.errors import UserError
from dllm_rl.objectives.base import LossInputs
from dllm_rl.objectives.bgpo import BGPO, bgpo_factors
from tests.conftest import loss_inputs

INF = math.inf


def bgpo_terms(delta: Tensor, advantage: Tensor, max_delta: float, chunk: int = 1) -> Tensor:
    """N g_j."""
    return advantage * bgpo_factors(delta, advantage, max_delta, chunk)


def inputs(delta: Tensor, advantages: Tensor) -> LossInputs:
    """Log-probabilities whose ELBO terms differ from the old ones by `delta` [B, n]: one position, weight 2."""
    old = torch.zeros(*delta.shape, 1, dtype=delta.dtype)
    weights = torch.full(delta.shape, 2.0, dtype=delta.dtype)
    return loss_inputs((delta / 2).unsqueeze(-1), old, weights, advantages)


def test_numbers_by_hand() -> None:
    delta = torch.tensor([[0.5, -1.0], [math.log(2.0), 0.0]], dtype=torch.float64)
    advantages = torch.tensor([2.0, -3.0], dtype=torch.float64)
    # First row: 2 (1 + 0.5) + 2 (1 - 1) = 3. Second row: -3 * 2 - 3 * 1 = -9. Loss: -(3 - 9) / 4.
    assert BGPO().loss(inputs(delta, advantages)).loss.item() == pytest.approx(1.5, abs=1e-12)


@settings(max_examples=500, deadline=None)
@given(st.floats(-5, 5), st.lists(st.floats(-300, 300), min_size=1, max_size=16))
def test_the_bound_holds(advantage: float, values: list[float]) -> None:
    delta = torch.tensor([values], dtype=torch.float64)
    bound = bgpo_terms(delta, torch.tensor([[advantage]], dtype=torch.float64), INF).mean()
    exact = advantage * delta.mean().exp()
    assert bound <= exact + 1e-12 * max(1.0, abs(bound), abs(exact))


def test_the_bound_holds_below_max_delta_with_the_default() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 16):
        delta = (torch.rand(20_000, n, generator=generator, dtype=torch.float64) - 0.5) * 40
        advantage = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
        bound = bgpo_terms(delta, advantage, BGPO().max_delta).mean(1)
        exact = advantage.squeeze(1) * delta.mean(1).exp()
        assert (bound <= exact + 1e-9 * exact.abs().clamp(min=1)).all()


@pytest.mark.parametrize("advantage", [1.7, 0.0, -0.6])
def test_value_and_gradient_are_exact_on_policy(advantage: float) -> None:
    delta = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    bound = bgpo_terms(delta, torch.tensor([[advantage]], dtype=torch.float64), 20.0).mean()
    exact = advantage * delta.mean().exp()
    assert bound.item() == exact.item() == advantage
    ours, theirs = (torch.autograd.grad(value, delta)[0] for value in (bound, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("delta", [-3.0, 0.4, 7.0])
def test_one_sample_with_negative_advantage_is_tight(delta: float) -> None:
    bound = bgpo_terms(torch.tensor([[delta]], dtype=torch.float64), torch.tensor([[-2.0]], dtype=torch.float64), INF)
    assert bound.item() == pytest.approx(-2 * math.exp(delta), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
def test_loss_and_gradient_are_finite_for_any_delta(dtype: torch.dtype, advantage: float) -> None:
    values = [-1e4, -1e3, -88.0, -20.0, -1.0, 0.0, 1.0, 20.0, 88.0, 1e3, 1e4]
    delta = torch.tensor([values], dtype=dtype, requires_grad=True)
    output = BGPO().loss(inputs(delta, torch.tensor([advantage], dtype=dtype)))
    output.loss.backward()
    assert output.loss.isfinite() and delta.grad is not None and delta.grad.isfinite().all()


def test_an_overflow_in_one_row_does_not_reach_another() -> None:
    """exp of the first row overflows if it is evaluated although its advantage is positive."""
    delta = torch.tensor([[1e4, 1e4], [0.1, -0.1]], requires_grad=True)
    BGPO(max_delta=INF).loss(inputs(delta, torch.tensor([1.0, -1.0]))).loss.backward()
    assert delta.grad is not None
    torch.testing.assert_close(delta.grad[0], torch.tensor([-0.25, -0.25]))
    torch.testing.assert_close(delta.grad[1], torch.tensor([0.1, -0.1]).exp() / 4)


def test_the_tangent_continues_value_and_slope() -> None:
    advantage, limit, step = torch.tensor([[-1.0]], dtype=torch.float64), 3.0, 1e-6

    def value(x: float) -> float:
        return bgpo_terms(torch.tensor([[x]], dtype=torch.float64), advantage, limit).item()

    assert value(limit + 2) == pytest.approx(-math.exp(limit) * 3, rel=1e-12)
    left, right = (value(limit) - value(limit - step)) / step, (value(limit + step) - value(limit)) / step
    assert left == pytest.approx(right, rel=1e-5) == pytest.approx(-math.exp(limit), rel=1e-5)


def test_lost_bounds_are_counted() -> None:
    delta = torch.tensor([[25.0, 5.0], [25.0, 30.0], [21.0, -50.0]])
    # Only negative advantages use the exponential: rows two and three have three samples above 20 out of six in all.
    metrics = BGPO().loss(inputs(delta, torch.tensor([1.0, -1.0, -1.0]))).metrics
    total, count = metrics["delta/above_max"]
    assert total.item() / count.item() == pytest.approx(3 / 6)


def test_max_delta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"objective\.max_delta=0"):
        BGPO(max_delta=0)


@pytest.mark.parametrize("advantage", [0.7, -1.3])
def test_the_bound_rises_with_the_chunk_to_the_exact_objective(advantage: float) -> None:
    delta = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    column = torch.full((50, 1), advantage, dtype=torch.float64)
    values = [bgpo_terms(delta, column, INF, chunk).mean(1) for chunk in (1, 2, 4, 8)]
    exact = advantage * delta.mean(1).exp()
    for lower, upper in zip(values, [*values[1:], exact], strict=True):
        assert (lower <= upper + 1e-12).all()
    if advantage < 0:
        torch.testing.assert_close(values[-1], exact, rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(values[-1], values[0], rtol=0, atol=0)


def test_chunk_numbers_by_hand() -> None:
    delta = torch.tensor([[1.0, 3.0, 0.0, -2.0]], dtype=torch.float64)
    # Means 2 and -1, each counted twice out of four: -(e^2 + e^-1) / 2.
    loss = BGPO(chunk=2).loss(inputs(delta, torch.tensor([-1.0], dtype=torch.float64))).loss
    assert loss.item() == pytest.approx((math.exp(2) + math.exp(-1)) / 2)


@settings(max_examples=300, deadline=None)
@given(st.floats(-3, 3), st.lists(st.floats(-8, 8), min_size=1, max_size=6), st.floats(0.01, 2), st.floats(0.01, 0.9))
def test_clipping_only_lowers_the_bound(advantage: float, values: list[float], high: float, low: float) -> None:
    delta, one = torch.tensor([values], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    plain, clipped = (BGPO(max_delta=INF, clip_low=a, clip_high=b).loss(inputs(delta, one)).loss.item()
                      for a, b in ((None, None), (low, high)))
    assert -clipped <= -plain + 1e-9 * max(1, abs(plain))
    zero = torch.zeros_like(delta)
    assert BGPO(clip_low=low, clip_high=high).loss(inputs(zero, one)).loss.item() == pytest.approx(-advantage)


def test_a_clipped_sample_has_no_gradient() -> None:
    delta = torch.tensor([[0.05, 0.5], [-0.05, -0.5]], dtype=torch.float64, requires_grad=True)
    output = BGPO(clip_low=0.2, clip_high=0.2).loss(inputs(delta, torch.tensor([1.0, -1.0], dtype=torch.float64)))
    output.loss.backward()
    assert delta.grad is not None
    assert (delta.grad != 0).tolist() == [[True, False], [True, False]]
    total, count = output.metrics["objective/clipped"]
    assert total / count == 0.5


@pytest.mark.parametrize(("fields", "key"), [({"chunk": 0}, "chunk"), ({"clip_low": 0.0}, "clip_low"),
                                             ({"aggregation": "mean"}, "aggregation"), ({"horizon": 0}, "horizon")])
def test_bad_values_name_their_key(fields: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=rf"objective\.{key}="):
        BGPO(**fields)  # type: ignore[arg-type]


def test_the_chunk_must_divide_the_samples() -> None:
    with pytest.raises(UserError, match=r"objective\.chunk=3: must be a divisor of likelihood\.num_samples=16"):
        BGPO(chunk=3).check_likelihood(StratifiedCounts(num_samples=16))
