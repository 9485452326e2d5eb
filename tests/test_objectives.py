"""Objectives against numbers typed in by hand, the published form of each loss, limiting cases, and one another."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_rl.diffusion import divergence
from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.errors import UserError
from dllm_rl.objectives.aggregation import AGGREGATIONS, Totals, coefficients
from dllm_rl.objectives.base import LossInputs, Objective
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.objectives.coupled_grpo import CoupledGRPO
from dllm_rl.objectives.dppo import DPPO
from dllm_rl.objectives.drpo import DRPO, SPO
from dllm_rl.objectives.elbo_ratio import ELBORatio
from dllm_rl.objectives.espo import ESPO
from dllm_rl.objectives.kl import KL_ESTIMATORS, kl
from dllm_rl.objectives.levels import LEVELS
from dllm_rl.objectives.ppo_clip import GRPO, PPOClip
from dllm_rl.objectives.reinforce import Reinforce
from dllm_rl.objectives.spg import SPG, eubo
from dllm_rl.objectives.unigrpo import UniGRPO
from dllm_rl.objectives.wd1 import WD1
from tests.conftest import loss_inputs

INF = math.inf
DOUBLE = torch.float64
RATIOS: dict[str, Callable[[], Objective]] = {
    "bgpo": BGPO, "elbo_ratio": ELBORatio, "reinforce": Reinforce,
    **{f"ppo_{level}": (lambda level=level: PPOClip(level=level)) for level in LEVELS},
    "dppo_binary_tv": lambda: DPPO(aggregation="seq-mean-token-sum"),
    "dppo_binary_kl": lambda: DPPO(divergence="binary_kl", aggregation="seq-mean-token-sum"),
    "dppo_topk_tv": lambda: DPPO(divergence="topk_tv", aggregation="seq-mean-token-sum"),
    "drpo": lambda: DRPO(radius=0.3, aggregation="seq-mean-token-sum"),
    "spo": lambda: SPO(radius=0.3, aggregation="seq-mean-token-sum"),
}


def random_inputs(seed: int = 0, spread: float = 0.3, batch: int = 5, samples: int = 4, length: int = 6) -> LossInputs:
    """Log-probabilities as an estimator gives them: scored somewhere, zero elsewhere, near those of the old policy."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    scored = torch.rand(batch, samples, length, generator=generator) < 0.6
    scored[:, 0] = True
    old = torch.where(scored, -normal(batch, samples, length).abs() - 0.05, 0.0)
    current = torch.where(scored, (old + spread * normal(batch, samples, length)).clamp(max=-1e-3), 0.0)
    return loss_inputs(
        current.requires_grad_(), old, length / scored.sum(-1).clamp(min=1).double(), normal(batch), scored=scored
    )


def gradient(objective: Objective, inputs: LossInputs) -> Tensor:
    """∂loss/∂logp at every scored position."""
    return torch.autograd.grad(objective.loss(inputs).loss, inputs.logps)[0]


def one(current: list[float], old: list[float], advantage: float, weight: float = 1.0) -> LossInputs:
    """One sequence, one sample: probabilities of its tokens under both policies."""
    logps = torch.tensor([[current]], dtype=DOUBLE).log().requires_grad_()
    return loss_inputs(logps, torch.tensor([[old]], dtype=DOUBLE).log(), torch.tensor([[weight]], dtype=DOUBLE),
                       torch.tensor([advantage], dtype=DOUBLE))


# --- what all of them share

@pytest.mark.parametrize("name", RATIOS)
def test_on_policy_every_ratio_objective_has_the_gradient_of_reinforce(name: str) -> None:
    inputs = random_inputs(spread=0.0)
    inputs = loss_inputs(inputs.old_logps.clone().requires_grad_(), inputs.old_logps, inputs.weights, inputs.advantages,
                         scored=inputs.scored)
    found, expected = gradient(RATIOS[name](), inputs), gradient(Reinforce(), inputs)
    # Positions that a sample does not score never reach the network.
    torch.testing.assert_close(found * inputs.scored, expected * inputs.scored, rtol=1e-12, atol=1e-14)


def test_reinforce_by_hand() -> None:
    logps = torch.tensor([[[-1.0, -2.0], [-3.0, 0.0]]], dtype=DOUBLE)
    inputs = loss_inputs(logps, logps, torch.tensor([[2.0, 4.0]], dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE))
    # ELBO terms -6 and -12, mean -9, times -0.5.
    assert Reinforce().loss(inputs).loss.item() == 4.5


