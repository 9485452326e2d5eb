"""Compares what is learned from one file of scored completions, with no reinforcement-learning loop.

Per seed: a noisy starting model, one `dllm-rl rollout` of it, and from that file one run of every algorithm in each of its
forms, with the same model, optimizer, batches and number of updates. Nothing is tuned: the optimizer is the toolkit's
default for all.

    scripts/compare_offline --seeds 3 --json offline.json

Runs that are complete are not repeated, so that an interrupted comparison continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_algorithms import dllm, finished, interval, prepare_start, slug, summary


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    algorithm: str
    variant: str
    settings: tuple[str, ...]

    def folder(self, out: Path, seed: int) -> Path:
        return out / f"{self.algorithm}-{slug(self.variant)}-seed{seed}"


ARMS = (
    Arm("sft", "best", ()),
    Arm("sft", "best above 0", ("objective.threshold=0",)),
    Arm("vrpo", "canonical", ()),
    Arm("kto", "canonical", ()),
    Arm("kto", "official", ("variant=official",)),
    Arm("dro", "canonical", ()),
    Arm("dro", "official", ("variant=official",)),
    Arm("dro", "group mean", ("objective.value=group_mean", "critic.mdp=none")),
    *(Arm("rpo", f"{partition}, {form}", (f"objective.partition={partition}", f"objective.log_ratio={log_ratio}"))
      for partition in ("ref_weighted_sum", "mc_mean", "ref_weighted_normalised")
      for form, log_ratio in (("official", "mean"), ("canonical", "sum"))),
)
"""The official form of RPO has log-ratios per token, as its code; the canonical one those of the derivation, per
sequence."""


def run_seed(options: argparse.Namespace, seed: int) -> None:
    """The start and the file of a seed, and every algorithm from them."""
    task = (f"task={options.task}", "task.demonstrations_from=noisy")
    start = prepare_start(options.out, task, seed)
    file = options.out / f"scored-{options.prompts}x{options.completions}-seed{seed}.jsonl"
    if not file.exists():
        dllm("rollout", *task, f"seed={seed}", f"model.path={start}", f"output={file}", f"num_prompts={options.prompts}",
             f"group_size={options.completions}")
    for arm in ARMS:
        folder = arm.folder(options.out, seed)
        if not finished(folder, options.steps):
            dllm("train", *task, f"algorithm={arm.algorithm}", *arm.settings, f"data={file}", f"model.path={start}",
                 f"trainer.steps={options.steps}", f"trainer.eval_every={options.steps}", "trainer.save_every=1000",
                 "offline.bad_rows=skip", "offline.small_groups=skip",
                 *(() if arm.algorithm == "sft" else (f"likelihood.num_samples={options.samples}",)), "resume=auto",
                 f"seed={seed}", f"run_dir={folder}")


def table_row(options: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    """Figures of one arm over all seeds."""
    runs = {str(seed): summary(arm.folder(options.out, seed)) for seed in range(options.seeds)}
    row: dict[str, Any] = {"algorithm": arm.algorithm, "variant": arm.variant, "runs": runs}
    for name in ("sampled", "greedy"):
        row[f"{name}_mean"], row[f"{name}_half"] = interval([run[name] for run in runs.values()])
        row[f"{name}_before"] = statistics.mean(run[f"{name}_before"] for run in runs.values())
        rises = [run[name] - run[f"{name}_before"] for run in runs.values()]
        row[f"{name}_rise"], row[f"{name}_rise_half"] = interval(rises)
    row["cpu_seconds"] = statistics.mean(run["cpu_seconds"] for run in runs.values())
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Prints the table: means over seeds with 95 % intervals (Student's t)."""
    print(f"\n{'algorithm':10} {'variant':36} {'sampled: before':>15} {'after':>6} {'rise':>17} {'greedy: before':>15}"
          f" {'after':>6} {'rise':>17} {'CPU s':>6}")
    for row in rows:
        figures = "".join(
            f" {row[f'{name}_before']:>15.3f} {row[f'{name}_mean']:>6.3f} {row[f'{name}_rise']:>+8.3f} ±"
            f" {row[f'{name}_rise_half']:>6.3f}" for name in ("sampled", "greedy")
        )
        print(f"{row['algorithm']:10} {row['variant']:36}{figures} {row['cpu_seconds']:>6.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sudoku", help="a task that can make noisy demonstrations")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 16), metavar="1..15")
    parser.add_argument("--prompts", type=int, default=512, help="prompts in the file")
    parser.add_argument("--completions", type=int, default=4, help="completions per prompt, at least 2")
    parser.add_argument("--steps", type=int, default=96, help="updates, each on all completions of 16 prompts")
    parser.add_argument("--samples", type=int, default=8, help="Monte Carlo samples (SFT has 1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="seeds run at the same time")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare_offline"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [pool.submit(run_seed, options, seed) for seed in range(options.seeds)]
    for job in jobs:
        job.result()
    rows = [table_row(options, arm) for arm in ARMS]
    report(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
