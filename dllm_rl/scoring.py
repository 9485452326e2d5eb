"""Completions under all of their corruptions: drawing, evaluating and recording them, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion import divergence as divergences
from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.divergence import Support
from dllm_rl.diffusion.likelihood import Denoiser, Look, Read, Reader, elbo_terms, scored_logits, token_logps
from dllm_rl.types import Completions, Corruption


@dataclass(frozen=True)
class Masks:
    """Where corruptions come from: everything but the completions and the sample number."""

    likelihood: Likelihood
    seed: int
    step: int
    inner: int = 0
    """Number of the inner update, for methods that draw new masks for each; equal numbers see equal masks."""

    def draw(self, policy: Reader, completions: Completions, sample: Tensor) -> Corruption:
        return self.likelihood.draw(
            completions, sample, seed=self.seed, step=self.step + (self.inner << 32), mask_id=policy.mask_id,
            eos_id=policy.eos_id,
        )


@dataclass(frozen=True)
class Scores:
    """What is known about completions under all N corruptions; no graph."""

    logps: Tensor
    """[B, N, L], 0 where a sample does not score a position."""
    scored: Tensor
    """[B, N, L] bool."""
    weights: Tensor
    """[B, N] float64."""
    mask_ratio: Tensor
    """[B, N] float64: the share of the region's tokens that the model does not see."""
    region: Tensor
    """[B, L] bool."""
    support: Support | None = None
    """[B, N, L, S]: a part of the distribution at each position, kept for top-K divergences from it."""
    divergence: Tensor | None = None
    """[B, N, L]: divergence from the policy that sampled, where the objective asks for one."""

    @property
    def terms(self) -> Tensor:
        """ELBO terms l_j, [B, N]."""
        return elbo_terms(self.logps, self.weights)


@dataclass(frozen=True)
class Old:
    """The policy that sampled, as far as later updates need it."""

    scores: Scores
    policy: Denoiser | None = None
    """A frozen copy, for exact divergences."""


@dataclass(frozen=True)
class Chunk:
    """Some (sequence, sample) pairs with their corruptions."""

    rows: Tensor
    sample: Tensor
    completions: Completions
    corruption: Corruption


class Recorder:
    """Fills `Scores` chunk by chunk, and takes what needs whole distributions while the logits are there.

    `read` says what is read; `top_k` > 0 keeps the support of later divergences; `divergence` names the one to measure from
    `old`.
    """

    def __init__(
        self, completions: Completions, likelihood: Likelihood, policy: Reader, *, read: Read = token_logps, top_k: int = 0,
        divergence: str | None = None, old: Old | None = None,
    ) -> None:
        ids = completions.ids
        shape = (len(ids), likelihood.num_samples)
        self._scored = torch.zeros(*shape, ids.shape[1], dtype=torch.bool, device=ids.device)
        self._weights = torch.zeros(shape, dtype=torch.float64, device=ids.device)
        self._mask_ratio = torch.zeros_like(self._weights)
        self._region = likelihood.region_of(ids, policy.eos_id)
        self._logps: Tensor | None = None
        self._support: Support | None = None
        self._divergence: Tensor | None = None
        self._mask_id, self._top_k = policy.mask_id, top_k
        self._kind = divergence if old else None
        self._old = old
        self._read = read

    def note(self, chunk: Chunk) -> None:
        """Records a corruption without a forward pass."""
        rows, sample, corruption = chunk.rows, chunk.sample, chunk.corruption
        region = self._region[rows]
        hidden = (corruption.canvas == self._mask_id) & region
        self._scored[rows, sample] = corruption.scored
        self._weights[rows, sample] = corruption.weight
        self._mask_ratio[rows, sample] = hidden.sum(1) / region.sum(1).double()

    def forward(self, policy: Reader, chunk: Chunk) -> Tensor:
        """Log-probabilities of a chunk, [C, L], with a graph if autograd is on; their values are recorded."""
        self.note(chunk)

        logps = masked_forward(policy, chunk, self._read, self._look(chunk) if self._top_k or self._kind else None)
        if chunk.corruption.scored.any():
            if self._logps is None:
                self._logps = logps.new_zeros(self._scored.shape)
            self._logps[chunk.rows, chunk.sample] = logps.detach()
        return logps

    def recorded(self, completions: Completions) -> Scores:
        """What the sampler recorded of the tokens, in place of a forward pass; only `note` is needed before."""
        assert completions.behaviour_logps is not None
        values = rearrange(completions.behaviour_logps, "b l -> b 1 l")
        return replace(self.scores(), logps=torch.where(self._scored, values, 0.0))

    def scores(self) -> Scores:
        logps = torch.zeros_like(self._scored, dtype=torch.float64) if self._logps is None else self._logps
        return Scores(logps, self._scored, self._weights, self._mask_ratio, self._region, self._support, self._divergence)

    def _look(self, chunk: Chunk) -> Look:
        """Takes what is needed of the logits of a chunk, some of its scored tokens at a time."""
        places, targets = _places(chunk), chunk.completions.ids[chunk.corruption.scored]
        exact = self._exact_old_logits(chunk) if self._kind and self._kind.startswith("exact") else None

        def look(logits: Tensor, part: slice) -> None:
            where = tuple(index[part] for index in places)
            if self._top_k:
                self._keep_support(where, logits, targets[part])
            if self._kind:
                self._measure(where, logits, None if exact is None else exact[part])

        return look

    def _keep_support(self, where: tuple[Tensor, ...], logits: Tensor, targets: Tensor) -> None:
        ids, logps = divergences.top_k_support(logits, targets, self._top_k)
        if self._support is None:
            shape = (*self._scored.shape, ids.shape[-1])
            self._support = Support(ids.new_full(shape, -1), logps.new_zeros(shape))
        self._support.ids[where] = ids
        self._support.logps[where] = logps

    def _exact_old_logits(self, chunk: Chunk) -> Tensor:
        assert self._old is not None and self._old.policy is not None, "exact divergences need the policy that sampled"
        with torch.no_grad():
            return scored_logits(self._old.policy, chunk.completions, chunk.corruption)

    def _measure(self, where: tuple[Tensor, ...], logits: Tensor, old_logits: Tensor | None) -> None:
        assert self._kind is not None and self._old is not None
        measure = self._kind.split("_")[1]
        if old_logits is not None:
            values = divergences.exact(measure, logits, old_logits)
        else:
            kept = self._old.scores.support
            assert kept is not None, "the first update keeps the support of the later ones"
            values = divergences.top_k(measure, logits, Support(kept.ids[where], kept.logps[where]))
        if self._divergence is None:
            self._divergence = values.new_zeros(self._scored.shape)
        self._divergence[where] = values


def masked_forward(policy: Reader, chunk: Chunk, read: Read = token_logps, look: Look | None = None) -> Tensor:
    """`read` of a chunk, [C, L], without a forward pass for pairs that score nothing."""
    active = chunk.corruption.scored.any(1)
    if active.all():
        return read(policy, chunk.completions, chunk.corruption, look)
    if not active.any():
        return torch.zeros(chunk.corruption.scored.shape, device=active.device)
    logps = read(policy, chunk.completions.rows(active), chunk.corruption.rows(active), look)
    return logps.new_zeros(chunk.corruption.scored.shape).index_put((active,), logps)


def _places(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Row, sample and position of every scored token, in the order of the logits."""
    pair, position = chunk.corruption.scored.nonzero(as_tuple=True)
    return chunk.rows[pair], chunk.sample[pair], position
