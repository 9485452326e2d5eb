"""The commands as a user runs them, from a folder that is not the repository.

Most calls share this process, because importing torch and transformers takes seconds; what depends on the process itself
(`python -m`, being killed) gets its own.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from dllm_rl import evaluation
from dllm_rl.cli import main
from dllm_rl.config import GROUPS

REPOSITORY = Path(__file__).parents[1]
SMALL = ("model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "supervised.steps=4")
SHORT = ("trainer.steps=2", "trainer.prompts_per_step=2", "trainer.group_size=2", "evaluation.num_prompts=4",
         "likelihood.num_samples=2")


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def dllm(folder: Path, *arguments: str) -> Result:
    """`dllm-rl ARGUMENTS` in `folder`."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["dllm-rl", *arguments])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def good(folder: Path, *arguments: str) -> str:
    done = dllm(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bad(folder: Path, *arguments: str) -> str:
    """The one line of an error of the user's."""
    done = dllm(folder, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
    return done.stderr


def module(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m dllm_rl.NAME ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"dllm_rl.{name}", *arguments], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of `dllm-rl sft` with a network that knows nothing."""
    folder = tmp_path_factory.mktemp("sft")
    good(folder, "sft", "task=sudoku", *SMALL, "run_dir=start")
    return folder / "start"


def test_help_lists_commands_and_groups(tmp_path: Path) -> None:
    text = good(tmp_path, "--help")
    assert all(command in text for command in ("sft", "train", "evaluate", "generate"))
    text = good(tmp_path, "train", "--help")
    for line in ("algorithm: agrpo, bgpo", "likelihood: bernoulli, block, coupled",
                 "sampler: dream, fast_dllm, left_to_right, low_confidence, parallel, random_order",
                 "task: countdown, gsm8k, humaneval, math, mbpp, program_synthesis, sudoku, sudoku_9x9, word_problems",
                 "num_samples: 16"):
        assert line in text


@pytest.mark.parametrize(("arguments", "words"), [
    (["train", "task=chess"], ["task/chess", "countdown", "sudoku"]),
    (["train", "trainer.stepz=3"], ["trainer.stepz", "steps", "group_size"]),
    (["train", "stepz=3"], ["stepz", "trainer", "seed"]),
    (["train", "likelihood.num_samples=0"], ["likelihood.num_samples=0", ">= 1"]),
    (["train", "likelihood.num_samples=many"], ["likelihood.num_samples", "many", "Integer"]),
    (["train", "likelihood.region=prompt"], ["likelihood.region=prompt", "canvas", "through_first_eos"]),
    (["train", "trainer.group_size=1"], ["trainer.group_size=1", ">= 2"]),
    (["train", "seed=-1"], ["seed=-1", "from 0 to"]),
    (["train"], ["model.path", "sft"]),
    (["train", "model.path=nowhere"], ["model.path=nowhere", "model.safetensors"]),
    (["train", "model.path=empty/run"], ["model.path=empty/run", "no such folder"]),
    (["train", "model.path=empty"], ["model.path=empty", "no config.json", "no model.safetensors", "no tokenizer.json"]),
    (["evaluate", "model.path=empty/.."], ["has no"]),
    (["train", "model.path=x", "sampler.block_length=3"], ["sampler.block_length=3", "divisor", "20"]),
    (["train", "model.path=x", "resume=maybe"], ["resume=maybe", "never", "auto", "overwrite"]),
    (["train", "task=gsm8k", "task.data=missing.jsonl", "model.path=x"], ["task.data=missing.jsonl", "No such file"]),
    (["sft", "task=gsm8k", "task.data=rows.jsonl"], ["rows.jsonl:2", "`question`"]),
    (["sft", "task=gsm8k", "task.data=broken.jsonl"], ["broken.jsonl:1", "not JSON"]),
    (["fly"], ["fly", "train"]),
])
def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"answer": "#### 2"}\n')
    (tmp_path / "broken.jsonl").write_text('{"question": \n')
    before = sorted(tmp_path.rglob("*"))
    done = dllm(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_train_writes_a_run_folder(tmp_path: Path, start: Path) -> None:
    text = good(tmp_path, "train", "task=sudoku", f"model.path={start}", *SHORT)
    (run,) = (tmp_path / "outputs").iterdir()
    assert run.name.startswith("train-sudoku-bgpo-") and run.name.endswith("-seed0")
    assert text.count("reward 0") >= 2 and "step    2/2" in text
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["likelihood"]["num_samples"] == 2 and config["trainer"]["inner_updates"] == 1
    assert {"torch", "transformers", "python"} <= json.loads((run / "versions.json").read_text()).keys()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [1, 2]
    assert len((run / "rollouts.jsonl").read_text().splitlines()) == 8
    assert (run / "checkpoints" / "step-000002" / "manifest.json").is_file()
    assert (run / "plots" / "reward.png").is_file()
    assert not list(tmp_path.glob("*.log")) and not (tmp_path / ".hydra").exists()

    done = dllm(tmp_path, "train", "task=sudoku", f"model.path={start}", *SHORT)
    assert done.returncode == 2 and "already holds a run" in done.stderr and done.stderr.count("\n") == 1

    # A finished run goes on when it is given more steps; another configuration is refused.
    longer = [*SHORT[1:], "trainer.steps=3", f"run_dir={run}", "resume=auto"]
    assert "continuing after step 2" in good(tmp_path, "train", "task=sudoku", f"model.path={start}", *longer)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [1, 2, 3]
    done = dllm(tmp_path, "train", "task=sudoku", f"model.path={start}", *longer, "sampler.temperature=0.5")
    assert done.returncode == 2 and "sampler.temperature was 1.0 and is 0.5" in done.stderr


def test_module_and_command_are_the_same(tmp_path: Path, start: Path) -> None:
    arguments = ("task=sudoku", f"model.path={start}", *SHORT)
    good(tmp_path, "train", *arguments, "run_dir=a")
    done = module(tmp_path, "commands.train", *arguments, "run_dir=b")
    assert done.returncode == 0, done.stderr
    a, b = ((tmp_path / name / "rollouts.jsonl").read_text() for name in ("a", "b"))
    assert a == b


def test_sweep_runs_every_combination(tmp_path: Path, start: Path) -> None:
    good(tmp_path, "train", "-m", "task=sudoku", f"model.path={start}", *SHORT[:4], "likelihood.num_samples=1,4", "seed=0,1")
    runs = [path for path in (tmp_path / "outputs").iterdir() if path.is_dir()]
    assert len(runs) == 4
    assert {yaml.safe_load((run / "config.yaml").read_text())["likelihood"]["num_samples"] for run in runs} == {1, 4}
    assert sum(run.name.endswith("seed1") for run in runs) == 2


def test_evaluate_writes_results(tmp_path: Path, start: Path) -> None:
    good(tmp_path, "evaluate", "task=sudoku", f"model.path={start}", "evaluation.num_prompts=6", "run_dir=e")
    result = json.loads((tmp_path / "e" / "results.json").read_text())["sudoku"]
    assert result["metric"] == "greedy/reward" and result["n"] == 6
    assert 0 <= result["low"] <= result["value"] <= result["high"] <= 1
    assert {row["metric"] for row in result["metrics"]} >= {"sampled/reward", "greedy/cell"}
    assert len((tmp_path / "e" / "samples.jsonl").read_text().splitlines()) == 12
    assert sum(result["verdicts"]["greedy"].values()) == 6
    assert result["protocol"] == "plain" and result["nfe"] == 10 and result["tokens_per_second"] > 0
    assert set(result["pass@k"]) == {"1"} and result["pass@k"]["1"]["metric"] == "pass@1"
    assert "| greedy/reward | 6 |" in (tmp_path / "e" / "results.md").read_text()
    assert (tmp_path / "e" / "results.png").read_bytes()[1:4] == b"PNG"


def test_evaluate_takes_several_tasks_and_a_baseline(tmp_path: Path, start: Path) -> None:
    good(tmp_path, "sft", "task=sudoku", *SMALL[:3], "supervised.steps=2", "seed=5", "run_dir=other")
    text = good(
        tmp_path, "evaluate", "task=sudoku,countdown", "task.countdown.numbers=4", "task.countdown.completion_length=24",
        f"model.path={start}", "baseline=other", "evaluation.num_prompts=5", "evaluation.samples=4", "evaluation.k=[1,3]",
    )
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name.startswith("evaluate-sudoku+countdown-start-")
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["sudoku", "countdown"]
    assert results["countdown"]["prompt"].count(",") == 3 and results["sudoku"]["prompt"].count("\n") == 4
    for result in results.values():
        assert set(result["pass@k"]) == {"1", "3"}
        comparison, ours, theirs = result["comparison"]["greedy/reward"], result["value"], result["baseline"]["value"]
        assert comparison["delta"] == pytest.approx(ours - theirs) and comparison["n"] == 5
        assert "pass@3" in result["comparison"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 2 * 5 * (1 + 4)
    assert {(row["task"], row["of"]) for row in samples} == {(t, o) for t in results for o in ("model", "baseline")}
    assert "baseline" in text and "difference" in text


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("evaluate", "task=sudoku", f"model.path={start}", "evaluation.num_prompts=8", "evaluation.samples=2",
                 "sampler.batch_size=4")
    good(tmp_path, *arguments, "run_dir=whole")
    whole = [json.loads(line) for line in (tmp_path / "whole/samples.jsonl").read_text().splitlines()]
    good(tmp_path, *arguments, "run_dir=cut")
    kept = (tmp_path / "cut/samples.jsonl").read_text().splitlines(keepends=True)[:11]
    (tmp_path / "cut/samples.jsonl").write_text("".join(kept) + '{"task": "sudoku", "of')  # killed in the middle of a line
    asked: list[int] = []
    original = evaluation.rollout
    monkeypatch.setattr(evaluation, "rollout", lambda *args, **kw: asked.append(len(args[3])) or original(*args, **kw))
    assert "11 of 24 completions are there" in good(tmp_path, *arguments, "run_dir=cut")
    assert sum(asked) == 13
    again = [json.loads(line) for line in (tmp_path / "cut/samples.jsonl").read_text().splitlines()]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in whole]
    asked.clear()
    good(tmp_path, *arguments, "run_dir=cut", "resume=overwrite")
    assert sum(asked) == 24
    assert "was started with another configuration (seed was 0 and is 1)" in bad(
        tmp_path, *arguments, "run_dir=cut", "seed=1")


def test_samples_of_other_questions_are_not_used(tmp_path: Path, start: Path) -> None:
    data = tmp_path / "puzzles.csv"
    arguments = ("evaluate", "task=sudoku", "task.data=puzzles.csv", f"model.path={start}", "run_dir=e")
    data.write_text("Puzzle\n0234341221434321\n1034341221434321\n")
    good(tmp_path, *arguments)
    data.write_text("Puzzle\n0234341221434321\n1204341221434321\n")
    again = module(tmp_path, "cli", *arguments)  # this process remembers the file
    assert "2 of 4 completions are there" in again.stdout, again.stderr
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "e/samples.jsonl").read_text().splitlines()]
    assert len(prompts) == 4 and not any(prompt.startswith("1034") for prompt in prompts)


def test_mistakes_in_a_list_of_tasks_and_in_a_baseline_are_one_line(tmp_path: Path, start: Path) -> None:
    arguments = ("evaluate", f"model.path={start}", "evaluation.num_prompts=2")
    assert "nosuch" in bad(tmp_path, *arguments, "task=sudoku,nosuch")
    assert "error: baseline=/nonexistent: no such folder" in bad(tmp_path, *arguments, "baseline=/nonexistent")
    assert not (tmp_path / "outputs").exists()


def test_the_protocol_is_chosen_with_one_word(tmp_path: Path, start: Path) -> None:
    assert "task.protocol=nonsense: must be" in bad(
        tmp_path, "evaluate", "task=sudoku", f"model.path={start}", "protocol=nonsense")


def test_generate_shows_the_order(tmp_path: Path, start: Path) -> None:
    settings = ("count=1", "watch=true", "sampler.denoising_steps=5")
    text = good(tmp_path, "generate", "task=sudoku", f"model.path={start}", *settings)
    assert "step    5" in text and "order" in text
    # The last watched canvas has no dot left; the first has 16 of 20.
    canvases = [line for line in text.splitlines() if line.startswith("step ")]
    assert canvases[0].count("·") == 16 and "·" not in canvases[-1]
    assert not list(tmp_path.iterdir())


def test_a_killed_run_continues(tmp_path: Path, start: Path) -> None:
    """SIGKILL at some step; the continued run ends with the weights of one that was never killed."""
    arguments = ("task=sudoku", f"model.path={start}", *SHORT[1:], "trainer.steps=6", "trainer.save_every=1",
                 "trainer.eval_every=0", "optimizer.lr=1e-2")
    good(tmp_path, "train", *arguments, "run_dir=whole")
    process = subprocess.Popen(
        [sys.executable, "-m", "dllm_rl.cli", "train", *arguments, "run_dir=killed"], cwd=tmp_path,
        stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/checkpoints/step-000002/manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    good(tmp_path, "train", *arguments, "run_dir=killed", "resume=auto")
    final = "checkpoints/step-000006/model.safetensors"
    assert (tmp_path / "whole" / final).read_bytes() == (tmp_path / "killed" / final).read_bytes()
    rollouts = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("whole", "killed")]
    assert rollouts[0] == rollouts[1]


def test_a_mistake_ends_the_process_with_code_2(tmp_path: Path) -> None:
    done = module(tmp_path, "cli", "train", "likelihood.num_samples=0")
    assert (done.returncode, done.stderr) == (2, "error: likelihood.num_samples=0: must be an integer >= 1\n")


def test_every_task_composes(tmp_path: Path) -> None:
    for task in GROUPS["task"]:
        text = good(tmp_path, "sft", f"task={task}", "--cfg", "job")
        assert "completion_length" in yaml.safe_load(text)["task"]
