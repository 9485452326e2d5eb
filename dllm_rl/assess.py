"""From rewards to advantages: the KL penalty, then a comparison of rewards or the critic's judgement."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_rl.accumulate import Engine
from dllm_rl.advantages import compute_advantages, has_signal
from dllm_rl.critic import Appraisal
from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.experience import Experience
from dllm_rl.objectives.groups import group_sum
from dllm_rl.scoring import Masks, Scores
from dllm_rl.training import Training


class Assessed(NamedTuple):
    """Experience with its advantages."""

    experience: Experience
    appraisal: Appraisal | None
    """Of the valid completions, where there is a critic."""
    metrics: dict[str, float]


def assess(run: Training, experience: Experience) -> Assessed:
    """Fills in the advantages. Objectives that work on rewards get those, less the critic's value where there is one."""
    valid = experience.valid
    graded = experience.completions.rows(valid)
    decisions = run.critic.decisions(graded) if run.critic else torch.zeros_like(graded.ids)
    rewards = at_the_end(experience.rewards[valid], decisions)
    metrics: dict[str, float] = {}
    if run.kl_reward and run.reference:
        penalty = log_ratios(run, experience, decisions)
        kl = float(penalty.sum(1).mean())
        rewards = rewards - run.kl_reward.coef * penalty
        metrics |= {"kl_reward/kl": kl, "kl_reward/coef": run.kl_reward.coef}
        run.kl_reward.adapt(kl, len(graded))

    appraisal = run.critic.appraise(graded, rewards, seed=run.seed) if run.critic else None
    if appraisal:
        found = appraisal.advantages
        advantages = found.new_zeros(len(valid), *found.shape[1:])
        advantages[valid] = found
    else:
        total = experience.rewards.clone()
        total[valid] = rewards.sum(1)
        advantages = total if run.objective.traits.reads_rewards else compute_advantages(
            total, valid, experience.groups, run.advantage.kind, run.advantage.epsilon
        )
    if not run.objective.traits.reads_rewards:
        silent = group_sum(has_signal(advantages).long(), experience.groups) == 0
        metrics["reward/zero_advantage_groups"] = len(experience.groups[silent].unique())
    return Assessed(replace(experience, advantages=advantages), appraisal, metrics)


def at_the_end(rewards: Tensor, decisions: Tensor) -> Tensor:
    """[B] rewards on the last decision of each completion: [B, S]. `decisions` is [B, L], -1 for no action."""
    last = decisions.amax(1).clamp(min=0)
    placed = rewards.new_zeros(len(rewards), int(last.max()) + 1 if len(last) else 1)
    return placed.scatter(1, last.unsqueeze(1), rewards.unsqueeze(1))


def log_ratios(run: Training, experience: Experience, decisions: Tensor) -> Tensor:
    """log π − log π_ref of each decision of the valid completions, under the policy that sampled: [B, S].

    On a trajectory these are the probabilities of the tokens at the states in which they were written; otherwise there is
    one decision, and ELBOs stand for its log-probability.
    """
    assert run.reference is not None
    graded = experience.completions.rows(experience.valid)
    trajectory = run.critic is not None and run.critic.on_trajectory
    likelihood: Likelihood = run.critic.states(graded) if run.critic and trajectory else run.likelihood
    engine = Engine(graded, Masks(likelihood, run.seed, experience.mask_step), run.config.micro_samples)
    policy, reference = engine.score(run.policy), engine.score(run.reference)
    if not trajectory:
        return (policy.terms - reference.terms).mean(1, keepdim=True)
    return per_decision(policy, reference, decisions)


def per_decision(policy: Scores, reference: Scores, decisions: Tensor) -> Tensor:
    """Sums over the tokens that each decision wrote: [B, S]."""
    tokens = (policy.logps - reference.logps).sum(1).double()
    written = decisions >= 0
    sums = tokens.new_zeros(len(tokens), int(decisions.max()) + 1)
    return sums.scatter_add(1, decisions.clamp(min=0), torch.where(written, tokens, 0.0))
