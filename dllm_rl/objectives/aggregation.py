"""From token losses to one number, with global denominators.

With S_b the token-summed loss of sequence b, n_b its number of tokens and B sequences in the whole update:

    token-mean                Σ S_b / Σ n_b                  every token counts the same (DAPO)
    seq-mean-token-mean       1/B Σ S_b / n_b                every sequence counts the same (GRPO)
    seq-mean-token-sum        1/B Σ S_b                      log-likelihood of the sequence (BGPO)
    seq-mean-token-sum-norm   1/B Σ S_b / H                  the same over a constant (Dr. GRPO)

Each is Σ_b c_b S_b with a coefficient that is known before the loss is, so that micro-batches of any size add up to the
same gradient. Over Monte Carlo samples S_b = 1/N Σ_j w_j Σ_scored loss, whose weights already make it an estimate of the sum
over all n_b tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


class Totals(NamedTuple):
    """Of the whole update: all micro-batches, all processes, and the sequences whose gradient is zero."""

    sequences: int
    tokens: int
    canvas: int
    """L."""


def coefficients(aggregation: str, lengths: Tensor, totals: Totals, horizon: int | None) -> Tensor:
    """c_b for each sequence: [B] int64 lengths n_b -> [B] float64."""
    per_sequence = 1.0 / totals.sequences
    ones = torch.ones_like(lengths, dtype=torch.float64)
    match aggregation:
        case "token-mean":
            return ones / totals.tokens
        case "seq-mean-token-mean":
            return per_sequence / lengths.double()
        case "seq-mean-token-sum":
            return ones * per_sequence
        case "seq-mean-token-sum-norm":
            return ones * per_sequence / (horizon or totals.canvas)
    raise ValueError(f"unknown aggregation {aggregation}")
