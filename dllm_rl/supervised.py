"""Supervised fine-tuning on a task's demonstrations: the start policy of reinforcement learning.

The loss is the negative ELBO per token, one corruption per demonstration: k uniform on 1..L tokens masked, weight 1/k
(LLaDA, arXiv 2502.09992, eq. 5). EOS fills the canvas after the text and is learned like any token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from dllm_rl.checkpoint import save_checkpoint
from dllm_rl.diffusion.estimators import elbo_of
from dllm_rl.diffusion.likelihood import elbo_terms, token_logps
from dllm_rl.errors import check
from dllm_rl.models.policy import Policy
from dllm_rl.optimization import Optimizer
from dllm_rl.task import Demonstration, Task, normalised
from dllm_rl.tracking import Reporter, RunFolder
from dllm_rl.types import Completions


@dataclass
class SupervisedConfig:
    """The size and rhythm of a fine-tuning run."""

    steps: int = 800
    batch_size: int = 64
    log_every: int = 50
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 1
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            check(getattr(self, name) >= 1, f"supervised.{name}", getattr(self, name), "an integer >= 1")


@dataclass
class FineTuning:
    """Everything a fine-tuning run consists of, and how far it has come."""

    policy: Policy
    task: Task
    optimizer: Optimizer
    config: SupervisedConfig
    accelerator: Accelerator
    folder: RunFolder
    seed: int
    done: int = 0
    leaked: frozenset[str] = frozenset()
    """Normalised prompts that are left out, because they are test prompts."""


def finetune(run: FineTuning) -> None:
    """Runs from step `run.done` to the end."""
    config, start = run.config, time.perf_counter()
    with Reporter(config.steps, run.done) as report:
        for step in range(run.done + 1, config.steps + 1):
            loss = demonstration_loss(run.policy, demonstration_batch(run, step), seed=run.seed, step=step)
            run.accelerator.backward(loss)
            norm = run.optimizer.step()
            if step % config.log_every == 0 or step == config.steps:
                metrics = {"step": step, "loss": loss.item(), "grad/norm": norm, "time/total": time.perf_counter() - start}
                run.folder.log("metrics.jsonl", [metrics])
                report.line(f"step {step:>5}/{config.steps}  loss {loss.item():.3f}  grad {norm:.2f}")
            report.advance()
            if step % config.save_every == 0 or step == config.steps:
                save_checkpoint(run.folder.path, step, run.policy, run.optimizer.state_dict(), config.keep)


def demonstration_batch(run: FineTuning, step: int) -> Completions:
    """The demonstrations of a step: fresh ones every step, a pure function of (seed, step)."""
    size, length = run.config.batch_size, run.task.completion_length
    demonstrations = allowed_demonstrations(run.task, size, step_seed(run.seed, step), run.leaked)
    prompts = run.policy.encode_prompts([item.prompt for item in demonstrations], torch.arange(size))
    ids = run.policy.encode_completions([item.completion for item in demonstrations], length)
    return Completions(prompts.ids, prompts.mask, prompts.sample_ids, ids, torch.zeros_like(ids))


def step_seed(seed: int, step: int) -> int:
    """The seed of a step. Those of different runs and steps must not meet: a run has fewer than 2^32 steps."""
    return (seed << 32) + step


def allowed_demonstrations(task: Task, count: int, seed: int, leaked: frozenset[str]) -> list[Demonstration]:
    """`count` demonstrations whose prompts are not in `leaked`; twice as many are drawn until enough are left."""
    drawn, kept = count, task.demonstrations(count, seed)
    while leaked:
        kept = [item for item in task.demonstrations(drawn, seed) if normalised(item.prompt) not in leaked]
        if len(kept) >= count:
            break
        drawn *= 2
    return kept[:count]


def demonstration_loss(policy: Policy, completions: Completions, *, seed: int, step: int) -> torch.Tensor:
    """Minus the ELBO per canvas token, in nats, averaged over the batch: a scalar."""
    corruptions = elbo_of(policy.rules.block_length, 1, length_norm="canvas")
    sample = torch.zeros_like(completions.sample_ids)
    corruption = corruptions.draw(
        completions, sample, seed=seed, step=step, mask_id=policy.mask_id, eos_id=policy.eos_id
    )
    logps = token_logps(policy, completions, corruption)
    return -elbo_terms(logps, corruption.weight).mean()
