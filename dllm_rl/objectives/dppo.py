"""Divergence PPO: mask the updates that would carry the policy out of a divergence ball, instead of clipping ratios.

Per (sample, token) with π the current policy, μ the policy that sampled, r = π/μ and D their divergence at that masked
position (arXiv 2602.04879, eq. 11-14; the authors' Stable-RL code):

    loss = −A sg( min(r, ratio_cap) M ) log π
    M = 0  iff  (A > 0 and r > 1 and D > delta_high)  or  (A < 0 and r < 1 and D > delta_low)

Updates that move π back towards μ are never masked. M and r carry no gradient, so the loss is a sum over samples: one pass.
For masked diffusion μ is the policy that sampled, at the same masked state. On a trajectory of an approximate sampler that
is what it recorded at the unmasking step (`dllm_rl.update.uses_recorded`), else a forward pass of that policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.diffusion.divergence import binary
from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Objective, Traits, column, log_ratio, share, weighted_logp_loss

DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl", "exact_tv", "exact_kl")


@dataclass
class DPPO(Objective):
    """DPPO (`objective=dppo`)."""

    aggregation: str = "seq-mean-token-sum-norm"
    divergence: str = "binary_tv"
    """D: binary_tv | binary_kl | topk_tv | topk_kl | exact_tv | exact_kl."""
    delta_low: float = 0.15
    """Radius for A < 0. The source uses 0.15 for tv and 0.05 for kl."""
    delta_high: float = 0.15
    """Radius for A > 0."""
    top_k: int = 20
    """K of the topk divergences; the sampled token is added where it is missing."""
    ratio_cap: float = float("inf")
    """C: truncates r. inf: off, as the source recommends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.divergence in DIVERGENCES, "objective.divergence", self.divergence, ", ".join(DIVERGENCES))
        check(self.delta_low >= 0, "objective.delta_low", self.delta_low, "a number >= 0")
        check(self.delta_high >= 0, "objective.delta_high", self.delta_high, "a number >= 0")
        check(self.top_k >= 1, "objective.top_k", self.top_k, "an integer >= 1")
        check(self.ratio_cap > 0, "objective.ratio_cap", self.ratio_cap, "a number > 0 (inf for no cap)")

    @property
    def traits(self) -> Traits:
        return Traits(separable=True, token_level=True)

    @property
    def measured_divergence(self) -> str | None:
        return None if self.divergence.startswith("binary") else self.divergence

    @property
    def binary_divergence(self) -> str:
        return self.divergence[-2:]

    @property
    def support_size(self) -> int:
        return self.top_k if self.divergence.startswith("topk") else 0

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The masked, importance-weighted surrogate of every (sample, token). See `LossInputs` for shapes."""
        logps = inputs.logps.detach()
        log_r = log_ratio(inputs).detach()
        if self.measured_divergence is None:
            divergence = binary(self.divergence.removeprefix("binary_"), logps, inputs.old_logps)
        else:
            divergence = torch.zeros_like(logps) if inputs.divergence is None else inputs.divergence
        kept = trust_region(log_r, divergence, column(inputs.advantages, logps), self.delta_low, self.delta_high)
        omega = log_r.exp().clamp(max=self.ratio_cap) * kept
        return LossOutput(weighted_logp_loss(inputs, omega), {
            "objective/clipped": share(~kept, inputs.scored),
            "divergence/mean": share(divergence, inputs.scored),
        })


def trust_region(log_r: Tensor, divergence: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """M as bool: False where the update would move a token further out of the region. Shapes broadcast."""
    up_and_out = (advantage > 0) & (log_r > 0) & (divergence > high)
    down_and_out = (advantage < 0) & (log_r < 0) & (divergence > low)
    return ~(up_and_out | down_and_out)
