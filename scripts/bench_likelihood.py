"""Time and memory of one update's forward and backward pass, by where logits are computed.

    everywhere   at every token of prompt and completion, as plain fine-tuning code does
    completion   at every token of the completion
    masked       at the masked tokens that are scored, all at once
    chunked      at those, a chunk at a time: what this library does

One BGPO update of the same completions and corruptions at LLaDA's vocabulary of 126,464 tokens, random weights, layers
checkpointed as those of large models are. Seconds are the median over repetitions that take turns: processor seconds of one
thread on a CPU, wall seconds on a GPU. Peak bytes are above what weights, their gradients and the completions take.
grad_error is the distance to the gradient of `everywhere` relative to its norm, for the worst parameter.

    scripts/bench_likelihood --json bench_likelihood.json
    scripts/bench_likelihood --layers 32 --hidden-size 4096 --dtype bfloat16      LLaDA-8B's shape, on a GPU
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_common import device, llada_policy, make_completions, parser, random_advantages, write_json
from einops import rearrange
from torch import Tensor

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.models import linear_logps
from dllm_rl.models.policy import Policy
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.scoring import Masks
from dllm_rl.types import PromptBatch

MIB = 2**20


@dataclass
class Reading:
    """A denoiser that computes logits where its name says and reads log-probabilities where they are asked for."""

    policy: Policy
    name: str

    @property
    def mask_id(self) -> int:
        return self.policy.mask_id

    @property
    def eos_id(self) -> int:
        return self.policy.eos_id

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        if self.name == "masked":
            return self.policy.logits(prompts, canvas, positions)
        width = prompts.ids.shape[1]
        if self.name == "completion":
            rows = torch.cat([torch.zeros_like(prompts.mask), torch.ones_like(positions)], dim=1)
            logits = rearrange(self.policy.run(rows, **self._inputs(prompts, canvas)), "(b l) v -> b l v", b=len(canvas))
        else:
            logits = self.policy.network(**self._inputs(prompts, canvas)).logits[:, width:]
        return self.policy.without_mask(logits[positions])

    def _inputs(self, prompts: PromptBatch, canvas: Tensor) -> dict[str, Any]:
        return {"input_ids": torch.cat([prompts.ids, canvas], dim=1), "use_cache": False}


READINGS = ("everywhere", "completion", "masked", "chunked")


class Case:
    """One update, ready to be run by any reading."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.policy = llada_policy(options.layers, options.hidden_size, checkpointed=True)
        self.policy.network.to(getattr(torch, options.dtype))
        if options.frozen_head:
            self.policy.network.get_output_embeddings().requires_grad_(False)
        self.completions = make_completions(self.policy, options.sequences, options.prompt_length, options.length)
        self.advantages = random_advantages(self.policy, options.sequences)
        masks = Masks(StratifiedCounts(num_samples=options.samples), seed=0, step=0)
        self.engine = Engine(self.completions, masks, options.micro_samples)
        self.totals = Totals(options.sequences, self.completions.ids.numel(), options.length)
        for parameter in self.trained():
            parameter.grad = torch.zeros_like(parameter)

    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.policy.network.parameters() if parameter.requires_grad]

    def update(self, name: str) -> None:
        reader: Any = self.policy if name == "chunked" else Reading(self.policy, name)
        self.engine.backward(reader, BGPO(), self.advantages, self.totals)

    def gradient(self, name: str) -> list[Tensor]:
        for parameter in self.trained():
            assert parameter.grad is not None
            parameter.grad.zero_()
        self.update(name)
        return [parameter.grad.clone() for parameter in self.trained() if parameter.grad is not None]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True) if other.any())


def clock() -> float:
    if device().type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], None]) -> float:
    start = clock()
    run()
    return clock() - start


def peak_bytes(case: Case, name: str) -> int:
    """Of one update, above what was there before. On a CPU, call it in a fresh process."""
    gc.collect()
    if torch.cuda.is_available():
        case.update(name)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.update(name)
        return torch.cuda.max_memory_allocated() - before
    before = reset_resident()
    case.update(name)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_resident() -> int:
    """Makes the peak resident size the present one (Linux); returns it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def in_process(name: str) -> int:
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--peak", name], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}:\n{done.stderr[-3000:]}")
    return int(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    peaks = {name: in_process(name) for name in READINGS}
    case = Case(options)
    exact = case.gradient("everywhere")
    errors = {name: error(case.gradient(name), exact) for name in READINGS}
    del exact
    times: dict[str, list[float]] = {name: [] for name in READINGS}
    for _ in range(options.repeats):
        for name in READINGS:
            times[name].append(seconds(lambda name=name: case.update(name)))  # type: ignore[misc]
    return {name: {"seconds": statistics.median(times[name]), "peak_bytes": peaks[name], "grad_error": errors[name]}
            for name in READINGS}


def main() -> None:
    options_of = parser(__doc__, {"hidden_size": 256, "layers": 4, "sequences": 4, "prompt_length": 128, "length": 512,
                                  "samples": 1, "micro_samples": 4, "repeats": 5})
    options_of.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options_of.add_argument("--frozen-head", action="store_true", help="as LoRA leaves it: no gradient for the output head")
    options_of.add_argument("--chunk", type=int, default=linear_logps.AT_ONCE, help="logits at a time, default %(default)s")
    options_of.add_argument("--peak", choices=READINGS, help=argparse.SUPPRESS)
    options = options_of.parse_args()
    torch.set_num_threads(1)
    linear_logps.AT_ONCE = options.chunk
    if options.peak:
        print(peak_bytes(Case(options), options.peak))
        return
    found = measure(options)
    base, masked = found["everywhere"], found["masked"]
    print(f"{'':12}{'seconds':>9}{'to masked':>11}{'peak MiB':>10}{'to everywhere':>15}{'grad error':>12}")
    for name, row in found.items():
        print(f"{name:12}{row['seconds']:>9.2f}{row['seconds'] / masked['seconds']:>11.2f}{row['peak_bytes'] / MIB:>10.0f}"
              f"{row['peak_bytes'] / base['peak_bytes']:>15.3f}{row['grad_error']:>12.1e}")
    write_json(options.json, found)


if __name__ == "__main__":
    main()
