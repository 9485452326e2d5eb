"""The measuring scripts at the smallest size: they run, and write the figures that they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
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
    elsewhere = {"ppo", "tracerl", "rpo", "dro", "kto", "vrpo", "sft"}
    assert {arm.preset for arm in arms} == set(PRESETS) - elsewhere and {arm.inner_updates for arm in arms} == {1, 4}
    cut = {arm.preset for arm in arms if arm.num_samples == 4}
    assert {"bgpo", "grpo", "agrpo", "justgrpo", "dppo_tv"} <= cut
    assert not cut & {"vrpo_ol", "espo", "spg", "unigrpo", "gdpo", "diffu_grpo", "coupled_grpo", "wd1"}
    names = [arm.name for arm in module.sample_arms(16)]
    assert len(set(names)) == len(names) and "two-pass elbo_ratio, 3/4 of the samples, N=12" in names


@pytest.mark.heavy
def test_the_critic_is_compared_on_and_off(tmp_path: Path) -> None:
    run("compare_algorithms", "--sweep", "critic", "--task", "word_problems", "--seeds", "1", "--steps", "1",
        "--prompts-per-step", "4", "--max-samples", "2", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "f.json"))
    rows = json.loads((tmp_path / "f.json").read_text())
    assert [row["preset"] for row in rows] == ["ppo", "ppo", "ppo", "tracerl", "bgpo", "bgpo"]
    explained = [len(row["runs"]["0"]["explained_variance"]) for row in rows]
    assert explained == [1, 1, 0, 1, 0, 0]


@pytest.mark.heavy
def test_every_form_of_learning_from_a_file_is_compared(tmp_path: Path) -> None:
    run("compare_offline", "--task", "word_problems", "--seeds", "1", "--prompts", "8", "--steps", "1", "--samples", "2",
        "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "f.json"))
    rows = json.loads((tmp_path / "f.json").read_text())
    assert {row["algorithm"] for row in rows} == {"sft", "vrpo", "kto", "dro", "rpo"}
    assert sum(row["algorithm"] == "rpo" for row in rows) == 6
    for row in rows:
        figures = row["runs"]["0"]
        assert 0 <= figures["sampled_before"] <= 1 and 0 <= figures["sampled"] <= 1 and figures["cpu_seconds"] > 0


def test_a_table_row_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compare(monkeypatch)
    import compare_offline as module

    folders = {arm.folder(tmp_path, 0).name for arm in module.ARMS}
    assert len(folders) == len(module.ARMS) == 14 and not any("," in name or " " in name for name in folders)
    arm = module.ARMS[0]
    for seed, after in ((0, 0.5), (1, 0.7)):
        folder = arm.folder(tmp_path, seed)
        folder.mkdir()
        rows = [{"step": step, "greedy/reward": 0.4, "sampled/reward": value} for step, value in ((0, 0.3), (9, after))]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "metrics.jsonl").write_text(json.dumps({"reward/mean": 0.1, "time/cpu": 2.0}) + "\n")
    row = module.table_row(Namespace(out=tmp_path, seeds=2), arm)
    assert (row["sampled_before"], row["sampled_mean"], row["cpu_seconds"]) == (0.3, pytest.approx(0.6), 2.0)
    assert row["sampled_rise"] == pytest.approx(0.3) and row["greedy_rise"] == pytest.approx(0)
    assert row["sampled_rise_half"] == pytest.approx(12.706 * 0.1)


def test_intervals_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, half = compare(monkeypatch).interval([0.2, 0.4, 0.6])
    assert (mean, half) == (pytest.approx(0.4), pytest.approx(4.303 * 0.2 / 3**0.5))


@pytest.mark.heavy
def test_the_likelihood_benchmark_compares_gradients_and_memory(tmp_path: Path) -> None:
    run("bench_likelihood", "--hidden-size", "128", "--layers", "1", "--sequences", "2", "--prompt-length", "64",
        "--length", "256", "--micro-samples", "2", "--repeats", "1", "--chunk", str(2**22),
        "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["everywhere", "completion", "masked", "chunked"]
    assert all(row["grad_error"] < 1e-5 and row["seconds"] > 0 for row in figures.values())
    if sys.platform == "linux":
        assert figures["chunked"]["peak_bytes"] < 0.3 * figures["everywhere"]["peak_bytes"]
        assert figures["masked"]["peak_bytes"] < figures["everywhere"]["peak_bytes"]
