"""Tokens per second of the samplers against LLaDA's published loop, on the same models and prompts in one run.

The reference computes logits at every position of prompt and canvas, for all steps of all blocks, for the batch as given.
Two versions of it are published: with the softmax of the confidences in float64, and since then in the precision of the
logits. The second is the faster one, and the base of all ratios; `same` is about the text of the first, which has no ties of
rounding.
Small models of three tasks answer on a canvas of 256 tokens. Most of it is EOS, as instruction-tuned models leave most of
theirs: that is where stopping early gains, and the ablation says how much each technique does. Times are processor seconds
of one thread on a CPU (neighbours disturb them less) and wall seconds on a GPU; a token is one of the text or its end.

    scripts/bench_sampler --json bench_sampler.json
    scripts/bench_sampler --shape llada_8b --layers 2 --hidden-size 512 --length 64 --prompts 1     V = 126,464
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import device, llada_policy, parser, write_json
from omegaconf import OmegaConf
from torch import Tensor
from transformers.utils import logging

from dllm_rl.diffusion.corruption import through_first
from dllm_rl.diffusion.reading import CacheConfig
from dllm_rl.diffusion.sampler import LowConfidence, Parallel, Sampler
from dllm_rl.models.policy import Policy, load_policy
from dllm_rl.run_folder import latest_checkpoint, resolve_model_path
from dllm_rl.sandbox import SandboxConfig, configure
from dllm_rl.statistics import mean_interval
from dllm_rl.task import Task
from dllm_rl.tasks.code.program_synthesis import ProgramSynthesis
from dllm_rl.tasks.math.word_problems import WordProblems
from dllm_rl.tasks.planning.sudoku import Sudoku
from dllm_rl.types import Completions, PromptBatch

TASKS: dict[str, type[Task]] = {"sudoku": Sudoku, "word_problems": WordProblems, "program_synthesis": ProgramSynthesis}
REFERENCE, REFERENCE64 = "reference: LLaDA's loop", "reference: LLaDA's loop, softmax in float64"
DEFAULT = "sampler=low_confidence (default)"
Draw = Callable[[Policy, PromptBatch, int], Completions]


@torch.no_grad()
def reference(
    policy: Policy, prompts: PromptBatch, length: int, plan: tuple[int, int], temperature: float, float64: bool
) -> Completions:
    """LLaDA's generate.py as published: float64 Gumbel-max and a softmax over prompt and canvas, the top k row by row.

    `plan` is the block length and the steps per block; `float64` says whether that softmax is in float64. Its only
    addition is the attention mask, for prompts of different lengths.
    """
    width, (block, per_block) = prompts.ids.shape[1], plan
    x = F.pad(prompts.ids, (0, length), value=policy.mask_id)
    order = torch.full_like(x, -1)
    attended = F.pad(prompts.mask, (0, length), value=True).long()
    given = {"attention_mask": attended, "position_ids": (attended.cumsum(1) - 1).clamp(min=0)}
    now = 0
    for start in range(width, width + length, block):
        end = start + block
        masked = (x[:, start:end] == policy.mask_id).sum(1, keepdim=True)
        counts = masked // per_block + (torch.arange(per_block, device=x.device) < masked % per_block)
        for step in range(per_block):
            mask_index = x == policy.mask_id
            logits = policy.network(input_ids=x, use_cache=False, **given).logits
            x0 = gumbel_max(logits, temperature).argmax(-1)
            law = (logits.double() if float64 else logits).softmax(-1)
            confidence = law.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
            confidence[:, end:] = -torch.inf
            x0 = torch.where(mask_index, x0, x)
            confidence = torch.where(mask_index, confidence, -torch.inf)
            transfer = torch.zeros_like(mask_index)
            for row in range(len(x)):
                transfer[row, confidence[row].topk(int(counts[row, step])).indices] = True
            x[transfer] = x0[transfer]
            order[transfer], now = now, now + 1
    return Completions(prompts.ids, prompts.mask, prompts.sample_ids, x[:, width:], order[:, width:])


def gumbel_max(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits
    logits = logits.double()
    return logits.exp() / (-torch.rand_like(logits).log()) ** temperature


def configurations(options: argparse.Namespace) -> dict[str, Draw]:
    """Name → how to draw completions. The default adds to the line before it, the others add to the default."""
    plain = LowConfidence(temperature=options.temperature, stop_early=False, batch_size=options.batch)
    default = replace(plain, stop_early=True)
    parallel = Parallel(temperature=options.temperature, batch_size=options.batch)
    samplers: dict[str, Sampler] = {
        "logits at the block's masked positions": plain,
        DEFAULT: default,
        "bfloat16": replace(default, dtype="bfloat16"),
        "cache: prefix": replace(default, cache=CacheConfig("prefix")),
        "cache: dual": replace(default, cache=CacheConfig("dual")),
        "cache: dual, refresh 4": replace(default, cache=CacheConfig("dual", 4)),
        "parallel, threshold 0.9": parallel,
        "parallel, factor 1": replace(parallel, threshold=None, factor=1.0),
        "parallel, at most 4 tokens": replace(parallel, max_tokens=4),
        "sampler=fast_dllm": replace(parallel, cache=CacheConfig("dual")),
        "sampler=fast_dllm, bfloat16": replace(parallel, cache=CacheConfig("dual"), dtype="bfloat16"),
    }

    def published(policy: Policy, prompts: PromptBatch, length: int, float64: bool = False) -> Completions:
        chunks = [prompts.rows(slice(n, n + options.batch)) for n in range(0, len(prompts), options.batch)]
        parts = [reference(policy, chunk, length, plain.plan(length), options.temperature, float64) for chunk in chunks]
        return Completions(*(torch.cat([getattr(part, name) for part in parts])
                             for name in ("prompt_ids", "prompt_mask", "sample_ids", "ids", "unmask_step")))

    def of(sampler: Sampler) -> Draw:
        return lambda policy, prompts, length: sampler.sample(policy, prompts, length, seed=0, step=0)

    references: dict[str, Draw] = {REFERENCE: published, REFERENCE64: partial(published, float64=True)}
    chosen = {name: of(sampler) for name, sampler in samplers.items() if not options.only or name in options.only}
    return references | chosen


@dataclass
class Measured:
    """One configuration on one set of prompts."""

    seconds: list[float]
    tokens: int
    nfe: int
    same: float
    """Share of the text of the reference in float64 that is the same, token by token."""
    correct: list[float]

    def record(self, name: str, base: Measured) -> dict[str, Any]:
        rate, slow = self.tokens / statistics.median(self.seconds), base.tokens / statistics.median(base.seconds)
        interval = mean_interval(self.correct)._asdict() if self.correct else {}
        return {
            "name": name, "tokens_per_second": rate, "nfe_per_token": self.nfe / self.tokens,
            "accuracy": interval.get("value"), "low": interval.get("low"), "high": interval.get("high"),
            "ratio_to_reference": rate / slow, "same_as_reference": self.same,
        }


def clock() -> float:
    if device().type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    policy: Policy, prompts: PromptBatch, length: int, draws: dict[str, Draw], repeats: int,
    grade: Callable[[Completions], list[float]],
) -> dict[str, Measured]:
    """Every configuration in turn, `repeats` times over."""
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    found: dict[str, Completions] = {}
    for _ in range(repeats):
        for name, draw in draws.items():
            start = clock()
            found[name] = draw(policy, prompts, length)
            seconds[name].append(clock() - start)
    exact = found[REFERENCE64].ids
    text = through_first(exact, *policy.stop_ids)
    return {
        name: Measured(
            seconds[name], int(through_first(one.ids, *policy.stop_ids).sum()), int(one.nfe.sum()),
            float(((one.ids == exact) & text).sum() / text.sum()), grade(one),
        ) for name, one in found.items()
    }


def pooled(parts: list[Measured]) -> Measured:
    """Several tasks as one: times, tokens and passes add up."""
    return Measured(
        [sum(times) for times in zip(*(part.seconds for part in parts), strict=True)], sum(part.tokens for part in parts),
        sum(part.nfe for part in parts), statistics.mean(part.same for part in parts),
        [value for part in parts for value in part.correct],
    )


def trained(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the run in `folder` had these settings (where the model came from apart) and is finished."""
    file = folder / "config.yaml"
    config = OmegaConf.load(file) if file.exists() else OmegaConf.create()
    same = all(OmegaConf.select(config, key) == value for key, value in settings.items() if key != "model.path")
    last = latest_checkpoint(folder)
    return same and last is not None and last.name == f"step-{settings['supervised.steps']:06d}"


