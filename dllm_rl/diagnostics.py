"""Figures that tell whether an update is healthy: how far the policy has moved, and how noisy its likelihoods are.

Mask-ratio bins: `low_mask` has the draws that hide less than a third of the tokens, `high_mask` those that hide more than
two thirds. Ratios and divergences behave differently there: with most tokens hidden, probabilities are small, and binary
divergences with them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.divergence import binary
from dllm_rl.objectives.bgpo import bgpo_factors
from dllm_rl.scoring import Scores

BINS = {"low_mask": (0.0, 1 / 3), "mid_mask": (1 / 3, 2 / 3), "high_mask": (2 / 3, 1.01)}
QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


def diagnostics(scores: Scores, old: Scores | None, advantages: Tensor, binary_kind: str = "tv") -> dict[str, float]:
    """The figures of one update.

    Args:
        scores: of the B completions under the current policy.
        old: the same corruptions under the policy that sampled; None where they were not evaluated, which leaves out
            everything but elbo/.
        advantages: [B] or [B, L].
        binary_kind: tv or kl, the binary divergence shown where the objective measures none.

    Returns:
        elbo/mean, elbo/std (over the samples of a completion), elbo/<bin>; delta/mean, delta/mean_abs, delta/std,
        delta/max_abs in nats; ratio/<bin>/<quantile> of the per-token ratios; divergence/<bin>/<quantile> of the objective's
        divergence, or else of the binary one; bound/gap, the mean of A exp(mean δ) − Σ g_j (BGPO).
    """
    terms = scores.terms
    metrics = {"elbo/mean": float(terms.mean()), "elbo/std": float(terms.std(1, correction=0).mean())}
    metrics |= {f"elbo/{name}": float(terms[chosen].mean()) for name, chosen in bins(scores) if chosen.any()}
    if old is None:
        return metrics
    delta = terms - old.terms
    metrics |= {
        "delta/mean": float(delta.mean()), "delta/mean_abs": float(delta.abs().mean()),
        "delta/std": float(delta.std(correction=0)), "delta/max_abs": float(delta.abs().max()),
        "bound/gap": bound_gap(delta, advantages),
    }
    ratio = (scores.logps - old.logps).exp()
    divergence = binary(binary_kind, scores.logps, old.logps) if scores.divergence is None else scores.divergence
    for name, chosen in bins(scores):
        where = scores.scored & rearrange(chosen, "b n -> b n 1")
        if where.any():
            metrics |= {f"ratio/{name}/{key}": value for key, value in quantiles(ratio[where]).items()}
            metrics |= {f"divergence/{name}/{key}": value for key, value in quantiles(divergence[where]).items()}
    return metrics


def bound_gap(delta: Tensor, advantages: Tensor) -> float:
    """Mean over completions of A exp(mean δ) − Σ g_j, >= 0: δ [B, N] and A [B] (the mean of A where each token has one)."""
    advantages = advantages if advantages.dim() == 1 else advantages.mean(1)
    advantage = rearrange(advantages.double(), "b -> b 1")
    bound = advantage * bgpo_factors(delta.double(), advantage, torch.inf).mean(1, keepdim=True)
    return float((advantage * delta.double().mean(1, keepdim=True).exp() - bound).mean())


def bins(scores: Scores) -> Iterator[tuple[str, Tensor]]:
    """Name and [B, N] bool members of each mask-ratio bin."""
    for name, (low, high) in BINS.items():
        yield name, (scores.mask_ratio >= low) & (scores.mask_ratio < high)


def quantiles(values: Tensor) -> dict[str, float]:
    """The nearest-rank quantiles of a non-empty tensor."""
    ordered = values.flatten().sort().values
    return {name: float(ordered[round(level * (len(ordered) - 1))]) for name, level in QUANTILES.items()}


def cosine(first: list[Tensor], total: list[Tensor]) -> float:
    """Cosine between two halves of a gradient, from the first half and the sum of both, parameter by parameter."""
    dot = sum(float((a.double() * (b - a).double()).sum()) for a, b in zip(first, total, strict=True))
    norms = [sum(float(part.double().square().sum()) for part in half) ** 0.5
             for half in (first, [b - a for a, b in zip(first, total, strict=True)])]
    return dot / (norms[0] * norms[1]) if all(norms) else float("nan")
