"""The samplers: how many tokens a denoising step writes, and where. `decoding.py` has the loop and the settings they share.

Training rollouts, evaluation and `dllm-rl generate` all call `Sampler.sample`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_rl.diffusion.decoding import Sampler, attention_block, even_schedule
from dllm_rl.diffusion.likelihood import Denoiser
from dllm_rl.diffusion.unmasking import (
    POSITION_RULES,
    count_above,
    count_within_factor,
    gumbel,
    most_confident,
    position_scores,
    time_schedule,
)
from dllm_rl.errors import check
from dllm_rl.types import PromptBatch

__all__ = ["Dream", "LowConfidence", "Parallel", "Sampler", "reproduces"]

ALGORITHMS = {"origin": "random", "maskgit_plus": "sampled_prob", "topk_margin": "margin", "entropy": "entropy"}


@dataclass
class LowConfidence(Sampler):
    """LLaDA's semi-autoregressive sampler with low-confidence remasking (`sampler=low_confidence`).

    Every step predicts all masked tokens of a block and keeps the same number of them. Source: arXiv 2502.09992, section 2.4
    and algorithm 5, and the authors' generate.py.
    """

    position_by: str = "sampled_prob"
    """Which predictions a step keeps: sampled_prob (LLaDA) | max_prob | entropy | margin | random | left_to_right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(self.position_by)

    @property
    def order(self) -> str:
        return self.position_by

    def quota(self, masked: Tensor, step: Tensor, plan: tuple[int, int], noise: Tensor) -> Tensor:
        """The same number at every step, as nearly as possible."""
        del masked, noise
        return even_schedule(plan, step)


@dataclass
class Dream(Sampler):
    """Dream's sampler: the whole canvas at once, its own schedule and confidences (`sampler=dream`).

    Step i writes the share 1 - t_{i+1}/t_i of what is still masked, t linear from 1 to eps. The published code takes the
    batch's mean number of masked tokens, so that rows influence each other; here every row counts its own. Where attention
    goes in blocks, every block has a schedule of its own. Source: Dream 7B, arXiv 2508.15487, and its generation_utils.py.
    """

    alg: str = "entropy"
    """origin: random positions | maskgit_plus: the most probable | topk_margin | entropy: the most certain."""
    alg_temp: float = 0.0
    """Above 0, positions are drawn with probabilities softmax(confidence / alg_temp) instead of taken in order."""
    eps: float = 1e-3
    """The time at which the last step begins to end."""
    own_block = None
    judges_law = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.alg in ALGORITHMS, "sampler.alg", self.alg, ", ".join(ALGORITHMS))
        check(0 <= self.alg_temp < float("inf"), "sampler.alg_temp", self.alg_temp, "a number >= 0")
        check(0 <= self.eps < 1, "sampler.eps", self.eps, "a number >= 0 and < 1")
        valid = "0 with sampler.alg=origin, whose positions are random anyway"
        check(self.alg != "origin" or self.alg_temp == 0, "sampler.alg_temp", self.alg_temp, valid)

    @property
    def order(self) -> str:
        return ALGORITHMS[self.alg]

    @property
    def deterministic(self) -> bool:
        return super().deterministic and self.alg_temp == 0

    def quota(self, masked: Tensor, step: Tensor, plan: tuple[int, int], noise: Tensor) -> Tensor:
        """origin writes every masked token with the probability of the step, the others a fixed part of them."""
        share = time_schedule(plan[1], self.eps).to(step.device)[step]
        if self.alg == "origin":  # those with the highest noise, which is the order of `random`
            return ((noise > 1 - share.double().unsqueeze(1)) & masked).sum(1)
        return (masked.sum(1) * share).long()

    def ranked(self, scores: Tensor, noise: Tensor) -> Tensor:
        return scores if self.alg_temp == 0 else scores / self.alg_temp + gumbel(noise)