@pytest.mark.parametrize(("name", "make"), [
    ("ppo", lambda: PPOClip(clip_low=1.0, clip_high=INF, aggregation="seq-mean-token-sum")),
    ("dppo", lambda: DPPO(delta_low=INF, delta_high=INF, aggregation="seq-mean-token-sum")),
    ("dppo_kl", lambda: DPPO(divergence="binary_kl", delta_low=INF, delta_high=INF, aggregation="seq-mean-token-sum")),
    ("drpo", lambda: DRPO(radius=INF, aggregation="seq-mean-token-sum")),
    ("spo", lambda: SPO(radius=INF, aggregation="seq-mean-token-sum")),
])
def test_without_a_boundary_they_are_the_importance_weighted_policy_gradient(name: str, make: type) -> None:
    del name
    inputs = random_inputs()
    ratio = (inputs.logps - inputs.old_logps).exp()
    share = inputs.weights.unsqueeze(-1) * inputs.coefficients.view(-1, 1, 1) * inputs.advantages.view(-1, 1, 1) / 4
    expected = -(share * ratio).detach()
    torch.testing.assert_close(gradient(make(), inputs) * inputs.scored, expected * inputs.scored)


EVERY: dict[str, Callable[[], Objective]] = {
    **RATIOS, "grpo": GRPO, "espo": ESPO, "wd1": WD1, "coupled": CoupledGRPO, "unigrpo": UniGRPO,
    "elbo_ratio_clip": lambda: ELBORatio(clip_low=0.2, clip_high=0.2), "dual": lambda: PPOClip(dual_clip=3.0),
    **{f"spg_{kind}": (lambda kind=kind: SPG(negative=kind)) for kind in ("mix", "eubo", "elbo", "zero")},
}

DETACHED = {"dppo_binary_tv", "dppo_binary_kl", "dppo_topk_tv", "drpo", "spo"}
"""Their weights carry no gradient by definition: their values are no antiderivative, and they have tests of their own."""


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_loss_and_gradient_are_finite_for_any_log_ratio(name: str, size: float) -> None:
    inputs = random_inputs()
    generator = torch.Generator().manual_seed(3)
    old = torch.where(inputs.scored, -size * torch.rand(inputs.logps.shape, generator=generator, dtype=DOUBLE), 0.0)
    logps = torch.where(inputs.scored, -size * torch.rand(inputs.logps.shape, generator=generator, dtype=DOUBLE), 0.0)
    inputs = loss_inputs(logps.requires_grad_(), old, inputs.weights, inputs.advantages, scored=inputs.scored,
                         ref_logps=old.flip(0) * inputs.scored)
    output = EVERY[name]().loss(inputs)
    assert output.loss.isfinite()
    assert torch.autograd.grad(output.loss, inputs.logps)[0].isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_advantage_zero_has_no_gradient(name: str) -> None:
    inputs = random_inputs()
    objective = EVERY[name]()
    inputs = loss_inputs(inputs.logps, inputs.old_logps, inputs.weights, torch.zeros(5, dtype=DOUBLE), scored=inputs.scored)
    assert (gradient(objective, inputs) == 0).all()


@pytest.mark.parametrize("name", sorted(set(EVERY) - DETACHED))
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    inputs, objective = random_inputs(spread=0.02), EVERY[name]()
    found = gradient(objective, inputs)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(inputs.logps.shape, generator=generator, dtype=DOUBLE) * inputs.scored
    values = []
    for sign in (1, -1):
        moved = loss_inputs(inputs.logps.detach() + sign * 1e-6 * direction, inputs.old_logps, inputs.weights,
                            inputs.advantages, scored=inputs.scored)
        values.append(objective.loss(moved).loss.item())
    assert (found * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-9)


# --- aggregation

def test_aggregation_by_hand() -> None:
    lengths, totals = torch.tensor([2, 6]), Totals(sequences=4, tokens=16, canvas=8)  # two more sequences elsewhere
    expected = {
        "token-mean": [1 / 16, 1 / 16], "seq-mean-token-mean": [1 / 8, 1 / 24],
        "seq-mean-token-sum": [1 / 4, 1 / 4], "seq-mean-token-sum-norm": [1 / 32, 1 / 32],
    }
    assert set(expected) == set(AGGREGATIONS)
    for mode, values in expected.items():
        assert coefficients(mode, lengths, totals, None).tolist() == pytest.approx(values)
    assert coefficients("seq-mean-token-sum-norm", lengths, totals, 100).tolist() == pytest.approx([1 / 400] * 2)


