"""Bias, spread and cost of every likelihood estimator on a trained tiny model, against exact values.

The model answers one-step word problems on a canvas of 6 tokens, so that the exact ELBO is a sum over 63 masks. For each
estimator, with the given number of forward passes (NFE) per estimate:

    bias, standard_error   mean of (estimate − exact value) over completions and repetitions, in nats
    std                    standard deviation of one estimate of one completion, averaged over completions
    grad_bias              |mean gradient − gradient of the reference| / |gradient of the reference|; the reference is the
                           elbo estimator with 256 samples
    grad_std               root of the summed variances of the gradient's entries / |gradient of the reference|

`target` names the exact value: the ELBO, or for estimators of another quantity (block-wise ELBO, log-probability of the
trajectory, autoregressive log-likelihood) that quantity. one_step, coupled_full and spg_block estimate no bound of the
log-likelihood: their bias against the ELBO is what they are.

    scripts/estimator_report --json estimators.json
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from bench_common import parser, write_json
from torch import Tensor
from transformers.utils import logging

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.estimators import (
    Bernoulli,
    Block,
    Coupled,
    CoupledFull,
    LeftToRight,
    OneStep,
    Quadrature,
    StratifiedCounts,
    Trajectory,
)
from dllm_rl.diffusion.likelihood import token_logps
from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.models.policy import Policy, load_policy
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.objectives.reinforce import Reinforce
from dllm_rl.run_folder import resolve_model_path
from dllm_rl.scoring import Masks
from dllm_rl.tasks.math.word_problems import WordProblems
from dllm_rl.types import Completions, Corruption

BLOCK = 3


def estimators(samples: int) -> dict[str, tuple[Likelihood, str]]:
    """Each estimator and the exact value it aims at, with about `samples` forward passes."""
    even, threes = 2 * max(1, samples // 2), 3 * max(1, samples // 3)
    return {
        "elbo": (StratifiedCounts(num_samples=samples), "elbo"),
        "bernoulli": (Bernoulli(num_samples=samples), "elbo"),
        "coupled": (Coupled(num_samples=even), "elbo"),
        "quadrature, 2 nodes": (Quadrature(num_samples=even, nodes=2), "elbo"),
        "quadrature, 3 nodes": (Quadrature(num_samples=threes, nodes=3), "elbo"),
        "block": (Block(num_samples=samples, block_length=BLOCK, region="canvas"), "block"),
        "trajectory": (Trajectory(num_samples=max(1, samples // 2)), "trajectory"),
        "left_to_right": (LeftToRight(num_samples=samples, region="canvas"), "left_to_right"),
        "one_step": (OneStep(num_samples=1, region="canvas"), "elbo"),
        "coupled_full": (CoupledFull(num_samples=threes, region="canvas"), "elbo"),
        "spg_block": (Block(num_samples=samples, block_length=BLOCK, region="canvas", scored="masked", clean_mask_prob=0.15),
                      "elbo"),
    }


def trained_policy(folder: Path) -> Policy:
    """The policy in `folder`, fine-tuned there first if it is not."""
    if not (folder / "checkpoints").exists():
        arguments = ["sft", "task=word_problems", f"run_dir={folder}", "resume=auto"]
        subprocess.run([sys.executable, "-m", "dllm_rl.cli", *arguments], check=True)
    return load_policy(str(resolve_model_path(str(folder))))


def sample_completions(policy: Policy, count: int) -> Completions:
    task = WordProblems()
    batch = policy.encode_prompts(task.prompts("test")[:count], torch.arange(count))
    return LowConfidence().sample(policy, batch, task.completion_length, seed=0, step=0)


def repeated(completions: Completions, times: int) -> Completions:
    """Each completion `times` times under different sample ids, side by side."""
    index = torch.arange(len(completions)).repeat_interleave(times)
    return replace(completions.rows(index), sample_ids=torch.arange(len(index)))


@torch.no_grad()
def exact_values(policy: Policy, completions: Completions) -> dict[str, Tensor]:
    """The exact value of each target for every completion: [B] float64."""
    length = completions.ids.shape[1]
    found = {name: torch.zeros(len(completions), dtype=torch.float64) for name in ("elbo", "block")}

    def scored_sum(hidden: Tensor, scored: Tensor) -> Tensor:
        shape = completions.ids.shape
        canvas = completions.ids.masked_fill(hidden.expand(shape), policy.mask_id)
        one = torch.ones(len(completions), dtype=torch.float64)
        return token_logps(policy, completions, Corruption(canvas, scored.expand(shape), one, completions.prompt_ids)).sum(1)

    for bits in product((False, True), repeat=length):
        mask = torch.tensor(bits)
        count = int(mask.sum())
        if count:
            choices = torch.combinations(torch.arange(length), count).shape[0]
            found["elbo"] += scored_sum(mask, mask) / (count * choices)
    for start in range(0, length, BLOCK):
        for bits in product((False, True), repeat=BLOCK):
            inside = torch.zeros(length, dtype=torch.bool)
            inside[start : start + BLOCK] = torch.tensor(bits)
            count = int(inside.sum())
            if count:
                later = torch.arange(length) >= start + BLOCK
                choices = torch.combinations(torch.arange(BLOCK), count).shape[0]
                found["block"] += scored_sum(inside | later, inside) / (count * choices)
    for name, whole in (("trajectory", Trajectory(num_samples=length)),
                        ("left_to_right", LeftToRight(num_samples=length, region="canvas"))):
        found[name] = Engine(completions, Masks(whole, 0, 0), 512).score(policy).terms.mean(1)
    return found


def values(
    policy: Policy, completions: Completions, likelihood: Likelihood, exact: Tensor, repeats: int
) -> dict[str, float]:
    """Bias, its standard error, and the spread of single estimates."""
    many = repeated(completions, repeats)
    terms = Engine(many, Masks(likelihood, 0, 0), 2048).score(policy).terms.mean(1).view(-1, repeats)
    errors = terms - exact.unsqueeze(1)
    return {
        "bias": float(errors.mean()), "standard_error": float((terms.var(1) / repeats).sum().sqrt() / len(terms)),
        "std": float(terms.std(1).mean()),
    }


def gradient(policy: Policy, completions: Completions, likelihood: Likelihood, seed: int) -> Tensor:
    """Gradient of the mean estimate over the completions, as REINFORCE with A = 1 takes it."""
    count, length = completions.ids.shape
    Engine(completions, Masks(likelihood, seed, 0), 512).backward(
        policy, Reinforce(), torch.ones(count), Totals(count, count * length, length)
    )
    flat = torch.cat([parameter.grad.flatten() for parameter in policy.network.parameters()]).double()
    policy.network.zero_grad()
    return flat


def main() -> None:
    options_of = parser(__doc__, {"samples": 4, "completions": 16, "repeats": 400, "gradients": 16})
    options_of.add_argument("--model", type=Path, default=Path("outputs/estimator_report"),
                            help="run folder of a word_problems model; made where missing")
    options = options_of.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    policy = trained_policy(options.model)
    completions = sample_completions(policy, options.completions)
    exact = exact_values(policy, completions)
    print("exact values, mean over completions: " + "  ".join(f"{name} {float(v.mean()):.4f}" for name, v in exact.items()))
    reference = gradient(policy, completions, StratifiedCounts(num_samples=256), seed=1)
    norm = reference.norm()

    print(f"{'estimator':22}{'target':>15}{'NFE':>5}{'bias':>10}{'± s.e.':>9}{'std':>8}{'grad bias':>11}{'grad std':>10}")
    figures = {}
    for name, (likelihood, target) in estimators(options.samples).items():
        row: dict[str, float | str] = {"target": target, "nfe": likelihood.num_samples}
        row |= values(policy, completions, likelihood, exact[target], options.repeats)
        gradients = torch.stack([gradient(policy, completions, likelihood, seed) for seed in range(options.gradients)])
        row["grad_bias"] = float((gradients.mean(0) - reference).norm() / norm)
        row["grad_std"] = float(gradients.var(0).sum().sqrt() / norm)
        figures[name] = row
        print(f"{name:22}{target:>15}{row['nfe']:>5}{row['bias']:>10.4f}{row['standard_error']:>9.4f}{row['std']:>8.3f}"
              f"{row['grad_bias']:>11.3f}{row['grad_std']:>10.3f}", flush=True)
    print("grad bias of an unbiased estimator is about its grad std / sqrt(gradients): the noise of the mean itself.")
    write_json(options.json, {"exact": {name: float(v.mean()) for name, v in exact.items()}, "estimators": figures})


if __name__ == "__main__":
    main()
