"""The promise of the quickstart as a test: BGPO mends what the demonstrations got wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli import good


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("task", "rise"), [("sudoku", 0.3), ("word_problems", 0.3), ("program_synthesis", 0.1)])
def test_bgpo_lifts_accuracy(tmp_path: Path, task: str, rise: float, seed: int) -> None:
    good(tmp_path, "sft", f"task={task}", f"seed={seed}", "run_dir=sft")
    good(tmp_path, "train", f"task={task}", f"seed={seed}", "model.path=sft", "likelihood.num_samples=4", "run_dir=rl",
         "trainer.eval_every=60")
    before, after = [json.loads(line) for line in (tmp_path / "rl" / "evaluations.jsonl").open()]
    assert after["sampled/reward"] - before["sampled/reward"] >= rise
    assert after["greedy/reward"] > before["greedy/reward"]
