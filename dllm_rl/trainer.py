"""The training loop: prompts, rollouts, rewards, advantages, gradient, step. It knows no algorithm by name."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from accelerate import Accelerator

from dllm_rl.advantages import AdvantageConfig
from dllm_rl.checkpoint import save_checkpoint
from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.errors import check
from dllm_rl.evaluation import Evaluation, EvaluationConfig, evaluate
from dllm_rl.experience import collect, pick_prompts
from dllm_rl.memory import memory_metrics
from dllm_rl.models.policy import Policy
from dllm_rl.objectives.base import Objective
from dllm_rl.optimization import Optimizer
from dllm_rl.task import Task
from dllm_rl.tracking import Reporter, RunFolder, step_line
from dllm_rl.update import update


@dataclass
class TrainerConfig:
    """The size and rhythm of a run. A step is one rollout batch."""

    steps: int = 60
    prompts_per_step: int = 16
    group_size: int = 8
    """G: completions per prompt, compared with each other."""
    inner_updates: int = 1
    """Optimizer steps per rollout batch. 1 is on-policy."""
    resample_masks: bool = False
    """false: all inner updates use the same masks, so the first one finds the old values of the later ones. true: new masks
    for each, whose old values take a pass of their own (diffu-GRPO and its descendants)."""
    micro_samples: int = 128
    """Pairs of sequence and corruption per forward pass: memory against speed; the gradient is the same."""
    eval_every: int = 20
    """Steps between evaluations; 0: none."""
    save_every: int = 20
    """Steps between checkpoints, of which the newest `keep` stay; the last step is always saved."""
    keep: int = 2
    gradient_cosine: bool = False
    """Also log the cosine between the gradients of the even and of the odd Monte Carlo samples."""

    def __post_init__(self) -> None:
        least = {"group_size": 2, "eval_every": 0, "resample_masks": 0, "gradient_cosine": 0}
        for name, value in asdict(self).items():
            check(value >= least.get(name, 1), f"trainer.{name}", value, f"an integer >= {least.get(name, 1)}")


@dataclass
class Training:
    """Everything a run consists of: the five choices, their settings, and how far it has come."""

    policy: Policy
    task: Task
    sampler: LowConfidence
    likelihood: Likelihood
    objective: Objective
    advantage: AdvantageConfig
    optimizer: Optimizer
    config: TrainerConfig
    evaluation: EvaluationConfig
    accelerator: Accelerator
    folder: RunFolder
    seed: int
    done: int = 0
    reference: Policy | None = None
    """What KL terms pull towards; None for objectives without one."""


def train(run: Training) -> None:
    """Runs from step `run.done` to the end. One iteration is one rollout batch."""
    config, prompts = run.config, run.task.prompts("train")
    if run.done == 0 and config.eval_every:
        _evaluate(run, 0)
    with Reporter(config.steps, run.done) as report:
        for step in range(run.done + 1, config.steps + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            chosen = pick_prompts(prompts, config.prompts_per_step, seed=run.seed, step=step - 1)
            experience = collect(
                run.policy, run.task, run.sampler, chosen, config.group_size, run.advantage, seed=run.seed, step=step
            )
            rollout_end = time.perf_counter()
            learned = update(run, experience, step)
            metrics = {
                "step": step, **experience.metrics(), **learned, "time/rollout": rollout_end - start,
                "time/update": time.perf_counter() - rollout_end, "time/cpu": time.process_time() - cpu_start,
                **memory_metrics(),
            }
            run.folder.log("metrics.jsonl", [metrics])
            run.folder.log("rollouts.jsonl", experience.records(step))
            report.line(step_line(metrics, config.steps))
            report.advance()
            if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                report.line(_evaluate(run, step).line(step))
            if step % config.save_every == 0 or step == config.steps:
                save_checkpoint(run.folder.path, step, run.policy, run.optimizer.state_dict(), config.keep)
    run.folder.plot()


def _evaluate(run: Training, step: int) -> Evaluation:
    result = evaluate(run.policy, run.task, run.sampler, run.evaluation, seed=run.seed)
    run.folder.log("evaluations.jsonl", [result.record(step)])
    return result
