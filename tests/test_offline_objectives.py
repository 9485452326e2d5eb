"""RPO, DRO, KTO, VRPO and SFT: numbers by hand, the tabular optimum, and the identities of their sources."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.errors import UserError
from dllm_rl.objectives.base import Extras, LossInputs, Objective
from dllm_rl.objectives.dro import DRO
from dllm_rl.objectives.groups import group_log_softmax, group_logsumexp, group_sum
from dllm_rl.objectives.kto import KTO
from dllm_rl.objectives.log_ratio import LogRatio
from dllm_rl.objectives.rpo import PARTITIONS, RPO, log_partition
from dllm_rl.objectives.sft import SFT
from dllm_rl.objectives.vrpo import VRPO
from dllm_rl.update import partners
from tests.conftest import loss_inputs

DOUBLE = torch.float64
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def tabular(logps: Tensor, reference: Tensor, rewards: Tensor, groups: Tensor, **extras: Tensor) -> LossInputs:
    """One token and one sample per completion: log-likelihoods are what the table says. All [B]."""
    shaped = [values.view(-1, 1, 1) for values in (logps, reference)]
    inputs = loss_inputs(shaped[0], shaped[1], torch.ones(len(logps), 1, dtype=DOUBLE), rewards, ref_logps=shaped[1])
    return replace(inputs, extras=Extras(groups, extras.get("mismatched")))


def two_prompts(seed: int = 0) -> tuple[Tensor, Tensor]:
    """log π_ref over the three responses that each of two prompts has, and their rewards."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(2, 3, generator=generator, dtype=DOUBLE).log_softmax(1).flatten()
    return reference, torch.randn(6, generator=generator, dtype=DOUBLE)


def gradient(objective: Objective, inputs: LossInputs) -> Tensor:
    logps = inputs.logps.detach().requires_grad_()
    (slope,) = torch.autograd.grad(objective.loss(replace(inputs, logps=logps)).loss, logps)
    return slope.flatten()


# --- groups

def test_group_sums_take_groups_of_any_size_in_any_order() -> None:
    values, groups = torch.tensor([1.0, 2.0, 3.0, -math.inf], dtype=DOUBLE), torch.tensor([7, 2, 7, 2])
    assert group_sum(values[:3], groups[:3]).tolist() == [4.0, 2.0, 4.0]
    high = math.log(math.e + math.e**3)
    assert group_logsumexp(values, groups).tolist() == pytest.approx([high, 2.0, high, 2.0])
    assert group_log_softmax(values, groups).tolist() == pytest.approx([1 - high, 0.0, 3 - high, -math.inf])


# --- the tabular optimum

@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_rpo_and_dro_are_zero_at_the_optimum_with_full_support(tau: float) -> None:
    """π* = π_ref exp((r − V)/τ) with V = τ log Σ π_ref exp(r/τ), when the data has every response to a prompt."""
    reference, rewards = two_prompts()
    value = tau * group_logsumexp(reference + rewards / tau, GROUPS)
    best = reference + (rewards - value) / tau
    assert group_logsumexp(best, GROUPS).tolist() == pytest.approx([0.0] * 6)
    for partition in ("ref_weighted_sum", "ref_weighted_normalised"):
        rpo = RPO(tau=tau, partition=partition)
        assert rpo.loss(tabular(best, reference, rewards, GROUPS)).loss.item() == pytest.approx(0.0, abs=1e-12)
    dro = DRO(tau=tau)
    assert dro.loss(tabular(best, reference, rewards - value, GROUPS)).loss.item() == pytest.approx(0.0, abs=1e-12)
    targets = dro.value_targets(rewards, (best - reference).view(-1, 1), torch.ones(6))
    assert targets.tolist() == pytest.approx(value.tolist())
    assert DRO(tau=tau, value="group_mean").loss(tabular(best, reference, rewards, GROUPS)).loss.item() == pytest.approx(0)
    elsewhere = best + torch.tensor([0.1, 0, 0, 0, 0, 0], dtype=DOUBLE)
    assert RPO(tau=tau).loss(tabular(elsewhere, reference, rewards, GROUPS)).loss > 1e-4


def test_on_a_part_of_the_responses_the_partition_is_not_that_of_the_optimum() -> None:
    reference, rewards = two_prompts()
    value = group_logsumexp(reference + rewards, GROUPS)
    best, part = reference + rewards - value, torch.tensor([0, 1, 3, 4])
    inputs = tabular(best[part], reference[part], rewards[part], GROUPS[part])
    assert RPO(tau=1.0).loss(inputs).loss > 1e-3


