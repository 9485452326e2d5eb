"""What an objective reads and returns. B sequences, n Monte Carlo samples in this chunk, L completion length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """One chunk of Monte Carlo samples.

    Example: one sequence, two samples of three positions: `logps` [1, 2, 3], `weights=[[3.0, 1.5]]`, `advantages=[1.0]`
    """

    logps: Tensor
    """[B, n, L]: current log-probabilities, 0 where a sample does not score a position. Carries the graph."""
    old_logps: Tensor
    """[B, n, L]: the same corruptions under the policy that sampled; no graph."""
    weights: Tensor
    """[B, n]: weight of each ELBO term."""
    advantages: Tensor
    """[B]."""
    num_terms: float
    """B x N of the whole update over all chunks and processes: the loss is a sum divided by this number, so that chunks
    of any size add up to the same gradient."""


class LossOutput(NamedTuple):
    """The chunk's share of the loss (minimised), and its share of each metric (shares add up over chunks)."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """A pure function of log-probabilities and advantages: a member of the Hydra group `objective`."""

    separable: ClassVar[bool]
    """True: the loss is a sum over Monte Carlo samples of functions of one sample each."""

    def loss(self, inputs: LossInputs) -> LossOutput: ...
