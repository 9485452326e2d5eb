"""dllm-rl sft: supervised fine-tuning on a task's demonstrations.

    dllm-rl sft task=sudoku
"""

from __future__ import annotations

from omegaconf import DictConfig

from dllm_rl.checkpoint import latest_checkpoint, load_state, resolve_model_path
from dllm_rl.commands.common import (
    Settings,
    accelerator_for_one_process,
    check_seed,
    group_choice,
    launch,
    plain,
    run_directory,
)
from dllm_rl.optimization import Optimizer
from dllm_rl.supervised import FineTuning, finetune
from dllm_rl.tracking import RunFolder


def run(settings: Settings, config: DictConfig) -> None:
    seed, model, task, supervised = check_seed(settings["seed"]), settings["model"], settings["task"], settings["supervised"]
    path = run_directory("sft", settings, ("task", "model"))
    RunFolder.claim(path, settings["resume"], plain(config))
    task.demonstrations(1, seed)

    checkpoint = latest_checkpoint(path) if settings["resume"] == "auto" else None
    if checkpoint:
        model.path = str(checkpoint)
    elif model.path:
        model.path = resolve_model_path(model.path)
    policy = model.build(task.words, seed)
    accelerator = accelerator_for_one_process()
    policy.network = accelerator.prepare(policy.network)
    optimizer = Optimizer(settings["optimizer"], policy.network.parameters(), supervised.steps)
    done = 0
    if checkpoint:
        state = load_state(checkpoint)
        optimizer.load_state_dict(state)
        done = state["step"]
    folder = RunFolder.open(path, plain(config), from_step=done)
    print(f"run folder: {path}" + (f" (continuing after step {done})" if done else ""))
    finetune(FineTuning(policy, task, optimizer, supervised, accelerator, folder, seed, done))
    print(f"next: dllm-rl train task={group_choice('task')} model.path={path}")


def main() -> None:
    launch("sft", run)


if __name__ == "__main__":
    main()
