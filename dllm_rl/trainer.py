"""The training loop: prompts, rollouts, rewards, advantages, gradient, step. It knows no algorithm by name."""

from __future__ import annotations

import time

from dllm_rl.checkpoint import save_checkpoint
from dllm_rl.evaluation import Evaluation, evaluate
from dllm_rl.experience import collect, pick_prompts
from dllm_rl.memory import memory_metrics
from dllm_rl.tracking import Reporter, step_line
from dllm_rl.training import Training
from dllm_rl.update import update


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
