"""All optimizer steps on one batch of experience: which passes are needed, and in which order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dllm_rl.accumulate import Engine
from dllm_rl.advantages import has_signal
from dllm_rl.critic import Appraisal
from dllm_rl.diagnostics import cosine, diagnostics
from dllm_rl.experience import Experience
from dllm_rl.memory import SavedBytes
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.objectives.base import Extras
from dllm_rl.objectives.groups import group_sum
from dllm_rl.objectives.log_ratio import LogRatio
from dllm_rl.scoring import Masks, Old, Scores
from dllm_rl.training import Training
from dllm_rl.types import Completions


def update(run: Training, experience: Experience, appraisal: Appraisal | None = None) -> dict[str, float]:
    """Takes `trainer.inner_updates` steps; returns the figures of the last one.

    Completions without an advantage have no gradient and cost no forward pass, unless a reference acts on them too.
    """
    config, objective, policy, traits = run.config, run.objective, run.policy, run.objective.traits
    advantages = objective.prepare(experience.advantages, experience.valid, experience.groups)
    learnable = learns_from(run, advantages, experience)
    if not learnable.any():
        return {"update/sequences": 0}
    counted = learnable if traits.reads_rewards else torch.ones_like(learnable)
    region = run.likelihood.region_of(experience.completions.ids, policy.eos_id)
    totals = Totals(sequences=int(counted.sum()), tokens=int(region[counted].sum()), canvas=region.shape[1])
    completions = experience.completions.rows(learnable)
    advantages, groups = advantages[learnable], experience.groups[learnable]

    several, resampled = config.inner_updates > 1, config.resample_masks
    engines = [
        Engine(completions, Masks(run.likelihood, run.seed, experience.mask_step, inner), config.micro_samples)
        for inner in range(config.inner_updates if resampled else 1)
    ]
    recorded = uses_recorded(run, completions)
    old = {n: engine.recorded(policy) for n, engine in enumerate(engines)} if recorded else known_before(run, engines)
    reference = [engine.score(run.reference) for engine in engines] if run.reference and traits.uses_reference else []
    exact = several and (objective.measured_divergence or "").startswith("exact")
    sampled_by = policy.frozen_copy() if exact else None

    metrics: dict[str, float] = {}
    judged: dict[str, float] = {}
    for inner in range(config.inner_updates):
        number = inner if resampled else 0
        before = old.get(number)
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
                judged = judged if inner else judged | appraisal.metrics(targets)
                figures |= run.critic.learn(appraisal, targets)
        if not resampled:
            old.setdefault(0, scores)
        known = None if traits.reads_rewards else before or (None if inner else scores)
        if recorded and before and not inner:
            judged["sampler/behaviour_gap"] = float((scores.logps - before.logps)[scores.scored].abs().mean())
        metrics = losses | figures | diagnostics(scores, known, advantages, objective.binary_divergence)
        metrics |= {"grad/norm": run.optimizer.step(), "memory/saved_bytes": saved.peak}
    return {"update/sequences": len(completions), **metrics, **judged}


def uses_recorded(run: Training, completions: Completions) -> bool:
    """Whether ratios are to what the sampler recorded, at the very states that are scored, and not to a pass of our own.

    A cache or half precision makes the two differ. Divergences of whole distributions have no use for one number per token.
    """
    objective, known = run.objective, completions.behaviour_logps is not None
    return known and run.likelihood.replays and objective.traits.uses_old and objective.measured_divergence is None


def known_before(run: Training, engines: list[Engine]) -> dict[int, Scores]:
    """What the policy that sampled says of masks that only later updates use, before the weights move. On the first update's
    masks its values are those of that update itself."""
    later = engines[1:] if run.objective.traits.uses_old else []
    return {1 + n: engine.score(run.policy, top_k=run.objective.support_size) for n, engine in enumerate(later)}


def learns_from(run: Training, advantages: Tensor, experience: Experience) -> Tensor:
    """[B] bool: the completions that an update needs. `advantages` is what the objective made of them."""
    traits, valid = run.objective.traits, experience.valid
    if traits.selects or not traits.uses_reference:
        return has_signal(advantages)
    if not traits.reads_rewards:
        return torch.ones_like(valid)
    # Where graders failed, groups may have become too small to say anything.
    return valid & (group_sum(valid.long(), experience.groups) >= run.objective.least_group[0])


def mismatched(run: Training, engine: Engine, groups: Tensor) -> Tensor | None:
    """ℓ of prompts with completions of other prompts, [M] without gradient, for the objectives that read it."""
    objective = run.objective
    if not (objective.traits.uses_mismatched and isinstance(objective, LogRatio) and run.reference):
        return None
    rows, others = partners(groups, prompt_numbers(engine.completions))
    if not len(rows):
        return torch.zeros(1, dtype=torch.float64, device=groups.device)
    strangers = replace(engine.completions.rows(rows), ids=engine.completions.ids[others])
    paired = Engine(strangers, engine.masks, engine.micro_samples)
    policy, reference = paired.score(run.policy), paired.score(run.reference)
    return objective.sequence(policy.terms - reference.terms, policy.region.sum(1))


def prompt_numbers(completions: Completions) -> Tensor:
    """[B] int64: equal for equal prompts."""
    seen = torch.where(completions.prompt_mask, completions.prompt_ids, -1)
    numbers: Tensor = seen.unique(dim=0, return_inverse=True)[1]
    return numbers


def partners(groups: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Mismatched pairs: (rows, others), each int64, such that the prompt of `rows[i]` differs from that of `others[i]`.

    The n-th completion of a group meets the n-th one of the next group (cyclically) that has another prompt, so that as
    many different completions take part as there are. Without such a group a row is left out.

    Args:
        groups: [B] int64, one number per group; a prompt may be drawn twice.
        prompts: [B] int64, one number per prompt.
    """
    members: dict[int, list[int]] = {}
    for row, number in enumerate(groups.tolist()):
        members.setdefault(number, []).append(row)
    of, order, pairs = prompts.tolist(), list(members.values()), []
    for index, group in enumerate(order):
        following = order[index + 1 :] + order[:index]
        other = next((found for found in following if of[found[0]] != of[group[0]]), [])
        pairs += [(row, other[n % len(other)]) for n, row in enumerate(group) if other]
    found = torch.tensor(pairs, dtype=torch.int64, device=groups.device).view(-1, 2)
    return found[:, 0], found[:, 1]


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
