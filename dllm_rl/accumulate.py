"""The gradient engine: parameter gradients of an objective while one chunk of Monte Carlo samples has a live graph.

A separable objective is a sum over samples, so each chunk can be evaluated, differentiated and forgotten before the
next: memory does not grow with the number of samples. The result is the gradient of the whole sum for every chunk size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.likelihood import Denoiser, Likelihood, elbo_terms, token_logps
from dllm_rl.objectives.base import LossInputs, Objective
from dllm_rl.types import Completions, Corruption


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of completions under all N corruptions."""

    logps: Tensor
    """[B, N, L], 0 where a sample does not score a position; no graph."""
    weights: Tensor
    """[B, N]."""

    @property
    def terms(self) -> Tensor:
        """ELBO terms l_j, [B, N]."""
        return elbo_terms(self.logps, self.weights)


@dataclass(frozen=True)
class Masks:
    """Where corruptions come from: everything but the completions and the sample number."""

    likelihood: Likelihood
    seed: int
    step: int

    def draw(self, policy: Denoiser, completions: Completions, sample: Tensor) -> Corruption:
        return self.likelihood.draw(
            completions, sample, seed=self.seed, step=self.step, mask_id=policy.mask_id, eos_id=policy.eos_id
        )


def backward(
    policy: Denoiser,
    objective: Objective,
    completions: Completions,
    advantages: Tensor,
    masks: Masks,
    *,
    old: Scores | None,
    num_terms: float,
    micro_samples: int,
    run_backward: Callable[[Tensor], None] = torch.Tensor.backward,
) -> tuple[Scores, dict[str, float]]:
    """Adds the objective's gradient to the parameters.

    Args:
        completions: B sequences.
        advantages: [B].
        old: scores under the policy that sampled. None: the policy is still that one, so its values are the current
            ones and no pass is needed for them.
        num_terms: see `LossInputs`.
        micro_samples: pairs of sequence and corruption per forward pass. Trades speed for memory, never the result.
        run_backward: `accelerator.backward` in a distributed run.

    Returns:
        The scores of this pass (they serve as `old` of the next inner update), and the metrics with the loss.
    """
    if not objective.separable:
        raise TypeError(f"{type(objective).__name__} is not separable over Monte Carlo samples")
    scores: Scores | None = None
    totals: dict[str, Tensor] = {}
    for rows, sample in _chunks(len(completions), masks.likelihood.num_samples, micro_samples, completions.ids.device):
        chunk = completions.rows(rows)
        corruption = masks.draw(policy, chunk, sample)
        logps = token_logps(policy, chunk, corruption)
        scores = scores or _empty_scores(logps, len(completions), masks.likelihood.num_samples)
        scores.logps[rows, sample] = logps.detach()
        scores.weights[rows, sample] = corruption.weight
        old_logps = logps.detach() if old is None else old.logps[rows, sample]
        output = objective.loss(LossInputs(
            logps=rearrange(logps, "c l -> c 1 l"),
            old_logps=rearrange(old_logps, "c l -> c 1 l"),
            weights=rearrange(corruption.weight, "c -> c 1"),
            advantages=advantages[rows],
            num_terms=num_terms,
        ))
        run_backward(output.loss)
        for name, share in {"loss": output.loss.detach(), **output.metrics}.items():
            totals[name] = totals.get(name, 0.0) + share
    assert scores is not None, "the trainer never passes an empty batch"
    return scores, {name: float(value) for name, value in totals.items()}


def score_metrics(scores: Scores, old: Scores) -> dict[str, float]:
    """Figures of one pass: the ELBO estimate, its spread over the N samples, and δ against the old policy."""
    terms, delta = scores.terms, (scores.terms - old.terms).abs()
    return {
        "elbo/mean": float(terms.mean()), "elbo/std": float(terms.std(1, correction=0).mean()),
        "delta/mean_abs": float(delta.mean()), "delta/max_abs": float(delta.max()),
    }


def _chunks(
    num_sequences: int, num_samples: int, micro_samples: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(row, sample) index pairs, all sequences of sample 0 first, `micro_samples` pairs at a time."""
    pairs = torch.arange(num_sequences * num_samples, device=device)
    for chunk in pairs.split(micro_samples):
        yield chunk % num_sequences, chunk // num_sequences


def _empty_scores(like: Tensor, num_sequences: int, num_samples: int) -> Scores:
    logps = like.new_zeros(num_sequences, num_samples, like.shape[-1])
    return Scores(logps, torch.zeros(num_sequences, num_samples, dtype=torch.float64, device=like.device))