def trained_policy(name: str, options: argparse.Namespace) -> Policy:
    """A small model of the task, first on its own short canvas, then on the long one.

    It is made where it is missing, half trained, or was made with other settings; the second stage follows the first.
    """
    short, long = options.models / f"{name}-short", options.models / f"{name}-{options.length}"
    sizes = {"model.hidden_size": options.hidden_size, "model.num_layers": options.layers}
    stages = ((short, {**sizes, "supervised.steps": options.short_steps}),
              (long, {"model.path": short, "task.completion_length": options.length, "supervised.batch_size": 16,
                      "supervised.steps": options.long_steps, "optimizer.lr": 2e-3}))
    anew = False
    for folder, settings in stages:
        anew = anew or not trained(folder, settings)
        if anew:
            arguments = [f"{key}={value}" for key, value in settings.items()]
            subprocess.run([sys.executable, "-m", "dllm_rl.cli", "sft", f"task={name}", f"run_dir={folder}",
                            "resume=overwrite", *arguments], check=True)
    policy = load_policy(str(resolve_model_path(str(long))))
    policy.network.to(device())
    return policy


def on_tasks(options: argparse.Namespace, draws: dict[str, Draw]) -> dict[str, Any]:
    measured: dict[str, dict[str, Measured]] = {}
    for name in options.tasks:
        task = TASKS[name](completion_length=options.length)  # type: ignore[call-arg]
        policy, items = trained_policy(name, options), task.prompts("test")[: options.prompts]
        prompts = policy.encode_prompts(items, torch.arange(len(items)))

        def grade(found: Completions, task: Task = task, items: Any = items, policy: Policy = policy) -> list[float]:
            return [float(reward.verdict == "correct") for reward in task.score_batch(items, policy.decode(found.ids))]

        measured[name] = measure(policy, prompts, options.length, draws, options.repeats, grade)
        show(name, records(measured[name]))
    together = {name: pooled([one[name] for one in measured.values()]) for name in draws}
    show("all tasks", records(together))
    return {"configurations": records(together), "tasks": {name: records(one) for name, one in measured.items()}}


