"""Log-probabilities of completions under a corruption: the only forward pass that carries a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_rl.types import Completions, Corruption, PromptBatch


class Denoiser(Protocol):
    """What this library needs of a model; `dllm_rl.models.policy.Policy` is one."""

    mask_id: int
    eos_id: int

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """[K, V] float logits at the K True entries of `positions` [B, L], in row-major order."""


def scored_logits(policy: Denoiser, completions: Completions, corruption: Corruption) -> Tensor:
    """[K, V] logits at the K scored positions: float32 (float64 for a float64 model)."""
    prompts = replace(completions.prompts, ids=corruption.prompt)
    logits = policy.logits(prompts, corruption.canvas, corruption.scored)
    return logits if logits.dtype == torch.float64 else logits.float()


def token_logps(
    policy: Denoiser, completions: Completions, corruption: Corruption, look: Callable[[Tensor], None] | None = None
) -> Tensor:
    """log p(y_i | corrupted y, x) at the scored positions, 0 elsewhere: [B, L] float32 (float64 for a float64 model).

    `look` is shown the detached [K, V] logits, for figures that need the whole distribution.
    """
    scored = corruption.scored
    logits = scored_logits(policy, completions, corruption)
    if look is not None:
        look(logits.detach())
    picked = -F.cross_entropy(logits, completions.ids[scored], reduction="none")
    return torch.zeros(scored.shape, dtype=picked.dtype, device=picked.device).masked_scatter(scored, picked)


def elbo_terms(logps: Tensor, weights: Tensor) -> Tensor:
    """l_j = weight_j x sum over positions: [B, N, L] and float64 [B, N] -> float64 [B, N]."""
    return weights * logps.sum(-1)
