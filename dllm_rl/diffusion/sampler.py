"""LLaDA's semi-autoregressive sampler with low-confidence remasking (arXiv 2502.09992, section 2.4 and algorithm 5).

Blocks are decoded from left to right. Within a block every step predicts all masked tokens and keeps the most confident
ones. Training rollouts, evaluation and `dllm-rl generate` all call `sample`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.diffusion.likelihood import Denoiser
from dllm_rl.diffusion.noise import Purpose, fold, make_key, uniform
from dllm_rl.diffusion.unmasking import choose_tokens, most_confident, token_confidence, transfer_schedule
from dllm_rl.errors import bad_value, check
from dllm_rl.types import Completions, PromptBatch

REMASKING = ("low_confidence", "random")


@dataclass
class LowConfidence:
    """Sampler settings (`sampler=low_confidence`)."""

    block_length: int = 32
    """Tokens per block; a completion shorter than this is one block."""
    denoising_steps: int | None = None
    """Forward passes for a whole completion. null: half the completion length, two tokens per step."""
    temperature: float = 1.0
    """0 is greedy."""
    remasking: str = "low_confidence"
    """low_confidence keeps the most probable predictions of a step; random keeps random ones."""
    stop_early: bool = True
    """Once a finished block holds EOS, fill the later blocks with EOS instead of decoding them: the text is the same."""
    batch_size: int = 128
    """Rows per forward pass. Never changes a result."""

    def __post_init__(self) -> None:
        check(self.block_length >= 1, "sampler.block_length", self.block_length, "an integer >= 1")
        steps = self.denoising_steps
        check(steps is None or steps >= 1, "sampler.denoising_steps", steps, "an integer >= 1, or null")
        check(0 <= self.temperature < float("inf"), "sampler.temperature", self.temperature, "a number >= 0")
        check(self.remasking in REMASKING, "sampler.remasking", self.remasking, " or ".join(REMASKING))
        check(self.batch_size >= 1, "sampler.batch_size", self.batch_size, "an integer >= 1")

    def plan(self, length: int) -> tuple[int, int]:
        """(block length, steps per block) for completions of `length` tokens.

        Raises:
            UserError: the blocks do not tile the completion, or the steps do not divide evenly among them.
        """
        block = min(self.block_length, length)
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
        parts = [
            self._sample_batch(policy, prompts.rows(slice(start, start + self.batch_size)), length, seed, step)
            for start in range(0, len(prompts), self.batch_size)
        ]
        ids, unmask_step = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Completions(prompts.ids, prompts.mask, prompts.sample_ids, ids, unmask_step)

    def _sample_batch(
        self, policy: Denoiser, prompts: PromptBatch, length: int, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        block_length, steps_per_block = self.plan(length)
        keys = make_key(seed, Purpose.SAMPLE, step, prompts.sample_ids, device=prompts.ids.device)
        canvas = torch.full((len(prompts), length), policy.mask_id, device=prompts.ids.device)
        unmask_step = torch.full_like(canvas, -1)
        now = 0
        for start in range(0, length, block_length):
            end = start + block_length
            for count in transfer_schedule(block_length, steps_per_block):
                masked = canvas == policy.mask_id
                masked[:, end:] = False
                tokens, confidence = self._predict(policy, prompts, canvas, masked, fold(keys, now))
                write = most_confident(confidence, masked, count)
                canvas = torch.where(write, tokens, canvas)
                unmask_step = torch.where(write, now, unmask_step)
                now += 1
            if self.stop_early and end < length:
                finished = (canvas[:, :end] == policy.eos_id).any(1)
                canvas[finished, end:] = policy.eos_id
                if finished.all():
                    break
        return canvas, unmask_step

    def _predict(
        self, policy: Denoiser, prompts: PromptBatch, canvas: Tensor, masked: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A token and its confidence for every masked position: two [B, L] tensors, meaningless elsewhere."""
        noise = uniform(keys, 2 * canvas.shape[1]).chunk(2, dim=1)
        logits = policy.logits(prompts, canvas, masked)
        chosen = choose_tokens(logits, noise[0][masked], self.temperature)
        if self.remasking == "random":
            confidence = noise[1]
        else:
            confidence = torch.zeros_like(noise[1]).masked_scatter(masked, token_confidence(logits.double(), chosen))
        return canvas.masked_scatter(masked, chosen), confidence


@torch.no_grad()
def reproduces(policy: Denoiser, prompts: PromptBatch, ids: Tensor) -> Tensor:
    """[B] bool: whether greedy decoding gives `ids` [B, L], one token per step, the most confident first.

    That is what `LowConfidence(block_length=L, denoising_steps=L, temperature=0)` decodes, but a row takes no more forward
    passes after its first wrong token.
    """
    right = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    canvas = torch.full_like(ids, policy.mask_id)
    for _ in range(ids.shape[1]):
        if not right.any():
            break
        part = canvas[right]
        masked = part == policy.mask_id
        logits = policy.logits(prompts.rows(right), part, masked)
        chosen = logits.argmax(-1)
        confidence = torch.zeros(part.shape, dtype=torch.float64, device=ids.device).masked_scatter(
            masked, token_confidence(logits.double(), chosen)
        )
        write = most_confident(confidence, masked, 1)
        canvas[right] = torch.where(write, part.masked_scatter(masked, chosen), part)
        right = right & ((canvas == policy.mask_id) | (canvas == ids)).all(1)
    return right
