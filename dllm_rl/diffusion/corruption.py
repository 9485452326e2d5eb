"""The forward process: which tokens of a completion are hidden, and what that draw weighs.

A *likelihood* is a rule that draws `Corruption`s: what the model sees, which positions are scored, with what weight. The
estimate of a completion's log-likelihood is the mean over its N draws of weight_j x (sum of the scored log-probabilities).
This module has what all rules share; `estimators.py` has the rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.noise import Purpose, fold, make_key, uniform
from dllm_rl.errors import check
from dllm_rl.types import Completions, Corruption

REGIONS = ("canvas", "through_first_eos")
LENGTH_NORMS = ("none", "canvas")


class Draw(NamedTuple):
    """What a rule may look at when it draws one corruption for each of B sequences."""

    completions: Completions
    region: Tensor
    """[B, L] bool: the positions that count."""
    sample: Tensor
    """[B] int64: j, the number of the draw."""
    sequence_key: Tensor
    """[B] int64: one key per sequence, the same for all of its draws."""

    @property
    def length(self) -> Tensor:
        """[B] int64: positions in the region."""
        return self.region.sum(1)

    def key(self, number: Tensor | None = None) -> Tensor:
        """[B] keys of draw number `number` (by default j): draws that share a number share their noise."""
        return fold(self.sequence_key, (self.sample if number is None else number) + 1)

    def point(self, number: Tensor, count: int) -> Tensor:
        """[B] float64 in [0, 1), stratified: point `number` of `count` on a ring with a random start per sequence."""
        return torch.remainder(uniform(self.sequence_key, 1).squeeze(1) + number / count, 1.0)


class Choice(NamedTuple):
    """What a rule decides: see `Corruption`."""

    hidden: Tensor
    """[B, L] bool: positions that the model sees as mask tokens."""
    scored: Tensor
    """[B, L] bool."""
    weight: Tensor
    """[B] float64."""
    prompt_hidden: Tensor | None = None
    """[B, P] bool; None: the prompt is left alone."""


@dataclass
class Likelihood(ABC):
    """A rule that draws corruptions: a member of the Hydra group `likelihood`."""

    num_samples: int = 16
    """N, the BGPO paper's n_t: draws, that is forward passes, per completion. Memory does not depend on it."""
    region: str = "canvas"
    """canvas (BGPO paper): every token of the canvas, the EOS tail included. through_first_eos: only the text and its first
    EOS; the tail is not scored, and hidden from the model (the trajectory shows it where the sampler had written it)."""
    length_norm: str = "none"
    """none (BGPO paper): ELBO terms in nats. canvas (its authors' code): divided by the canvas length."""
    multiple: ClassVar[int] = 1
    """num_samples must be a multiple of it."""

    def __post_init__(self) -> None:
        valid = "an integer >= 1" if self.multiple == 1 else f"a multiple of {self.multiple}, >= {self.multiple}"
        fits = self.num_samples >= 1 and self.num_samples % self.multiple == 0
        check(fits, "likelihood.num_samples", self.num_samples, valid)
        check(self.region in REGIONS, "likelihood.region", self.region, " or ".join(REGIONS))
        check(self.length_norm in LENGTH_NORMS, "likelihood.length_norm", self.length_norm, " or ".join(LENGTH_NORMS))

    @abstractmethod
    def choose(self, draw: Draw) -> Choice:
        """The corruption of each row. Draws nothing but from the keys of `draw`."""

    @property
    def unit(self) -> int:
        """Consecutive draws that belong together: halves of the samples hold whole units."""
        return self.multiple

    @property
    def replays(self) -> bool:
        """Whether every token is scored at the state in which the sampler wrote it."""
        return False

    def fits_blocks(self, block: int) -> bool:
        """Whether no draw hides a token before the block of attention that it scores. A model whose attention goes in blocks
        of `block` tokens, counted from the prompt's start, never saw that."""
        del block
        return False

    def region_of(self, ids: Tensor, eos_id: int) -> Tensor:
        """[B, L] bool: the positions of the completions `ids` [B, L] that count."""
        return through_first(ids, eos_id) if self.region == "through_first_eos" else torch.ones_like(ids, dtype=torch.bool)

    def draw(
        self, completions: Completions, sample: Tensor, *, seed: int, step: int, mask_id: int, eos_id: int
    ) -> Corruption:
        """Corruption number `sample` [B] of each row: a pure function of (seed, step, sample id, j), so that the
        current, old and reference policies see the same masks."""
        ids, prompt = completions.ids, completions.prompt_ids
        key = make_key(seed, Purpose.CORRUPT, step, completions.sample_ids, device=ids.device)
        choice = self.choose(Draw(completions, self.region_of(ids, eos_id), sample, key))
        if choice.prompt_hidden is not None:
            prompt = prompt.masked_fill(choice.prompt_hidden & completions.prompt_mask, mask_id)
        weight = choice.weight / ids.shape[1] if self.length_norm == "canvas" else choice.weight
        return Corruption(ids.masked_fill(choice.hidden, mask_id), choice.scored, weight, prompt)


def through_first(ids: Tensor, *ends: int) -> Tensor:
    """[B, L] bool: True up to and including the first of the tokens `ends`, everywhere if there is none."""
    is_end = torch.isin(ids, torch.tensor(ends, device=ids.device)).long()
    return is_end.cumsum(1) - is_end == 0


def positions(region: Tensor) -> Tensor:
    """[1, L] int64: 0..L-1, on the region's device."""
    return rearrange(torch.arange(region.shape[1], device=region.device), "l -> 1 l")


def stratified_counts(point: Tensor, length: Tensor) -> Tensor:
    """How many tokens to mask: `point` [B] in [0, 1) on {1..length} [B], each number equally likely."""
    return torch.minimum((point * length).long() + 1, length)


def random_subset(region: Tensor, count: Tensor, key: Tensor) -> Tensor:
    """[B, L] bool: for each row `count` [B] random positions of `region` [B, L], a pure function of `key` [B]."""
    return lowest(region, count, uniform(key, region.shape[1]))


def lowest(region: Tensor, count: Tensor, noise: Tensor) -> Tensor:
    """[B, L] bool: for each row the `count` [B] positions of `region` [B, L] with the least `noise` [B, L]."""
    rank = noise.masked_fill(~region, 2.0).argsort(dim=1).argsort(dim=1)
    return rank < rearrange(count, "b -> b 1")


def bernoulli_subset(region: Tensor, ratio: Tensor, key: Tensor) -> Tensor:
    """[B, L] bool: each position of `region` [B, L] with probability `ratio` [B], a pure function of `key` [B]."""
    return region & (uniform(key, region.shape[1]) < rearrange(ratio, "b -> b 1"))


def prompt_noise(draw: Draw) -> Tensor:
    """[B, P] float64 in (0, 1) for the prompt, counted from its end so that padding changes nothing."""
    return uniform(fold(draw.key(), -1), draw.completions.prompt_ids.shape[1]).flip(1)


def inverse(count: Tensor) -> Tensor:
    """[B] float64: 1 / count, 0 where nothing is counted."""
    return torch.where(count > 0, 1 / count.clamp(min=1).double(), 0.0)
