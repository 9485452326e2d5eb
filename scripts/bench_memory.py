"""Peak memory of one off-policy update against the number N of Monte Carlo samples.

Three ways: BGPO (single pass), the exact ELBO ratio in two passes, and the same with all graphs retained. Reported are the
peak of the bytes that autograd saves (deterministic), the growth of the process's peak resident size, each in a process of
its own, and on a GPU the peak of allocated memory. `alone` is the largest single sample by itself.

    scripts/bench_memory --json bench_memory.json
    scripts/bench_memory --shape llada_8b --sequences 1 --length 512     layer shapes of LLaDA-8B, random weights, on a GPU
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from bench_common import llada_policy, make_completions, parser, random_advantages, tiny_policy, write_json

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.diffusion.likelihood import token_logps
from dllm_rl.memory import SavedBytes
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.objectives.base import Objective
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.objectives.elbo_ratio import ELBORatio
from dllm_rl.scoring import Masks, Old

METHODS: dict[str, tuple[type[Objective], str]] = {
    "bgpo": (BGPO, "single_pass"), "two_pass": (ELBORatio, "two_pass"), "retained": (ELBORatio, "retained"),
}
SAMPLES = (1, 4, 16, 64)


def peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(options: argparse.Namespace, method: str, samples: int) -> dict[str, float]:
    """The figures of one method at one N; run in a process of its own, because peaks never fall."""
    torch.set_num_threads(1)
    policy = llada_policy(options.layers) if options.shape == "llada_8b" else tiny_policy(options.hidden_size)
    completions = make_completions(policy, options.sequences, options.prompt_length, options.length)
    masks = Masks(StratifiedCounts(num_samples=samples), seed=0, step=0)
    if method == "alone":
        return {"saved_bytes": largest_alone(policy, completions, masks, samples)}
    make, driver = METHODS[method]
    engine = Engine(completions, masks, options.sequences)
    scores = engine.score(policy)
    old = Old(type(scores)(**{**scores.__dict__, "logps": scores.logps - 0.01 * scores.scored}))
    totals = Totals(len(completions), completions.ids.numel(), options.length)
    advantages = random_advantages(policy, options.sequences)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = peak_resident()
    with SavedBytes() as saved:
        engine.backward(policy, make(), advantages, totals, old=old, driver=driver)
    figures = {"saved_bytes": saved.peak, "rss_growth": peak_resident() - before}
    if torch.cuda.is_available():
        figures["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def largest_alone(policy, completions, masks, samples: int) -> int:  # type: ignore[no-untyped-def]
    peaks = []
    for j in range(samples):
        corruption = masks.draw(policy, completions, torch.full((len(completions),), j, device=policy.device))
        with SavedBytes() as saved:
            token_logps(policy, completions, corruption).sum().backward()
        peaks.append(saved.peak)
    return max(peaks)


def in_process(method: str, samples: int) -> dict[str, float]:
    """`measure` in a fresh process with the options of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", method, str(samples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{method}, N = {samples}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options_of = parser(__doc__, {"hidden_size": 64, "sequences": 16, "prompt_length": 32, "length": 64})
    options_of.add_argument("--shape", choices=("tiny", "llada_8b"), default="tiny")
    options_of.add_argument("--layers", type=int, help="depth of llada_8b, for machines that cannot hold 32 layers")
    options_of.add_argument("--only", nargs=2, metavar=("METHOD", "N"), help=argparse.SUPPRESS)
    options = options_of.parse_args()
    if options.only:
        print(json.dumps(measure(options, options.only[0], int(options.only[1]))))
        return
    print(f"{'':10}" + "".join(f"{f'N = {n}':>14}" for n in SAMPLES))
    found = {method: {n: in_process(method, n) for n in SAMPLES} for method in (*METHODS, "alone")}
    for title, key, unit in (("saved bytes, MB", "saved_bytes", 1e6), ("growth of peak RSS, MB", "rss_growth", 1e6),
                             ("peak GPU memory, GB", "gpu_gb", 1.0)):
        if key not in found["bgpo"][1]:
            continue
        print(title)
        for method, by_samples in found.items():
            if key in by_samples[1]:
                print(f"{method:10}" + "".join(f"{by_samples[n][key] / unit:>14.2f}" for n in SAMPLES))
    for method in METHODS:
        print(f"{method}: N = 64 over the largest single sample: "
              f"{found[method][64]['saved_bytes'] / found['alone'][64]['saved_bytes']:.3f}")
    write_json(options.json, {
        **{method: {str(n): found[method][n]["saved_bytes"] for n in SAMPLES} for method in (*METHODS, "alone")},
        "details": found,
    })


if __name__ == "__main__":
    main()
