"""Log-probabilities of completions under a corruption: the only forward pass that carries a gradient."""

from __future__ import annotations

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


class Likelihood(Protocol):
    """Which corruptions are drawn, with which weights: a member of the Hydra group `likelihood`."""

    num_samples: int

    def draw(
        self, completions: Completions, sample: Tensor, *, seed: int, step: int, mask_id: int, eos_id: int
    ) -> Corruption: ...


def token_logps(policy: Denoiser, completions: Completions, corruption: Corruption) -> Tensor:
    """log p(y_i | corrupted y, x) at the scored positions, 0 elsewhere: [B, L] float32 (float64 for a float64 model)."""
    scored = corruption.scored
    logits = policy.logits(completions.prompts, corruption.canvas, scored)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    picked = -F.cross_entropy(logits, completions.ids[scored], reduction="none")
    return torch.zeros(scored.shape, dtype=picked.dtype, device=picked.device).masked_scatter(scored, picked)


def elbo_terms(logps: Tensor, weights: Tensor) -> Tensor:
    """l_j = weight_j x sum over positions: [B, N, L] and float64 [B, N] -> float64 [B, N]."""
    return weights * logps.sum(-1)
