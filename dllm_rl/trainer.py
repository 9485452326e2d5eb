"""The training loop: experience, advantages, gradient, step. It knows no algorithm by name, nor where completions come
from."""

from __future__ import annotations

import time

from dllm_rl.assess import assess
from dllm_rl.checkpoint import save_checkpoint
from dllm_rl.evaluation import Evaluation, evaluate
from dllm_rl.memory import memory_metrics
from dllm_rl.tracking import Reporter, step_line
from dllm_rl.training import Training
from dllm_rl.update import update


def train(run: Training) -> None:
    """Runs from step `run.done` to the end. One iteration is one batch of completions."""
    config = run.config
    if run.done == 0 and config.eval_every:
        _evaluate(run, 0)
    with Reporter(config.steps, run.done) as report:
        for step in range(run.done + 1, config.steps + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            gathered = run.source.experience(step)
            gathered_at = time.perf_counter()
            experience, appraisal, assessed = assess(run, gathered)
            learned = update(run, experience, appraisal)
            metrics = {
                "step": step, **experience.metrics(), **assessed, **learned, "time/rollout": gathered_at - start,
                "time/update": time.perf_counter() - gathered_at, "time/cpu": time.process_time() - cpu_start,
                **memory_metrics(),
            }
            run.folder.log("metrics.jsonl", [metrics])
            run.folder.log("rollouts.jsonl", experience.records(step))
            report.line(step_line(metrics, config.steps))
            report.advance()
            if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                report.line(_evaluate(run, step).line(step))
            if step % config.save_every == 0 or step == config.steps:
                critic = run.critic.model if run.critic else None
                save_checkpoint(run.folder.path, step, run.policy, run.state_dict(), config.keep, critic)
    run.folder.plot()


def _evaluate(run: Training, step: int) -> Evaluation:
    result = evaluate(run.policy, run.task, run.sampler, run.evaluation, seed=run.seed)
    run.folder.log("evaluations.jsonl", [result.record(step)])
    return result
