"""Decoding decisions, without a model: how many tokens to write per step, which token, and where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

POSITION_RULES = ("sampled_prob", "max_prob", "entropy", "margin", "random", "left_to_right")
MODEL_FREE = ("random", "left_to_right")
"""Rules that need no look at the model's predictions."""
LAST = -1e9
"""Score of a token that is to be written after all others; above the -inf of positions that are not asked about."""


def transfer_schedule(block_length: int, steps: int) -> list[int]:
    """Tokens written at each step of a block: as even as possible, the larger counts first (LLaDA generate.py).

    Example: `transfer_schedule(9, 4) == [3, 2, 2, 2]`
    """
    base, extra = divmod(block_length, steps)
    return [base + (step < extra) for step in range(steps)]


def time_schedule(steps: int, eps: float) -> Tensor:
    """Share of the masked tokens that each step writes, float32 [steps]: 1 - s/t, times linear from 1 to eps (Dream).

    The last step writes whatever is left. Example: `time_schedule(2, 0.0)` is `[0.5, 1.0]`
    """
    times = torch.linspace(1, eps, steps + 1)
    shares = 1 - times[1:] / times[:-1]
    shares[-1] = 1
    return shares


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """-inf for all but the most probable tokens whose probabilities first sum to more than `top_p`: [K, V] -> [K, V]."""
    ordered, order = logits.sort(-1, descending=True)
    before = F.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > top_p)
    return logits.masked_fill(dropped, -torch.inf)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """-inf for all tokens below the `top_k` most probable ones: [K, V] -> [K, V]. Equals of the last one stay."""
    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def sampling_law(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The logits that tokens are drawn from, [K, V]: first the temperature (0 leaves them alone), then top-p, then top-k."""
    if temperature not in (0, 1):
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    return logits if top_k is None else keep_top_k(logits, top_k)


def draw_tokens(probabilities: Tensor, noise: Tensor) -> Tensor:
    """One token per row of `probabilities` [K, V], by inverting the cumulative distribution at `noise` [K] in (0, 1).

    The same distribution as LLaDA's Gumbel-max in float64, with one random number instead of V.
    """
    cumulative = probabilities.cumsum(-1)
    # Scaling by the last entry keeps the index in range although the sum of V rounded terms is not exactly 1.
    threshold = rearrange(noise, "k -> k 1") * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=cumulative.shape[-1] - 1)


def position_scores(rule: str, probabilities: Tensor, tokens: Tensor) -> Tensor:
    """How soon each position should be written, higher first: probabilities [K, V] and the chosen tokens [K] -> [K].

    `sampled_prob` is the probability of the chosen token (LLaDA), `max_prob` that of the likeliest one, `entropy` the
    negative entropy and `margin` the lead of the likeliest token over the second (Dream).
    """
    if rule == "sampled_prob":
        return probabilities.gather(-1, rearrange(tokens, "k -> k 1")).squeeze(-1)
    if rule == "max_prob":
        return probabilities.amax(-1)
    if rule == "entropy":
        return -torch.special.entr(probabilities).sum(-1)
    best = probabilities.topk(2).values
    return best[:, 0] - best[:, 1]


def most_confident(confidence: Tensor, masked: Tensor, count: int | Tensor) -> Tensor:
    """[B, L] bool: in each row the `count` masked positions of highest confidence (the leftmost of equals).

    `count` is one number, or [B].
    """
    candidates = confidence.masked_fill(~masked, -torch.inf)
    rank = candidates.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    most = rearrange(count, "b -> b 1") if isinstance(count, Tensor) else count
    return (rank < most) & masked


def count_above(score: Tensor, masked: Tensor, threshold: float) -> Tensor:
    """[B]: masked positions whose score is at least `threshold` (Fast-dLLM, arXiv 2505.22618, algorithm 1)."""
    return ((score >= threshold) & masked).sum(1)


def count_within_factor(score: Tensor, masked: Tensor, factor: float) -> Tensor:
    """[B]: the largest n with (n + 1)(1 - c_n) <= factor, c_n the n-th highest score (Fast-dLLM, section 3.3).

    The published code also writes the last masked token of a block where only that one misses the bound; this does not.
    """
    ordered = score.masked_fill(~masked, -torch.inf).sort(dim=1, descending=True).values
    number = torch.arange(1, score.shape[1] + 1, device=score.device)
    return ((number + 1) * (1 - ordered) <= factor).sum(1)


def gumbel(noise: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniform ones: the top n of `log p + gumbel` is a draw of n without replacement."""
    return -(-noise.log()).log()
