"""Compares algorithms on one task from the same start: a Hydra sweep, a table, a plot and the raw figures.

Every arm gets the same starting model (per seed), prompts, rollout settings, optimizer and number of steps, and at most
`--max-samples` Monte Carlo samples per completion and update (passes for old or reference values, and second passes, come on
top; the CPU seconds have them). Nothing is tuned: the optimizer is the toolkit's default for all.

    scripts/compare_algorithms --seeds 5 --json compare.json              all online presets, 1 and 4 updates per batch
    scripts/compare_algorithms --sweep arms --json arms.json              naive small N, two-pass, BGPO and REINFORCE
    scripts/compare_algorithms --sweep critic --json critic.json          PPO with critic, bandit critic and none; BGPO

Runs that are complete are not repeated, so that an interrupted comparison continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""0.975 quantiles of Student's t with 1, 2, ... degrees of freedom."""
REPOSITORY = Path(__file__).parents[1]
FROM_FILES = ("rpo", "dro", "kto", "vrpo", "sft")
"""Presets that learn from a file of scored completions."""
ALWAYS = ("sampler.position_by=sampled_prob", "resume=auto", "trainer.save_every=1000")


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    preset: str
    num_samples: int | None
    """None: what the preset has."""
    inner_updates: int
    """Updates per rollout batch."""
    extra: tuple[str, ...] = ()
    """Further settings."""

    def folder(self, out: Path, seed: int) -> Path:
        if self.extra:
            return out / f"{slug(self.name)}-seed{seed}"
        return out / f"{self.preset}-n{self.num_samples or 'preset'}-inner{self.inner_updates}-seed{seed}"


def slug(name: str) -> str:
    """A folder name that needs no quoting in a shell or in Hydra."""
    return re.sub(r"\W+", "_", name)


def preset_arms(max_samples: int) -> list[Arm]:
    """Every online preset, on-policy and with 4 updates per batch; presets with more samples are cut to `max_samples`."""
    arms = []
    for path in sorted((REPOSITORY / "conf" / "algorithm").glob("*.yaml")):
        text = path.read_text()
        if path.stem in FROM_FILES or "critic:" in text:
            continue  # compare_offline and --sweep critic have those
        # Presets that say nothing have the elbo estimator's 16; an interpolation is the completion length.
        samples = yaml.safe_load(text).get("likelihood", {}).get("num_samples", 16 if "likelihood: elbo" in text else 1)
        many = not isinstance(samples, int) or samples > max_samples
        arms += [Arm(path.stem, path.stem, max_samples if many else None, inner) for inner in (1, 4)]
    return arms


