"""dllm-rl evaluate: greedy and sampled accuracy on the test prompts of one or more tasks, with 95 % intervals.

    dllm-rl evaluate task=sudoku model.path=outputs/train-sudoku-bgpo-seed0
    dllm-rl evaluate task=gsm8k,math task.math.completion_length=512 model.path=RUN baseline=BASE evaluation.samples=8
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import Progress

from dllm_rl.commands import common
from dllm_rl.config import register
from dllm_rl.errors import UserError
from dllm_rl.evaluation import Evaluation, Sample, compared, evaluate, regraded
from dllm_rl.evaluation_report import HEADERS, PAIRED_HEADERS, SampleLog, entry, rows, verdict_lines, write_results
from dllm_rl.models.policy import Policy
from dllm_rl.run_folder import resolve_model_path, weights_digest
from dllm_rl.tracking import RunFolder, table


class TaskList(NamedTuple):
    """The tasks of `task=a,b`, and what is set for one of them only (`task.a.KEY=VALUE`)."""

    names: list[str]
    own: dict[str, list[str]]


def split_tasks(arguments: Sequence[str]) -> tuple[list[str], TaskList]:
    """The arguments for the first task, and the list. A sweep (-m) is left to Hydra.

    Example: `["task=a,b", "task.b.data=x", "seed=1"]` gives `["seed=1", "task=a"]` and
    `TaskList(["a", "b"], {"a": [], "b": ["task.data=x"]})`.
    """
    chosen = [argument for argument in arguments if argument.startswith("task=")]
    names = [name for name in chosen[-1].partition("=")[2].strip("[]").split(",") if name] if chosen else []
    if len(names) < 2 or {"-m", "--multirun"} & {*arguments}:
        return list(arguments), TaskList(names, {})
    own: dict[str, list[str]] = {name: [] for name in names}
    common_ones = []
    for argument in arguments:
        name = next((name for name in names if argument.startswith(f"task.{name}.")), None)
        if name:
            own[name].append("task." + argument.removeprefix(f"task.{name}."))
        elif not argument.startswith("task="):
            common_ones.append(argument)
    return [*common_ones, f"task={names[0]}", *own[names[0]]], TaskList(names, own)


def run(settings: common.Settings, config: DictConfig, tasks: TaskList) -> None:
    """Evaluates, prints a table per task and writes samples.jsonl, results.json, results.md and results.png."""
    common.check_seed(settings["seed"])
    common.require_model_path(settings)
    register([f"task={name}" for name in tasks.names])
    names = tasks.names if len(tasks.names) > 1 else [common.group_choice("task")]
    configs = {names[0]: config} | {name: _composed(name, tasks) for name in names[1:]}
    jobs = {names[0]: settings} | {name: common.instances(configs[name]) for name in names[1:]}
    for job in jobs.values():  # whatever can be refused is refused before there is a folder
        job["sampler"].check_length(job["task"].completion_length)
        job["task"].prompts("test")

    paths = {"model": resolve_model_path(settings["model"].path)}
    if settings["baseline"]:
        paths["baseline"] = resolve_model_path(settings["baseline"], "baseline")
    record = common.plain(config) | {
        "task": {name: common.plain(configs[name])["task"] for name in names},
        "weights": {of: weights_digest(path) for of, path in paths.items()},
    }
    label = Path(settings["model"].path).expanduser().resolve().name
    folder = common.run_directory("evaluate", settings, ("task",), ["+".join(names), label])
    RunFolder.claim(folder, settings["resume"], record)
    policies = {of: _policy(settings, path, of) for of, path in paths.items()}
    for job in jobs.values():
        for policy in policies.values():
            job["sampler"].check_model(policy, job["task"].completion_length)
    prompts = [prompt for job in jobs.values() for prompt in job["task"].prompts("test")]
    introductions = {of: common.introduction(policy, prompts) for of, policy in policies.items()}
    RunFolder.open(folder, record, from_step=0)
    log = SampleLog(folder)
    if settings["resume"] == "overwrite":
        log.clear()

    for of in policies:
        print(f"{of}: {paths[of]}\n{introductions[of]}", flush=True)
    found = {of: {name: _evaluated(policy, name, of, job, log) for name, job in jobs.items()}
             for of, policy in policies.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        prompt = job["task"].prompts("test")[0]
        results[name] = entry(found["model"][name], job["task"].protocol, policies["model"].render(prompt))
        if "baseline" in found:
            results[name]["baseline"] = found["baseline"][name].summary()
            results[name]["comparison"] = compared(found["model"][name], found["baseline"][name])
        _show(name, results[name], settings)
    write_results(folder, results, settings["model"].path, settings["baseline"])
    print(f"results: {folder / 'results.json'}  {folder / 'results.md'}  {folder / 'results.png'}")


def _composed(name: str, tasks: TaskList) -> DictConfig:
    """The configuration for another task of the list: what was given for all of them, and what for it."""
    first, *_ = tasks.names
    given = [item for item in HydraConfig.get().overrides.task if item not in (f"task={first}", *tasks.own[first])]
    try:
        return compose("evaluate", overrides=[*given, f"task={name}", *tasks.own[name]])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(common.explain(error)) from None


def _policy(settings: common.Settings, path: str, of: str) -> Policy:
    try:
        policy = common.build_policy({**settings, "model": replace(settings["model"], path=path)})
    except UserError as error:
        raise UserError(str(error).replace("model.path=", "baseline=") if of == "baseline" else str(error)) from None
    policy.network.to(common.accelerator_for_one_process().device)
    return policy


def _evaluated(policy: Policy, name: str, of: str, job: common.Settings, log: SampleLog) -> Evaluation:
    """One policy on one task, from where an interrupted evaluation stopped."""
    task, config = job["task"], job["evaluation"]
    asked = {prompt.id: policy.render(prompt) for prompt in task.prompts("test")[: config.num_prompts]}
    # What was sampled for other questions, before the data changed, is of no use.
    earlier = [sample for sample in log.read(name, of) if asked.get(sample.id) == sample.prompt]
    prompts = len(asked)
    total = prompts * (int(config.greedy) + config.samples)
    there = f", {len(earlier)} of {total} completions are there" if earlier else ""
    print(f"{name}: {prompts} prompts, protocol {task.protocol}, {of}{there}", flush=True)
    with Progress(transient=True, disable=not Console().is_terminal) as progress:
        bar = progress.add_task(name, total=total, completed=len(earlier))

        def save(samples: list[Sample]) -> None:
            log.append(name, of, samples)
            progress.advance(bar, len(samples))

        result = evaluate(policy, task, job["sampler"], config, seed=job["seed"], earlier=regraded(earlier, task), save=save)
    log.replace(name, of, result.samples)
    return result


def _show(name: str, result: dict[str, Any], settings: common.Settings) -> None:
    headers = PAIRED_HEADERS if "comparison" in result else HEADERS
    table(headers, rows(result), title=f"{name}, protocol {result['protocol']}: {settings['model'].path}")
    for mode, counts in verdict_lines(result).items():
        print(f"{mode}: {counts}")


def main() -> None:
    sys.argv[1:], tasks = split_tasks(sys.argv[1:])
    common.launch("evaluate", partial(run, tasks=tasks))


if __name__ == "__main__":
    main()
