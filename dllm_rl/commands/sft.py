"""dllm-rl sft: supervised fine-tuning on a task's demonstrations.

    dllm-rl sft task=sudoku
"""

from __future__ import annotations

from omegaconf import DictConfig

from dllm_rl.commands import common
from dllm_rl.supervised import FineTuning, finetune
from dllm_rl.tracking import RunFolder


def run(settings: common.Settings, config: DictConfig) -> None:
    """Checks everything that can be refused, then fine-tunes."""
    seed, task, supervised = common.check_seed(settings["seed"]), settings["task"], settings["supervised"]
    path = common.run_directory("sft", settings, ("task", "model"))
    record = common.plain(config)
    RunFolder.claim(path, settings["resume"], record)
    task.demonstrations(1, seed)  # bad data end the run before there is a folder

    start = common.prepare(settings, record, path, supervised.steps)
    finetune(FineTuning(
        start.policy, task, start.optimizer, supervised, start.accelerator, start.folder, seed, start.done
    ))
    print(f"next: dllm-rl train task={common.group_choice('task')} model.path={path}")


def main() -> None:
    common.launch("sft", run)


if __name__ == "__main__":
    main()