def test_mc_mean_is_unbiased_for_the_partition_function() -> None:
    """The mean of exp(r/τ) over two responses drawn from π_ref, over all pairs with their probabilities."""
    reference, rewards = (values[:3] for values in two_prompts(seed=4))
    expected = (reference + rewards).exp().sum()
    total = torch.zeros((), dtype=DOUBLE)
    for i in range(3):
        for j in range(3):
            pair = torch.tensor([i, j])
            estimate = log_partition(rewards[pair], reference[pair], torch.zeros(2).long(), "mc_mean").exp()
            total += (reference[i] + reference[j]).exp() * estimate[0]
    assert total.item() == pytest.approx(expected.item())


# --- RPO

def test_rpo_targets_are_the_log_softmax_of_the_group() -> None:
    reference, rewards = two_prompts()
    objective = RPO(tau=0.7)
    residuals = gradient(objective, tabular(torch.zeros(6, dtype=DOUBLE), reference, rewards, GROUPS)) * 6
    targets = -residuals  # residual = log π − target, and log π is 0 here
    assert torch.allclose(targets, group_log_softmax(reference + rewards / 0.7, GROUPS))
    assert group_sum(targets.exp(), GROUPS).tolist() == pytest.approx([1.0] * 6)


def test_a_single_response_is_driven_to_certainty_by_the_code_partition() -> None:
    for reward in (-3.0, 5.0):
        inputs = tabular(torch.tensor([-2.0]), torch.tensor([-1.5]), torch.tensor([reward]), torch.tensor([0]))
        assert RPO().loss(inputs).loss.item() == pytest.approx(0.5 * 2.0**2)
    for partition in PARTITIONS:
        assert RPO(partition=partition).least_group[0] == 2 and "whatever its reward" in RPO().least_group[1]


@pytest.mark.parametrize("objective", [
    *(RPO(partition=partition, tau=0.6) for partition in PARTITIONS), DRO(value="group_mean"),
])
def test_a_shift_of_the_rewards_of_a_prompt_changes_nothing(objective: Objective) -> None:
    reference, rewards = two_prompts()
    logps = reference + torch.linspace(-0.3, 0.2, 6, dtype=DOUBLE)
    shift = torch.tensor([10.0, 10, 10, -3, -3, -3], dtype=DOUBLE)
    inputs, moved = (tabular(logps, reference, values, GROUPS) for values in (rewards, rewards + shift))
    assert objective.loss(moved).loss.item() == pytest.approx(objective.loss(inputs).loss.item())
    assert torch.allclose(gradient(objective, moved), gradient(objective, inputs))


def test_at_the_reference_rpo_is_reinforce_with_the_partition_as_baseline() -> None:
    reference, rewards = two_prompts()
    value = 0.7 * group_logsumexp(reference + rewards / 0.7, GROUPS)
    found = gradient(RPO(tau=0.7), tabular(reference, reference, rewards, GROUPS))
    assert torch.allclose(found, -(rewards - value) / 0.7 / 6)


def test_rpo_is_dro_with_the_partition_as_value() -> None:
    """τ² L_RPO(V) = L_DRO(V), where ours divides DRO by τ."""
    reference, rewards = two_prompts()
    logps, tau = reference + torch.linspace(-0.3, 0.2, 6, dtype=DOUBLE), 0.7
    value = tau * group_logsumexp(reference + rewards / tau, GROUPS)
    rpo = RPO(tau=tau).loss(tabular(logps, reference, rewards, GROUPS)).loss
    dro = DRO(tau=tau).loss(tabular(logps, reference, rewards - value, GROUPS)).loss
    assert (tau * rpo).item() == pytest.approx(dro.item())


def test_per_token_log_ratios_divide_by_the_length() -> None:
    logps, reference = torch.full((1, 1, 4), -1.0, dtype=DOUBLE), torch.full((1, 1, 4), -1.5, dtype=DOUBLE)
    inputs = loss_inputs(logps, reference, torch.ones(1, 1, dtype=DOUBLE), torch.zeros(1), ref_logps=reference)
    assert RPO(log_ratio="mean").ell(inputs).tolist() == [0.5]
    assert RPO(log_ratio="sum").ell(inputs).tolist() == [2.0]


# --- DRO

def test_dro_by_hand() -> None:
    # r − V = 1, ℓ = 0.5, τ = 2: residual 0, then 1 − 2 x 0.75 = −0.5, loss 0.25 / (2 x 2)
    inputs = tabular(torch.tensor([-0.5, -0.25]), torch.tensor([-1.0, -1.0]), torch.ones(2), torch.tensor([0, 1]))
    assert DRO(tau=2.0).loss(inputs).loss.item() == pytest.approx((0.0 + 0.0625) / 2)


