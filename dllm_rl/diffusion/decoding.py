"""The decoding loop that all samplers share: blocks from left to right, each written over several denoising steps.

Every row keeps its own place: a row whose block is complete goes on to the next one, a finished row leaves the batch.
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
from dllm_rl.diffusion.reading import CacheConfig, Guided, Query, Reader
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

    block_length: int | None = 32
    """Tokens per block; a completion shorter than this is one block. null: the whole canvas is one block."""
    denoising_steps: int | None = None
    """Denoising steps for a whole completion. null: half the completion length, two tokens per step."""
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
    """Once a finished block holds EOS, fill the later blocks with EOS instead of decoding them: the text is the same."""
    batch_size: int = 128
    """Rows per forward pass. Never changes a result."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    dtype: str | None = None
    """bfloat16 or float16: sample from a copy of the network in this precision. null: from the network itself."""
    record_logps: bool = False
    """Keep the log-probability of every token at the state in which it was written (`Completions.behaviour_logps`)."""
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
    def approximate(self) -> bool:
        """Whether there is a slower sampler, `exact()`, that this one stands for."""
        return self.cache.approximate or self.dtype is not None

    def exact(self: AnySampler) -> AnySampler:
        """The sampler that this one stands for: one pass over the whole row, in full precision, for each step."""
        return replace(self, cache=CacheConfig(), dtype=None)

    def plan(self, length: int) -> tuple[int, int]:
        """(block length, steps per block) for completions of `length` tokens.

        Raises:
            UserError: the blocks do not tile the completion, or the steps do not divide evenly among them.
        """
        block = min(self.block_length or length, length)
        if length % block:
            raise bad_value("sampler.block_length", block, f"a divisor of task.completion_length={length}")
        blocks = length // block
        steps = self.denoising_steps or max(1, length // 2 // blocks) * blocks
        if steps % blocks or not blocks <= steps <= length:
            valid = f"a multiple of the number of blocks ({blocks}), at most task.completion_length={length}"
            raise bad_value("sampler.denoising_steps", steps, valid)
        return block, steps // blocks

    @torch.no_grad()
    def sample(self, policy: Denoiser, prompts: PromptBatch, length: int, *, seed: int, step: int) -> Completions:
        """Completions of `length` tokens, a pure function of (policy, prompt, seed, step, sample id) for each row."""
        self.plan(length)
        asked: Any = policy
        if self.dtype is not None:
            asked = asked.in_dtype(getattr(torch, self.dtype))
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
        device = logits.device
        if self.suppress_eos:
            logits = logits.index_fill(-1, torch.tensor([eos_id], device=device), -torch.inf)
        own = logits.double()
        law = sampling_law(own, self.temperature, self.top_k, self.top_p)
        probabilities = law.softmax(-1)
        tokens = draw_tokens(probabilities, noise) if self.temperature > 0 else logits.argmax(-1)
        logps = own.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1) if self.record_logps else None
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
        self.sampler, self.keys, self.plan = sampler, keys, sampler.plan(length)
        self.mask_id, self.eos_id = policy.mask_id, policy.eos_id
        self.end_ids: list[int] = list(getattr(policy, "end_ids", [policy.eos_id]))
        self.reader: Reader | Guided = (
            Guided(policy, prompts, length, sampler.cache, sampler.cfg_scale) if sampler.cfg_scale
            else Reader(policy, prompts, length, sampler.cache)
        )
        self.columns = torch.arange(length, device=device)
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
        return self.columns // self.plan[0] == self.block[rows].unsqueeze(1)

    def _write(self, rows: Tensor, masked: Tensor, quota: Tensor, token_noise: Tensor, order_noise: Tensor) -> None:
        """One denoising step of R rows."""
        sampler, canvas = self.sampler, self.canvas[rows]
        if sampler.order in MODEL_FREE:
            scores = order_noise if sampler.order == "random" else -self.columns.double().expand_as(order_noise)
            masked = most_confident(scores, masked, quota)  # the model is asked about these positions only
        start = self.block[rows] * self.plan[0]
        logits = self.reader.logits(Query(rows, canvas, masked, start, start + self.plan[0], self.asked[rows]))
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
        length, size = len(self.columns), self.plan[0]
        complete = rows[~((self.canvas[rows] == self.mask_id) & self._inside(rows)).any(1)]
        if not len(complete):
            return rows
        self.block[complete] += 1
        self.step[complete], self.asked[complete] = 0, 0
        if self.sampler.stop_early:
            behind = self.columns >= self.block[complete].unsqueeze(1) * size
            ended = ((self.canvas[complete] == self.eos_id) & ~behind).any(1)
            self.canvas[complete] = self.canvas[complete].masked_fill(behind & ended.unsqueeze(1), self.eos_id)
            self.block[complete[ended]] = length // size
        return rows[self.block[rows] * size < length]


def even_schedule(plan: tuple[int, int], step: Tensor) -> Tensor:
    """[R]: tokens that LLaDA's schedule writes at step `step` [R] of a block."""
    return torch.tensor(transfer_schedule(*plan), device=step.device)[step]