def test_grpo_value_is_zero_on_policy_when_sequences_count_the_same() -> None:
    """Σ A = 0 within groups; under token-mean, lengths would weigh it."""
    region = torch.tensor([[True] * 2 + [False] * 4, [True] * 6])
    logps = -torch.ones(2, 1, 6, dtype=DOUBLE) * region.unsqueeze(1)
    scored = region.unsqueeze(1)
    for mode, value in (("seq-mean-token-mean", 0.0), ("token-mean", -(2 - 6) / 8)):
        factor = coefficients(mode, region.sum(1), Totals(2, 8, 6), None)
        inputs = loss_inputs(logps, logps, torch.ones(2, 1, dtype=DOUBLE), torch.tensor([1.0, -1.0], dtype=DOUBLE),
                             scored=scored, region=region, coefficients=factor)
        assert GRPO(kl_coef=0).loss(inputs).loss.item() == pytest.approx(value, abs=1e-14)


# --- PPO's clip

@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), [
    (1.5, 1.0, -1.2, 0.0), (1.1, 1.0, -1.1, -1.1), (0.5, 1.0, -0.5, -0.5),
    (0.5, -1.0, 0.8, 0.0), (0.9, -1.0, 0.9, 0.9), (1.5, -1.0, 1.5, 1.5), (4.0, -1.0, 3.0, 0.0),
])
def test_ppo_clip_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    """The last case is the dual clip with c = 3. Slopes are with respect to log π."""
    inputs = one([0.1 * ratio], [0.1], advantage)
    objective = PPOClip(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert objective.loss(inputs).loss.item() == pytest.approx(loss, rel=1e-12)
    assert gradient(objective, inputs).item() == pytest.approx(slope, rel=1e-12, abs=1e-15)


def test_a_huge_ratio_of_a_bad_completion_keeps_a_gradient() -> None:
    """A < 0 and r = e^25 is the branch that no clip bounds: the loss must still push the ratio down."""
    logps = torch.full((1, 1, 1), 25.0, dtype=DOUBLE, requires_grad=True)
    inputs = loss_inputs(logps, torch.zeros(1, 1, 1, dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE), torch.tensor([-1.0]))
    (slope,) = torch.autograd.grad(PPOClip().loss(inputs).loss, logps)
    assert slope.item() == pytest.approx(math.exp(20))


def test_what_needs_plain_elbo_terms_refuses_normalised_ones() -> None:
    for objective in (SPG(), ESPO()):
        with pytest.raises(UserError, match=r"likelihood\.length_norm=canvas: must be none"):
            objective.check_likelihood(StratifiedCounts(length_norm="canvas"))
    with pytest.raises(UserError, match=r"objective\.aggregation=token-mean: must be seq-mean-token-sum"):
        ESPO(aggregation="token-mean")


def test_spg_drops_bad_completions_before_any_pass() -> None:
    valid, groups = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    kept = SPG(negative="zero").prepare(torch.tensor([1.0, -2.0]), valid, groups)
    assert kept.tolist() == [1.0, 0.0]


def test_clip_higher_is_one_sided() -> None:
    objective = PPOClip(clip_low=0.2, clip_high=0.28)
    assert gradient(objective, one([0.125], [0.1], 1.0)).item() != 0  # 1.25 < 1.28
    assert gradient(objective, one([0.13], [0.1], 1.0)).item() == 0
    assert gradient(objective, one([0.079], [0.1], -1.0)).item() == 0


def test_levels_by_hand() -> None:
    """Two samples of two tokens: the log-ratios are 0.1 and 0.2 in the first, 0.4 and nothing in the second."""
    old = torch.tensor([[[-1.0, -1.0], [-1.0, 0.0]]], dtype=DOUBLE)
    logps = old + torch.tensor([[[0.1, 0.2], [0.4, 0.0]]], dtype=DOUBLE)
    scored = torch.tensor([[[True, True], [True, False]]])
    inputs = loss_inputs(logps, old, torch.tensor([[1.0, 2.0]], dtype=DOUBLE), torch.ones(1, dtype=DOUBLE), scored=scored)
    e = math.exp
    expected = {
        "sample_token": (e(0.1) + e(0.2)) * 1 / 2 + e(0.4) * 2 / 2,
        "sample": e(0.3) * 1 / 2 + e(0.4) * 2 / 2,
        "token": e(0.1 / 2 + 0.4 * 2 / 2) + e(0.2 / 2),
        "sequence": e((0.1 + 0.2) / 2 + 0.4 * 2 / 2),
    }
    for level in LEVELS:
        objective = PPOClip(level=level, clip_low=1.0, clip_high=INF)
        assert objective.loss(inputs).loss.item() == pytest.approx(-expected[level], rel=1e-12)


def test_ppo_clip_is_dppo_with_the_ratio_as_divergence() -> None:
    inputs = random_inputs()
    away = ((inputs.logps - inputs.old_logps).exp() - 1).abs().detach()
    with_ratio = loss_inputs(inputs.logps, inputs.old_logps, inputs.weights, inputs.advantages, scored=inputs.scored,
                             divergence=away)
    dppo = DPPO(divergence="exact_tv", delta_low=0.2, delta_high=0.2, aggregation="seq-mean-token-sum")
    ppo = PPOClip(clip_low=0.2, clip_high=0.2)
    found, expected = gradient(dppo, with_ratio), gradient(ppo, inputs)
    torch.testing.assert_close(found * inputs.scored, expected * inputs.scored)
    assert (expected == 0)[inputs.scored].any() and (expected != 0)[inputs.scored].any()


# --- divergences and DPPO

def two_policies(vocabulary: int = 12, rows: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, old = (2 * torch.randn(rows, vocabulary, generator=generator, dtype=DOUBLE) for _ in range(2))
    return logits, old, old.softmax(-1).multinomial(1, generator=generator).squeeze(1)


def picked(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_merging_outcomes_only_loses_divergence(kind: str) -> None:
    logits, old, tokens = two_policies()
    measures = [divergence.binary(kind, picked(logits, tokens), picked(old, tokens))]
    for k in (1, 2, 5, 12):
        measures.append(divergence.top_k(kind, logits, divergence.top_k_support(old, tokens, k)))
    measures.append(divergence.exact(kind, logits, old))
    for smaller, larger in pairwise(measures):
        assert (smaller <= larger + 1e-10).all()
    torch.testing.assert_close(measures[-2], measures[-1], rtol=1e-8, atol=1e-10)  # K = V is exact
    assert (measures[0] < measures[-1] - 1e-6).any()


def test_divergences_by_hand() -> None:
    mu, pi = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=DOUBLE), torch.tensor([[0.4, 0.3, 0.1, 0.2]], dtype=DOUBLE)
    token = torch.tensor([3])
    assert divergence.exact("tv", pi.log(), mu.log()).item() == pytest.approx(0.15)
    assert divergence.binary("tv", pi.log()[:, 3], mu.log()[:, 3]).item() == pytest.approx(0.15)
    # Top 1 is token 0; with the sampled token 3 the rest has 0.45 and 0.4.
    support = divergence.top_k_support(mu.log(), token, 1)
    assert support.ids.tolist() == [[0, 3]]
    assert divergence.top_k("tv", pi.log(), support).item() == pytest.approx((0.1 + 0.15 + 0.05) / 2)
    expected = 0.5 * math.log(0.5 / 0.4) + 0.05 * math.log(0.05 / 0.2) + 0.45 * math.log(0.45 / 0.4)
    assert divergence.top_k("kl", pi.log(), support).item() == pytest.approx(expected)
    expected = 0.05 * math.log(0.05 / 0.2) + 0.95 * math.log(0.95 / 0.8)
    assert divergence.binary("kl", pi.log()[:, 3], mu.log()[:, 3]).item() == pytest.approx(expected)
    # A sampled token inside the top K leaves the extra place empty.
    assert divergence.top_k_support(mu.log(), torch.tensor([0]), 2).ids.tolist() == [[0, 1, -1]]


def test_half_the_mean_distance_of_the_ratio_from_one_is_the_total_variation() -> None:
    logits, old, _ = two_policies(rows=50)
    mu, pi = old.softmax(-1), logits.softmax(-1)
    torch.testing.assert_close((mu * (pi / mu - 1).abs()).sum(-1) / 2, divergence.exact("tv", logits, old))


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1 - 1e-6))
def test_pinsker(mu: float, pi: float) -> None:
    logs = torch.tensor(pi, dtype=DOUBLE).log(), torch.tensor(mu, dtype=DOUBLE).log()
    assert divergence.binary("tv", *logs).item() ** 2 <= divergence.binary("kl", *logs).item() / 2 + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_divergences_are_finite_and_zero_between_equals(dtype: torch.dtype) -> None:
    logits = torch.tensor([[80.0, 0.0, -80.0, -INF], [0.0, 0.0, 0.0, -INF]], dtype=dtype)
    tokens = torch.tensor([0, 2])
    for kind in ("tv", "kl"):
        support = divergence.top_k_support(logits, tokens, 2)
        values = [divergence.exact(kind, logits, logits), divergence.top_k(kind, logits, support),
                  divergence.binary(kind, picked(logits, tokens), picked(logits, tokens)),
                  divergence.exact(kind, logits.flip(0), logits)]
        assert all(value.isfinite().all() for value in values)
        assert all((value.abs() < 1e-6).all() for value in values[:3])


