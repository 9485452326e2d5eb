"""Every sampler from the command line, and the benchmark that compares them."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dllm_rl.checkpoint import save_checkpoint
from tests.conftest import make_policy
from tests.test_cli import SMALL, bad, good
from tests.test_scripts import run

SAMPLERS = {
    "low_confidence": ("sampler.cfg_scale=0.5", "sampler.suppress_eos_confidence=true"),
    "random_order": ("sampler.record_logps=true",),
    "left_to_right": ("sampler.denoising_steps=20", "sampler.top_k=5"),
    "dream": ("sampler.alg=topk_margin", "sampler.alg_temp=0.1", "sampler.top_p=0.95"),
    "parallel": ("sampler.threshold=null", "sampler.factor=1.0", "sampler.dtype=bfloat16"),
    "fast_dllm": ("sampler.block_length=4", "sampler.cache.refresh=2"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    good(folder, "sft", "task=sudoku", *SMALL, "run_dir=start")
    return folder / "start"


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_trains_and_evaluates(tmp_path: Path, start: Path, name: str) -> None:
    chosen = ("task=sudoku", f"model.path={start}", f"sampler={name}", *SAMPLERS[name])
    good(tmp_path, "train", *chosen, "trainer.steps=1", "trainer.prompts_per_step=2", "trainer.group_size=4",
         "trainer.eval_every=0", "likelihood.num_samples=2", "run_dir=run")
    (metrics,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ("sampler/disagreement" in metrics) == (name in ("parallel", "fast_dllm"))
    good(tmp_path, "evaluate", *chosen, "evaluation.num_prompts=3", "run_dir=evaluation")
    samples = [json.loads(line) for line in (tmp_path / "evaluation" / "samples.jsonl").read_text().splitlines()]
    most = {"low_confidence": 20, "left_to_right": 20, "parallel": 20, "fast_dllm": 20}.get(name, 10)
    assert len(samples) == 6 and all(1 <= sample["nfe"] <= most for sample in samples)


@pytest.mark.parametrize(("arguments", "words"), [
    (["sampler=fast"], ["sampler/fast", "dream", "parallel"]),
    (["sampler.cache.kind=all"], ["sampler.cache.kind=all", "none, prefix, dual, exact"]),
    (["sampler.cache.kind=exact"], ["sampler.cache.kind=exact", "not causal between blocks"]),
    (["sampler=parallel", "sampler.factor=1"], ["sampler.factor=1", "null with sampler.threshold"]),
])
def test_mistakes_get_one_line(tmp_path: Path, start: Path, arguments: list[str], words: list[str]) -> None:
    line = bad(tmp_path, "generate", "task=sudoku", f"model.path={start}", *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("command", ["train", "evaluate", "rollout", "generate"])
def test_what_a_model_cannot_do_is_refused_before_there_is_a_folder(tmp_path: Path, start: Path, command: str) -> None:
    """Refusals that need the model: a cache that only attention in blocks allows, blocks that do not tile the completion."""
    output = {"rollout": ["output=run.jsonl"], "generate": []}.get(command, ["run_dir=run"])
    for settings, words in ((["sampler.cache.kind=exact"], "sampler.cache.kind=exact: must be none, prefix or dual"),
                            (["task.completion_length=40"], "sampler.block_length=32: must be a divisor")):
        line = bad(tmp_path, command, "task=sudoku", f"model.path={start}", *settings, *output)
        assert words in line and not list(tmp_path.iterdir()), line


TRACE = ("algorithm=agrpo", "likelihood.num_samples=20", "sampler=fast_dllm", "sampler.block_length=4")


def test_an_approximate_sampler_records_where_ratios_are_to_it(tmp_path: Path, start: Path) -> None:
    size = ("trainer.steps=1", "trainer.prompts_per_step=1", "trainer.group_size=2", "trainer.eval_every=0")
    for name, settings, records in (("run", (), True), ("exact", ("sampler=low_confidence",), False),
                                    ("slices", ("likelihood.steps_per_slice=2",), False)):
        good(tmp_path, "train", "task=sudoku", f"model.path={start}", *TRACE, *size, *settings, f"run_dir={name}")
        assert ('"behaviour_logps": [' in (tmp_path / name / "rollouts.jsonl").read_text()) == records


@pytest.mark.parametrize(("settings", "words"), [
    (["sampler.cfg_scale=1"], "sampler.cfg_scale=1.0: must be 0 with likelihood=trajectory and a sampler that is not exact"),
    (["objective=dppo_topk_kl"], "objective.divergence=topk_kl: must be binary_tv or binary_kl with likelihood=trajectory"),
])
def test_what_cannot_be_recorded_is_refused(tmp_path: Path, start: Path, settings: list[str], words: str) -> None:
    line = bad(tmp_path, "train", "task=sudoku", f"model.path={start}", *TRACE, *settings, "run_dir=run")
    assert words in line and not list(tmp_path.iterdir()), line


@pytest.mark.parametrize(("settings", "refused"), [
    (["sampler.temperature=0"], True), (["sampler=parallel", "sampler.temperature=0"], True),
    (["sampler=dream", "sampler.temperature=0"], True),
    (["sampler=left_to_right", "sampler.temperature=0", "trainer.group_size=16"], True),
    (["sampler=random_order", "sampler.temperature=0"], False), (["sampler=dream", "sampler.alg=origin"], False),
    (["sampler=dream", "sampler.temperature=0", "sampler.alg_temp=0.5"], False),
    (["sampler.temperature=0", "trainer.group_size=1", "algorithm=sft", "objective=reinforce", "critic.mdp=bandit"], False),
])
def test_rollouts_that_are_all_the_same_are_refused(tmp_path: Path, settings: list[str], refused: bool) -> None:
    line = bad(tmp_path, "train", "task=sudoku", "model.path=nowhere", *settings)
    assert line.startswith("error: sampler.temperature=0.0: must be a number > 0 with trainer.group_size=") == refused, line
    assert refused or "model.path=nowhere" in line


def test_a_continued_run_counts_on(tmp_path: Path, start: Path) -> None:
    """Every completion of a word alone: a temperature near 0 gives one text per prompt, step after step."""
    arguments = ("task=sudoku", f"model.path={start}", "sampler.temperature=1e-6", "trainer.group_size=2", "trainer.steps=6",
                 "trainer.prompts_per_step=1", "trainer.eval_every=0", "trainer.save_every=1", "run_dir=run")
    first = bad(tmp_path, "train", *arguments, "trainer.max_identical_steps=3")
    assert "max_identical_steps=3" in first
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2
    second = bad(tmp_path, "train", *arguments, "trainer.max_identical_steps=3", "resume=auto")
    assert "max_identical_steps=3" in second
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2, "the third such step stops it again"


def test_the_sampler_benchmark_writes_its_figures(tmp_path: Path) -> None:
    file, default = tmp_path / "f.json", "sampler=low_confidence (default)"
    run("bench_sampler", "--tasks", "word_problems", "--hidden-size", "16", "--layers", "1", "--prompts", "4",
        "--short-steps", "5", "--long-steps", "5", "--length", "64", "--models", str(tmp_path), "--json", str(file),
        "--only", default, "sampler=fast_dllm")
    found = json.loads(file.read_text())
    rows = {row["name"]: row for row in found["configurations"]}
    exact = "reference: LLaDA's loop, softmax in float64"
    assert set(rows) == {"reference: LLaDA's loop", exact, default, "sampler=fast_dllm"}
    assert rows["reference: LLaDA's loop"]["ratio_to_reference"] == 1 and rows[exact]["same_as_reference"] == 1
    # The published loop may write mask tokens, which a network that knows nothing still predicts.
    assert rows[default]["same_as_reference"] > 0.9
    assert {"low", "high", "accuracy", "nfe_per_token", "tokens_per_second"} <= rows[default].keys()
    assert found["tasks"]["word_problems"] == found["configurations"]


def test_the_benchmark_takes_no_half_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of steps in the second stage: only that is trained again; another first stage: both."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    bench, stages = importlib.import_module("bench_sampler"), []

    def train(command: list[str], check: bool) -> None:
        assert check and "resume=overwrite" in command
        settings = OmegaConf.from_dotlist(command[4:])
        folder = Path(settings.run_dir)
        stages.append(folder.name)
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(folder, settings.supervised.steps, make_policy(), {}, 1)
        OmegaConf.save(settings, folder / "config.yaml")

    monkeypatch.setattr(bench.subprocess, "run", train)
    options = argparse.Namespace(models=tmp_path, length=64, hidden_size=16, layers=1, short_steps=5, long_steps=5)
    both = ["sudoku-short", "sudoku-64"]
    for changes, expected in (({}, both), ({}, []), ({"long_steps": 7}, both[1:]), ({"hidden_size": 32}, both), ({}, [])):
        for name, value in changes.items():
            setattr(options, name, value)
        bench.trained_policy("sudoku", options)
        assert stages == expected
        stages.clear()
    finished = tmp_path / "sudoku-64" / "checkpoints" / "step-000007"
    finished.rename(finished.with_name("step-000003"))  # killed after its third step
    bench.trained_policy("sudoku", options)
    assert stages == both[1:]
    (tmp_path / "sudoku-short" / "checkpoints" / "step-000005" / "manifest.json").unlink()
    bench.trained_policy("sudoku", options)
    assert stages[1:] == both
