"""The forward process: which tokens of a completion are hidden, and what that draw weighs.

The exact ELBO of a masked-diffusion model has equivalent forms (LLaDA, arXiv 2502.09992, eq. 6; BGPO, arXiv 2510.11683,
eq. 3-4):

    B(y|x) = E_{t ~ U[0,1], mask ~ Bernoulli(t)} [ 1/t * S(M) ]  =  E_{k ~ U{1..L}, |M| = k} [ L/k * S(M) ]

with S(M) the sum of log p(y_i | y with M masked, x) over the masked set M. The count form used here has finite variance;
the Bernoulli form has not (the k = 1 term diverges logarithmically).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.noise import Purpose, make_key, uniform
from dllm_rl.errors import check
from dllm_rl.types import Completions, Corruption

REGIONS = ("canvas", "through_first_eos")
LENGTH_NORMS = ("none", "canvas")


def through_first(ids: Tensor, eos_id: int) -> Tensor:
    """[B, L] bool: True up to and including the first `eos_id`, everywhere if there is none."""
    is_eos = (ids == eos_id).long()
    return is_eos.cumsum(1) - is_eos == 0


def stratified_counts(start: Tensor, sample: Tensor, num_samples: int, length: Tensor) -> Tensor:
    """How many tokens each draw masks.

    Draw j of N takes the point (start + j/N) mod 1: each draw alone is uniform on {1..length}, and the N draws of one
    sequence spread evenly over it.

    Args:
        start: [B] float64 in (0, 1), one random rotation per sequence.
        sample: [B] int64, j of each row.
        num_samples: N.
        length: [B] int64.

    Returns:
        [B] int64 in 1..length.
    """
    point = torch.remainder(start + sample / num_samples, 1.0)
    return torch.minimum((point * length).long() + 1, length)


@dataclass
class StratifiedCounts:
    """Stratified count-based corruption: k uniform on 1..L, weight L/k (`likelihood=elbo`)."""

    num_samples: int = 16
    """N, the BGPO paper's n_t: masks per completion. Memory does not depend on it."""
    region: str = "canvas"
    """canvas (paper): every token of the canvas, the EOS tail included. through_first_eos: only the text and its first
    EOS; the tail is hidden from the model and not scored."""
    length_norm: str = "none"
    """none (paper): l_j in nats. canvas (the authors' code): l_j divided by the canvas length."""

    def __post_init__(self) -> None:
        check(self.num_samples >= 1, "likelihood.num_samples", self.num_samples, "an integer >= 1")
        check(self.region in REGIONS, "likelihood.region", self.region, " or ".join(REGIONS))
        check(self.length_norm in LENGTH_NORMS, "likelihood.length_norm", self.length_norm, " or ".join(LENGTH_NORMS))

    def draw(
        self, completions: Completions, sample: Tensor, *, seed: int, step: int, mask_id: int, eos_id: int
    ) -> Corruption:
        """Corruption number `sample` [B] of each row: a pure function of (seed, step, sample id, j), so that the
        current, old and reference policies see the same masks. The prompt is never masked."""
        ids = completions.ids
        region = torch.ones_like(ids, dtype=torch.bool)
        if self.region == "through_first_eos":
            region = through_first(ids, eos_id)
        length = region.sum(1)

        sequence_key = make_key(seed, Purpose.CORRUPT, step, completions.sample_ids, device=ids.device)
        start = uniform(sequence_key, 1).squeeze(1)
        count = stratified_counts(start, sample, self.num_samples, length)

        draw_key = make_key(seed, Purpose.CORRUPT, step, completions.sample_ids, sample + 1, device=ids.device)
        scored = random_subset(region, count, uniform(draw_key, ids.shape[1]))
        weight = length.double() / count / (ids.shape[1] if self.length_norm == "canvas" else 1)
        return Corruption(ids.masked_fill(scored | ~region, mask_id), scored, weight)


def random_subset(region: Tensor, count: Tensor, noise: Tensor) -> Tensor:
    """[B, L] bool: for each row the `count` [B] positions of `region` [B, L] with the least `noise` [B, L]."""
    rank = noise.masked_fill(~region, 2.0).argsort(dim=1).argsort(dim=1)
    return rank < rearrange(count, "b -> b 1")
