"""Ratios to what the sampler recorded: the same as before with an exact sampler, honest with an approximate one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_rl.assess import assess
from dllm_rl.diffusion.estimators import StratifiedCounts, Trajectory
from dllm_rl.diffusion.reading import CacheConfig
from dllm_rl.diffusion.sampler import LowConfidence, Parallel, Sampler
from dllm_rl.experience import Experience, RolloutSource
from dllm_rl.models.policy import Policy
from dllm_rl.models.tiny import TinyModel
from dllm_rl.objectives.base import LossInputs, LossOutput, Objective
from dllm_rl.objectives.dppo import DPPO
from dllm_rl.objectives.ppo_clip import PPOClip
from dllm_rl.objectives.reinforce import Reinforce
from dllm_rl.trainer import train
from dllm_rl.training import Training
from dllm_rl.update import update
from tests.test_trainer import Letters, count_passes, training

LENGTH = 8


@dataclass
class Watched(PPOClip):
    """Keeps what it is given."""

    seen: list[LossInputs] = field(default_factory=list)

    def loss(self, inputs: LossInputs) -> LossOutput:
        self.seen.append(inputs)
        return super().loss(inputs)


def float64_policy() -> Policy:
    policy = TinyModel(hidden_size=16, num_layers=2, num_heads=2).build([], seed=0)
    policy.network.to(torch.float64)
    with torch.no_grad():
        policy.network.get_output_embeddings().weight *= 4
    return policy


def prepared(folder: Path, sampler: Sampler, objective: Objective, samples: int = LENGTH, **config: Any) -> tuple[
        Training, Experience]:
    """A run on letters with a trajectory likelihood, and its first experience."""
    run = training(folder, 1, policy=float64_policy(), task=Letters(completion_length=LENGTH), micro_samples=5, **config)
    assert isinstance(run.source, RolloutSource)
    run.source = replace(run.source, sampler=sampler)
    run.likelihood, run.objective = Trajectory(num_samples=samples), objective
    return run, assess(run, run.source.experience(1)).experience


def gradient(run: Training, experience: Experience) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Of the first inner update, which leaves the parameters as they are."""
    found: list[torch.Tensor] = []

    def stop() -> float:
        found.extend(p.grad.clone() for p in run.optimizer.parameters if p.grad is not None)
        run.policy.network.zero_grad()
        return 0.0

    run.optimizer.step = stop  # type: ignore[method-assign]
    return found, update(run, experience)


@pytest.mark.parametrize("objective", [PPOClip(), PPOClip(level="sequence"), DPPO(), DPPO(divergence="binary_kl")], ids=str)
@pytest.mark.parametrize("samples", [LENGTH, 3])
def test_an_exact_sampler_gives_ratio_one_and_the_same_gradient(
    tmp_path: Path, objective: Objective, samples: int
) -> None:
    """Parallel decoding without a cache too: its tokens are drawn from the network's own distribution."""
    for number, sampler in enumerate((LowConfidence(block_length=4), Parallel(threshold=0.3, block_length=4))):
        found = []
        for record in (False, True):
            run, experience = prepared(
                tmp_path / f"{number}{record}", replace(sampler, record_logps=record), objective, samples)
            assert (experience.completions.behaviour_logps is not None) == record
            found.append(gradient(run, experience))
        (plain, before), (recorded, metrics) = found
        assert "sampler/behaviour_gap" not in before and metrics["sampler/behaviour_gap"] < 1e-12
        assert metrics["delta/max_abs"] < 1e-10 and metrics["objective/clipped"] == 0
        assert plain and any(one.abs().max() > 1e-4 for one in plain)
        for one, other in zip(plain, recorded, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"inner_updates": 2}, {"inner_updates": 2, "resample_masks": True}], ids=str)
