"""dllm-rl sft: supervised fine-tuning on a task's demonstrations.

    dllm-rl sft task=sudoku
"""

from __future__ import annotations

from omegaconf import DictConfig

from dllm_rl.commands import common
from dllm_rl.leaks import leaked_texts
from dllm_rl.optimization import Optimizer
from dllm_rl.supervised import FineTuning, allowed_demonstrations, finetune, step_seed
from dllm_rl.task import Prompt
from dllm_rl.tracking import RunFolder


def run(settings: common.Settings, config: DictConfig) -> None:
    """Checks everything that can be refused, then fine-tunes."""
    seed, task, supervised = common.check_seed(settings["seed"]), settings["task"], settings["supervised"]
    path = common.run_directory("sft", settings, ("task", "model"))
    record = common.plain(config)
    RunFolder.claim(path, settings["resume"], record)
    task.demonstrations(1, seed)  # bad data end the run before there is a folder
    leaked = leaked_texts(task, settings["leaks"])

    start = common.start(settings, path)
    optimizer = Optimizer(settings["optimizer"], start.policy.network.parameters(), supervised.steps)
    if start.checkpoint:
        optimizer.load_state_dict(start.state)
    first = allowed_demonstrations(task, supervised.batch_size, step_seed(seed, start.done + 1), leaked)[0]
    introduction = common.introduction(start.policy, [Prompt("of the first demonstration", first.prompt)])
    ending = start.policy.ending(first.completion, task.completion_length)
    folder = common.open_folder(path, record, start.done)
    print(f"{introduction}\n{ending}", flush=True)
    finetune(FineTuning(start.policy, task, optimizer, supervised, start.accelerator, folder, seed, start.done, leaked))
    print(f"next: dllm-rl train task={common.group_choice('task')} model.path={path}")


def main() -> None:
    common.launch("sft", run)


if __name__ == "__main__":
    main()