@pytest.mark.parametrize(("mu", "pi", "advantage", "dppo_keeps", "ppo_keeps"), [
    (1e-4, 1e-2, 1.0, True, False),   # r = 100, TV = .0099
    (0.99, 0.80, -1.0, False, False),  # r = .808 is inside 1 - .2 by a hair; TV = .19
    (0.99, 0.80, 1.0, True, True),    # towards mu is never masked
    (0.5, 0.7, 1.0, False, False),
])
def test_dppo_by_hand(mu: float, pi: float, advantage: float, dppo_keeps: bool, ppo_keeps: bool) -> None:
    inputs = one([pi], [mu], advantage)
    found = gradient(DPPO(aggregation="seq-mean-token-sum"), inputs).item()
    assert found == pytest.approx(-advantage * pi / mu if dppo_keeps else 0.0)
    if (mu, advantage) == (0.99, -1.0):
        ppo_keeps = True  # .808 > .8
    assert (gradient(PPOClip(), inputs).item() != 0) == ppo_keeps


def test_only_updates_that_move_away_are_masked() -> None:
    inputs = random_inputs(spread=1.0)
    found = gradient(DPPO(delta_low=0.0, delta_high=0.0, aggregation="seq-mean-token-sum"), inputs)
    moved = (inputs.logps - inputs.old_logps).detach()
    away = inputs.advantages.view(-1, 1, 1) * moved > 0
    assert torch.equal((found != 0)[inputs.scored], ~away[inputs.scored])


