"""Decoding decisions, without a model: how many tokens to write per step, which token, and where."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def transfer_schedule(block_length: int, steps: int) -> list[int]:
    """Tokens written at each step of a block: as even as possible, the larger counts first (LLaDA generate.py).

    Example: `transfer_schedule(9, 4) == [3, 2, 2, 2]`
    """
    base, extra = divmod(block_length, steps)
    return [base + (step < extra) for step in range(steps)]


def choose_tokens(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One token per row.

    Temperature 0 is argmax. Otherwise the token is drawn from softmax(logits / temperature) by inverting its cumulative
    distribution at `noise`: the same distribution as LLaDA's Gumbel-max with one random number instead of V.

    Args:
        logits: [K, V].
        noise: [K] float64 in (0, 1).
        temperature: >= 0.

    Returns:
        [K] int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # Scaling by the last entry keeps the index in range although the sum of V rounded terms is not exactly 1.
    threshold = rearrange(noise, "k -> k 1") * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def token_confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability of the chosen tokens under softmax(logits), whatever the temperature: [K, V], [K] -> [K]."""
    return logits.softmax(-1).gather(-1, rearrange(tokens, "k -> k 1")).squeeze(-1)


def most_confident(confidence: Tensor, masked: Tensor, count: int) -> Tensor:
    """[B, L] bool: in each row the `count` masked positions of highest confidence (the leftmost of equals)."""
    candidates = confidence.masked_fill(~masked, -torch.inf)
    rank = candidates.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < count) & masked
