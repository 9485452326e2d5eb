"""The whole loop on a tiny task: it learns, resumes bit for bit, and does no work that it can avoid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from dllm_rl.advantages import AdvantageConfig
from dllm_rl.assess import assess
from dllm_rl.checkpoint import load_state
from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.errors import UserError
from dllm_rl.evaluation import EvaluationConfig
from dllm_rl.experience import Failures, RolloutSource, collect, pick
from dllm_rl.models.policy import Policy, load_policy
from dllm_rl.models.tiny import TinyModel
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.objectives.dppo import DPPO
from dllm_rl.objectives.ppo_clip import GRPO
from dllm_rl.objectives.reinforce import Reinforce
from dllm_rl.optimization import Optimizer, OptimizerConfig
from dllm_rl.run_folder import latest_checkpoint
from dllm_rl.supervised import FineTuning, SupervisedConfig, finetune
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task
from dllm_rl.tracking import RunFolder
from dllm_rl.trainer import train
from dllm_rl.training import TrainerConfig, Training
from dllm_rl.update import update


@dataclass
class Letters(Task):
    """Write four tokens; the reward is the share of small letters."""

    completion_length: int = 4
    constant: float | None = None
    infra_every: int = 0

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(f"{split}/{index}", "q" * (1 + index % 3)) for index in range(8)]

    def score(self, prompt: Prompt, completion: str) -> Reward:
        del prompt
        value = sum("a" <= sign <= "z" for sign in completion) / 4 if self.constant is None else self.constant
        return Reward(value, "correct" if value == 1 else "wrong")

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        rewards = super().score_batch(prompts, completions)
        if self.infra_every:
            rewards[:: self.infra_every] = [Reward(0.0, "infra_error")] * len(rewards[:: self.infra_every])
        return rewards

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        return [Demonstration("qq", "abcd"[(seed + index) % 4] * 4) for index in range(count)]


def tiny() -> Policy:
    return TinyModel(hidden_size=16, num_layers=2, num_heads=2).build([], seed=0)


def training(folder: Path, steps: int, *, policy: Policy | None = None, task: Task | None = None, **config: int) -> Training:
    policy = policy or tiny()
    settings = {"prompts_per_step": 4, "group_size": 8, "save_every": 2, "eval_every": 0, "keep": 10, **config}
    trainer = TrainerConfig(steps=steps, **settings)
    total = steps * trainer.inner_updates
    optimizer = Optimizer(OptimizerConfig(lr=3e-3, warmup_steps=2), policy.network.parameters(), total)
    task = task or Letters()
    source = RolloutSource(
        policy, task, task.prompts("train"), task, LowConfidence(), trainer.prompts_per_step, trainer.group_size, seed=0,
        failures=Failures(1.0),
    )
    return Training(
        policy=policy, task=task, source=source, sampler=LowConfidence(), likelihood=StratifiedCounts(num_samples=2),
        objective=BGPO(), advantage=AdvantageConfig(), optimizer=optimizer, config=trainer,
        evaluation=EvaluationConfig(num_prompts=4), accelerator=Accelerator(),
        folder=RunFolder.open(folder, {"seed": 0}, from_step=0), seed=0,
    )


def weights(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.network.parameters()]


def without_clock(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]


def test_reward_rises(tmp_path: Path) -> None:
    run = training(tmp_path, 50, eval_every=50)
    train(run)
    rewards = [row["reward/mean"] for row in run.folder.read("metrics.jsonl")]
    # Small letters are 26 of 360 tokens, so a random policy earns about 0.07.
    assert sum(rewards[:3]) / 3 < 0.15 and sum(rewards[-3:]) / 3 > 0.3
    assert [row["step"] for row in run.folder.read("evaluations.jsonl")] == [0, 50]
    assert (tmp_path / "plots" / "reward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("inner_updates", [1, 3])
def test_resume_continues_bit_for_bit(tmp_path: Path, inner_updates: int) -> None:
    whole = training(tmp_path / "whole", 6, inner_updates=inner_updates)
    train(whole)

    # Killed during step 6, after the checkpoint of step 4 and with half a line written.
    first = training(tmp_path / "cut", 6, inner_updates=inner_updates)
    first.config.steps = 5
    first.config.save_every = 4
    train(first)
    for leftover in (tmp_path / "cut" / "checkpoints").glob("step-000005"):
        (leftover / "manifest.json").unlink()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "rew')

    checkpoint = latest_checkpoint(tmp_path / "cut")
    assert checkpoint is not None and checkpoint.name == "step-000004"
    second = training(tmp_path / "unused", 6, policy=load_policy(str(checkpoint)), inner_updates=inner_updates)
    state = load_state(checkpoint)
    second.optimizer.load_state_dict(state)
    second.done = state["step"]
    second.folder = RunFolder.open(tmp_path / "cut", {"seed": 0}, from_step=4)
    train(second)

    assert all(torch.equal(a, b) for a, b in zip(weights(whole.policy), weights(second.policy), strict=True))
    assert without_clock(second.folder.read("metrics.jsonl")) == without_clock(whole.folder.read("metrics.jsonl"))
    assert second.folder.read("rollouts.jsonl") == whole.folder.read("rollouts.jsonl")


def test_off_policy_updates_move_away_from_the_old_policy(tmp_path: Path) -> None:
    run = training(tmp_path, 20, inner_updates=3)
    train(run)
    moved = [row["delta/max_abs"] for row in run.folder.read("metrics.jsonl") if "delta/max_abs" in row]
    assert moved and min(moved) > 0


def test_on_policy_delta_is_exactly_zero(tmp_path: Path) -> None:
    run = training(tmp_path, 20)
    train(run)
    assert {row["delta/max_abs"] for row in run.folder.read("metrics.jsonl") if "delta/max_abs" in row} == {0.0}


def test_inner_updates_reuse_the_masks_unless_told_otherwise(tmp_path: Path) -> None:
    """Reused masks need no pass for old values; new masks need one each, made before the weights move."""
    for resample, expected in ((0, [True] * 3), (1, [False] * 2 + [True] * 3)):
        run = training(tmp_path / str(resample), 1, inner_updates=3, resample_masks=resample, micro_samples=1000)
        calls: list[bool] = []
        sampling = 2  # four tokens, two per step
        run.policy.network.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        train(run)
        assert calls[:sampling] == [False] * sampling
        assert calls[sampling:] == expected
        assert run.folder.read("metrics.jsonl")[0]["delta/max_abs"] > 0


def test_a_kl_term_acts_without_advantages_and_pulls_back(tmp_path: Path) -> None:
    """Every reward is equal, so only the KL term has a gradient; far from the reference it brings the policy nearer."""
    run = training(tmp_path, 30, task=Letters(constant=1.0))
    run.objective = GRPO(kl_coef=1.0, kl_estimator="k2")
    run.reference = TinyModel(hidden_size=16, num_layers=2, num_heads=2).build([], seed=1).frozen_copy()
    before = weights(run.reference)
    train(run)
    distances = [row["kl/mean"] for row in run.folder.read("metrics.jsonl")]
    assert sum(distances[-3:]) < 0.7 * sum(distances[:3])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run.reference), strict=True))
    assert run.folder.read("metrics.jsonl")[0]["update/sequences"] == 32


def test_exact_divergences_are_measured_from_the_policy_that_sampled(tmp_path: Path) -> None:
    run = training(tmp_path, 8, inner_updates=2)
    run.objective = DPPO(divergence="exact_tv", delta_low=1e-4, delta_high=1e-4)
    train(run)
    rows = [row for row in run.folder.read("metrics.jsonl") if "loss" in row]
    assert rows and all(row["divergence/mean"] > 0 for row in rows[1:])  # the warm-up starts at 0
    assert any(row["objective/clipped"] > 0 for row in rows)


def test_an_objective_that_reads_no_old_values_pays_no_pass_for_them(tmp_path: Path) -> None:
    run = training(tmp_path, 1, inner_updates=3, resample_masks=True)
    run.objective = Reinforce()
    passes = count_passes(run.policy)
    experience = assess(run, run.source.experience(1)).experience
    passes.clear()
    metrics = update(run, experience)
    # 3 updates x 2 samples, one chunk each; nothing is known of the old policy, so no δ is claimed.
    assert len(passes) == 3 * -(-2 * int(metrics["update/sequences"]) // run.config.micro_samples)
    assert "delta/max_abs" not in metrics and "elbo/mean" in metrics


def count_passes(policy: Policy) -> list[int]:
    """Grows by the number of rows of every forward pass."""
    passes: list[int] = []
    policy.network.register_forward_pre_hook(lambda *call: passes.append(len(call[2]["input_ids"])), with_kwargs=True)
    return passes


def test_the_gradient_cosine_is_logged_on_request(tmp_path: Path) -> None:
    run = training(tmp_path, 6, gradient_cosine=1)
    train(run)
    cosines = [row["grad/cosine"] for row in run.folder.read("metrics.jsonl") if "loss" in row]
    assert cosines and all(-1 <= value <= 1 for value in cosines)


def test_equal_rewards_cost_no_update(tmp_path: Path) -> None:
    run = training(tmp_path, 2, task=Letters(constant=1.0))
    before = weights(run.policy)
    train(run)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run.policy), strict=True))
    assert [row["update/sequences"] for row in run.folder.read("metrics.jsonl")] == [0, 0]


def test_micro_samples_do_not_change_the_run(tmp_path: Path) -> None:
    runs = [training(tmp_path / str(size), 12, micro_samples=size) for size in (5, 64)]
    for run in runs:
        train(run)
    for a, b in zip(*(weights(run.policy) for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # float32 sums in another order, twelve Adam steps


def test_rollouts_file_has_every_completion(tmp_path: Path) -> None:
    run = training(tmp_path, 2)
    train(run)
    rows = run.folder.read("rollouts.jsonl")
    assert len(rows) == 2 * 4 * 8
    assert all(sorted(row["unmask_step"]) == [0, 0, 1, 1] for row in rows)


def test_infra_errors_leave_their_group(tmp_path: Path) -> None:
    run = training(tmp_path, 1, task=Letters(infra_every=4))
    experience = assess(run, run.source.experience(1)).experience
    assert experience.metrics()["reward/infra_error"] == 8
    assert not experience.advantages[::4].any() and experience.advantages[1::4].any()


def test_groups_without_a_signal_are_counted(tmp_path: Path) -> None:
    run = training(tmp_path, 1)
    experience = run.source.experience(1)
    rewards = torch.zeros_like(experience.rewards)
    rewards[8:16:2] = 1.0  # one of the four groups of eight has rewards that differ
    assert assess(run, replace(experience, rewards=rewards)).metrics["reward/zero_advantage_groups"] == 3


def test_a_failing_grader_stops_the_run(tmp_path: Path) -> None:
    run = training(tmp_path, 1, task=Letters(infra_every=4))
    run.source = replace(run.source, failures=Failures(0.2))
    with pytest.raises(UserError, match="failed on 8 of the last 32"):
        train(run)


def test_experience_metrics_by_hand() -> None:
    task = Letters()
    base = collect(tiny(), task, task, LowConfidence(), task.prompts("train")[:2], 2, seed=0, step=1)
    experience = replace(
        base, texts=["x", "x", "y", "z"], rewards=torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64),
        valid=torch.tensor([True, True, True, False]), advantages=torch.tensor([1.0, -1, 0, 0]),
    )
    metrics = experience.metrics()
    assert metrics["reward/mean"] == 0.5
    assert metrics["rollout/unique"] == 3


def test_prompts_come_in_passes_over_the_whole_set() -> None:
    prompts = Letters().prompts("train")
    steps = [[prompt.id for prompt in pick(prompts, 3, seed=1, step=step)] for step in range(8)]
    order = [name for step in steps for name in step]
    for epoch in range(3):
        assert sorted(order[8 * epoch : 8 * epoch + 8]) == sorted(prompt.id for prompt in prompts)
    assert order[:8] != order[8:16]


def test_fine_tuning_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, policy: Policy, done: int = 0) -> FineTuning:
        config = SupervisedConfig(steps=40, batch_size=8, log_every=10, save_every=20, keep=5)
        optimizer = Optimizer(OptimizerConfig(lr=1e-2, schedule="cosine"), policy.network.parameters(), 40)
        opened = RunFolder.open(tmp_path / folder, {}, from_step=done)
        return FineTuning(policy, Letters(), optimizer, config, Accelerator(), opened, seed=0, done=done)

    whole = run("whole", tiny())
    finetune(whole)
    losses = [row["loss"] for row in whole.folder.read("metrics.jsonl")]
    assert losses[-1] < losses[0] / 2

    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000020"
    second = run("again", load_policy(str(checkpoint)), done=20)
    second.optimizer.load_state_dict(load_state(checkpoint))
    finetune(second)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.policy), weights(second.policy), strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer(OptimizerConfig(), [parameter], 10)
    for _ in range(2):
        parameter.grad = torch.tensor([1.0, float("nan")])
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(2))
    parameter.grad = torch.tensor([float("inf"), 0.0])
    with pytest.raises(FloatingPointError, match="three gradients in a row"):
        optimizer.step()