def test_the_two_gradients_of_dro_are_those_of_the_joint_loss() -> None:
    """1/2 (r − V − τℓ)²: ours for the policy is 1/τ of its gradient, and the value's is (V − target)."""
    reference, rewards = two_prompts()
    logps = (reference + 0.2).requires_grad_()
    value, tau = torch.linspace(-1, 1, 6, dtype=DOUBLE).requires_grad_(), 0.6
    joint = ((rewards - value - tau * (logps - reference)).square() / 2).mean()
    by_policy, by_value = torch.autograd.grad(joint, (logps, value))
    dro = DRO(tau=tau)
    inputs = tabular(logps.detach(), reference, (rewards - value).detach(), GROUPS)
    assert torch.allclose(tau * gradient(dro, inputs), by_policy)
    targets = dro.value_targets(rewards, (logps - reference).detach().view(-1, 1), torch.ones(6))
    assert torch.allclose((value - targets) / 6, by_value)


def test_dro_with_the_group_mean_is_half_the_variance_in_the_group() -> None:
    reference, rewards = two_prompts()
    logps, tau = reference + torch.linspace(-0.5, 0.5, 6, dtype=DOUBLE), 0.6
    free = logps.clone().requires_grad_()
    spread = (rewards - tau * (free - reference)).view(2, 3).var(1, correction=0).mean() / 2 / tau
    inputs = tabular(logps, reference, rewards, GROUPS)
    objective = DRO(tau=tau, value="group_mean")
    assert objective.loss(inputs).loss.item() == pytest.approx(spread.item())
    assert torch.allclose(gradient(objective, inputs), torch.autograd.grad(spread, free)[0])


# --- KTO

def test_at_the_reference_kto_is_half_its_weight_with_a_quarter_of_the_slope() -> None:
    reference, labels = two_prompts()[0], torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=DOUBLE)
    objective = KTO(beta=0.4, desirable_weight=1.5, undesirable_weight=0.5)
    inputs = tabular(reference, reference, labels, GROUPS, mismatched=torch.zeros(2, dtype=DOUBLE))
    weight = torch.where(labels > 0, 1.5, 0.5).double()
    assert objective.loss(inputs).loss.item() == pytest.approx(float(weight.mean()) / 2)
    assert torch.allclose(gradient(objective, inputs), -labels * weight * 0.4 / 4 / 6)


def test_kto_by_hand() -> None:
    # ℓ = 2, z0 = max(0, mean(1, 3)) = 2: desirable 1 − σ(0) = 1/2; ℓ = 0: undesirable 1 − σ(0.5 x 2) = 0.2689
    inputs = tabular(torch.tensor([-1.0, -3.0]), torch.tensor([-3.0, -3.0]), torch.tensor([1.0, -1.0]), torch.tensor([0, 1]),
                     mismatched=torch.tensor([1.0, 3.0]))
    assert KTO(beta=0.5).loss(inputs).loss.item() == pytest.approx((0.5 + 0.2689414) / 2)
    three = tabular(torch.tensor([-1.0, -3.0, -3.0]), torch.tensor([-3.0] * 3), torch.tensor([1.0, -1.0, -1.0]),
                    torch.tensor([0, 1, 2]), mismatched=torch.tensor([1.0, 3.0]))
    balanced = KTO(beta=0.5, undesirable_weight=0.5).loss(three).loss  # λ_D = 0.5 x 2 / 1
    assert balanced.item() == pytest.approx((1.0 * 0.5 + 2 * 0.5 * 0.2689414) / 3)


@pytest.mark.parametrize(("mismatched", "expected"), [([-2.0, 1.0], 0.0), ([1.0, 2.0], 1.5)])
def test_the_reference_point_is_not_negative(mismatched: list[float], expected: float) -> None:
    assert KTO().z0(torch.ones(2), torch.tensor(mismatched)).item() == expected


@pytest.mark.parametrize("point", ["matched", "mismatched", "zero"])
def test_no_gradient_goes_through_the_reference_point(point: str) -> None:
    reference, labels = two_prompts()[0], torch.ones(6, dtype=DOUBLE)
    logps = reference + torch.linspace(-0.5, 0.5, 6, dtype=DOUBLE)
    objective = KTO(beta=0.5, reference_point=point)
    inputs = tabular(logps, reference, labels, GROUPS, mismatched=torch.full((2,), 0.3, dtype=DOUBLE))
    z0 = {"matched": float((logps - reference).mean()), "mismatched": 0.3, "zero": 0.0}[point]
    fixed = torch.sigmoid(-0.5 * (logps - reference - z0))
    assert torch.allclose(gradient(objective, inputs), -0.5 * fixed * (1 - fixed) / 6)


def test_kto_saturates_on_both_sides() -> None:
    reference = torch.zeros(3, dtype=DOUBLE)
    inputs = tabular(torch.tensor([-60.0, 0.0, 60.0], dtype=DOUBLE), reference, torch.ones(3, dtype=DOUBLE), torch.arange(3))
    slopes = gradient(KTO(beta=0.5, reference_point="zero"), inputs).abs()
    assert slopes[0] < 1e-10 and slopes[2] < 1e-10 and slopes[1] == pytest.approx(0.5 / 4 / 3)


