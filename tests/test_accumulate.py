"""The gradient engine: three drivers, one gradient; constant memory; no pass that can be avoided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.estimators import (
    Block,
    Coupled,
    CoupledFull,
    LeftToRight,
    OneStep,
    Quadrature,
    StratifiedCounts,
    Trajectory,
)
from dllm_rl.diffusion.likelihood import token_logps, token_values
from dllm_rl.memory import SavedBytes
from dllm_rl.models.policy import Policy
from dllm_rl.models.value_head import ValueModel
from dllm_rl.objectives.aggregation import AGGREGATIONS, Totals
from dllm_rl.objectives.base import Extras, Objective
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.objectives.coupled_grpo import CoupledGRPO
from dllm_rl.objectives.dppo import DIVERGENCES, DPPO
from dllm_rl.objectives.dro import DRO, VALUES
from dllm_rl.objectives.drpo import DRPO, SPO
from dllm_rl.objectives.elbo_ratio import ELBORatio
from dllm_rl.objectives.espo import ESPO
from dllm_rl.objectives.kto import KTO, REFERENCE_POINTS
from dllm_rl.objectives.levels import LEVELS
from dllm_rl.objectives.ppo_clip import GRPO, PPOClip
from dllm_rl.objectives.reinforce import Reinforce
from dllm_rl.objectives.rpo import PARTITIONS, RPO
from dllm_rl.objectives.sft import SFT
from dllm_rl.objectives.spg import SPG
from dllm_rl.objectives.unigrpo import UniGRPO
from dllm_rl.objectives.value import ValueLoss
from dllm_rl.objectives.vrpo import VRPO
from dllm_rl.objectives.wd1 import WD1
from dllm_rl.scoring import Masks, Old, Scores
from dllm_rl.types import Completions
from tests.conftest import make_completions, make_policy

ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 1.5], dtype=torch.float64)
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "bgpo": BGPO,
    "bgpo_clip": lambda: BGPO(clip_low=0.1, clip_high=0.1),
    "bgpo_chunk": lambda: BGPO(chunk=2),
    "elbo_ratio": ELBORatio,
    "elbo_ratio_clip_kl": lambda: ELBORatio(clip_low=0.2, clip_high=0.2, kl_coef=0.1),
    "reinforce": Reinforce,
    **{f"ppo_{level}": (lambda level=level: PPOClip(level=level, kl_coef=0.1, dual_clip=3.0)) for level in LEVELS},
    "grpo": GRPO,
    **{f"dppo_{kind}": (lambda kind=kind: DPPO(divergence=kind, delta_low=1e-3, delta_high=1e-3)) for kind in DIVERGENCES},
    "drpo": lambda: DRPO(radius=0.2),
    "spo": lambda: SPO(radius=0.2),
    "espo": ESPO,
    "wd1": WD1,
    **{f"spg_{kind}": (lambda kind=kind: SPG(negative=kind)) for kind in ("mix", "eubo", "elbo", "zero")},
    "coupled_grpo": CoupledGRPO,
    "unigrpo": UniGRPO,
    **{f"rpo_{kind}": (lambda kind=kind: RPO(partition=kind, tau=0.7)) for kind in PARTITIONS},
    "rpo_sum": lambda: RPO(log_ratio="sum"),
    **{f"dro_{value}": (lambda value=value: DRO(value=value, tau=0.3)) for value in VALUES},
    **{f"kto_{point}": (lambda point=point: KTO(reference_point=point)) for point in REFERENCE_POINTS},
    "vrpo": VRPO,
    "sft": SFT,
    "ppo_old_anchor": lambda: PPOClip(kl_coef=0.1, kl_anchor="old"),
    **{f"aggregation_{mode}": (lambda mode=mode: ELBORatio(aggregation=mode)) for mode in AGGREGATIONS},
}
LIKELIHOODS: dict[str, Likelihood] = {
    "elbo": StratifiedCounts(num_samples=4),
    "through_first_eos": StratifiedCounts(num_samples=4, region="through_first_eos"),
    "quadrature": Quadrature(num_samples=4, nodes=2),
    "coupled": Coupled(num_samples=4),
    "coupled_full": CoupledFull(num_samples=6),
    "one_step": OneStep(num_samples=2, prompt_mask_prob=0.5),
    "block": Block(num_samples=4, block_length=3, scored="masked", clean_mask_prob=0.3),
    "trajectory": Trajectory(num_samples=4),
    "left_to_right": LeftToRight(num_samples=10),
}


def gradient(policy: Policy) -> Tensor:
    flat = torch.cat([parameter.grad.flatten() for parameter in policy.network.parameters()])
    policy.network.zero_grad()
    return flat


def take_small_step(policy: Policy) -> None:
    """Moves the parameters by 1e-3 against their gradient's direction, and clears it."""
    step = gradient(policy)
    size, offset = 1e-3 / step.norm(), 0
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter -= size * step[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()


def totals_of(completions: Completions, likelihood: Likelihood, eos_id: int) -> Totals:
    region = likelihood.region_of(completions.ids, eos_id)
    return Totals(len(region), int(region.sum()), region.shape[1])


class Setting:
    """A policy, the policy that sampled, a reference policy, and completions."""

    def __init__(self, likelihood: Likelihood | None = None, dtype: torch.dtype = torch.float64) -> None:
        self.likelihood = likelihood or StratifiedCounts(num_samples=4)
        self.policy, self.sampled_by, self.reference = (make_policy(dtype, seed=seed) for seed in (0, 1, 2))
        nearer = zip(self.policy.network.parameters(), self.sampled_by.network.parameters(), strict=True)
        with torch.no_grad():
            for current, old in nearer:
                old.copy_(current + 0.1 * (old - current))
        self.completions = make_completions(self.policy)
        self.advantages = ADVANTAGES.to(dtype)
        self.masks = Masks(self.likelihood, seed=3, step=5)
        self.extras = Extras(torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0.3, -0.1], dtype=dtype))

    def run(
        self, objective: Objective, driver: str = "auto", micro: int = 7, on_policy: bool = False,
        rows: Tensor | None = None, **options: object,
    ) -> tuple[Scores, dict[str, float], Tensor]:
        extras = self.extras if rows is None else self.extras.rows(rows)
        completions = self.completions if rows is None else self.completions.rows(rows)
        advantages = self.advantages if rows is None else self.advantages[rows]
        engine = Engine(completions, self.masks, micro)
        old = None
        if not on_policy:
            old = Old(engine.score(self.sampled_by, top_k=objective.support_size), self.sampled_by)
        reference = engine.score(self.reference) if objective.traits.uses_reference else None
        scores, metrics = engine.backward(
            self.policy, objective, advantages, totals_of(self.completions, self.likelihood, self.policy.eos_id), old=old,
            reference=reference, extras=extras, driver=driver, **options,  # type: ignore[arg-type]
        )
        return scores, metrics, gradient(self.policy)


