"""dllm-rl evaluate: greedy and sampled accuracy on a task's test prompts, with 95 % intervals.

    dllm-rl evaluate task=sudoku model.path=outputs/train-sudoku-bgpo-seed0
"""

from __future__ import annotations

import json

from omegaconf import DictConfig

from dllm_rl.checkpoint import resolve_model_path
from dllm_rl.commands.common import (
    Settings,
    accelerator_for_one_process,
    check_seed,
    group_choice,
    launch,
    plain,
    run_directory,
)
from dllm_rl.errors import bad_value
from dllm_rl.evaluation import evaluate
from dllm_rl.tracking import replace_text, table


def run(settings: Settings, config: DictConfig) -> None:
    seed, model, task = check_seed(settings["seed"]), settings["model"], settings["task"]
    if not model.path:
        raise bad_value("model.path", model.path, "a checkpoint folder, run folder or hub name")
    settings["sampler"].plan(task.completion_length)
    task.prompts("test")
    given = model.path
    model.path = resolve_model_path(given)
    policy = model.build(task.words, seed)
    policy.network.to(accelerator_for_one_process().device)
    result = evaluate(policy, task, settings["sampler"], settings["evaluation"], seed=seed)

    name = group_choice("task")
    rows = [(row.metric, str(row.n), f"{row.value:.3f}", f"[{row.low:.3f}, {row.high:.3f}]") for row in result.estimates]
    table(("metric", "prompts", "mean", "95 % interval"), rows, title=f"{name}: {given}")
    path = run_directory("evaluate", settings, ("task",))
    path.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in result.answers)
    replace_text(path / "answers.jsonl", lines)
    replace_text(path / "config.json", json.dumps(plain(config), indent=1))
    replace_text(path / "results.json", json.dumps({name: result.summary()}, indent=1))
    print(f"results: {path / 'results.json'}")


def main() -> None:
    launch("evaluate", run)


if __name__ == "__main__":
    main()
