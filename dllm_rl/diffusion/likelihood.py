"""What a network says of a corruption at its scored positions: log-probabilities, or a critic's values.

These are the only forward passes that carry a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_rl.types import Completions, Corruption, PromptBatch

Look = Callable[[Tensor, slice], None]
"""Is shown the logits of some of the K rows, and which they are."""


class Reader(Protocol):
    """Whatever looks at a partly masked canvas."""

    mask_id: int
    eos_id: int


class Denoiser(Reader, Protocol):
    """What this library needs of a model; `dllm_rl.models.policy.Policy` is one."""

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """[K, V] float logits at the K True entries of `positions` [B, L], in row-major order."""


@runtime_checkable
class Scorer(Denoiser, Protocol):
    """A model that gives log-probabilities without the logits of all rows at once."""

    def logps(
        self, prompts: PromptBatch, canvas: Tensor, positions: Tensor, targets: Tensor, look: Look | None = None
    ) -> Tensor:
        """[K] log-probabilities, float32 or wider, of `targets` [K] where `logits` has its rows."""


class Valuer(Reader, Protocol):
    """What this library needs of a critic; `dllm_rl.models.value_head.ValueModel` is one."""

    def values(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """[K] values at the K True entries of `positions` [B, L], in row-major order."""


Read = Callable[[Any, Completions, Corruption, Look | None], Tensor]
"""(reader, completions, corruption, look) -> [B, L]: one number per scored position, 0 elsewhere."""


def scored_logits(policy: Denoiser, completions: Completions, corruption: Corruption) -> Tensor:
    """[K, V] logits at the K scored positions: float32 (float64 for a float64 model)."""
    prompts = replace(completions.prompts, ids=corruption.prompt)
    logits = policy.logits(prompts, corruption.canvas, corruption.scored)
    return logits if logits.dtype == torch.float64 else logits.float()


def token_logps(
    policy: Denoiser, completions: Completions, corruption: Corruption, look: Look | None = None
) -> Tensor:
    """log p(y_i | corrupted y, x) at the scored positions, 0 elsewhere: [B, L] float32 (float64 for a float64 model).

    `look` is shown the detached logits, for figures that need the whole distribution.
    """
    scored = corruption.scored
    targets = completions.ids[scored]
    if isinstance(policy, Scorer):
        prompts = replace(completions.prompts, ids=corruption.prompt)
        return _spread(policy.logps(prompts, corruption.canvas, scored, targets, look), scored)
    logits = scored_logits(policy, completions, corruption)
    if look is not None:
        look(logits.detach(), slice(0, len(logits)))
    return _spread(-F.cross_entropy(logits, targets, reduction="none"), scored)


def token_values(critic: Valuer, completions: Completions, corruption: Corruption, look: Look | None = None) -> Tensor:
    """The critic's value at the scored positions, 0 elsewhere: [B, L]. It sees the canvas, never the scored tokens."""
    del look
    prompts = replace(completions.prompts, ids=corruption.prompt)
    return _spread(critic.values(prompts, corruption.canvas, corruption.scored), corruption.scored)


def _spread(picked: Tensor, scored: Tensor) -> Tensor:
    """[K] numbers onto the K True entries of [B, L]."""
    return torch.zeros(scored.shape, dtype=picked.dtype, device=picked.device).masked_scatter(scored, picked)


def elbo_terms(logps: Tensor, weights: Tensor) -> Tensor:
    """l_j = weight_j x sum over positions: [B, N, L] and float64 [B, N] -> float64 [B, N]."""
    return weights * logps.sum(-1)
