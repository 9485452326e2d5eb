"""dllm-rl train: reinforcement learning from a checkpoint.

    dllm-rl train task=sudoku model.path=outputs/sft-sudoku-tiny-seed0 likelihood.num_samples=4
    accelerate launch -m dllm_rl.commands.train task=sudoku model.path=outputs/sft-sudoku-tiny-seed0
"""

from __future__ import annotations

from omegaconf import DictConfig

from dllm_rl.commands import common
from dllm_rl.tracking import RunFolder
from dllm_rl.trainer import Training, train


def run(settings: common.Settings, config: DictConfig) -> None:
    """Checks everything that can be refused, then trains."""
    seed, task, trainer = common.check_seed(settings["seed"]), settings["task"], settings["trainer"]
    common.require_model_path(settings)
    path = common.run_directory("train", settings, ("task", "algorithm"))
    RunFolder.claim(path, settings["resume"], common.plain(config))
    settings["sampler"].plan(task.completion_length)
    settings["objective"].check_samples(settings["likelihood"].num_samples)
    task.prompts("train"), task.prompts("test")  # bad data end the run before there is a folder

    start = common.prepare(settings, config, path, trainer.steps * trainer.inner_updates)
    # The model that training started from, also where a killed run continues.
    reference = common.reference_policy(settings, start.policy.device) if settings["objective"].uses_reference else None
    train(Training(
        policy=start.policy, task=task, sampler=settings["sampler"], likelihood=settings["likelihood"],
        objective=settings["objective"], advantage=settings["advantage"], optimizer=start.optimizer, config=trainer,
        evaluation=settings["evaluation"], accelerator=start.accelerator, folder=start.folder, seed=seed, done=start.done,
        reference=reference,
    ))
    print(f"checkpoints: {path / 'checkpoints'}\nreward curve: {path / 'plots' / 'reward.png'}\n"
          f"next: dllm-rl evaluate task={common.group_choice('task')} model.path={path}")


def main() -> None:
    common.launch("train", run)


if __name__ == "__main__":
    main()
