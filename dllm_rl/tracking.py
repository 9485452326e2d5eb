"""The run folder: what a run writes, where, and what it prints.

    config.yaml  versions.json  metrics.jsonl  rollouts.jsonl  evaluations.jsonl  checkpoints/  plots/reward.png
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

from dllm_rl import __version__
from dllm_rl.errors import UserError, check

RESUME = ("never", "auto", "overwrite")
LOGS = ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")
PACKAGES = ("torch", "transformers", "accelerate", "einops", "hydra-core", "datasets", "tokenizers", "safetensors")
# Keys that may differ between a run and its continuation: they do not change what a step computes.
FREE_KEYS = (
    "resume", "run_dir", "output_dir", "model.path", "trainer.steps", "trainer.save_every", "trainer.keep",
    "trainer.eval_every", "trainer.micro_samples", "supervised.save_every", "supervised.keep", "supervised.log_every",
    "sandbox.workers", "sandbox.allow_unisolated",
)


class RunFolder:
    """A run's files. `open` checks and creates the folder; nothing is written before it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def claim(path: Path, resume: str, config: Mapping[str, Any], fixed: Sequence[str] = ()) -> None:
        """Checks, without writing anything, that a run with this configuration may use the folder.

        `fixed` names keys that a continuation may not change although other runs may.

        Raises:
            UserError: the folder holds another run, or a run whose configuration differs.
        """
        check(resume in RESUME, "resume", resume, ", ".join(RESUME))
        saved = path / "config.yaml"
        if not saved.exists() or resume == "overwrite":
            return
        if resume == "never":
            raise UserError(f"run_dir={path}: already holds a run; resume=auto continues it, resume=overwrite replaces it, "
                            "run_dir=FOLDER goes elsewhere")
        before, now = _flatten(yaml.safe_load(saved.read_text())), _flatten(config)
        changed = [key for key in sorted(before.keys() | now.keys())
                   if (key not in FREE_KEYS or key in fixed) and before.get(key) != now.get(key)]
        if changed:
            listed = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in changed)
            raise UserError(f"resume=auto: {path} was started with another configuration ({listed})")

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any], from_step: int) -> RunFolder:
        """Creates the folder, or cuts its logs back to the first `from_step` steps to continue from there."""
        folder = cls(path)
        path.mkdir(parents=True, exist_ok=True)
        if from_step == 0:
            folder._clear()
        folder._truncate(from_step)
        replace_text(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        versions = {"python": platform.python_version(), "dllm-rl": __version__, **{p: version(p) for p in PACKAGES}}
        replace_text(path / "versions.json", json.dumps(versions, indent=1))
        return folder

    def log(self, file: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends records to metrics.jsonl, rollouts.jsonl or evaluations.jsonl. Each has a `step`."""
        with (self.path / file).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def read(self, file: str) -> list[dict[str, Any]]:
        path = self.path / file
        return [json.loads(line) for line in lines_of(path.read_text(encoding="utf-8"))] if path.exists() else []

    def _clear(self) -> None:
        for name in LOGS:
            (self.path / name).unlink(missing_ok=True)
        for name in ("checkpoints", "plots"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _truncate(self, steps: int) -> None:
        """Drops what a killed run wrote after its last checkpoint; those steps are done again."""
        for name in LOGS:
            path = self.path / name
            if path.exists():
                lines = lines_of(path.read_text(encoding="utf-8"))
                replace_text(path, "".join(line for line in lines if complete(line) and json.loads(line)["step"] <= steps))

    def plot(self) -> Path:
        """Draws mean reward per step and the evaluations into plots/reward.png."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        metrics = self.read("metrics.jsonl")
        axes.plot([row["step"] for row in metrics], [row["reward/mean"] for row in metrics], label="training reward",
                  color="tab:blue", alpha=0.6)
        evaluations = self.read("evaluations.jsonl")
        for metric, marker in (("greedy/reward", "s"), ("sampled/reward", "o")):
            if points := [(row["step"], row[metric]) for row in evaluations if metric in row]:
                axes.plot(*zip(*points, strict=True), marker=marker, label=f"test, {metric.split('/')[0]}")
        axes.set(xlabel="update", ylabel="reward", ylim=(0, 1.02), title=self.path.name)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        path = self.path / "plots" / "reward.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
        return path


class Reporter:
    """One printed line per step, and below it a progress bar where the output is a terminal."""

    def __init__(self, total: int, done: int) -> None:
        console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("training", total=total, completed=done)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False)
        self._progress.console.file.flush()  # a log file shows each line at once

    def advance(self) -> None:
        self._progress.advance(self._task)


def step_line(metrics: Mapping[str, float], steps: int) -> str:
    """The printed line of one step."""
    parts = [
        f"step {metrics['step']:>4}/{steps}",
        f"reward {metrics['reward/mean']:.3f}",
        *([f"unique {metrics['rollout/unique']}/{metrics['rollout/count']}"] if "rollout/unique" in metrics else []),
        *([f"zero-advantage groups {metrics['reward/zero_advantage_groups']}"]
          if "reward/zero_advantage_groups" in metrics else []),
    ]
    if "loss" in metrics:
        parts += [
            *([f"|δ| {metrics['delta/max_abs']:.3g}"] if "delta/max_abs" in metrics else []),
            f"elbo {metrics['elbo/mean']:.2f}±{metrics['elbo/std']:.2f}",
            f"grad {metrics['grad/norm']:.2f}",
            *([f"explained {metrics['critic/explained_variance']:.2f}"] if "critic/explained_variance" in metrics else []),
            f"saved {metrics['memory/saved_bytes'] / 1e6:.0f} MB",
        ]
    else:
        parts += ["no update: every advantage is 0"]
    parts += [f"rollout {metrics['time/rollout']:.2f}s", f"update {metrics['time/update']:.2f}s",
              f"memory {metrics.get('memory/gpu_gb', metrics['memory/rss_gb']):.2f} GB"]
    return "  ".join(parts)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Prints a table to the terminal."""
    from rich.table import Table

    grid = Table(*headers, title=title)
    for row in rows:
        grid.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(grid)  # a log file has no width to fit


def lines_of(text: str) -> list[str]:
    """The lines with their ends. Unlike `splitlines`, only a line feed ends one: JSON may hold other separators."""
    return list(io.StringIO(text, newline="\n"))


def complete(line: str) -> bool:
    """A killed process may leave half a line at the end."""
    return line.endswith("\n")


def replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