@dataclass
class Parallel(Sampler):
    """Fast-dLLM's parallel decoding: as many tokens per step as the model is sure of, at least one (`sampler=parallel`).

    The policy that it samples is another one than with a fixed schedule. `threshold` above 1 is one token per step. Source:
    arXiv 2505.22618 and the authors' llada/generate.py.
    """

    threshold: float | None = 0.9
    """Write every masked token of the block with at least this confidence. null: no threshold."""
    factor: float | None = None
    """In place of a threshold: write the n best while (n + 1)(1 - confidence of the n-th) <= factor."""
    max_tokens: int | None = None
    """Never write more than this many at a step. null: no limit."""
    position_by: str = "sampled_prob"
    """The confidence: sampled_prob | max_prob | margin. Without threshold and factor also entropy, random, left_to_right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(self.position_by)
        threshold, factor, most = self.threshold, self.factor, self.max_tokens
        check(threshold is None or threshold > 0, "sampler.threshold", threshold, "a number > 0, or null")
        check(factor is None or factor > 0, "sampler.factor", factor, "a number > 0, or null")
        check(threshold is None or factor is None, "sampler.factor", factor, "null with sampler.threshold, or that one null")
        check(most is None or most >= 1, "sampler.max_tokens", most, "an integer >= 1, or null")
        free = threshold is None and factor is None
        check(not free or most is not None, "sampler.max_tokens", most, "an integer >= 1 without threshold and factor")
        probability = self.position_by in ("sampled_prob", "max_prob", "margin")
        valid = "sampled_prob, max_prob or margin with sampler.threshold or sampler.factor"
        check(free or probability, "sampler.position_by", self.position_by, valid)
        check(self.denoising_steps is None, "sampler.denoising_steps", self.denoising_steps, "null: the model decides")

    @property
    def order(self) -> str:
        return self.position_by

    def quota(self, masked: Tensor, step: Tensor, plan: tuple[int, int], noise: Tensor) -> Tensor:
        """The limit."""
        del step, plan, noise
        return masked.sum(1).clamp(max=self.max_tokens or masked.shape[1])

    def count(self, scores: Tensor, masked: Tensor, quota: Tensor) -> Tensor:
        """Those that the model is sure of, at least one."""
        if self.threshold is not None:
            quota = torch.minimum(quota, count_above(scores, masked, self.threshold))
        elif self.factor is not None:
            quota = torch.minimum(quota, count_within_factor(scores, masked, self.factor))
        return quota.clamp(min=1)

    @property
    def approximate(self) -> bool:
        return True

    def exact(self) -> Parallel:
        """One token per step, from passes over the whole row in full precision."""
        return replace(super().exact(), threshold=None, factor=None, max_tokens=1)


def check_rule(rule: str) -> None:
    check(rule in POSITION_RULES, "sampler.position_by", rule, ", ".join(POSITION_RULES))


@torch.no_grad()
def reproduces(policy: Denoiser, prompts: PromptBatch, ids: Tensor) -> Tensor:
    """[B] bool: whether greedy decoding gives `ids` [B, L], one token per step, the most confident first.

    That is what `LowConfidence(block_length=L, denoising_steps=L, temperature=0)` decodes, but a row takes no more forward
    passes after its first wrong token. Where attention goes in blocks, those are decoded one after the other.
    """
    size = attention_block(policy) or prompts.mask.shape[1] + ids.shape[1]
    block = (prompts.mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)) // size
    right = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    canvas = torch.full_like(ids, policy.mask_id)
    for _ in range(ids.shape[1]):
        if not right.any():
            break
        part = canvas[right]
        masked = part == policy.mask_id
        first = block[right].masked_fill(~masked, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        masked = masked & (block[right] == first)
        logits = policy.logits(prompts.rows(right), part, masked)
        chosen = logits.argmax(-1)
        confidence = torch.zeros(part.shape, dtype=torch.float64, device=ids.device).masked_scatter(
            masked, position_scores("sampled_prob", logits.double().softmax(-1), chosen)
        )
        write = most_confident(confidence, masked, 1)
        canvas[right] = torch.where(write, part.masked_scatter(masked, chosen), part)
        right = right & ((canvas == policy.mask_id) | (canvas == ids)).all(1)
    return right
