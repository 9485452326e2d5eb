"""How a sampler looks at the model: a pass over the whole row, a pass over a part of it with the rest remembered, guidance.

Full attention lets every token see every other, so remembered keys and values are out of date as soon as a token is written:
`prefix` and `dual` are approximations (Fast-dLLM, arXiv 2505.22618). `exact` is for models whose attention is causal between
blocks: what lies before the first unfinished block of attention never changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.errors import check
from dllm_rl.types import PromptBatch

CACHES = ("none", "prefix", "dual", "exact")
EXACT_ONLY = ("none, prefix or dual with this model: its attention is not causal between blocks, so that every key depends "
              "on every token")


@dataclass
class CacheConfig:
    """What is remembered between denoising steps (`sampler.cache`)."""

    kind: str = "none"
    """none: every step computes the whole row. prefix: keys and values before the block. dual: also those after it. exact:
    those that cannot change any more, for models with block-causal attention."""
    refresh: int | None = None
    """Steps of a block from one pass over the whole row to the next. null: only the first step of a block."""

    def __post_init__(self) -> None:
        check(self.kind in CACHES, "sampler.cache.kind", self.kind, ", ".join(CACHES))
        fits = self.refresh is None or (self.refresh >= 1 and self.kind in ("prefix", "dual"))
        check(fits, "sampler.cache.refresh", self.refresh, "null, or an integer >= 1 with sampler.cache.kind=prefix or dual")

    @property
    def approximate(self) -> bool:
        return self.kind in ("prefix", "dual") and self.refresh != 1


class BlockCache(Protocol):
    """Keys and values of B rows, as `cache` of a policy gives it; `dllm_rl.models.kv_cache.KeyValueCache` is one.

    Columns count the padded prompt and the canvas: [0, P + L).
    """

    def logits(self, rows: Tensor, canvas: Tensor, positions: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """[K, V] logits at `positions` [R, L] of the rows number `rows` [R]; columns start..end [R] are computed anew."""

    def unsettled(self, rows: Tensor, canvas: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """For block-causal attention: the columns [R], [R] that must be computed to know those up to column `end` [R]."""


class Query(NamedTuple):
    """One step's question about R of the B rows."""

    rows: Tensor
    """[R] int64: their numbers."""
    canvas: Tensor
    """[R, L] int64."""
    positions: Tensor
    """[R, L] bool, K of them True."""
    start: Tensor
    """[R]: first position of the row's block."""
    end: Tensor
    """[R]: one past its last position."""
    step: Tensor
    """[R]: passes already made for this block."""

    def of(self, index: Tensor) -> Query:
        return Query(*(part[index] for part in self))


class Reader:
    """Asks the model and counts its passes."""

    def __init__(self, policy: Any, prompts: PromptBatch, length: int, config: CacheConfig) -> None:
        self._policy, self._prompts, self._config = policy, prompts, config
        self._cache: BlockCache | None = None
        if config.kind != "none":
            self._cache = policy.cache(prompts, length, exact=config.kind == "exact")
        self.passes = torch.zeros(len(prompts), 2, dtype=torch.int64, device=prompts.ids.device)
        """[B, 2]: passes over whole rows, and over parts."""

    def logits(self, query: Query) -> Tensor:
        """[K, V] logits, in row-major order of the positions."""
        if self._cache is None:
            self.passes[query.rows, 0] += 1
            return self._policy_logits(query)
        refresh = query.step == 0 if self._config.refresh is None else query.step % self._config.refresh == 0
        if self._config.kind == "exact":
            refresh = torch.zeros_like(refresh)
        groups = [group for group in (refresh, ~refresh) if group.any()]
        if len(groups) == 1:
            return self._cached(query, bool(refresh[0]))
        # Rows out of step: one pass for those that refresh, one for the others.
        owner = refresh.unsqueeze(1).expand_as(query.positions)[query.positions]
        fresh, other = self._cached(query.of(refresh), True), self._cached(query.of(~refresh), False)
        logits = fresh.new_empty(len(owner), fresh.shape[-1])
        logits[owner], logits[~owner] = fresh, other
        return logits

    def _policy_logits(self, query: Query) -> Tensor:
        everything = len(query.rows) == len(self._prompts)
        prompts = self._prompts if everything else self._prompts.rows(query.rows)
        logits: Tensor = self._policy.logits(prompts, query.canvas, query.positions)
        return logits

    def _cached(self, query: Query, refresh: bool) -> Tensor:
        assert self._cache is not None
        self.passes[query.rows, 0 if refresh else 1] += 1
        width = self._prompts.ids.shape[1]
        start, end = query.start + width, query.end + width
        if refresh:
            start, end = torch.zeros_like(start), torch.full_like(end, width + query.canvas.shape[1])
        elif self._config.kind == "prefix":
            end = torch.full_like(end, width + query.canvas.shape[1])
        elif self._config.kind == "exact":
            start, end = self._cache.unsettled(query.rows, query.canvas, end)
        return self._cache.logits(query.rows, query.canvas, query.positions, start, end)


class Guided:
    """Classifier-free guidance: logits u + (scale + 1)(c - u), u those for a prompt of mask tokens (LLaDA, section A.2)."""

    def __init__(self, policy: Any, prompts: PromptBatch, length: int, config: CacheConfig, scale: float) -> None:
        self._mask_id, self._scale, self._count = policy.mask_id, scale, len(prompts)
        hidden = replace(prompts, ids=prompts.ids.masked_fill(prompts.mask, policy.mask_id))
        both = PromptBatch(*(torch.cat([getattr(part, name) for part in (prompts, hidden)])
                             for name in ("ids", "mask", "sample_ids")))
        self._reader = Reader(policy, both, length, config)

    @property
    def passes(self) -> Tensor:
        return rearrange(self._reader.passes, "(two b) kind -> two b kind", two=2).sum(0)

    def logits(self, query: Query) -> Tensor:
        """[K, V] guided logits, in row-major order of the positions."""
        both = Query(*(torch.cat([part, part]) for part in query))._replace(
            rows=torch.cat([query.rows, query.rows + self._count])
        )
        given, free = self._reader.logits(both).chunk(2)
        logits = free + (self._scale + 1) * (given - free)
        # The mask token has -inf in both, and -inf - -inf is not a number.
        return logits.index_fill(-1, torch.tensor([self._mask_id], device=logits.device), -torch.inf)
