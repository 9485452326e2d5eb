"""How far two policies are apart at one masked position: total variation and KL, of the whole vocabulary or a part of it.

With π the current and μ the behaviour distribution and a the sampled token (DPPO, arXiv 2602.04879, section 4):

    exact     TV = 1/2 Σ_v |μ_v − π_v|,  KL = Σ_v μ_v log(μ_v / π_v)         over the vocabulary
    top-K     the same over TopK(μ) ∪ {a} and one bucket for the rest
    binary    the same over {a} and one bucket for the rest:  TV = |π(a) − μ(a)|

Merging outcomes can only lose divergence: binary <= top-K <= exact. KL is KL(μ || π) throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

_LEAST = 1e-12
"""Least probability of a bucket: 1 - Σ rounds to zero or below where the rest has no mass."""


class Support(NamedTuple):
    """A part of the behaviour distribution at K positions."""

    ids: Tensor
    """[..., S] int32; -1 where there is no token."""
    logps: Tensor
    """[..., S] log-probabilities, -inf where there is no token."""


def top_k_support(logits: Tensor, tokens: Tensor, top_k: int) -> Support:
    """TopK(μ) ∪ {sampled token} at K positions: logits [K, V] and tokens [K] -> S = top_k + 1 entries.

    The last entry is the sampled token where it is not among the top_k, and empty elsewhere.
    """
    logps = logits.log_softmax(-1)
    top = logps.topk(min(top_k, logits.shape[-1]), dim=-1)
    sampled = rearrange(tokens, "k -> k 1")
    known = (top.indices == sampled).any(-1, keepdim=True)
    ids = torch.cat([top.indices, sampled.masked_fill(known, -1)], -1)
    values = torch.cat([top.values, logps.gather(-1, sampled).masked_fill(known, -torch.inf)], -1)
    return Support(ids.int(), values)


def binary(kind: str, logps: Tensor, old_logps: Tensor) -> Tensor:
    """Divergence of {sampled token, rest}, any shape. `kind` is tv or kl."""
    pi, mu = logps.exp(), old_logps.exp()
    return _tv(mu, pi) if kind == "tv" else _kl(mu, pi)


def top_k(kind: str, logits: Tensor, support: Support) -> Tensor:
    """Divergence of {the supported tokens, rest}: logits [K, V] of π and the [K, S] support of μ -> [K]."""
    empty = support.ids < 0
    logps = logits.log_softmax(-1).gather(-1, support.ids.long().clamp(min=0)).masked_fill(empty, -torch.inf)
    pi, mu = (_with_rest(values.exp()) for values in (logps, support.logps))
    return 0.5 * (mu - pi).abs().sum(-1) if kind == "tv" else _kl_sum(mu, pi)


def exact(kind: str, logits: Tensor, old_logits: Tensor) -> Tensor:
    """Divergence over the whole vocabulary: [K, V] logits of π and μ -> [K]."""
    pi, mu = logits.softmax(-1), old_logits.softmax(-1)
    return 0.5 * (mu - pi).abs().sum(-1) if kind == "tv" else _kl_sum(mu, pi)


def _with_rest(probabilities: Tensor) -> Tensor:
    """[K, S] -> [K, S + 1]: one more outcome with what is left of the mass."""
    rest = (1 - probabilities.sum(-1, keepdim=True)).clamp(min=_LEAST)
    return torch.cat([probabilities, rest], -1)


def _kl_sum(mu: Tensor, pi: Tensor) -> Tensor:
    """Σ μ (log μ − log π), 0 where μ is 0."""
    return (torch.special.xlogy(mu, mu) - torch.special.xlogy(mu, pi.clamp(min=_LEAST))).sum(-1)


def _tv(mu: Tensor, pi: Tensor) -> Tensor:
    return (mu - pi).abs()


def _kl(mu: Tensor, pi: Tensor) -> Tensor:
    """Two outcomes. Probabilities of 1 leave the other outcome the least mass instead of none."""
    return _kl_sum(*(torch.stack([p, (1 - p).clamp(min=_LEAST)], -1) for p in (mu, pi)))
