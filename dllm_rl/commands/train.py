"""dllm-rl train: learning from rewards, by rollouts or from a file of scored completions.

    dllm-rl train task=sudoku model.path=outputs/sft-sudoku-tiny-seed0 likelihood.num_samples=4
    dllm-rl train algorithm=rpo task=sudoku model.path=outputs/sft-sudoku-tiny-seed0 data=scored.jsonl
    accelerate launch -m dllm_rl.commands.train task=sudoku model.path=outputs/sft-sudoku-tiny-seed0
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from importlib import resources
from itertools import chain

import torch
from omegaconf import DictConfig

from dllm_rl.commands import common
from dllm_rl.critic import Critic
from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.estimators import Trajectory
from dllm_rl.diffusion.sampler import Sampler
from dllm_rl.drift import Variety
from dllm_rl.errors import UserError, bad_value, check
from dllm_rl.experience import Failures, RolloutSource, Source
from dllm_rl.kl_reward import KLReward
from dllm_rl.leaks import MODES, find_leaks, guarded, held_out_items, report, text_item
from dllm_rl.models.policy import Policy
from dllm_rl.objectives.base import check_unnormalised
from dllm_rl.offline import FileSource, OfflineConfig, Scored, Skipped, load_scored
from dllm_rl.optimization import Optimizer
from dllm_rl.run_folder import resolve_model_path
from dllm_rl.task import Task, TaskReward
from dllm_rl.tracking import RunFolder, replace_text
from dllm_rl.trainer import train
from dllm_rl.training import Training

INEXACT = "sampler.cache, sampler.dtype"


def run(settings: common.Settings, config: DictConfig) -> None:
    """Checks everything that can be refused, then trains."""
    seed, task, trainer = common.check_seed(settings["seed"]), settings["task"], settings["trainer"]
    check_variant(common.group_choice("algorithm"), common.group_choice("variant"))
    check_parts(settings, common.group_choice("objective"))
    common.require_model_path(settings)
    path = common.run_directory("train", settings, ("task", "algorithm"))
    objective, record = settings["objective"], common.plain(config)
    uses_reference = objective.traits.uses_reference or settings["kl_reward"].coef > 0
    if uses_reference:
        # What pulls towards the model that training started from needs the very same checkpoint in a continuation.
        record["model"]["path"] = resolve_model_path(record["model"]["path"])
    RunFolder.claim(path, settings["resume"], record, ("model.path",) if uses_reference else ())
    settings["sampler"].check_length(task.completion_length)
    task.prompts("test")  # bad data end the run before there is a folder

    start = common.start(settings, path)
    policy = start.policy
    settings["sampler"].check_model(policy, task.completion_length)
    source, skipped = make_source(settings, start)
    updates = trainer.steps * trainer.inner_updates
    critic = make_critic(settings, start, updates)
    own = critic.model.parameters() if critic and not critic.model.separate else ()
    optimizer = Optimizer(settings["optimizer"], chain(policy.network.parameters(), own), updates)
    kl_reward = KLReward(settings["kl_reward"]) if settings["kl_reward"].coef else None
    if start.checkpoint:
        optimizer.load_state_dict(start.state)
        if kl_reward:
            kl_reward.coef = start.state["kl_reward_coef"]
    reference = common.reference_policy(settings, start.accelerator, policy) if uses_reference else None
    sampled = task.prompts("train") if settings["data"] is None else []
    introduction = common.introduction(policy, [*task.prompts("test"), *sampled])
    folder = common.open_folder(path, record, start.done)
    print(f"prompts: protocol {task.protocol}\n{introduction}" + blocks_note(policy, settings["likelihood"]), flush=True)
    if skipped:
        lines = "".join(json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in skipped)
        replace_text(path / "skipped.jsonl", lines)
    train(Training(
        policy=policy, task=task, source=source, sampler=settings["sampler"], likelihood=settings["likelihood"],
        objective=objective, advantage=settings["advantage"], optimizer=optimizer, config=trainer,
        evaluation=settings["evaluation"], accelerator=start.accelerator, folder=folder, seed=seed, done=start.done,
        reference=reference, critic=critic, kl_reward=kl_reward,
    ))
    print(f"checkpoints: {path / 'checkpoints'}\nreward curve: {path / 'plots' / 'reward.png'}\n"
          f"next: dllm-rl evaluate task={common.group_choice('task')} model.path={path}")


def blocks_note(policy: Policy, likelihood: Likelihood) -> str:
    """A line on a likelihood whose states the model never met in its own training; empty where there is nothing to say."""
    block = policy.rules.block_length
    if block is None or likelihood.fits_blocks(block):
        return ""
    return (f"\nnote: this model sees blocks of {block} tokens and never a mask before the block that it writes, but this "
            f"likelihood hides such tokens; better: likelihood=trajectory likelihood.steps_per_slice=1, or likelihood=block "
            f"likelihood.block_length={block} likelihood.count_from=prompt")


def make_source(settings: common.Settings, start: common.Start) -> tuple[Source, list[Skipped]]:
    """Rollouts, or the file named by `data` with what was left out of it."""
    task, trainer, objective, policy = settings["task"], settings["trainer"], settings["objective"], start.policy
    if settings["data"] is None:
        grader = settings["reward"].grader(task, policy.device, policy.tokenizer)
        return RolloutSource(
            policy, task, guarded(task, settings["leaks"]), grader, rollout_sampler(settings), trainer.prompts_per_step,
            trainer.group_size, settings["seed"], Failures(trainer.max_infra_errors),
            Variety(trainer.max_identical_steps, start.state.get("source", {}).get("identical_steps", 0)),
            trainer.sampler_check,
        ), []
    length, offline = task.completion_length, settings["offline"]
    groups, skipped = load_scored(str(settings["data"]), offline, policy, length, least_group(settings))
    if objective.traits.uses_mismatched and len({group[0].prompt for group in groups}) < 2:
        raise bad_value("data", settings["data"], "a file with at least two prompts: mismatched pairs need them")
    groups = without_leaks(groups, task, settings["leaks"])
    rows = sum(map(len, groups))
    passes = trainer.steps * trainer.prompts_per_step / len(groups)
    print(f"data: {rows} completions of {len(groups)} prompts, {passes:.1f} passes over them"
          + (f"; {len(skipped)} rows or groups left out, see skipped.jsonl" if skipped else ""))
    advice = objective.advice(torch.tensor([row.reward for group in groups for row in group]))
    if advice:
        print(f"note: {advice}")
    return FileSource(groups, policy, length, trainer.prompts_per_step, offline.masks, settings["seed"]), skipped


def needs_recorded(settings: common.Settings) -> bool:
    """Whether ratios to the policy that sampled need the log-probabilities that the sampler met: its states are scored
    again, and something in it (a cache, half precision) lets an exact pass see them differently."""
    uses_old, replays, sampler = settings["objective"].traits.uses_old, settings["likelihood"].replays, settings["sampler"]
    differs = sampler.cache.approximate or sampler.dtype not in (None, getattr(settings["model"], "dtype", None))
    return bool(settings["data"] is None and uses_old and replays and differs)


def rollout_sampler(settings: common.Settings) -> Sampler:
    """The sampler, recording where that is needed."""
    sampler: Sampler = settings["sampler"]
    return replace(sampler, record_logps=True) if needs_recorded(settings) else sampler


def without_leaks(groups: list[list[Scored]], task: Task, mode: str) -> list[list[Scored]]:
    """The groups of a file whose prompts are not in the test split of the task (with `leaks=drop`; see leaks.py)."""
    check(mode in MODES, "leaks", mode, ", ".join(MODES))
    train, test = [text_item(group[0].place, group[0].prompt) for group in groups], held_out_items(task, with_texts=True)
    found = find_leaks(train, test)
    print(report(found, len(train), len(task.prompts("test")), mode), flush=True)
    leaked = {leak.train for leak in found} if mode == "drop" else set()
    left = [group for group in groups if group[0].place not in leaked]
    if not left:
        raise UserError("leaks=drop: every prompt of the file is also a test prompt; nothing is left")
    return left


def make_critic(settings: common.Settings, start: common.Start, updates: int) -> Critic | None:
    """The critic at its beginning, or as the checkpoint has it."""
    if settings["critic"].mdp == "none":
        return None
    trainer = settings["trainer"]
    critic = Critic(
        settings["critic"], start.policy, settings["optimizer"], updates, start.accelerator, trainer.micro_samples
    )
    if start.checkpoint:
        critic.model.load(start.checkpoint)
        critic.load_state_dict(start.state["critic"])
    return critic


def check_variant(algorithm: str, variant: str) -> None:
    """Refuses a variant that the algorithm does not have."""
    if variant == "canonical":
        return
    names = [file.name.removesuffix(".yaml") for file in (resources.files("dllm_rl.conf") / "variant_of").iterdir()]
    having = sorted(name.removesuffix(f"_{variant}") for name in names if name.endswith(f"_{variant}"))
    valid = f"canonical with algorithm={algorithm}; {variant} exists for {', '.join(having)}"
    check(algorithm in having, "variant", variant, valid)


def check_parts(settings: common.Settings, name: str) -> None:
    """Refuses choices that do not fit together; `name` is that of the objective."""
    objective, likelihood, trainer = settings["objective"], settings["likelihood"], settings["trainer"]
    critic, samples = settings["critic"], settings["likelihood"].num_samples
    objective.check_likelihood(likelihood)
    if trainer.gradient_cosine and samples < 2 * likelihood.unit:
        valid = f"false with likelihood.num_samples={samples}: two halves need {2 * likelihood.unit}"
        raise bad_value("trainer.gradient_cosine", True, valid)

    needed, mdp = objective.traits.needs_critic, critic.mdp
    check(needed in (None, mdp), "critic.mdp", mdp, f"{needed} with objective={name}")
    if mdp != "none":
        ratio = objective.traits.reads_rewards and not needed
        check(not ratio, "critic.mdp", mdp, f"none with objective={name}: it works on the rewards themselves")
        fits = mdp == "bandit" or objective.traits.token_level
        check(fits, "critic.mdp", mdp, f"bandit or none with objective={name}: its loss has one advantage per sequence")
        check(not (needed and critic.whiten), "critic.whiten", critic.whiten, f"false with objective={name}: it needs r - V")
    penalty = settings["kl_reward"].coef
    own = penalty == 0 or not objective.traits.reads_rewards
    check(own, "kl_reward.coef", penalty, f"0 with objective={name}: it does not work on advantages")
    if penalty:
        check_unnormalised(likelihood, "kl_reward is in nats per completion")
    if isinstance(likelihood, Trajectory):
        same = mdp != "trajectory" or critic.steps_per_slice == likelihood.steps_per_slice
        valid = f"likelihood.steps_per_slice={likelihood.steps_per_slice}: policy and critic see the same states"
        check(same, "critic.steps_per_slice", critic.steps_per_slice, valid)
    if objective.traits.uses_mismatched:
        valid = f"an integer >= 2 with objective={name}: mismatched pairs need two prompts"
        check(trainer.prompts_per_step >= 2, "trainer.prompts_per_step", trainer.prompts_per_step, valid)
        valid = f"another one with objective={name}: mismatched pairs have no trajectory"
        check(not isinstance(likelihood, Trajectory), "likelihood", "trajectory", valid)
    if settings["data"] is None:
        _check_without_data(settings, name)
    else:
        _check_for_data(settings, name)


def least_group(settings: common.Settings) -> tuple[int, str]:
    """The fewest completions per prompt that make sense, and why."""
    objective, alone = settings["objective"], settings["critic"].mdp == "none"
    if alone and not objective.traits.reads_rewards and settings["advantage"].kind != "z_score":
        return 2, "rewards are compared within a group"
    found: tuple[int, str] = objective.least_group
    return found


def _check_without_data(settings: common.Settings, name: str) -> None:
    size, (least, why) = settings["trainer"].group_size, least_group(settings)
    check(size >= least, "trainer.group_size", size, f"an integer >= {least} with objective={name}: {why}")
    same = size > 1 and settings["sampler"].deterministic
    valid = f"a number > 0 with trainer.group_size={size}: all completions of a prompt would be the same"
    check(not same, "sampler.temperature", settings["sampler"].temperature, valid)
    _check_recorded(settings)
    plain = OfflineConfig()
    for field in fields(plain):
        value, default = getattr(settings["offline"], field.name), getattr(plain, field.name)
        check(value == default, f"offline.{field.name}", value, f"{default} without data=FILE: it is about files")


def _check_recorded(settings: common.Settings) -> None:
    """What cannot be had where ratios are to recorded log-probabilities."""
    if not needs_recorded(settings):
        return
    scale, measured = settings["sampler"].cfg_scale, settings["objective"].measured_divergence
    where = f"with likelihood=trajectory and a sampler that is not exact ({INEXACT})"
    valid = f"0 {where}: ratios would be to guided logits, which are not the network's distribution"
    check(scale == 0, "sampler.cfg_scale", scale, valid)
    valid = f"binary_tv or binary_kl {where}: it records one log-probability per token"
    check(measured is None, "objective.divergence", measured, valid)


def _check_for_data(settings: common.Settings, name: str) -> None:
    valid = (f"null with objective={name}: it forms ratios to the policy that sampled, which a file does not have; "
             "rpo, dro, kto, vrpo and sft learn from files")
    check(not settings["objective"].traits.uses_old, "data", settings["data"], valid)
    valid = "task with data, which has its own rewards; dllm-rl rollout data=FILE reward=learned scores a file"
    check(isinstance(settings["reward"], TaskReward), "reward", "learned", valid)
    trajectory = "the file does not say in which order tokens were written"
    valid = f"an estimator of the completion alone with data={settings['data']}: {trajectory}"
    check(not isinstance(settings["likelihood"], Trajectory), "likelihood", "trajectory", valid)
    check(settings["critic"].mdp != "trajectory", "critic.mdp", "trajectory", f"bandit or none with data: {trajectory}")


def main() -> None:
    common.launch("train", run)


if __name__ == "__main__":
    main()
