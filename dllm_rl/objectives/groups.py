"""Sums over the completions of one prompt. Groups may have any size and lie anywhere in the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def group_sum(values: Tensor, groups: Tensor) -> Tensor:
    """Σ over the group of each entry: [B] values and int64 group numbers -> [B]."""
    number = groups.unique(return_inverse=True)[1]
    return values.new_zeros(len(values)).index_add(0, number, values)[number]


def group_max(values: Tensor, groups: Tensor) -> Tensor:
    """The greatest value in the group of each entry: [B] -> [B]."""
    number = groups.unique(return_inverse=True)[1]
    return values.new_full((len(values),), -torch.inf).scatter_reduce(0, number, values, "amax")[number]


def first_best(values: Tensor, groups: Tensor) -> Tensor:
    """[B] bool: True for the first entry of greatest value in each group, nowhere in a group of -inf."""
    best = (values == group_max(values, groups)) & (values > -torch.inf)
    places = torch.arange(len(values), device=values.device)
    return best & (places.double() == -group_max(-places.double().where(best, torch.inf), groups))


def group_logsumexp(values: Tensor, groups: Tensor) -> Tensor:
    """log Σ exp over the group of each entry: [B] -> [B]; -inf in a group of -inf."""
    shift = _shift(values, groups)
    return group_sum((values - shift).exp(), groups).log() + shift


def group_log_softmax(values: Tensor, groups: Tensor) -> Tensor:
    """log of each entry's share of its group: [B] -> [B]; -inf for entries of -inf."""
    shifted = values - _shift(values, groups)
    return torch.where(shifted == -torch.inf, -torch.inf, shifted - group_sum(shifted.exp(), groups).log())


def _shift(values: Tensor, groups: Tensor) -> Tensor:
    """What keeps exp in range: the greatest value of the group, 0 for a group of -inf."""
    highest = group_max(values, groups)
    return highest.masked_fill(highest == -torch.inf, 0.0)