def assert_drivers_agree(setting: Setting, objective: Objective, on_policy: bool, tolerance: float) -> None:
    retained = setting.run(objective, "retained", micro=24, on_policy=on_policy)
    norm = retained[2].norm()
    assert norm > 0
    for micro in (1, 5, 24):
        for driver in ("single_pass", "two_pass") if objective.traits.separable else ("two_pass",):
            scores, metrics, found = setting.run(objective, driver, micro, on_policy)
            assert (found - retained[2]).norm() <= tolerance * norm, (driver, micro)
            assert metrics["loss"] == pytest.approx(retained[1]["loss"], rel=100 * tolerance, abs=100 * tolerance)
            torch.testing.assert_close(scores.logps, retained[0].logps, rtol=tolerance * 10, atol=tolerance * 10)
            assert torch.equal(scores.scored, retained[0].scored)
            for name, value in retained[1].items():
                # On-policy the two passes know that nothing has moved without evaluating it.
                assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-4 if tolerance > 1e-8 else 1e-9), name


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_three_drivers_give_one_gradient(name: str, on_policy: bool) -> None:
    assert_drivers_agree(Setting(), OBJECTIVES[name](), on_policy, 1e-10)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", ["bgpo", "elbo_ratio", "ppo_token", "spg_mix", "dppo_topk_tv"])