def sample_arms(max_samples: int) -> list[Arm]:
    """What the number of samples, the second pass and the bound are worth, off-policy.

    Forward-equivalents of an off-policy update with N samples: single pass 3N, two passes 4N (a backward pass counts as two
    forward passes), so an off-policy update of two passes costs the same with 3/4 of the samples. (Of 4
    updates per batch the first is on-policy and needs no second pass: there 3/4 is a little below equal cost.)
    """
    small, equal = max(1, max_samples // 8), max(1, 3 * max_samples // 4)
    plan = [("naive elbo_ratio", "vrpo_ol", small), ("two-pass elbo_ratio", "vrpo_ol", max_samples),
            ("two-pass elbo_ratio, 3/4 of the samples", "vrpo_ol", equal),
            ("BGPO", "bgpo", max_samples), ("BGPO", "bgpo", small),
            ("REINFORCE on ELBO", "reinforce", max_samples), ("REINFORCE on ELBO", "reinforce", small)]
    return [Arm(f"{title}, N={n}", preset, n, 4) for title, preset, n in plan]


def critic_arms(max_samples: int) -> list[Arm]:
    """PPO with its critic on and off on the same trajectory likelihood, TraceRL, and BGPO with as many updates per batch.

    PPO's likelihood has one state per denoising step, whatever `max_samples` is; BGPO has that many masks.
    """
    return [
        Arm("PPO, critic on the trajectory", "ppo", None, 4, ("critic.mdp=trajectory",)),
        Arm("PPO, bandit critic", "ppo", None, 4, ("critic.mdp=bandit",)),
        Arm("PPO, no critic", "ppo", None, 4, ("critic.mdp=none", "advantage.kind=z_score")),
        Arm("TraceRL", "tracerl", None, 1, ("likelihood.steps_per_slice=1", "critic.steps_per_slice=1")),
        Arm("BGPO", "bgpo", max_samples, 1),
        Arm("BGPO", "bgpo", max_samples, 4),
    ]


def dllm(*arguments: str) -> None:
    """`dllm-rl ARGUMENTS`; its output is shown only if it fails."""
    done = subprocess.run([sys.executable, "-m", "dllm_rl.cli", *arguments], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"dllm-rl {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def prepare_start(out: Path, task: tuple[str, ...], seed: int) -> Path:
    """The noisy starting model of a seed, made once."""
    start = out / f"start-seed{seed}"
    if not (start / "checkpoints").exists():
        dllm("sft", *task, f"seed={seed}", f"run_dir={start}", "resume=auto")
    return start


def run_seed(out: Path, task: tuple[str, ...], arms: list[Arm], seed: int, steps: int, prompts: int) -> None:
    """The start of a seed, and from it one Hydra sweep for each number of samples; arms of their own run one by one."""
    start = prepare_start(out, task, seed)
    for arm in (arm for arm in arms if arm.extra and not finished(arm.folder(out, seed), steps)):
        dllm("train", *task, *ALWAYS, f"algorithm={arm.preset}", *arm.extra, f"trainer.steps={steps}", f"seed={seed}",
             f"trainer.inner_updates={arm.inner_updates}",
             f"trainer.prompts_per_step={prompts}", f"trainer.eval_every={steps}", f"model.path={start}",
             f"run_dir={arm.folder(out, seed)}")
    swept = [arm for arm in arms if not arm.extra]
    for samples in sorted({arm.num_samples for arm in swept}, key=str):
        chosen = [arm for arm in swept if arm.num_samples == samples and not finished(arm.folder(out, seed), steps)]
        if not chosen:
            continue
        inner = "${trainer.inner_updates}"
        folder = f"{out}/${{hydra:runtime.choices.algorithm}}-n{samples or 'preset'}-inner{inner}-seed{seed}"
        dllm(
            "train", "-m", *task, *ALWAYS, f"algorithm={','.join(sorted({arm.preset for arm in chosen}))}",
            f"trainer.inner_updates={','.join(str(n) for n in sorted({arm.inner_updates for arm in chosen}))}",
            *([f"likelihood.num_samples={samples}"] if samples else []), f"trainer.steps={steps}",
            f"trainer.prompts_per_step={prompts}", f"trainer.eval_every={steps}", f"seed={seed}", f"model.path={start}",
            f"run_dir={folder}", "hydra.sweep.dir=" + str(out / f"sweep-seed{seed}"),
        )
        print(f"seed {seed}: {len(chosen)} runs with N = {samples or 'of the preset'}", flush=True)


def finished(folder: Path, steps: int) -> bool:
    path = folder / "evaluations.jsonl"
    return path.exists() and any(row["step"] == steps for row in lines(path))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    """Curve, final accuracies and CPU seconds of one run."""
    metrics, evaluations = lines(folder / "metrics.jsonl"), lines(folder / "evaluations.jsonl")
    return {
        "curve": [row["reward/mean"] for row in metrics],
        "greedy": evaluations[-1]["greedy/reward"], "sampled": evaluations[-1]["sampled/reward"],
        "greedy_before": evaluations[0]["greedy/reward"], "sampled_before": evaluations[0]["sampled/reward"],
        "cpu_seconds": sum(row["time/cpu"] for row in metrics),
        "delta_max_abs": max(row.get("delta/max_abs", 0.0) for row in metrics),
        "explained_variance": [row["critic/explained_variance"] for row in metrics if "critic/explained_variance" in row],
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return values[0], float("nan")
    return statistics.mean(values), T975[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def report(results: list[dict[str, Any]], path: Path) -> None:
    """Prints the table and draws the rise of sampled accuracy per arm."""
    print(f"\n{'arm':34} {'updates':>7} {'sampled accuracy':>20} {'sampled rise':>20} {'greedy accuracy':>20}"
          f" {'CPU s':>7}")
    figure = Figure(figsize=(8, 0.28 * len(results) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ordered = sorted(results, key=lambda row: (row["inner_updates"], row["rise_mean"]))
    for height, row in enumerate(ordered):
        print(f"{row['name']:34} {row['inner_updates']:>7} {row['sampled_mean']:>12.3f} ± {row['sampled_half']:.3f}"
              f" {row['rise_mean']:>+12.3f} ± {row['rise_half']:.3f}"
              f" {row['greedy_mean']:>12.3f} ± {row['greedy_half']:.3f} {row['cpu_seconds']:>7.0f}")
        axes.errorbar(row["rise_mean"], height, xerr=row["rise_half"], fmt="o", color=f"C{row['inner_updates'] // 4}")
    axes.set_yticks(range(len(ordered)), [f"{row['name']} ({row['inner_updates']})" for row in ordered], fontsize=7)
    axes.axvline(0, color="gray", ls=":")
    axes.set(xlabel="rise of sampled accuracy, mean and 95 % interval over seeds; in brackets: updates per batch")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", choices=("presets", "arms", "critic"), default="presets")
    parser.add_argument("--task", default="sudoku", help="a task that can make noisy demonstrations")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, len(T975) + 2), metavar="1..15")
    parser.add_argument("--steps", type=int, default=40, help="rollout batches per run")
    parser.add_argument("--prompts-per-step", type=int, default=16, help="with 8 completions each")
    parser.add_argument("--max-samples", type=int, help="Monte Carlo samples per completion; 4 for presets, else 16")
    parser.add_argument("--only", nargs="*", help="only these presets")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="seeds run at the same time")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    max_samples = options.max_samples or (4 if options.sweep == "presets" else 16)
    arms = {"presets": preset_arms, "arms": sample_arms, "critic": critic_arms}[options.sweep](max_samples)
    task = (f"task={options.task}", "task.demonstrations_from=noisy")
    arms = [arm for arm in arms if not options.only or arm.name in options.only]
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [pool.submit(run_seed, options.out, task, arms, seed, options.steps, options.prompts_per_step)
                for seed in range(options.seeds)]
    for job in jobs:
        job.result()

    results = []
    for arm in arms:
        runs = {str(seed): summary(arm.folder(options.out, seed)) for seed in range(options.seeds)}
        row: dict[str, Any] = {**asdict(arm), "runs": runs}
        for name in ("sampled", "greedy"):
            row[f"{name}_mean"], row[f"{name}_half"] = interval([run[name] for run in runs.values()])
        # The starts of the seeds differ by more than the arms do; the rise over its own start does not carry that.
        row["rise_mean"], row["rise_half"] = interval([run["sampled"] - run["sampled_before"] for run in runs.values()])
        row["cpu_seconds"] = statistics.mean(run["cpu_seconds"] for run in runs.values())
        results.append(row)
    plot = options.out / f"{options.sweep}.png"
    report(results, plot)
    print(f"plot: {plot}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