def test_the_ratio_cap_truncates() -> None:
    inputs = one([0.4], [0.1], -1.0)
    assert gradient(DPPO(ratio_cap=3.0, aggregation="seq-mean-token-sum"), inputs).item() == pytest.approx(3.0)


# --- DRPO and SPO

@pytest.mark.parametrize("radius", [0.15, 0.5, 12.5])
def test_the_detached_form_has_the_gradient_of_the_published_quadratic(radius: float) -> None:
    inputs = random_inputs(spread=0.8)
    ratio = (inputs.logps - inputs.old_logps).exp()
    advantage = inputs.advantages.view(-1, 1, 1)
    share = inputs.weights.unsqueeze(-1) * inputs.coefficients.view(-1, 1, 1) / 4 * inputs.scored
    for objective, mu in ((DRPO, inputs.old_logps.exp()), (SPO, torch.ones_like(ratio))):
        published = (share * (-advantage * ratio + advantage.abs() * mu * (ratio - 1) ** 2 / (2 * radius))).sum()
        expected = torch.autograd.grad(published, inputs.logps, retain_graph=True)[0]
        found = gradient(objective(radius=radius, aggregation="seq-mean-token-sum"), inputs) * inputs.scored
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("radius", [0.05, 0.15, 0.4])
def test_drpo_pulls_back_exactly_where_dppo_masks(radius: float) -> None:
    inputs = random_inputs(spread=1.0, batch=40)
    drpo = gradient(DRPO(radius=radius, aggregation="seq-mean-token-sum"), inputs)
    dppo = gradient(DPPO(delta_low=radius, delta_high=radius, aggregation="seq-mean-token-sum"), inputs)
    corrective = (drpo * -inputs.advantages.view(-1, 1, 1) < 0)[inputs.scored]
    assert torch.equal(corrective, (dppo == 0)[inputs.scored])
    assert corrective.any() and not corrective.all()


