"""What an evaluation writes: samples.jsonl as it goes, then results.json, results.md and results.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dllm_rl.evaluation import Evaluation, Sample
from dllm_rl.tracking import complete, lines_of, replace_text

Results = Mapping[str, Mapping[str, Any]]
"""The content of results.json: by task, what `Evaluation.summary` gives, `protocol`, and with a baseline `baseline` and
`comparison`."""
SAMPLES = "samples.jsonl"


class SampleLog:
    """samples.jsonl: every completion, in the order in which they were graded. A killed run loses at most one line."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SAMPLES

    def append(self, task: str, of: str, samples: Sequence[Sample]) -> None:
        """Adds completions; `of` is `model` or `baseline`."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(_line(task, of, sample) for sample in samples)

    def read(self, task: str, of: str) -> list[Sample]:
        """The completions of a policy on a task so far. Half a line at the end is dropped."""
        if not self._path.exists():
            return []
        lines = lines_of(self._path.read_text(encoding="utf-8"))
        if lines and not complete(lines[-1]):
            replace_text(self._path, "".join(lines[:-1]))
            del lines[-1]
        records = [json.loads(line) for line in lines]
        return [Sample(**{key: value for key, value in record.items() if key not in ("task", "of")})
                for record in records if (record["task"], record["of"]) == (task, of)]

    def replace(self, task: str, of: str, samples: Sequence[Sample]) -> None:
        """Writes the completions of a policy on a task anew, in the order of the prompts."""
        others = []
        if self._path.exists():
            lines = lines_of(self._path.read_text(encoding="utf-8"))
            others = [line for line in lines if _owner(line) != (task, of)]
        replace_text(self._path, "".join([*others, *(_line(task, of, sample) for sample in samples)]))

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)


def _line(task: str, of: str, sample: Sample) -> str:
    return json.dumps({"task": task, "of": of, **asdict(sample)}, ensure_ascii=False) + "\n"


def _owner(line: str) -> tuple[str, str]:
    record = json.loads(line)
    return record["task"], record["of"]


HEADERS = ("metric", "prompts", "mean", "95 % interval")
PAIRED_HEADERS = (*HEADERS, "baseline", "difference", "95 % interval", "p")


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The lines of a task's table, under HEADERS, or PAIRED_HEADERS with a baseline."""
    estimates = [*result["metrics"], *result["pass@k"].values()]
    lines = [[row["metric"], str(row["n"]), f"{row['value']:.3f}", _range(row)] for row in estimates]
    if "comparison" not in result:
        return lines
    theirs = result["baseline"]
    values = {row["metric"]: row["value"] for row in [*theirs["metrics"], *theirs["pass@k"].values()]}
    return [line + _against(line[0], values, result["comparison"]) for line in lines]


def _against(metric: str, values: Mapping[str, float], comparison: Mapping[str, Any]) -> list[str]:
    value = f"{values[metric]:.3f}" if metric in values else ""
    found = comparison.get(metric)
    return [value, *((f"{found['delta']:+.3f}", _range(found), f"{found['p']:.2g}") if found else ("", "", ""))]


def _range(row: Mapping[str, float]) -> str:
    return f"[{row['low']:.3f}, {row['high']:.3f}]"


def markdown(results: Results, model: str, baseline: str | None) -> str:
    """The tables of all tasks as a page."""
    parts = [f"# {model}" + (f" against {baseline}" if baseline else "")]
    for name, result in results.items():
        headers = PAIRED_HEADERS if "comparison" in result else HEADERS
        table = [headers, ["---"] * len(headers), *rows(result)]
        parts += [f"## {name} (protocol {result['protocol']})", "\n".join(f"| {' | '.join(line)} |" for line in table),
                  *(f"{mode}: {counts}." for mode, counts in verdict_lines(result).items()),
                  f"{result['nfe']:.1f} forward passes and {result['tokens']['mean']:.1f} tokens per completion, "
                  f"{result['tokens_per_second']:.0f} tokens/s."]
    return "\n\n".join(parts) + "\n"


def verdict_lines(result: Mapping[str, Any]) -> dict[str, str]:
    """By mode, such as `12 correct, 3 wrong`; verdicts that nothing got are left out."""
    return {mode: ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
            for mode, counts in result["verdicts"].items()}


def plot(results: Results, path: Path) -> None:
    """Rewards with their intervals by task, and pass@k where there is more than one k."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several_k = any(len(result["pass@k"]) > 1 for result in results.values())
    figure = Figure(figsize=(10 if several_k else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if several_k else 1, squeeze=False)[0]
    _plot_rewards(results, panels[0])
    if several_k:
        _plot_pass_at_k(results, panels[1])
    figure.savefig(path, dpi=120)


def _plot_rewards(results: Results, axes: Any) -> None:
    bars: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for place, result in enumerate(results.values()):
        for who, found in (("", result), ("baseline, ", result.get("baseline"))):
            for row in found["metrics"] if found else ():
                if row["metric"].endswith("/reward"):
                    bars.setdefault(who + row["metric"].split("/")[0], []).append((place, row))
    width = 0.8 / max(1, len(bars))
    for number, (label, found) in enumerate(bars.items()):
        places = [place + (number - (len(bars) - 1) / 2) * width for place, _ in found]
        errors = [[row["value"] - row["low"] for _, row in found], [row["high"] - row["value"] for _, row in found]]
        axes.bar(places, [row["value"] for _, row in found], width, yerr=errors, capsize=3, label=label)
    axes.set_xticks(range(len(results)), list(results))
    axes.set(ylabel="reward, with 95 % intervals")
    axes.legend()


def _plot_pass_at_k(results: Results, axes: Any) -> None:
    for name, result in results.items():
        for who, found in ((name, result), (f"{name}, baseline", result.get("baseline"))):
            if found and found["pass@k"]:
                ks, estimates = [int(k) for k in found["pass@k"]], list(found["pass@k"].values())
                (line,) = axes.plot(ks, [row["value"] for row in estimates], marker="o", label=who)
                low, high = ([row[end] for row in estimates] for end in ("low", "high"))
                axes.fill_between(ks, low, high, alpha=0.2, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set(xlabel="k", ylabel="pass@k")
    axes.legend()


def write_results(folder: Path, results: Results, model: str, baseline: str | None) -> None:
    """results.json, results.md and results.png."""
    replace_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
    replace_text(folder / "results.md", markdown(results, model, baseline))
    plot(results, folder / "results.png")


def entry(result: Evaluation, protocol: str, prompt: str) -> dict[str, Any]:
    """The entry of a task in results.json; `prompt` is one rendered example."""
    return {**result.summary(), "protocol": protocol, "prompt": prompt}