def test_labels_are_split_at_the_threshold() -> None:
    valid = torch.tensor([True, True, True, False])
    labels = KTO(threshold=0.5).prepare(torch.tensor([0.5, 0.4, 1.0, 1.0]), valid, torch.arange(4))
    assert labels.tolist() == [1.0, -1.0, 1.0, 0.0]


def test_kto_gives_the_advice_of_its_paper() -> None:
    rewards = torch.tensor([1.0] * 2 + [-1.0] * 8)
    assert "from 4 to 5.33" in (KTO(desirable_weight=1.0).advice(rewards) or "") and KTO().advice(rewards) is None
    assert KTO(desirable_weight=4.5).advice(rewards) is None
    assert "one side" in (KTO().advice(rewards[:2]) or "")


def test_partners_have_another_prompt_and_spread_over_its_completions() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    rows, others = partners(groups, groups)
    assert list(zip(rows.tolist(), others.tolist(), strict=True)) == [(0, 3), (1, 4), (2, 3), (3, 5), (4, 5), (5, 0)]
    # A prompt that was drawn twice is no stranger to itself.
    rows, others = partners(groups, torch.tensor([7, 7, 7, 7, 7, 8]))
    assert set(zip(rows.tolist(), others.tolist(), strict=True)) == {(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 0)}
    assert not len(partners(groups, torch.zeros(6))[0])


# --- VRPO and SFT

def test_vrpo_pairs_the_best_with_the_worst() -> None:
    rewards = torch.tensor([0.5, 1.0, 0.0, 0.3, 0.3, 0.3])
    valid = torch.tensor([True] * 6)
    assert VRPO().prepare(rewards, valid, GROUPS).tolist() == [0.0, 1.0, -1.0, 0.0, 0.0, 0.0]
    valid[1] = False
    assert VRPO().prepare(rewards, valid, GROUPS).tolist() == [1.0, 0.0, -1.0, 0.0, 0.0, 0.0]


def test_vrpo_by_hand() -> None:
    # ℓ_w = 1, ℓ_l = −1, β = 0.5: −log σ(1) = 0.3133; gradient −β σ(−1) for the winner, averaged over pairs
    inputs = tabular(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]), torch.tensor([1.0, -1.0]), torch.tensor([5, 5]))
    objective = VRPO(beta=0.5)
    assert objective.loss(inputs).loss.item() == pytest.approx(0.3132617)
    assert gradient(objective, inputs).tolist() == pytest.approx([-0.5 * 0.2689414, 0.5 * 0.2689414])


def test_sft_takes_the_best_or_all() -> None:
    rewards, valid = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([True] * 5 + [False])
    assert SFT().prepare(rewards, valid, GROUPS).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert SFT(threshold=0.5).prepare(rewards, valid, GROUPS).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert SFT(select="all").prepare(rewards, valid, GROUPS).tolist() == [1.0] * 5 + [0.0]


def test_sft_is_reinforce_with_an_advantage_of_one() -> None:
    logps = torch.tensor([[[-1.0, -2.0]]], dtype=DOUBLE)
    inputs = loss_inputs(logps, logps, torch.full((1, 1), 2.0, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE))
    assert SFT().loss(inputs).loss.item() == pytest.approx(6.0)


# --- what is refused

@pytest.mark.parametrize(("make", "message"), [
    (lambda: RPO(partition="sum"), r"objective\.partition=sum: must be ref_weighted_sum, mc_mean"),
    (lambda: RPO(tau=0), r"objective\.tau=0"),
    (lambda: DRO(value="none"), r"objective\.value=none: must be network or group_mean"),
    (lambda: KTO(reference_point="mean"), r"objective\.reference_point=mean"),
    (lambda: KTO(beta=0), r"objective\.beta=0"),
    (lambda: KTO(desirable_weight=-1), r"objective\.desirable_weight=-1"),
    (lambda: VRPO(beta=-1), r"objective\.beta=-1"),
    (lambda: SFT(select="first"), r"objective\.select=first: must be all or best"),
    (lambda: RPO(log_ratio="max"), r"objective\.log_ratio=max: must be sum or mean"),
    (lambda: DRO(aggregation="token-mean"), r"objective\.aggregation=token-mean: must be seq-mean-token-sum"),
    (lambda: RPO().check_likelihood(StratifiedCounts(length_norm="canvas")), r"likelihood\.length_norm=canvas"),
])
def test_bad_values_name_their_key(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("objective", [RPO(), DRO(), KTO(), VRPO()])
def test_they_say_what_they_need(objective: LogRatio) -> None:
    traits = objective.traits
    assert traits.uses_reference and traits.reads_rewards and traits.couples_sequences and not traits.uses_old