@pytest.mark.parametrize(("advantage", "expected"), [(1.0, 0.7), (-2.0, 0.3)])
def test_the_stationary_point_of_drpo_is_at_the_radius(advantage: float, expected: float) -> None:
    """Gradient descent on one token with μ = 0.5 and radius 0.2 ends at 0.5 ± 0.2, whatever the size of A."""
    logit = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    old = torch.tensor([[[0.5]]], dtype=DOUBLE).log()
    for _ in range(600):
        inputs = loss_inputs(torch.nn.functional.logsigmoid(logit).view(1, 1, 1), old, torch.ones(1, 1, dtype=DOUBLE),
                             torch.tensor([advantage], dtype=DOUBLE))
        (slope,) = torch.autograd.grad(DRPO(radius=0.2, aggregation="seq-mean-token-sum").loss(inputs).loss, logit)
        logit = (logit - 0.2 * slope).detach().requires_grad_()
    assert torch.sigmoid(logit).item() == pytest.approx(expected, abs=1e-6)


def test_drpo_is_spo_with_the_radius_over_mu() -> None:
    inputs = one([0.3], [0.2], 1.0)
    drpo = gradient(DRPO(radius=0.4, aggregation="seq-mean-token-sum"), inputs)
    torch.testing.assert_close(drpo, gradient(SPO(radius=0.4 / 0.2, aggregation="seq-mean-token-sum"), inputs))


def test_scaling_advantages_scales_drpo_and_leaves_its_boundary() -> None:
    inputs = random_inputs(spread=1.0)
    tripled = loss_inputs(inputs.logps, inputs.old_logps, inputs.weights, 3 * inputs.advantages, scored=inputs.scored)
    torch.testing.assert_close(gradient(DRPO(radius=0.2), tripled), 3 * gradient(DRPO(radius=0.2), inputs))


def test_with_the_papers_radius_the_weight_barely_moves() -> None:
    """|π − μ| <= 1, so w stays within 1 ± 0.08 at radius 12.5: nearly the importance-weighted policy gradient."""
    inputs = random_inputs(spread=3.0)
    found, plain = gradient(DRPO(), inputs)[inputs.scored], gradient(DRPO(radius=INF), inputs)[inputs.scored]
    assert ((found / plain - 1).abs() <= 0.08).all()


# --- sequence-level objectives

def test_elbo_ratio_by_hand() -> None:
    old = torch.zeros(1, 2, 1, dtype=DOUBLE)
    logps = torch.tensor([[[0.2], [0.4]]], dtype=DOUBLE, requires_grad=True)
    inputs = loss_inputs(logps, old, torch.tensor([[1.0, 2.0]], dtype=DOUBLE), torch.tensor([-2.0], dtype=DOUBLE))
    assert ELBORatio().loss(inputs).loss.item() == pytest.approx(2 * math.exp(0.5))  # (0.2 + 0.8) / 2
    assert gradient(ELBORatio(), inputs).flatten().tolist() == pytest.approx([math.exp(0.5), 2 * math.exp(0.5)])
    clipped = ELBORatio(clip_high=0.2)
    up = loss_inputs(logps, old, inputs.weights, torch.tensor([1.0], dtype=DOUBLE))
    assert clipped.loss(up).loss.item() == pytest.approx(-1.2)
    assert (gradient(clipped, up) == 0).all()


def test_bgpo_is_below_the_elbo_ratio_and_equal_with_one_negative_sample() -> None:
    for seed in range(20):
        inputs = random_inputs(seed, spread=0.5)
        assert BGPO().loss(inputs).loss >= ELBORatio().loss(inputs).loss - 1e-12  # losses are minus the objectives


def test_espo_by_hand() -> None:
    logps = torch.tensor([[[-1.0, -1.0, -1.0, -1.0]]], dtype=DOUBLE, requires_grad=True)
    old, ref = logps.detach() - 0.1, logps.detach() - 0.5
    inputs = loss_inputs(logps, old, torch.ones(1, 1, dtype=DOUBLE), torch.tensor([1.0], dtype=DOUBLE), ref_logps=ref)
    # ELBO difference 0.4 over 4 tokens; to the reference 2.0, squared, halved, over 4 tokens.
    assert ESPO(kl_coef=0.3).loss(inputs).loss.item() == pytest.approx(-math.exp(0.1) + 0.3 * 0.5)
    assert gradient(ESPO(kl_coef=0.0), inputs).flatten().tolist() == pytest.approx([-math.exp(0.1) / 4] * 4)


