"""The measuring scripts at the smallest size: they run, and write the figures that they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_presets import PRESETS, SMALL, good

SCRIPTS = Path(__file__).parents[1] / "scripts"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SIZES = ("--hidden-size", "16", "--sequences", "4", "--prompt-length", "4", "--length", "8")


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compare(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_algorithms

    return compare_algorithms


@pytest.mark.parametrize(("script", "keys"), [
    ("bench_two_pass", {"off_policy_ratio", "on_policy_ratio"}),
    ("bench_update", {"update_ratio", "head_rows_ratio", "rollout_grad_calls"}),
])
def test_benchmarks_write_their_figures(tmp_path: Path, script: str, keys: set[str]) -> None:
    run(script, *SIZES, "--samples", "2", "--repeats", "1", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert keys <= set(figures) and all(value >= 0 for value in figures.values())


def test_the_memory_benchmark_sees_what_is_retained() -> None:
    figures = {method: json.loads(run("bench_memory", *SIZES, "--only", method, "16").splitlines()[-1])["saved_bytes"]
               for method in ("bgpo", "two_pass", "retained", "alone")}
    assert figures["bgpo"] <= 1.02 * figures["alone"] and figures["two_pass"] <= 1.02 * figures["alone"]
    assert figures["retained"] > 10 * figures["alone"]


def test_the_estimator_report_compares_with_exact_values(tmp_path: Path) -> None:
    good(tmp_path, "sft", "task=word_problems", *SMALL, "run_dir=start")
    run("estimator_report", "--model", str(tmp_path / "start"), "--completions", "3", "--repeats", "200", "--gradients", "2",
        "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())["estimators"]
    for name in ("elbo", "coupled", "quadrature, 3 nodes", "block", "trajectory", "left_to_right"):
        row = figures[name]
        assert abs(row["bias"]) < 4.5 * row["standard_error"] + 1e-6, name
        assert row["nfe"] > 0 and row["grad_std"] > 0
    assert abs(figures["one_step"]["bias"]) > 4.5 * figures["one_step"]["standard_error"]


def test_the_comparison_has_every_preset_at_equal_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    module = compare(monkeypatch)
    arms = module.preset_arms(4)
    assert {arm.preset for arm in arms} == set(PRESETS) and {arm.inner_updates for arm in arms} == {1, 4}
    cut = {arm.preset for arm in arms if arm.num_samples == 4}
    assert {"bgpo", "grpo", "agrpo", "justgrpo", "dppo_tv"} <= cut
    assert not cut & {"vrpo_ol", "espo", "spg", "unigrpo", "gdpo", "diffu_grpo", "coupled_grpo", "wd1"}
    names = [arm.name for arm in module.sample_arms(16)]
    assert len(set(names)) == len(names) and "two-pass elbo_ratio, equal cost, N=12" in names


def test_intervals_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, half = compare(monkeypatch).interval([0.2, 0.4, 0.6])
    assert (mean, half) == (pytest.approx(0.4), pytest.approx(4.303 * 0.2 / 3**0.5))
