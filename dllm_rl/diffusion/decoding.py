"""The decoding loop that all samplers share: blocks from left to right, each written over several denoising steps.

Every row keeps its own place: a row whose block is complete goes on to the next one, a finished row leaves the batch. Where
attention itself goes in blocks, those are the blocks: counted from the start of the prompt, so that the first one also holds
the prompt's end, and no token is written while an earlier block has masks, as in training (SDAR, arXiv 2510.06303, and its
generate.py; there the last block is filled beyond the completion, here the canvas ends with it).
What differs between samplers is how many tokens a step may write and which positions come first (`sampler.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from dllm_rl.diffusion.likelihood import Denoiser
from dllm_rl.diffusion.noise import Purpose, fold, make_key, uniform
from dllm_rl.diffusion.reading import EXACT_ONLY, CacheConfig, Guided, Query, Reader
from dllm_rl.diffusion.unmasking import (
    LAST,
    MODEL_FREE,
    draw_tokens,
    most_confident,
    position_scores,
    sampling_law,
    transfer_schedule,
)
from dllm_rl.errors import bad_value, check
from dllm_rl.types import Completions, PromptBatch

DTYPES = ("bfloat16", "float16")
AT_ONCE = 2**24
"""Logits that are turned into float64 at a time: 128 MiB."""

AnySampler = TypeVar("AnySampler", bound="Sampler")


class Proposal(NamedTuple):
    """What could be written at K positions."""

    tokens: Tensor
    """[K] int64."""
    scores: Tensor | None
    """[K] float64: how soon, higher first; None where the order does not depend on the model."""
    logps: Tensor | None
    """[K] float64: log-probability of the token under the network's own distribution, if it is recorded."""


