"""The example of docs/your_own_task.md works as printed, and mistakes in plugins are named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dllm_rl.config import add
from dllm_rl.errors import UserError
from tests.test_cli import SMALL, bad, good

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs/examples/fruit_task.py"


def test_the_example_trains_and_evaluates(tmp_path: Path) -> None:
    plugin = f"plugins=[{EXAMPLE}]"
    good(tmp_path, "sft", plugin, "task=fruit", *SMALL[:3], "supervised.steps=60", "run_dir=s")
    text = good(tmp_path, "train", plugin, "task=fruit", "model.path=s", "trainer.steps=1", "trainer.eval_every=0",
                "reward=composed", "+reward.weights.stars=0.1", "likelihood.num_samples=2", "run_dir=r")
    assert "leak guard: 3 training and 3 test prompts, none in common" in text
    (metrics,) = map(json.loads, (tmp_path / "r/metrics.jsonl").open())
    assert metrics["update/sequences"] > 0
    good(tmp_path, "evaluate", plugin, "task=fruit,sudoku", "model.path=r", "evaluation.num_prompts=3", "run_dir=e")
    results = json.loads((tmp_path / "e/results.json").read_text())
    assert results["fruit"]["n"] == 3 and "greedy/stars" in {row["metric"] for row in results["fruit"]["metrics"]}


def test_the_page_shows_the_file_that_is_tested() -> None:
    page = (ROOT / "docs/your_own_task.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert shown == EXAMPLE.read_text()
    assert len(shown.splitlines()) <= 34


def test_a_module_on_the_path_works_as_well(tmp_path: Path) -> None:
    (tmp_path / "my_tasks.py").write_text(EXAMPLE.read_text().replace('"fruit"', '"berries"'))
    assert "most: 6" in good(tmp_path, "sft", "plugins=[my_tasks]", "task=berries", "--cfg", "job")


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert "plugins=nowhere.py: must be a module that can be imported, or a .py file" in bad(
        tmp_path, "sft", "plugins=[nowhere.py]")
    assert "plugins=no_such_module: must be" in bad(tmp_path, "sft", "plugins=[no_such_module]")
    with pytest.raises(UserError, match="plugins=flavour: must be a group among model, task"):
        add("flavour", "sweet", Path)
    with pytest.raises(UserError, match="must be a dataclass"):
        add("task", "sweet", Path)