def test_three_drivers_agree_for_every_likelihood(name: str, likelihood: str) -> None:
    assert_drivers_agree(Setting(LIKELIHOODS[likelihood]), OBJECTIVES[name](), False, 1e-10)


@pytest.mark.parametrize("name", ["bgpo", "elbo_ratio", "ppo_sequence", "spg_mix", "drpo"])
def test_drivers_agree_in_float32(name: str) -> None:
    assert_drivers_agree(Setting(dtype=torch.float32), OBJECTIVES[name](), False, 2e-5)


def test_one_sample_needs_one_pass() -> None:
    """With N = 1 every objective is a sum over sequences: `auto` takes a single pass, which is exact."""
    setting = Setting(StratifiedCounts(num_samples=1))
    calls = count_calls(setting.policy)
    for name in ("elbo_ratio", "ppo_token", "espo", "spg_mix"):
        retained = setting.run(OBJECTIVES[name](), "retained", 6)[2]
        calls.clear()
        found = setting.run(OBJECTIVES[name](), "auto", 6)[2]
        assert calls == [True]
        assert (found - retained).norm() <= 1e-10 * retained.norm()


@pytest.mark.parametrize("name", ["rpo_ref_weighted_sum", "dro_group_mean", "kto_matched", "vrpo"])
def test_losses_that_couple_sequences_see_all_of_them(name: str) -> None:
    """Also with one sample, where chunks hold a part of the batch each."""
    setting = Setting(StratifiedCounts(num_samples=1))
    expected = setting.run(OBJECTIVES[name](), "retained", 6)[2]
    found = setting.run(OBJECTIVES[name](), "auto", micro=2)[2]
    assert (found - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("trunk", ["separate", "shared"])
@pytest.mark.parametrize("likelihood", ["trajectory", "one_step"])
def test_a_critic_goes_through_the_same_engine(trunk: str, likelihood: str) -> None:
    setting = Setting(Trajectory(num_samples=4) if likelihood == "trajectory" else OneStep(region="canvas"))
    critic = ValueModel(setting.policy, trunk)
    with torch.no_grad():
        critic.head.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    parameters = [*critic.parameters(), *([] if trunk == "separate" else setting.policy.network.parameters())]
    targets = torch.linspace(-1, 1, 48, dtype=torch.float64).view(6, 8)
    gradients = []
    for driver, micro in (("retained", 24), ("auto", 5), ("two_pass", 24)):
        engine = Engine(setting.completions, setting.masks, micro, token_values)
        old = engine.score(critic)
        shifted = Old(replace(old, logps=old.logps + 0.3 * old.scored))  # values have moved beyond the clip
        _, metrics = engine.backward(critic, ValueLoss(), targets, Totals(6, 48, 8), old=shifted, driver=driver)
        assert 0 < metrics["clipped"] < 1
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for parameter in parameters:
            parameter.grad = None
    assert gradients[0].norm() > 0
    assert all((found - gradients[0]).norm() <= 1e-10 * gradients[0].norm() for found in gradients)


def count_calls(policy: Policy) -> list[bool]:
    """Whether autograd was on, for each forward pass from now on."""
    calls: list[bool] = []
    policy.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize(("name", "expected"), [("bgpo", [True]), ("elbo_ratio", [True]), ("spg_mix", [False, True])])
def test_no_pass_for_values_that_are_known(name: str, expected: list[bool]) -> None:
    """On-policy, ratios are 1 whatever the values; only a loss that reads the values themselves needs pass 1."""
    setting = Setting()
    calls = count_calls(setting.policy)
    setting.run(OBJECTIVES[name](), micro=24, on_policy=True)
    assert calls == expected
    calls.clear()
    setting.run(OBJECTIVES[name](), micro=24)
    assert calls == ([True] if name == "bgpo" else [False, True])


def test_pairs_that_score_nothing_cost_no_pass() -> None:
    setting = Setting(LeftToRight(num_samples=100, region="canvas"))  # 8 positions, so 92 of 100 draws are empty
    rows: list[int] = []
    setting.policy.network.register_forward_hook(lambda _m, _a, kw, _o: rows.append(len(kw["input_ids"])), with_kwargs=True)
    setting.run(Reinforce(), micro=50, on_policy=True)
    assert sum(rows) == 6 * 8


def test_the_difference_between_the_passes_is_reported() -> None:
    setting = Setting()
    assert setting.run(ELBORatio())[1]["engine/pass_difference"] == 0.0
    calls = count_calls(setting.policy)

    def disturb(_module: torch.nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (torch.arange(output.shape[-1]) % 7) * 1e-3 * len(calls)

    setting.policy.network.get_output_embeddings().register_forward_hook(disturb)
    assert setting.run(ELBORatio())[1]["engine/pass_difference"] > 1e-3


def test_rows_can_come_in_any_order_and_zero_advantages_can_be_left_out() -> None:
    setting = Setting()
    for name in ("bgpo", "elbo_ratio", "grpo", "aggregation_token-mean", "aggregation_seq-mean-token-mean"):
        objective = OBJECTIVES[name]()
        if objective.traits.uses_reference:
            objective.kl_coef = 0.0  # type: ignore[attr-defined]
        expected = setting.run(objective)[2]
        found = setting.run(objective, rows=torch.tensor([3, 0, 5, 1, 2]))[2]  # 4 has advantage 0
        assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_saved_bytes_do_not_grow_with_the_number_of_samples() -> None:
    policy = make_policy(torch.float32)
    completions = make_completions(policy, batch=16, length=16)
    advantages = torch.linspace(-1, 1, 16)
    totals = Totals(16, 256, 16)

    def peak(objective: Objective, samples: int, driver: str) -> int:
        engine = Engine(completions, Masks(StratifiedCounts(num_samples=samples), 3, 5), micro_samples=16)
        scores = engine.score(make_policy(torch.float32, seed=1))
        with SavedBytes() as saved:
            reference = scores if objective.traits.uses_reference else None
            extras = Extras(torch.arange(16) // 4, torch.zeros(1))
            engine.backward(policy, objective, advantages, totals, old=Old(scores), reference=reference, extras=extras,
                            driver=driver)
        policy.network.zero_grad()
        return saved.peak

    def alone(samples: int) -> int:
        masks, peaks = Masks(StratifiedCounts(num_samples=samples), 3, 5), []
        for j in range(samples):
            corruption = masks.draw(policy, completions, torch.full((16,), j))
            with SavedBytes() as saved:
                token_logps(policy, completions, corruption).sum().backward()
            peaks.append(saved.peak)
        policy.network.zero_grad()
        return max(peaks)

    for samples in (4, 16, 64):
        assert peak(BGPO(), samples, "single_pass") <= 1.02 * alone(samples)
        assert peak(SFT(), samples, "auto") <= 1.02 * alone(samples)
        for objective in (ELBORatio(), RPO(), DRO(), KTO(), VRPO()):
            assert peak(objective, samples, "auto") <= 1.02 * alone(samples)
    assert peak(ELBORatio(), 16, "retained") > 12 * alone(16), "the meter must see graphs that are kept"


def test_saved_bytes_of_a_critic_do_not_grow_with_its_states() -> None:
    policy = make_policy(torch.float32)
    completions = make_completions(policy, batch=16, length=16)
    critic = ValueModel(policy, "separate")

    def peak(states: int) -> int:
        steps = torch.arange(16).expand(16, 16) * states // 16
        masks = Masks(Trajectory(num_samples=states), 3, 5)
        engine = Engine(replace(completions, unmask_step=steps.contiguous()), masks, 16, token_values)
        with SavedBytes() as saved:
            engine.backward(critic, ValueLoss(), torch.ones(16, 16), Totals(16, 256, 16), old=Old(engine.score(critic)))
        return saved.peak

    assert peak(16) <= 1.02 * peak(2)


def test_halves_add_up_and_are_seen_in_between() -> None:
    setting = Setting()
    whole = setting.run(ELBORatio())[2]
    half: list[Tensor] = []

    def at_half() -> None:
        half.append(torch.cat([parameter.grad.flatten() for parameter in setting.policy.network.parameters()]).clone())

    for name in ("bgpo", "elbo_ratio"):
        half.clear()
        whole = setting.run(OBJECTIVES[name]())[2]
        again = setting.run(OBJECTIVES[name](), at_half=at_half)[2]
        assert (again - whole).norm() <= 1e-10 * whole.norm()
        assert len(half) == 1 and 0.05 < half[0].norm() / whole.norm() < 20
    # For a linear objective the even samples alone, at half weight, are the first half.
    scores = setting.run(Reinforce())[0]
    half.clear()
    setting.run(Reinforce(), at_half=at_half)
    loss = torch.zeros((), dtype=torch.float64)
    for j in (0, 2):
        corruption = setting.masks.draw(setting.policy, setting.completions, torch.full((6,), j))
        logps = token_logps(setting.policy, setting.completions, corruption)
        loss = loss - (ADVANTAGES * corruption.weight * logps.sum(1)).sum() / (6 * scores.logps.shape[1])
    loss.backward()
    assert (gradient(setting.policy) - half[0]).norm() <= 1e-10 * half[0].norm()


def test_scores_are_those_of_token_logps() -> None:
    setting = Setting(Coupled(num_samples=4))
    scores = Engine(setting.completions, setting.masks, micro_samples=5).score(setting.policy)
    for j in range(4):
        corruption = setting.masks.draw(setting.policy, setting.completions, torch.full((6,), j))
        with torch.no_grad():
            expected = token_logps(setting.policy, setting.completions, corruption)
        torch.testing.assert_close(scores.logps[:, j], expected, rtol=0, atol=1e-12)
        assert torch.equal(scores.weights[:, j], corruption.weight)
        hidden = (corruption.canvas == setting.policy.mask_id).double().mean(1)
        torch.testing.assert_close(scores.mask_ratio[:, j], hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_delta_is_exactly_zero_at_the_old_policy(dtype: torch.dtype) -> None:
    setting = Setting(dtype=dtype)
    engine = Engine(setting.completions, setting.masks, micro_samples=5)
    totals = Totals(6, 48, 8)
    first, _ = engine.backward(setting.policy, BGPO(), setting.advantages, totals)
    again, metrics = engine.backward(setting.policy, BGPO(), setting.advantages, totals, old=Old(first))
    assert (again.terms - first.terms).abs().max().item() == 0.0
    assert metrics["loss"] == pytest.approx(-ADVANTAGES.mean().item(), abs=1e-6)


def test_shared_masks_are_what_makes_delta_small() -> None:
    """VRPO, arXiv 2505.19223: with independent masks for the two policies the noise of the masks swamps their difference."""
    setting = Setting(StratifiedCounts(num_samples=8))

    def terms(policy: Policy, seed: int) -> Tensor:
        return Engine(setting.completions, Masks(setting.likelihood, seed, 5), 48).score(policy).terms

    shared = (terms(setting.policy, 3) - terms(setting.sampled_by, 3)).var()
    independent = (terms(setting.policy, 3) - terms(setting.sampled_by, 4)).var()
    assert independent > 4 * shared


def test_masks_of_inner_updates_differ_and_default_to_the_same() -> None:
    setting = Setting()
    draws = [Masks(setting.likelihood, 3, 5, inner).draw(setting.policy, setting.completions, torch.zeros(6).long())
             for inner in (0, 0, 1)]
    assert torch.equal(draws[0].scored, draws[1].scored)
    assert not torch.equal(draws[0].scored, draws[2].scored)


def test_an_unknown_driver_is_refused() -> None:
    with pytest.raises(ValueError, match="driver=three_pass"):
        Setting().run(BGPO(), "three_pass", on_policy=True)


COMPARING = ("rpo_ref_weighted_sum", "rpo_ref_weighted_normalised", "rpo_mc_mean", "rpo_sum", "dro_group_mean", "vrpo",
             "kto_mismatched")
"""Objectives that say nothing about a completion alone."""
SIGN: dict[str, tuple[Callable[[], Objective], Likelihood]] = {
    **{name: (make, StratifiedCounts(num_samples=16)) for name, make in OBJECTIVES.items()
       if name != "spg_zero" and name not in COMPARING},
    "diffu_grpo": (lambda: PPOClip(level="token", clip_low=0.5, clip_high=0.5), OneStep(num_samples=4)),
    "coupled_grpo": (CoupledGRPO, CoupledFull(num_samples=12)),
    "wd1": (WD1, OneStep(num_samples=4)),
    "spg": (SPG, Block(num_samples=16, block_length=4, scored="masked", clean_mask_prob=0.15)),
    "espo": (ESPO, Coupled(num_samples=16)),
    "gdpo": (lambda: ELBORatio(clip_low=0.2, clip_high=0.2), Quadrature(num_samples=15)),
    "agrpo": (PPOClip, Trajectory(num_samples=24)),
    "justgrpo": (lambda: GRPO(kl_coef=0.0), LeftToRight(num_samples=8)),
}


@pytest.mark.parametrize("name", SIGN)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_one_step_moves_the_elbo_with_the_sign_of_the_advantage(name: str, advantage: float) -> None:
    make, likelihood = SIGN[name]
    policy, sampled = make_policy(), make_completions(make_policy(), batch=1)
    steps = torch.arange(8).unsqueeze(0) // 2
    completion = Completions(**{**sampled.__dict__, "unmask_step": steps})
    measure = Engine(completion, Masks(StratifiedCounts(num_samples=64), 8, 8), micro_samples=64)
    before = measure.score(policy).terms.mean().item()
    objective, engine = make(), Engine(completion, Masks(likelihood, 3, 5), micro_samples=64)
    engine.backward(
        policy, objective, torch.tensor([advantage], dtype=torch.float64), totals_of(completion, likelihood, policy.eos_id),
        reference=engine.score(policy) if objective.traits.uses_reference else None,
    )
    take_small_step(policy)
    assert (measure.score(policy).terms.mean().item() - before) * advantage > 0


@pytest.mark.parametrize("name", [name for name in COMPARING if name not in ("rpo_ref_weighted_sum", "rpo_sum")])
def test_one_step_prefers_the_better_of_two_completions(name: str) -> None:
    change = step_on_a_pair(OBJECTIVES[name](), torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert change[0] > 0 > change[1]


@pytest.mark.parametrize("rewards", [[1.0, -1.0], [-1.0, 1.0]])
def test_the_partition_of_the_rpo_code_moves_good_and_bad_alike(rewards: list[float]) -> None:
    """Per token its targets are about one over the number of responses, far above what random weights give."""
    change = step_on_a_pair(OBJECTIVES["rpo_ref_weighted_sum"](), torch.tensor(rewards, dtype=torch.float64))
    assert change.min() > 0


def step_on_a_pair(objective: Objective, advantages: Tensor) -> Tensor:
    """The change of the ELBO of two completions of one prompt by a small step, [2]."""
    policy = make_policy()
    completions = make_completions(policy, batch=2)
    measure = Engine(completions, Masks(StratifiedCounts(num_samples=64), 8, 8), micro_samples=128)
    before = measure.score(policy).terms.mean(1)
    engine = Engine(completions, Masks(StratifiedCounts(num_samples=16), 3, 5), micro_samples=64)
    engine.backward(
        policy, objective, advantages, Totals(2, 16, 8), reference=engine.score(policy),
        extras=Extras(torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)),
    )
    take_small_step(policy)
    return measure.score(policy).terms.mean(1) - before