def test_gdpo_is_the_clipped_elbo_ratio_over_the_length() -> None:
    inputs = random_inputs(spread=0.1)
    by_length = loss_inputs(inputs.logps, inputs.old_logps, inputs.weights, inputs.advantages, scored=inputs.scored,
                            coefficients=coefficients("seq-mean-token-mean", torch.full((5,), 6), Totals(5, 30, 6), None))
    loss = ELBORatio(clip_low=0.2, clip_high=0.2).loss(by_length).loss
    ratio = inputs.delta.mean(1).exp()
    a = inputs.advantages
    expected = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean() / 6
    assert loss.item() == pytest.approx(expected.item())


# --- wd1

def test_wd1_weights_by_hand() -> None:
    advantages = torch.tensor([1.0, 0.0, -1.0, 2.0, 2.0, 2.0], dtype=DOUBLE)
    found = WD1().prepare(advantages, torch.ones(6, dtype=torch.bool), torch.arange(6) // 3)
    e = math.e
    total = e + 1 + 1 / e
    assert found[:3].tolist() == pytest.approx([(e - 1 / e) / total, 0.0, -(e - 1 / e) / total])
    assert found[3:].tolist() == [0.0, 0.0, 0.0]


def test_wd1_leaves_out_what_could_not_be_graded() -> None:
    valid = torch.tensor([True, True, False, False, False, False])
    found = WD1().prepare(torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0, 0.0]), valid, torch.arange(6) // 3)
    assert found.tolist() == pytest.approx([math.tanh(0.5), -math.tanh(0.5), 0.0, 0.0, 0.0, 0.0], abs=1e-6)


# --- SPG

def test_spg_by_hand() -> None:
    """Two samples of two tokens, β = 2; the second sample scores the first token only. n/|M| weights 1 and 2."""
    p = torch.tensor([[[0.5, 0.25], [0.1, 1.0]]], dtype=DOUBLE)
    scored = torch.tensor([[[True, True], [True, False]]])
    inputs = loss_inputs(p.log(), p.log(), torch.tensor([[1.0, 2.0]], dtype=DOUBLE), torch.tensor([-1.0], dtype=DOUBLE),
                         scored=scored)
    upper = (math.log((0.25 + 2 * 0.01) / 2) + math.log(0.0625 / 2)) / 2
    lower = (math.log(0.5) + math.log(0.25) + 2 * math.log(0.1)) / 2
    for negative, expected in (("eubo", upper), ("elbo", lower), ("mix", (upper + lower) / 2), ("zero", 0.0)):
        assert SPG(negative=negative, beta=2.0).loss(inputs).loss.item() == pytest.approx(expected)
    positive = loss_inputs(p.log(), p.log(), inputs.weights, torch.tensor([1.0], dtype=DOUBLE), scored=scored)
    assert SPG(beta=2.0).loss(positive).loss.item() == pytest.approx(-lower)


def test_eubo_is_above_the_mean_log_probability_and_scales_unseen_tokens() -> None:
    logps = -torch.rand(3, 8, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) * 4
    ones = torch.ones(3, 8, dtype=DOUBLE)
    inputs = loss_inputs(logps, logps, ones, torch.ones(3, dtype=DOUBLE))
    bounds = [eubo(inputs, beta) for beta in (1.0, 1.5, 3.0, 50.0)]
    assert (logps.mean(1).sum(1) <= bounds[0]).all()
    for lower, upper in pairwise(bounds):
        assert (lower <= upper + 1e-12).all()  # power means rise with their exponent
    assert (bounds[-1] <= logps.amax(1).sum(1) + 1e-12).all()
    scored = torch.ones(3, 8, 5, dtype=torch.bool)
    scored[:, :, 4] = False
    partial = loss_inputs(torch.where(scored, logps, 0.0), logps, ones, torch.ones(3, dtype=DOUBLE), scored=scored)
    four = loss_inputs(logps[..., :4], logps[..., :4], ones, torch.ones(3, dtype=DOUBLE))
    torch.testing.assert_close(eubo(partial, 1.5), eubo(four, 1.5) * 5 / 4)


