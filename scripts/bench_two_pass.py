"""What the second pass costs: time of a two-pass ELBO-ratio update over that of a BGPO update, in turn in one process.

Off-policy the first pass evaluates the current policy (a forward pass more for every forward and backward); on-policy its
values are known and it is skipped. The figures are medians of paired ratios.

    scripts/bench_two_pass --json bench_two_pass.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from bench_common import make_completions, parser, random_advantages, timed, tiny_policy, write_json

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.objectives.base import Objective
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.objectives.elbo_ratio import ELBORatio
from dllm_rl.scoring import Masks, Old


def main() -> None:
    options = parser(__doc__, {"hidden_size": 64, "sequences": 64, "prompt_length": 32, "length": 64, "samples": 16,
                               "micro_samples": 64, "repeats": 9}).parse_args()
    torch.set_num_threads(1)
    policy = tiny_policy(options.hidden_size)
    completions = make_completions(policy, options.sequences, options.prompt_length, options.length)
    advantages = random_advantages(policy, options.sequences)
    engine = Engine(completions, Masks(StratifiedCounts(num_samples=options.samples), 0, 0), options.micro_samples)
    sampled_by = Old(engine.score(tiny_policy(options.hidden_size, seed=1)))
    totals = Totals(len(completions), completions.ids.numel(), options.length)

    def update(objective: Objective, old: Old | None) -> Callable[[], object]:
        return lambda: engine.backward(policy, objective, advantages, totals, old=old)

    figures = {}
    for name, old in (("off_policy", sampled_by), ("on_policy", None)):
        two_pass, bgpo = update(ELBORatio(), old), update(BGPO(), old)
        two_pass(), bgpo()
        times = [(timed(two_pass), timed(bgpo)) for _ in range(options.repeats)]
        figures[f"{name}_ratio"] = statistics.median(ours / theirs for ours, theirs in times)
        figures[f"{name}_bgpo_seconds"] = statistics.median(theirs for _, theirs in times)
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}")
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
