"""What BGPO's bookkeeping costs: one update phase against a plain forward, cross-entropy and backward.

Both run on the same network, tensors, masks and micro-batches, in turn in one process; the figure is the median of the
paired time ratios. The plain side gets its corrupted canvases for free and computes logits at every position, as a user's
own training step would.

    scripts/bench_update --json bench_update.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import make_completions, parser, random_advantages, timed, tiny_policy, write_json
from torch import Tensor

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.memory import SavedBytes
from dllm_rl.models.policy import Policy
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.scoring import Masks
from dllm_rl.types import Completions, PromptBatch


class HeadCounter:
    """Counts rows through the output head, and network calls with autograd enabled."""

    def __init__(self, policy: Policy) -> None:
        self.rows = self.grad_calls = 0
        policy.network.get_output_embeddings().register_forward_hook(self._count_rows)
        policy.network.register_forward_hook(self._count_calls)

    def _count_rows(self, _module: torch.nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        self.rows += inputs[0].shape[:-1].numel()

    def _count_calls(self, *_arguments: Any) -> None:
        self.grad_calls += torch.is_grad_enabled()


def plain_update(policy: Policy, completions: Completions, masks: Masks, micro_samples: int) -> Callable[[], None]:
    """Forward, cross-entropy and backward on the canvases that the update uses, drawn beforehand."""
    batch, samples = len(completions), masks.likelihood.num_samples
    chunks = []
    for pairs in torch.arange(batch * samples, device=policy.device).split(micro_samples):
        chunk = completions.rows(pairs % batch)
        corruption = masks.draw(policy, chunk, pairs // batch)
        nothing = torch.zeros_like(chunk.prompt_mask)
        chunks.append((
            torch.cat([chunk.prompt_ids, corruption.canvas], 1), torch.cat([nothing, corruption.scored], 1),
            chunk.ids[corruption.scored],
        ))

    def run() -> None:
        for ids, scored, targets in chunks:
            logits = policy.network(input_ids=ids, use_cache=False).logits
            F.cross_entropy(logits[scored].float(), targets).backward()

    return run


def rollout_grad_calls(policy: Policy, counter: HeadCounter, sequences: int, prompt_length: int, length: int) -> int:
    made = make_completions(policy, sequences, prompt_length, length)
    before = counter.grad_calls
    LowConfidence().sample(policy, PromptBatch(made.prompt_ids, made.prompt_mask, made.sample_ids), length, seed=0, step=0)
    return counter.grad_calls - before


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    policy = tiny_policy(arguments.hidden_size)
    completions = make_completions(policy, arguments.sequences, arguments.prompt_length, arguments.length)
    advantages = random_advantages(policy, arguments.sequences)
    masks = Masks(StratifiedCounts(num_samples=arguments.samples), seed=0, step=0)
    totals = Totals(len(completions), completions.ids.numel(), arguments.length)
    plain = plain_update(policy, completions, masks, arguments.micro_samples)

    def update() -> None:
        with SavedBytes():
            Engine(completions, masks, arguments.micro_samples).backward(policy, BGPO(), advantages, totals)

    counter = HeadCounter(policy)
    update()
    head_rows = counter.rows
    pairs = torch.arange(len(completions) * arguments.samples, device=policy.device)
    drawn = masks.draw(policy, completions.rows(pairs % len(completions)), pairs // len(completions))
    plain()
    times = [(timed(update), timed(plain)) for _ in range(arguments.repeats)]
    return {
        "update_ratio": statistics.median(ours / theirs for ours, theirs in times),
        "update_seconds": statistics.median(ours for ours, _ in times),
        "plain_seconds": statistics.median(theirs for _, theirs in times),
        "head_rows_ratio": head_rows / int(drawn.scored.sum()),
        "rollout_grad_calls": rollout_grad_calls(
            policy, counter, arguments.sequences, arguments.prompt_length, arguments.length
        ),
    }


def main() -> None:
    arguments = parser(__doc__, {"hidden_size": 64, "sequences": 128, "prompt_length": 20, "length": 20, "samples": 16,
                                 "micro_samples": 128, "repeats": 9}).parse_args()
    figures = measure(arguments)
    for name, value in figures.items():
        print(f"{name:20} {value:.4g}")
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