# --- KL terms

def test_kl_values_by_hand() -> None:
    ratio = torch.tensor([0.5], dtype=DOUBLE)
    assert kl(ratio, "k1").item() == 0.5
    assert kl(ratio, "k2").item() == 0.125
    assert kl(ratio, "k3").item() == pytest.approx(math.exp(-0.5) - 0.5)


@pytest.mark.parametrize("ratio", [-25.0, -19.0, -1.0, 1.0, 19.0, 25.0])
def test_k2_and_k3_always_pull_towards_the_reference(ratio: float) -> None:
    for estimator in ("k2", "k3"):
        x = torch.tensor(ratio, dtype=DOUBLE, requires_grad=True)
        (slope,) = torch.autograd.grad(kl(x, estimator), x)
        assert slope.item() * ratio > 0


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_gradients_are_the_documented_ones(estimator: str) -> None:
    """In expectation over π, by enumeration: k1 pushes nowhere, k2 down the reverse KL, k3 down the forward KL."""
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(7, generator=generator, dtype=DOUBLE) for _ in range(2))
    logits.requires_grad_()
    pi, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    loss = (pi.detach().exp() * kl(pi - ref, estimator)).sum()
    found = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    reverse = (pi.exp() * (pi - ref)).sum()
    forward = (ref.exp() * (ref - pi)).sum()
    expected = {"k1": torch.zeros(7, dtype=DOUBLE), "k2": torch.autograd.grad(reverse, logits, retain_graph=True)[0],
                "k3": torch.autograd.grad(forward, logits)[0]}[estimator]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if estimator != "k2":
        assert loss.item() == pytest.approx(reverse.item())


def test_the_kl_term_is_added_at_the_level_of_the_ratio() -> None:
    inputs = random_inputs()
    ref = inputs.old_logps - 0.3 * inputs.scored
    with_ref = loss_inputs(inputs.logps, inputs.old_logps, inputs.weights, inputs.advantages, scored=inputs.scored,
                           ref_logps=ref)
    difference = (inputs.logps - ref).detach()
    weights = (inputs.weights / 4).unsqueeze(-1)
    expected = {
        "sample_token": (weights * inputs.scored * kl(difference, "k3")).sum((1, 2)),
        "sample": (weights.squeeze(-1) * kl(difference.sum(-1), "k3")).sum(1),
        "token": kl((weights * difference).sum(1), "k3").sum(1),
        "sequence": kl((weights * difference).sum((1, 2)), "k3"),
    }
    for level in LEVELS:
        extra = PPOClip(level=level, kl_coef=0.7).loss(with_ref).loss - PPOClip(level=level).loss(inputs).loss
        assert extra.item() == pytest.approx(0.7 * expected[level].mean().item(), rel=1e-9)


# --- settings

@pytest.mark.parametrize(("make", "message"), [
    (lambda: PPOClip(level="batch"), r"objective\.level=batch: must be sample_token, sample, token, sequence"),
    (lambda: PPOClip(clip_low=-0.1), r"objective\.clip_low=-0\.1"),
    (lambda: PPOClip(dual_clip=0.5), r"objective\.dual_clip=0\.5: must be a number > 1"),
    (lambda: GRPO(kl_coef=-1), r"objective\.kl_coef=-1"),
    (lambda: GRPO(kl_estimator="k4"), r"objective\.kl_estimator=k4: must be k1, k2, k3"),
    (lambda: ELBORatio(clip_high=-1), r"objective\.clip_high=-1"),
    (lambda: DPPO(divergence="tv"), r"objective\.divergence=tv: must be binary_tv"),
    (lambda: DPPO(delta_low=-1), r"objective\.delta_low=-1"),
    (lambda: DPPO(ratio_cap=0), r"objective\.ratio_cap=0"),
    (lambda: DRPO(radius=0), r"objective\.radius=0"),
    (lambda: WD1(psi=0), r"objective\.psi=0"),
    (lambda: SPG(negative="drop"), r"objective\.negative=drop: must be mix, eubo, elbo, zero"),
    (lambda: SPG(beta=0.5), r"objective\.beta=0\.5"),
    (lambda: Reinforce(aggregation="sum"), r"objective\.aggregation=sum: must be token-mean"),
])
def test_bad_values_name_their_key(make: type, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