def on_llada_shape(options: argparse.Namespace, draws: dict[str, Draw]) -> dict[str, Any]:
    policy = llada_policy(options.layers, options.hidden_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 300, (options.prompts, options.prompt_length), generator=generator)
    prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(len(ids))).to(policy.device)
    found = records(measure(policy, prompts, options.length, draws, options.repeats, lambda _: []))
    show(f"LLaDA-8B's vocabulary, {options.layers} layers of width {options.hidden_size}, random weights", found)
    return {"configurations": found, "shape": {"layers": options.layers, "hidden_size": options.hidden_size}}


def records(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    return [one.record(name, measured[REFERENCE]) for name, one in measured.items()]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n{'':42}{'tokens/s':>10}{'ratio':>8}{'NFE/token':>11}{'same':>7}{'accuracy':>10}", flush=True)
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        print(f"{row['name']:42}{row['tokens_per_second']:>10.1f}{row['ratio_to_reference']:>8.2f}{row['nfe_per_token']:>11.2f}"
              f"{row['same_as_reference']:>7.3f}  {accuracy}", flush=True)


def main() -> None:
    options_of = parser(__doc__, {"hidden_size": 64, "layers": 3, "prompts": 64, "batch": 32, "prompt_length": 32,
                                  "length": 256, "repeats": 1, "short_steps": 800, "long_steps": 1000})
    options_of.add_argument("--shape", choices=("tiny", "llada_8b"), default="tiny")
    options_of.add_argument("--temperature", type=float, default=0.0)
    options_of.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    options_of.add_argument("--only", nargs="+", metavar="NAME", help="these configurations beside the reference")
    options_of.add_argument("--models", type=Path, default=Path("outputs/bench_sampler"), help="where the models are")
    options_of.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one")
    options = options_of.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    configure(SandboxConfig(allow_unisolated=True))  # expressions of a tiny model; bubblewrap is used where it is there
    run = on_tasks if options.shape == "tiny" else on_llada_shape
    found = run(options, configurations(options))
    write_json(options.json, {**found, "device": str(device()), "temperature": options.temperature, "length": options.length,
                              "prompts": options.prompts, "batch": options.batch})


if __name__ == "__main__":
    main()
