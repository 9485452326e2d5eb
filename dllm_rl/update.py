"""All optimizer steps on one batch of experience: which passes are needed, and in which order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dllm_rl.accumulate import Engine
from dllm_rl.critic import Appraisal
from dllm_rl.diagnostics import cosine, diagnostics
from dllm_rl.experience import Experience
from dllm_rl.memory import SavedBytes
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.objectives.base import Extras
from dllm_rl.objectives.log_ratio import LogRatio
from dllm_rl.scoring import Masks, Old, Scores
from dllm_rl.training import Training


def update(run: Training, experience: Experience, appraisal: Appraisal | None = None) -> dict[str, float]:
    """Takes `trainer.inner_updates` steps; returns the figures of the last one.

    Completions without an advantage have no gradient and cost no forward pass, unless a reference acts on them too.
    """
    config, objective, policy, traits = run.config, run.objective, run.policy, run.objective.traits
    advantages = objective.prepare(experience.advantages, experience.valid, experience.groups)
    learnable = learns_from(run, advantages, experience.valid)
    if not learnable.any():
        return {"update/sequences": 0}
    counted = learnable if traits.selects else torch.ones_like(learnable)
    region = run.likelihood.region_of(experience.completions.ids, policy.eos_id)
    totals = Totals(sequences=int(counted.sum()), tokens=int(region[counted].sum()), canvas=region.shape[1])
    completions = experience.completions.rows(learnable)
    advantages, groups = advantages[learnable], experience.groups[learnable]

    several, resampled = config.inner_updates > 1, config.resample_masks
    engines = [
        Engine(completions, Masks(run.likelihood, run.seed, experience.mask_step, inner), config.micro_samples)
        for inner in range(config.inner_updates if resampled else 1)
    ]
    # What the policy that sampled says of masks that only later updates use, before the weights move. On the first
    # update's masks its values are those of that update itself.
    later = engines[1:] if traits.uses_old else []
    old: dict[int, Scores] = {1 + n: engine.score(policy, top_k=objective.support_size) for n, engine in enumerate(later)}
    reference = [engine.score(run.reference) for engine in engines] if run.reference and traits.uses_reference else []
    exact = several and (objective.measured_divergence or "").startswith("exact")
    sampled_by = policy.frozen_copy() if exact else None

    metrics: dict[str, float] = {}
    for inner in range(config.inner_updates):
        number = inner if resampled else 0
        before = old.get(number) if inner else None
        halves = _Halves(run)
        extras = Extras(groups, mismatched(run, engines[number], groups))
        with SavedBytes() as saved:
            scores, losses = engines[number].backward(
                policy, objective, advantages, totals, old=Old(before, sampled_by) if before else None,
                reference=reference[number] if reference else None, extras=extras,
                keep_top_k=several and not resampled, run_backward=run.accelerator.backward,
                at_half=halves.take if config.gradient_cosine else None,
            )
            figures = halves.metrics()
            if run.critic and appraisal:
                targets = appraisal.returns
                if traits.needs_critic:
                    targets = objective.value_targets(targets, scores.terms - reference[number].terms, scores.region.sum(1))
                figures |= run.critic.learn(appraisal, targets)
        if not resampled:
            old.setdefault(0, scores)
        known = None if traits.reads_rewards else before or (None if inner else scores)
        metrics = losses | figures | diagnostics(scores, known, advantages, objective.binary_divergence)
        metrics |= {"grad/norm": run.optimizer.step(), "memory/saved_bytes": saved.peak}
    return {"update/sequences": len(completions), **metrics}


def learns_from(run: Training, advantages: Tensor, valid: Tensor) -> Tensor:
    """[B] bool: the completions that an update needs. `advantages` is [B] or [B, L]."""
    moved = (advantages != 0).flatten(1).any(1) if advantages.dim() > 1 else advantages != 0
    if run.objective.traits.selects or not run.objective.traits.uses_reference:
        return moved
    return valid if run.objective.traits.reads_rewards else torch.ones_like(valid)


def mismatched(run: Training, engine: Engine, groups: Tensor) -> Tensor | None:
    """ℓ of every prompt with the completion of another prompt, [B] without gradient, for the objectives that read it."""
    objective = run.objective
    if not (objective.traits.uses_mismatched and isinstance(objective, LogRatio) and run.reference):
        return None
    strangers = replace(engine.completions, ids=engine.completions.ids[partners(groups)])
    paired = Engine(strangers, engine.masks, engine.micro_samples)
    policy, reference = paired.score(run.policy), paired.score(run.reference)
    return objective.sequence(policy.terms - reference.terms, policy.region.sum(1))


def partners(groups: Tensor) -> Tensor:
    """For each entry the next one, cyclically, that is of another group: [B] -> [B] int64.

    Raises:
        ValueError: all entries are of one group.
    """
    numbers = groups.tolist()
    if len(set(numbers)) < 2:
        raise ValueError("a mismatched pair needs completions of two prompts in one batch")
    count = len(numbers)
    found = [next(j % count for j in range(i + 1, i + count) if numbers[j % count] != numbers[i]) for i in range(count)]
    return torch.tensor(found, device=groups.device)


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
