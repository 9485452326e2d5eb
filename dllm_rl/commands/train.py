"""dllm-rl train: reinforcement learning from a checkpoint.

    dllm-rl train task=sudoku model.path=outputs/sft-sudoku-tiny-seed0 likelihood.num_samples=4
    accelerate launch -m dllm_rl.commands.train task=sudoku model.path=outputs/sft-sudoku-tiny-seed0
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
from dllm_rl.errors import bad_value
from dllm_rl.optimization import Optimizer
from dllm_rl.tracking import RunFolder
from dllm_rl.trainer import Training, train


def run(settings: Settings, config: DictConfig) -> None:
    seed, model, task, trainer = check_seed(settings["seed"]), settings["model"], settings["task"], settings["trainer"]
    if not model.path:
        raise bad_value("model.path", model.path, "a checkpoint folder, run folder or hub name to start from "
                        "(dllm-rl sft makes one)")
    path = run_directory("train", settings, ("task", "algorithm"))
    RunFolder.claim(path, settings["resume"], plain(config))
    settings["sampler"].plan(task.completion_length)
    task.prompts("train"), task.prompts("test")

    checkpoint = latest_checkpoint(path) if settings["resume"] == "auto" else None
    model.path = str(checkpoint) if checkpoint else resolve_model_path(model.path)
    policy = model.build(task.words, seed)
    accelerator = accelerator_for_one_process()
    policy.network = accelerator.prepare(policy.network)
    optimizer = Optimizer(settings["optimizer"], policy.network.parameters(), trainer.steps * trainer.inner_updates)
    done = 0
    if checkpoint:
        state = load_state(checkpoint)
        optimizer.load_state_dict(state)
        done = state["step"]
    folder = RunFolder.open(path, plain(config), from_step=done)
    print(f"run folder: {path}" + (f" (continuing after step {done})" if done else ""))
    train(Training(
        policy=policy, task=task, sampler=settings["sampler"], likelihood=settings["likelihood"],
        objective=settings["objective"], optimizer=optimizer, config=trainer, evaluation=settings["evaluation"],
        accelerator=accelerator, folder=folder, seed=seed, done=done,
    ))
    print(f"checkpoints: {path / 'checkpoints'}\nreward curve: {path / 'plots' / 'reward.png'}\n"
          f"next: dllm-rl evaluate task={group_choice('task')} model.path={path}")


def main() -> None:
    launch("train", run)


if __name__ == "__main__":
    main()
