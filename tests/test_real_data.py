"""Real rows of GSM8K, MATH and MBPP through the whole path: fine-tune, sample, grade, one update; no learning is claimed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import good

DATA = Path(os.environ.get("DLLM_RL_DATA", Path(__file__).parents[1] / "../shared/data"))
TINY = ("model.hidden_size=48", "model.num_layers=2")


def real_rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"needs the real rows at {path}; set DLLM_RL_DATA to the folder that holds {name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shortest(rows: list[dict[str, Any]], length: Callable[[dict[str, Any]], int], count: int = 2) -> list[dict[str, Any]]:
    """The rows a tiny model can learn by heart in seconds, so that some completions are right and some are not."""
    return sorted(rows, key=length)[:count]


def one_update(folder: Path, task: str, rows: list[dict[str, Any]], *settings: str, sft_steps: int) -> dict[str, Any]:
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (f"task={task}", f"task.data={folder}", "leaks=allow", *settings)  # learnt by heart: both splits are the same
    good(folder, "sft", *data, *TINY, f"supervised.steps={sft_steps}", "supervised.batch_size=16", "run_dir=sft")
    good(
        folder, "train", *data, "model.path=sft", "trainer.steps=1", "trainer.prompts_per_step=2", "trainer.group_size=16",
        "trainer.eval_every=0", "likelihood.num_samples=4", "run_dir=rl",
    )
    (metrics,) = [json.loads(line) for line in (folder / "rl" / "metrics.jsonl").open()]
    return metrics


def assert_update_is_sound(metrics: dict[str, Any]) -> None:
    assert metrics["update/sequences"] > 0, "no group had both right and wrong completions"
    assert metrics["delta/max_abs"] == 0.0
    assert 0 < metrics["grad/norm"] < math.inf
    assert 0 < metrics["reward/mean"] < 1


def test_one_update_on_gsm8k(tmp_path: Path) -> None:
    rows = shortest(real_rows("gsm8k/train.jsonl"), lambda row: len(row["answer"]))
    assert_update_is_sound(one_update(tmp_path, "gsm8k", rows, "task.completion_length=64", sft_steps=80))


def test_one_update_on_math(tmp_path: Path) -> None:
    path = DATA / "math" / "train.json"
    if not path.is_file():
        pytest.skip(f"needs the real rows at {path}; set DLLM_RL_DATA to the folder that holds math/train.json")
    answered = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["answer"] and "sqrt" in row["answer"]]
    rows = shortest(answered, lambda row: len(row["problem"]) + len(row["answer"]))
    settings = (f"task.test_data={tmp_path}", "task.completion_length=32")
    assert_update_is_sound(one_update(tmp_path, "math", rows, *settings, sft_steps=80))


def test_one_update_on_mbpp(tmp_path: Path) -> None:
    train = [row for row in real_rows("mbpp/mbpp.jsonl") if 601 <= row["task_id"] <= 974]
    rows = shortest(train, lambda row: len(row["code"]))
    assert_update_is_sound(one_update(tmp_path, "mbpp", rows, "task.completion_length=96", sft_steps=150))
