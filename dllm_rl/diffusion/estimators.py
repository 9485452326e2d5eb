"""Likelihood estimators: the members of the Hydra group `likelihood`.

The exact ELBO of a masked-diffusion model over L positions has equivalent forms (LLaDA, arXiv 2502.09992, eq. 6 and 14;
ESPO, arXiv 2512.03759; BGPO, arXiv 2510.11683, eq. 3-4):

    B(y|x) = E_{t ~ U[0,1], M ~ Bernoulli(t)} [ S(M) / t ]              (Bernoulli, Quadrature)
           = E_{k ~ U{1..L}, |M| = k}         [ L/k S(M) ]              (StratifiedCounts)
           = E_{k ~ U{0..L}, |M| = k}         [ (L+1)/k S(M) ]          (Coupled; 0 for k = 0)

with S(M) the sum over the masked set M of log p(y_i | y with M masked, x). `num_samples` is the number of forward passes
for each of them, so that equal `num_samples` is equal cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.corruption import (
    Choice,
    Draw,
    Likelihood,
    bernoulli_subset,
    inverse,
    positions,
    prompt_noise,
    random_subset,
    stratified_counts,
)
from dllm_rl.diffusion.noise import fold, uniform
from dllm_rl.errors import check


@dataclass
class StratifiedCounts(Likelihood):
    """ELBO with k uniform on 1..L masked tokens and weight L/k, stratified over the N draws (`likelihood=elbo`).

    Its variance is finite; that of the Bernoulli form is not. Source: LLaDA eq. 14; the authors' code of BGPO.
    """

    def choose(self, draw: Draw) -> Choice:
        """k of L tokens, each k equally likely."""
        count = stratified_counts(draw.point(draw.sample, self.num_samples), draw.length)
        masked = random_subset(draw.region, count, draw.key())
        return Choice(masked | ~draw.region, masked, draw.length.double() / count)


@dataclass
class Bernoulli(Likelihood):
    """ELBO with t uniform on [min_ratio, 1], every token masked with probability t, weight 1/t (`likelihood=bernoulli`).

    Source: LLaDA eq. 6, BGPO eq. 3-4. For min_ratio = 0 its variance diverges (the draws with one masked token); for
    min_ratio > 0 it is finite, with a bias of order min_ratio.
    """

    min_ratio: float = 1e-3
    """Least mask ratio t; LLaDA trains with 1e-3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.min_ratio < 1, "likelihood.min_ratio", self.min_ratio, "a number >= 0 and < 1")

    def choose(self, draw: Draw) -> Choice:
        """Every token with probability t."""
        ratio = self.min_ratio + (1 - self.min_ratio) * (1 - draw.point(draw.sample, self.num_samples))
        masked = bernoulli_subset(draw.region, ratio, draw.key())
        return Choice(masked | ~draw.region, masked, 1 / ratio)