@dataclass
class Sampler(ABC):
    """Settings and loop of every sampler: a member of the Hydra group `sampler`."""

    block_length: int | None = None
    """Tokens per block; a completion shorter than this is one block. null: 32 (dream: the whole canvas), or the block of a
    model whose attention goes in blocks, of which any other value must be a divisor."""
    denoising_steps: int | None = None
    """Denoising steps for a whole completion. null: half the completion length, two tokens per step. Where attention goes in
    blocks, a prompt that ends inside one makes one block more, with the steps that it needs of its share."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float | None = None
    """Draw from the likeliest tokens whose probabilities first sum to more than this. null: from all."""
    top_k: int | None = None
    """Draw from this many likeliest tokens. null: from all."""
    cfg_scale: float = 0.0
    """Classifier-free guidance against a prompt of mask tokens; 0: none. Doubles the cost of a step."""
    suppress_eos: bool = False
    """Never write EOS (LLaDA's logits_eos_inf)."""
    suppress_eos_confidence: bool = False
    """Write EOS and ends of a turn after all others of the block (LLaDA's confidence_eos_eot_inf), at any temperature."""
    stop_early: bool = True
    """Once a finished block holds EOS or an end of the turn, fill the later blocks with EOS instead of decoding them: the
    text is the same."""
    batch_size: int = 128
    """Rows per forward pass. Never changes a result."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    dtype: str | None = None
    """bfloat16 or float16: sample from a copy of the network in this precision. null: from the network itself."""
    record_logps: bool = False
    """Keep the log-probability of every token at the state in which it was written (`Completions.behaviour_logps`)."""
    own_block: ClassVar[int | None] = 32
    """Tokens per block where neither `block_length` nor the model says so; None: the whole canvas."""
    judges_law: ClassVar[bool] = False
    """Whether confidence is judged by the tempered and filtered distribution (Dream) or by the network's own (LLaDA)."""

    def __post_init__(self) -> None:
        block, steps = self.block_length, self.denoising_steps
        check(block is None or block >= 1, "sampler.block_length", block, "an integer >= 1, or null")
        check(steps is None or steps >= 1, "sampler.denoising_steps", steps, "an integer >= 1, or null")
        check(0 <= self.temperature < float("inf"), "sampler.temperature", self.temperature, "a number >= 0")
        check(self.top_p is None or 0 < self.top_p <= 1, "sampler.top_p", self.top_p, "a number > 0 and <= 1, or null")
        check(self.top_k is None or self.top_k >= 1, "sampler.top_k", self.top_k, "an integer >= 1, or null")
        check(0 <= self.cfg_scale < float("inf"), "sampler.cfg_scale", self.cfg_scale, "a number >= 0")
        check(self.batch_size >= 1, "sampler.batch_size", self.batch_size, "an integer >= 1")
        check(self.dtype in (None, *DTYPES), "sampler.dtype", self.dtype, f"null, {', '.join(DTYPES)}")
        valid = "false with sampler.cfg_scale > 0: guided logits are not the network's distribution"
        check(not (self.record_logps and self.cfg_scale), "sampler.record_logps", self.record_logps, valid)

    @property
    @abstractmethod
    def order(self) -> str:
        """The rule, among `POSITION_RULES`, for which positions come first."""

    @abstractmethod
    def quota(self, masked: Tensor, step: Tensor, plan: tuple[int, int], noise: Tensor) -> Tensor:
        """[R]: how many tokens each row may write, known before the model is asked; a row with 0 does not ask.

        Args:
            masked: [R, L] bool, what is masked in the row's block.
            step: [R], steps done in this block.
            plan: block length and steps per block.
            noise: [R, L], the numbers that `random` orders by.
        """

    def count(self, scores: Tensor, masked: Tensor, quota: Tensor) -> Tensor:
        """[R]: how many tokens each row writes, with the scores [R, L] known."""
        del scores, masked
        return quota

    def ranked(self, scores: Tensor, noise: Tensor) -> Tensor:
        """[R, L]: the scores that decide which of the positions are written."""
        del noise
        return scores

    @property
    def deterministic(self) -> bool:
        """Whether all completions of a prompt are the same."""
        return self.temperature == 0 and self.order != "random"

    @property
    def approximate(self) -> bool:
        """Whether there is a slower sampler, `exact()`, that this one stands for."""
        return self.cache.approximate or self.dtype is not None

    def approximates(self, policy: Any) -> bool:
        """`approximate`, of a policy that may be in the sampler's precision anyway."""
        changes = self.dtype is not None and not policy.is_in(getattr(torch, self.dtype))
        return changes or replace(self, dtype=None).approximate

    def prepared(self, policy: Any) -> Any:
        """What `sample` asks: the policy in the sampler's precision. Given that, `sample` converts nothing again."""
        return policy if self.dtype is None else policy.in_dtype(getattr(torch, self.dtype))

    def exact(self: AnySampler) -> AnySampler:
        """The sampler that this one stands for: one pass over the whole row, in full precision, for each step."""
        return replace(self, cache=CacheConfig(), dtype=None)

    def check_length(self, length: int) -> None:
        """Refuses what cannot fit completions of `length` tokens whatever the model is: see `check_model`."""
        if self.block_length is not None:
            self.plan(length)

    def check_model(self, policy: Any, length: int) -> None:
        """Refuses, before anything is sampled or written, what this model cannot do for completions of `length` tokens."""
        attention = attention_block(policy)
        self.plan(length, attention)
        kind, caches = self.cache.kind, hasattr(policy, "cache")
        check(kind == "none" or caches, "sampler.cache.kind", kind, "none with this model: it has no cache")
        check(kind != "exact" or attention is not None, "sampler.cache.kind", kind, EXACT_ONLY)

    def block(self, length: int, attention_block: int | None = None) -> int:
        """Tokens per block for completions of `length` tokens; `attention_block` is that of the model."""
        if attention_block is None:
            return min(self.block_length or self.own_block or length, length)
        block = self.block_length or attention_block
        valid = f"null, or a divisor of the {attention_block} tokens in a block of this model's attention"
        check(attention_block % block == 0, "sampler.block_length", block, valid)
        return block

    def plan(self, length: int, attention_block: int | None = None) -> tuple[int, int]:
        """(block length, steps per block) for completions of `length` tokens.

        Raises:
            UserError: the blocks do not tile the completion or a block of attention, or the steps do not divide evenly among
            them.
        """
        block = self.block(length, attention_block)
        tiles = attention_block is not None and self.block_length is None
        if not tiles and length % min(block, length):
            raise bad_value("sampler.block_length", block, f"a divisor of task.completion_length={length}")
        blocks = -(-length // block)
        steps = self.denoising_steps or max(1, block // 2) * blocks
        if steps % blocks or not blocks <= steps <= blocks * block:
            valid = f"a multiple of the number of blocks ({blocks}), at most {blocks * block}"
            raise bad_value("sampler.denoising_steps", steps, valid)
        return block, steps // blocks

    @torch.no_grad()
    def sample(self, policy: Denoiser, prompts: PromptBatch, length: int, *, seed: int, step: int) -> Completions:
        """Completions of `length` tokens, a pure function of (policy, prompt, seed, step, sample id) for each row."""
        asked = self.prepared(policy)
        parts = []
        for start in range(0, len(prompts), self.batch_size):
            chunk = prompts.rows(slice(start, start + self.batch_size))
            parts.append(Decoding(self, asked, chunk, length, make_key(
                seed, Purpose.SAMPLE, step, chunk.sample_ids, device=chunk.ids.device
            )).run())
        ids, unmask_step, passes, logps = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Completions(
            prompts.ids, prompts.mask, prompts.sample_ids, ids, unmask_step, passes, logps if self.record_logps else None
        )

    def propose(self, logits: Tensor, noise: Tensor, eos_id: int, end_ids: list[int]) -> Proposal:
        """Tokens, and how soon each should be written: logits [K, V] and one number in (0, 1) for each row [K]."""
        size = max(1, AT_ONCE // logits.shape[-1])
        parts = [self._propose(*part, eos_id, end_ids) for part in zip(logits.split(size), noise.split(size), strict=True)]
        tokens, scores, logps = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        assert tokens is not None
        return Proposal(tokens, scores, logps)

    def _propose(self, logits: Tensor, noise: Tensor, eos_id: int, end_ids: list[int]) -> Proposal:
        device, whole = logits.device, logits.double()
        own = whole.index_fill(-1, torch.tensor([eos_id], device=device), -torch.inf) if self.suppress_eos else whole
        law = sampling_law(own, self.temperature, self.top_k, self.top_p)
        probabilities = law.softmax(-1)
        tokens = draw_tokens(probabilities, noise) if self.temperature > 0 else own.argmax(-1)
        # Likelihoods know nothing of suppressed tokens, temperatures and filters.
        logps = whole.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1) if self.record_logps else None
        if self.order in MODEL_FREE:
            return Proposal(tokens, None, logps)
        judged = law if self.judges_law else own
        if not self.suppress_eos_confidence:
            judged_probabilities = probabilities if judged is law else judged.softmax(-1)
            return Proposal(tokens, position_scores(self.order, judged_probabilities, tokens), logps)
        # The probabilities of the others are those without the ends, as published; the ends come last at any temperature.
        ends = torch.tensor(end_ids, device=device)
        scores = position_scores(self.order, judged.index_fill(-1, ends, -torch.inf).softmax(-1), tokens)
        return Proposal(tokens, scores.masked_fill(torch.isin(tokens, ends), LAST), logps)


class Decoding:
    """One batch on its way from an empty canvas to completions."""

    def __init__(self, sampler: Sampler, policy: Any, prompts: PromptBatch, length: int, keys: Tensor) -> None:
        batch, device = len(prompts), prompts.ids.device
        self.sampler, self.keys = sampler, keys
        own = attention_block(policy)
        self.plan = sampler.plan(length, own)
        self.mask_id, self.eos_id = policy.mask_id, policy.eos_id
        self.stop_ids = torch.tensor(getattr(policy, "stop_ids", [policy.eos_id]), device=device)
        self.end_ids: list[int] = list(getattr(policy, "end_ids", [policy.eos_id]))
        self.reader: Reader | Guided = (
            Guided(policy, prompts, length, sampler.cache, sampler.cfg_scale) if sampler.cfg_scale
            else Reader(policy, prompts, length, sampler.cache)
        )
        self.columns = torch.arange(length, device=device)
        prompt_lengths = prompts.mask.sum(1)
        self.taken = torch.zeros_like(prompt_lengths) if own is None else prompt_lengths % self.plan[0]
        # Tokens of the prompt in a row's first block.
        self.canvas = torch.full((batch, length), self.mask_id, device=device)
        self.unmask_step = torch.full_like(self.canvas, -1)
        self.logps = torch.zeros(batch, length, dtype=torch.float64, device=device)
        self.block, self.step, self.clock, self.asked, self.written = (
            torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(5)
        )
        # Per row: its block; steps and passes in that block; steps and passes since the beginning.

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, L] tokens, their steps, [B, 2] passes, and [B, L] log-probabilities."""
        rows = torch.arange(len(self.canvas), device=self.canvas.device)
        while len(rows):
            noise = uniform(fold(self.keys[rows], self.clock[rows]), 2 * len(self.columns)).chunk(2, dim=1)
            masked = (self.canvas[rows] == self.mask_id) & self._inside(rows)
            quota = self.sampler.quota(masked, self.step[rows], self.plan, noise[1])
            asking = quota > 0
            if asking.all():
                self._write(rows, masked, quota, *noise)
            elif asking.any():
                self._write(rows[asking], masked[asking], quota[asking], noise[0][asking], noise[1][asking])
            self.step[rows] += 1
            self.clock[rows] += 1
            rows = self._unfinished(rows)
        return self.canvas, self.unmask_step, self.reader.passes, self.logps

    def _inside(self, rows: Tensor) -> Tensor:
        """[R, L] bool: the row's block."""
        start, end = self._bounds(rows)
        return (self.columns >= start.unsqueeze(1)) & (self.columns < end.unsqueeze(1))

    def _bounds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[R], [R]: the first column of the row's block, and the one behind it; both L where the row has no block left."""
        start, length = self.block[rows] * self.plan[0] - self.taken[rows], len(self.columns)
        return start.clamp(0, length), (start + self.plan[0]).clamp(max=length)

    def _write(self, rows: Tensor, masked: Tensor, quota: Tensor, token_noise: Tensor, order_noise: Tensor) -> None:
        """One denoising step of R rows."""
        sampler, canvas = self.sampler, self.canvas[rows]
        if sampler.order in MODEL_FREE:
            scores = order_noise if sampler.order == "random" else -self.columns.double().expand_as(order_noise)
            masked = most_confident(scores, masked, quota)  # the model is asked about these positions only
        logits = self.reader.logits(Query(rows, canvas, masked, *self._bounds(rows), self.asked[rows]))
        found = sampler.propose(logits, token_noise[masked], self.eos_id, self.end_ids)
        if found.scores is None:
            write = masked
        else:
            scores = torch.zeros_like(order_noise).masked_scatter(masked, found.scores)
            write = most_confident(sampler.ranked(scores, order_noise), masked, sampler.count(scores, masked, quota))
        self.canvas[rows] = torch.where(write, canvas.masked_scatter(masked, found.tokens), canvas)
        self.unmask_step[rows] = torch.where(write, self.written[rows].unsqueeze(1), self.unmask_step[rows])
        if found.logps is not None:
            logps = torch.zeros_like(order_noise).masked_scatter(masked, found.logps)
            self.logps[rows] = torch.where(write, logps, self.logps[rows])
        self.asked[rows] += 1
        self.written[rows] += 1

    def _unfinished(self, rows: Tensor) -> Tensor:
        """The rows that have something left to decode; those whose block is complete are moved on."""
        complete = rows[~((self.canvas[rows] == self.mask_id) & self._inside(rows)).any(1)]
        if not len(complete):
            return rows
        self.block[complete] += 1
        self.step[complete], self.asked[complete] = 0, 0
        if self.sampler.stop_early:
            behind = self.columns >= self._bounds(complete)[0].unsqueeze(1)
            ended = (torch.isin(self.canvas[complete], self.stop_ids) & ~behind).any(1)
            self.canvas[complete] = self.canvas[complete].masked_fill(behind & ended.unsqueeze(1), self.eos_id)
            self.block[complete[ended]] = len(self.columns) + 1
        return rows[self._bounds(rows)[0] < len(self.columns)]


def attention_block(policy: Any) -> int | None:
    """Tokens in a block of the model's attention; None where it goes in both directions."""
    rules = getattr(policy, "rules", None)
    return None if rules is None else rules.block_length


def even_schedule(plan: tuple[int, int], step: Tensor) -> Tensor:
    """[R]: tokens that LLaDA's schedule writes at step `step` [R] of a whole block; a part of one is done sooner."""
    return torch.tensor(transfer_schedule(*plan), device=step.device)[step]
