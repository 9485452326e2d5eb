"""dllm-rl train: reinforcement learning from a checkpoint.

    dllm-rl train task=sudoku model.path=outputs/sft-sudoku-tiny-seed0 likelihood.num_samples=4
    accelerate launch -m dllm_rl.commands.train task=sudoku model.path=outputs/sft-sudoku-tiny-seed0
"""

from __future__ import annotations

from omegaconf import DictConfig

from dllm_rl.checkpoint import resolve_model_path
from dllm_rl.commands import common
from dllm_rl.errors import bad_value
from dllm_rl.tracking import RunFolder
from dllm_rl.trainer import train
from dllm_rl.training import Training


def run(settings: common.Settings, config: DictConfig) -> None:
    """Checks everything that can be refused, then trains."""
    seed, task, trainer = common.check_seed(settings["seed"]), settings["task"], settings["trainer"]
    common.require_model_path(settings)
    path = common.run_directory("train", settings, ("task", "algorithm"))
    objective, likelihood, record = settings["objective"], settings["likelihood"], common.plain(config)
    fixed: tuple[str, ...] = ()
    if objective.uses_reference:
        # A KL term pulls towards the model that training started from: a continuation needs the very same checkpoint.
        fixed, record["model"]["path"] = ("model.path",), resolve_model_path(record["model"]["path"])
    RunFolder.claim(path, settings["resume"], record, fixed)
    settings["sampler"].plan(task.completion_length)
    objective.check_likelihood(likelihood)
    if trainer.gradient_cosine and likelihood.num_samples < 2 * likelihood.unit:
        valid = f"false with likelihood.num_samples={likelihood.num_samples}: two halves need {2 * likelihood.unit}"
        raise bad_value("trainer.gradient_cosine", True, valid)
    task.prompts("train"), task.prompts("test")  # bad data end the run before there is a folder

    start = common.prepare(settings, record, path, trainer.steps * trainer.inner_updates)
    reference = common.reference_policy(settings, start.accelerator) if objective.uses_reference else None
    train(Training(
        policy=start.policy, task=task, sampler=settings["sampler"], likelihood=likelihood,
        objective=objective, advantage=settings["advantage"], optimizer=start.optimizer, config=trainer,
        evaluation=settings["evaluation"], accelerator=start.accelerator, folder=start.folder, seed=seed, done=start.done,
        reference=reference,
    ))
    print(f"checkpoints: {path / 'checkpoints'}\nreward curve: {path / 'plots' / 'reward.png'}\n"
          f"next: dllm-rl evaluate task={common.group_choice('task')} model.path={path}")


def main() -> None:
    common.launch("train", run)


if __name__ == "__main__":
    main()
