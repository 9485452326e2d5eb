"""Diagnostics against numbers typed in by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dllm_rl.diagnostics import bound_gap, cosine, diagnostics, quantiles
from dllm_rl.scoring import Scores


def scores(logps: Tensor, ratio: list[list[float]]) -> Scores:
    weights = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    return Scores(logps, logps != 0, weights, torch.tensor(ratio, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))


def test_figures_by_hand() -> None:
    old = scores(torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]], dtype=torch.float64), [[0.9, 0.2]])
    new = scores(torch.tensor([[[-1.5, -2.0], [-2.0, 0.0]]], dtype=torch.float64), [[0.9, 0.2]])
    found = diagnostics(new, old, torch.tensor([-2.0]))
    # ELBO terms -3.5 and -4 against -3 and -6: δ = -0.5 and 2.
    expected = {
        "elbo/mean": -3.75, "elbo/std": 0.25, "elbo/high_mask": -3.5, "elbo/low_mask": -4.0,
        "delta/mean": 0.75, "delta/mean_abs": 1.25, "delta/std": 1.25, "delta/max_abs": 2.0,
        "ratio/low_mask/p50": math.e, "ratio/high_mask/p05": math.exp(-0.5), "ratio/high_mask/p95": 1.0,
        "divergence/low_mask/p50": math.exp(-2) - math.exp(-3),
        "bound/gap": -2 * math.exp(0.75) + 2 * (math.exp(-0.5) + math.exp(2)) / 2,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert not any(name.startswith("ratio/mid_mask") for name in found)


def test_on_policy_nothing_has_moved() -> None:
    same = scores(torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]], dtype=torch.float64), [[0.9, 0.2]])
    found = diagnostics(same, same, torch.tensor([1.0]))
    assert found["delta/max_abs"] == found["bound/gap"] == found["divergence/high_mask/p95"] == 0.0
    assert found["ratio/low_mask/p05"] == 1.0


def test_the_gap_of_the_linear_branch() -> None:
    delta = torch.tensor([[0.3, -0.1], [0.0, 0.0]], dtype=torch.float64)
    assert bound_gap(delta, torch.tensor([1.0, 5.0])) == pytest.approx((math.exp(0.1) - 1.1) / 2)


def test_quantiles_are_members_of_the_sample() -> None:
    assert quantiles(torch.arange(101.0).flip(0)) == {"p05": 5.0, "p50": 50.0, "p95": 95.0}
    assert set(quantiles(torch.tensor([3.0])).values()) == {3.0}


def test_cosine_between_two_halves() -> None:
    first, second = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])], [torch.tensor([0.0, 1.0]), torch.tensor([2.0])]
    total = [a + b for a, b in zip(first, second, strict=True)]
    assert cosine(first, total) == pytest.approx(4 / 5)
    assert math.isnan(cosine([torch.zeros(2)], [torch.ones(2)]))