@dataclass
class Quadrature(Likelihood):
    """ELBO by Gauss-Legendre quadrature over the mask ratio, Bernoulli masks at each node (`likelihood=quadrature`).

    Draw j uses node j mod `nodes`. At a fixed ratio the expectation is a polynomial of degree L-1, so n nodes are exact in
    expectation iff 2n - 1 >= L - 1, and biased below. Source: GDPO, arXiv 2510.08554 (2 or 3 nodes, one mask each).
    """

    num_samples: int = 3
    nodes: int = 3
    """Quadrature nodes; num_samples is a multiple of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.nodes >= 1, "likelihood.nodes", self.nodes, "an integer >= 1")
        valid = f"a multiple of likelihood.nodes={self.nodes}"
        check(self.num_samples % self.nodes == 0, "likelihood.num_samples", self.num_samples, valid)

    @property
    def unit(self) -> int:
        return self.nodes

    def choose(self, draw: Draw) -> Choice:
        """Every token with the probability of the node."""
        node = draw.sample % self.nodes
        ratios, weights = (values.to(node.device)[node] for values in gauss_legendre(self.nodes))
        masked = bernoulli_subset(draw.region, ratios, draw.key())
        return Choice(masked | ~draw.region, masked, self.nodes * weights / ratios)


def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on (0, 1), float64 [nodes] each: eigenvalues of the Jacobi matrix (Golub and Welsch 1969)."""
    index = torch.arange(1, nodes, dtype=torch.float64)
    off_diagonal = index / (4 * index.square() - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return (values + 1) / 2, vectors[0].square()


@dataclass
class Coupled(Likelihood):
    """ELBO from a mask and its complement: k uniform on 0..L, weights (L+1)/k and (L+1)/(L-k) (`likelihood=coupled`).

    Draws 2p and 2p + 1 are a pair. Every token is scored once per pair. Source: ESPO, arXiv 2512.03759, with the counts
    stratified over the pairs of one sequence instead of over the batch.
    """

    num_samples: int = 2
    multiple: ClassVar[int] = 2

    def choose(self, draw: Draw) -> Choice:
        """A random subset for even draws, its complement for odd ones."""
        pair, second = draw.sample // 2, draw.sample % 2 == 1
        total = draw.length + 1
        count = (draw.point(pair, self.num_samples // 2) * total).long().clamp(max=draw.length)
        first = random_subset(draw.region, count, draw.key(pair))
        masked = torch.where(rearrange(second, "b -> b 1"), draw.region & ~first, first)
        return Choice(masked | ~draw.region, masked, total * inverse(masked.sum(1)))


@dataclass
class CoupledFull(Likelihood):
    """DiffuCoder's coupled estimate of every token: all masked, a mask M, its complement (`likelihood=coupled_full`).

    phi_k = 1/2 [ log p(y_k | all masked) + 1/t log p(y_k | M masked)  or  1/(1-t) log p(y_k | complement masked) ]

    with t uniform on [low, high] and M ~ Bernoulli(t). The weights carry the 3/2 that turns a mean over three draws into
    this. Its expectation is 3/2 of an average log-probability: the source's formula, kept. Source: coupled-GRPO, arXiv
    2506.20639, and its code.
    """

    num_samples: int = 3
    region: str = "through_first_eos"
    low: float = 0.2
    """Least mask ratio."""
    high: float = 0.8
    """Greatest mask ratio."""
    multiple: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.low < 1, "likelihood.low", self.low, "a number > 0 and < 1")
        check(self.low <= self.high < 1, "likelihood.high", self.high, f"a number >= likelihood.low={self.low} and < 1")

    def choose(self, draw: Draw) -> Choice:
        """Everything, a random subset, its complement."""
        triple, member = draw.sample // 3, rearrange(draw.sample % 3, "b -> b 1")
        ratio = self.low + (self.high - self.low) * draw.point(triple, self.num_samples // 3)
        first = bernoulli_subset(draw.region, ratio, draw.key(triple))
        masked = torch.where(member == 0, draw.region, torch.where(member == 1, first, draw.region & ~first))
        share = torch.stack([torch.ones_like(ratio), ratio, 1 - ratio], 1).gather(1, member).squeeze(1)
        return Choice(masked | ~draw.region, masked, 1.5 / share)


@dataclass
class OneStep(Likelihood):
    """Mean-field log-probabilities from one pass with the whole completion masked (`likelihood=one_step`).

    No bound on the likelihood. Prompt tokens are masked with probability `prompt_mask_prob`, anew in each draw. Source:
    diffu-GRPO (d1), arXiv 2504.12216, section 3.2; 0.15 is its training configuration.
    """

    num_samples: int = 1
    region: str = "through_first_eos"
    prompt_mask_prob: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("likelihood.prompt_mask_prob", self.prompt_mask_prob)

    def choose(self, draw: Draw) -> Choice:
        """The whole completion, and a part of the prompt."""
        everything = torch.ones_like(draw.region)
        hidden_prompt = prompt_noise(draw) < self.prompt_mask_prob
        return Choice(everything, draw.region, torch.ones_like(draw.sample, dtype=torch.float64), hidden_prompt)


@dataclass
class Block(Likelihood):
    """Block-wise ELBO, the masks that a semi-autoregressive sampler meets (`likelihood=block`).

    A draw picks one of the nb blocks: blocks before it are visible, blocks after it masked, and within it k uniform on
    1..L_b tokens are masked and scored with weight nb L_b/k. With scored=block and clean_mask_prob=0 that is unbiased for
    the sum over blocks of the ELBO of each block given the earlier ones. scored=masked is SPG's code: every masked
    completion token is scored with weight L/|M|. Source: SPG, arXiv 2510.09541, section 3.3.
    """

    num_samples: int = 2
    region: str = "through_first_eos"
    block_length: int | None = None
    """null: 32, as most samplers have it."""
    scored: str = "block"
    """block | masked."""
    clean_mask_prob: float = 0.0
    """Prompt tokens and tokens of earlier blocks are hidden with this probability; SPG uses 0.15."""
    count_from: str = "completion"
    """completion (SPG): the first block begins with the completion. prompt: with the prompt, whose last tokens may share a
    block with the first of the completion, as attention in blocks has it (SDAR; block_length is then the attention's)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        block = self.block_length
        check(block is None or block >= 1, "likelihood.block_length", block, "an integer >= 1, or null")
        check(self.count_from in ("completion", "prompt"), "likelihood.count_from", self.count_from, "completion or prompt")
        check(self.scored in ("block", "masked"), "likelihood.scored", self.scored, "block or masked")
        check_probability("likelihood.clean_mask_prob", self.clean_mask_prob)

    def fits_blocks(self, block: int) -> bool:
        return self.count_from == "prompt" and block % (self.block_length or 32) == 0 and self.clean_mask_prob == 0

    def choose(self, draw: Draw) -> Choice:
        """A random subset of one block, and all later blocks."""
        size = self.block_length or 32
        before = draw.completions.prompt_mask.sum(1) % size
        before = before if self.count_from == "prompt" else torch.zeros_like(before)
        blocks = (before + draw.length - 1) // size + 1
        chosen = rearrange((draw.point(draw.sample, self.num_samples) * blocks).long(), "b -> b 1")
        owner = (positions(draw.region) + rearrange(before, "b -> b 1")) // size
        inside = draw.region & (owner == chosen)
        length = inside.sum(1)
        key = draw.key()
        count = stratified_counts(uniform(fold(key, 1), 1).squeeze(1), length)
        masked = random_subset(inside, count, fold(key, 2))
        hidden = masked | (owner > chosen) | ~draw.region
        clean = (owner < chosen) & (uniform(fold(key, 3), hidden.shape[1]) < self.clean_mask_prob)
        hidden = hidden | clean
        hidden_prompt = prompt_noise(draw) < self.clean_mask_prob
        if self.scored == "masked":
            scored = hidden & draw.region
            return Choice(hidden, scored, draw.length * inverse(scored.sum(1)), hidden_prompt)
        return Choice(hidden, masked, blocks.double() * length / count, hidden_prompt)


@dataclass
class Trajectory(Likelihood):
    """Log-probability of the tokens at the denoising steps that wrote them (`likelihood=trajectory`).

    The states are those the sampler went through; `steps_per_slice` consecutive steps are scored together from the state
    before the first of them. All slices are scored if num_samples is at least their number, else a stratified choice of
    num_samples slices with weight (number of slices). The choice of positions has no probability here. Sources: TraceRL,
    arXiv 2509.06949 (slices); AGRPO, arXiv 2510.04019 (a choice of steps).
    """

    steps_per_slice: int = 1
    """TraceRL's shrinkage s."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.steps_per_slice >= 1, "likelihood.steps_per_slice", self.steps_per_slice, "an integer >= 1")

    @property
    def replays(self) -> bool:
        return self.steps_per_slice == 1

    def fits_blocks(self, block: int) -> bool:
        del block
        return self.replays

    def choose(self, draw: Draw) -> Choice:
        """What the sampler had not yet written before one of its slices."""
        step = draw.completions.unmask_step
        slices = torch.where(step >= 0, step // self.steps_per_slice, -1)
        choice = one_slice(draw, slices, self.num_samples)
        return choice._replace(scored=choice.scored & draw.region)


@dataclass
class LeftToRight(Likelihood):
    """The exact autoregressive factorisation: each token given all tokens to its left (`likelihood=left_to_right`).

    All positions are scored if num_samples is at least their number, else a stratified choice of num_samples positions with
    weight L. Source: JustGRPO, arXiv 2601.15165.
    """

    region: str = "through_first_eos"

    def fits_blocks(self, block: int) -> bool:
        del block
        return True

    def choose(self, draw: Draw) -> Choice:
        """Everything from one position on."""
        return one_slice(draw, positions(draw.region).masked_fill(~draw.region, -1), self.num_samples)


def elbo_of(attention_block: int | None, num_samples: int, length_norm: str = "none") -> Likelihood:
    """The ELBO of the whole canvas for a model of this attention: in both directions, or causal between blocks."""
    if attention_block is None:
        return StratifiedCounts(num_samples, length_norm=length_norm)
    return Block(num_samples, region="canvas", length_norm=length_norm, block_length=attention_block, count_from="prompt")


def one_slice(draw: Draw, slices: Tensor, num_samples: int) -> Choice:
    """Scores one slice of a completion that was written slice by slice.

    Args:
        slices: [B, L] int64, the slice that wrote each token; -1 for tokens that no slice wrote (always hidden).
        num_samples: N. With N >= the number of slices, draw j is slice j and draws beyond it score nothing.
    """
    total = slices.amax(1) + 1
    every = total <= num_samples
    sampled = torch.minimum((draw.point(draw.sample, num_samples) * total).long(), total - 1)
    number = torch.where(every, torch.where(draw.sample < total, draw.sample, total), sampled)
    weight = torch.where(every, num_samples, total).double()
    current = rearrange(number, "b -> b 1")
    return Choice((slices >= current) | (slices < 0), slices == current, weight)


def check_probability(key: str, value: float) -> None:
    check(0 <= value <= 1, key, value, "a probability from 0 to 1")
