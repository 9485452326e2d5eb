"""dllm-rl evaluate: greedy and sampled accuracy on a task's test prompts, with 95 % intervals.

    dllm-rl evaluate task=sudoku model.path=outputs/train-sudoku-bgpo-seed0
"""

from __future__ import annotations

import json

from omegaconf import DictConfig

from dllm_rl.commands import common
from dllm_rl.evaluation import evaluate
from dllm_rl.tracking import replace_text, table


def run(settings: common.Settings, config: DictConfig) -> None:
    """Evaluates, prints a table and writes results.json, answers.jsonl and config.json."""
    seed, task = common.check_seed(settings["seed"]), settings["task"]
    model_path = common.require_model_path(settings)
    settings["sampler"].plan(task.completion_length)
    task.prompts("test")
    policy = common.build_policy(settings)
    policy.network.to(common.accelerator_for_one_process().device)
    result = evaluate(policy, task, settings["sampler"], settings["evaluation"], seed=seed)

    name = common.group_choice("task")
    rows = [(row.metric, str(row.n), f"{row.value:.3f}", f"[{row.low:.3f}, {row.high:.3f}]") for row in result.estimates]
    table(("metric", "prompts", "mean", "95 % interval"), rows, title=f"{name}: {model_path}")
    path = common.run_directory("evaluate", settings, ("task",))
    path.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in result.answers)
    replace_text(path / "answers.jsonl", lines)
    replace_text(path / "config.json", json.dumps(common.plain(config), indent=1))
    replace_text(path / "results.json", json.dumps({name: result.summary()}, indent=1))
    print(f"results: {path / 'results.json'}")


def main() -> None:
    common.launch("evaluate", run)


if __name__ == "__main__":
    main()
