"""All optimizer steps on one batch of experience: which passes are needed, and in which order."""

from __future__ import annotations

from torch import Tensor

from dllm_rl.accumulate import Engine
from dllm_rl.diagnostics import cosine, diagnostics
from dllm_rl.experience import Experience
from dllm_rl.memory import SavedBytes
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.scoring import Masks, Old, Scores
from dllm_rl.training import Training


def update(run: Training, experience: Experience, step: int) -> dict[str, float]:
    """Takes `trainer.inner_updates` steps; returns the figures of the last one.

    Completions without an advantage have no gradient and cost no forward pass, unless a KL term acts on them too.
    """
    config, objective, policy = run.config, run.objective, run.policy
    advantages = objective.prepare(experience.advantages, experience.valid.to(policy.device), experience.group_size)
    learnable = (advantages != 0) | objective.uses_reference
    if not learnable.any():
        return {"update/sequences": 0}
    region = run.likelihood.region_of(experience.completions.ids, policy.eos_id)
    totals = Totals(sequences=len(region), tokens=int(region.sum()), canvas=region.shape[1])
    completions, advantages = experience.completions.rows(learnable), advantages[learnable]

    several = config.inner_updates > 1
    rounds = range(config.inner_updates if config.resample_masks else 1)
    engines = [Engine(completions, Masks(run.likelihood, run.seed, step, inner), config.micro_samples) for inner in rounds]
    # What the policy that sampled says of masks that only later updates use, before the weights move. On the first
    # update's masks its values are those of that update itself.
    later = engines[1:] if objective.uses_old else []
    old: dict[int, Scores] = {1 + n: engine.score(policy, top_k=objective.support_size) for n, engine in enumerate(later)}
    reference = [engine.score(run.reference) for engine in engines] if run.reference else None
    exact = several and (objective.measured_divergence or "").startswith("exact")
    sampled_by = policy.frozen_copy() if exact else None

    metrics: dict[str, float] = {}
    for inner in range(config.inner_updates):
        number = inner if config.resample_masks else 0
        before = old.get(number) if inner else None
        halves = _Halves(run)
        with SavedBytes() as saved:
            scores, losses = engines[number].backward(
                policy, objective, advantages, totals, old=Old(before, sampled_by) if before else None,
                reference=reference[number] if reference else None, keep_top_k=several and not config.resample_masks,
                run_backward=run.accelerator.backward, at_half=halves.take if config.gradient_cosine else None,
            )
        known = before or (scores if not inner else None)
        if not config.resample_masks:
            old.setdefault(0, scores)
        metrics = losses | diagnostics(scores, known, advantages, objective.binary_divergence) | halves.metrics()
        metrics |= {"grad/norm": run.optimizer.step(), "memory/saved_bytes": saved.peak}
    return {"update/sequences": len(completions), **metrics}


class _Halves:
    """The gradient when half of the samples have been differentiated, to compare the two halves."""

    def __init__(self, run: Training) -> None:
        self._parameters = run.optimizer.parameters
        self._first: list[Tensor] = []

    def take(self) -> None:
        self._first = [parameter.grad.clone() for parameter in self._parameters if parameter.grad is not None]

    def metrics(self) -> dict[str, float]:
        total = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return {"grad/cosine": cosine(self._first, total)} if self._first else {}