@pytest.mark.parametrize("sampler", [
    LowConfidence(block_length=4, cache=CacheConfig("dual"), record_logps=True),
    LowConfidence(block_length=4, dtype="bfloat16", record_logps=True),
], ids=["dual cache", "half precision"])
def test_ratios_are_to_what_an_approximate_sampler_met(
    tmp_path: Path, sampler: Sampler, settings: dict[str, Any]
) -> None:
    """The first update's ratio is exp(log p - behaviour), both by hand; later ones have the same denominator."""
    objective = Watched(level="sample_token")
    run, experience = prepared(tmp_path, sampler, objective, **settings)
    frozen = run.policy.frozen_copy()
    passes = count_passes(run.policy)
    metrics = update(run, experience)
    completions = experience.completions.rows(experience.advantages != 0)
    behaviour = completions.behaviour_logps
    assert behaviour is not None and len(completions) == metrics["update/sequences"]
    per_update = -(-len(completions) * LENGTH // run.config.micro_samples)
    assert len(passes) <= per_update * run.config.inner_updates, "no pass for old values"

    logps = torch.zeros_like(behaviour)
    for row, order in enumerate(completions.unmask_step):
        prompts = completions.prompts.rows(slice(row, row + 1))
        for now in range(int(order.max()) + 1):
            state = torch.where((order >= now) | (order < 0), run.policy.mask_id, completions.ids[row])
            here = order == now
            with torch.no_grad():
                law = frozen.logits(prompts, state[None], here[None]).log_softmax(-1)
            logps[row, here] = law.gather(-1, completions.ids[row, here, None]).squeeze(-1)
    written = completions.unmask_step >= 0
    gap = (logps - behaviour)[written].abs()
    assert gap.max() > 1e-4, "the sampler is not exact"
    assert metrics["sampler/behaviour_gap"] == pytest.approx(gap.mean().item(), rel=1e-9)

    first = objective.seen[:per_update]
    pairs = torch.cartesian_prod(torch.arange(LENGTH), torch.arange(len(completions)))  # samples, then rows
    at = 0
    for inputs in first:
        for index in range(len(inputs.logps)):
            row, scored = pairs[at, 1], inputs.scored[index, 0]
            at += 1
            expected = (logps - behaviour)[row][scored].exp()
            ratio = (inputs.logps.detach() - inputs.old_logps)[index, 0][scored].exp()
            torch.testing.assert_close(ratio, expected, rtol=1e-9, atol=1e-12)
    for inputs in objective.seen[per_update:]:
        distances = (inputs.old_logps[inputs.scored].unsqueeze(1) - behaviour[written]).abs()
        assert (distances.amin(1) < 1e-12).all()


def test_nothing_else_uses_recorded_values(tmp_path: Path) -> None:
    """Another likelihood, several steps at once, an objective without ratios, a divergence of whole distributions."""
    sampler = LowConfidence(block_length=4, cache=CacheConfig("dual"), record_logps=True)
    for number, (likelihood, objective) in enumerate((
        (StratifiedCounts(num_samples=2), PPOClip()), (Trajectory(num_samples=8, steps_per_slice=2), PPOClip()),
        (Trajectory(num_samples=8), Reinforce()), (Trajectory(num_samples=8), DPPO(divergence="topk_tv")),
    )):
        run, experience = prepared(tmp_path / str(number), sampler, objective)
        run.likelihood = likelihood
        metrics = update(run, experience)
        assert "sampler/behaviour_gap" not in metrics and metrics.get("delta/max_abs", 0.0) == 0.0


def test_a_run_writes_them_down(tmp_path: Path) -> None:
    run, _ = prepared(tmp_path, LowConfidence(block_length=4, cache=CacheConfig("dual"), record_logps=True), PPOClip())
    train(run)
    rows = run.folder.read("rollouts.jsonl")
    (metrics,) = run.folder.read("metrics.jsonl")
    assert metrics["sampler/behaviour_gap"] > 0
    assert all(len(row["behaviour_logps"]) == LENGTH and max(row["behaviour_logps"]) <= 0 for row in rows)
    found = run.source.experience(1).completions.behaviour_logps
    assert found is not None and rows[3]["behaviour_logps"] == pytest.approx(found[3].tolist(), abs=1e-6)
