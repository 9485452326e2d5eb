"""dllm-rl rollout: scored completions of a policy into a file, to learn from without a reinforcement-learning loop.

    dllm-rl rollout task=sudoku model.path=outputs/sft-sudoku-tiny-seed0 output=scored.jsonl
    dllm-rl rollout data=scored.jsonl reward=learned reward.path=REWARD_MODEL output=rescored.parquet
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.progress import track

from dllm_rl.commands import common
from dllm_rl.errors import UserError, bad_value, check
from dllm_rl.experience import collect
from dllm_rl.models.reward_model import LearnedReward, ModelGrader
from dllm_rl.offline import absent, check_output, write_scored
from dllm_rl.rows import load_placed_rows

PROMPTS_AT_ONCE = 32


def run(settings: common.Settings, config: DictConfig) -> None:
    """Samples and grades, or grades again, and writes one file."""
    del config
    common.check_seed(settings["seed"])
    check(settings["output"] is not None, "output", None, "a file that ends in .jsonl or .parquet")
    path = Path(settings["output"])
    check_output(path, settings["overwrite"])
    rows = sampled(settings) if settings["data"] is None else rescored(settings)
    if not rows:
        raise UserError(f"output={path}: is not written, because no completion could be graded")
    write_scored(rows, path)
    mean = sum(row["reward"] for row in rows) / len(rows)
    print(f"{len(rows)} completions of {len({row['group'] for row in rows})} prompts, mean reward {mean:.3f}: {path}")


def sampled(settings: common.Settings) -> list[dict[str, Any]]:
    """Completions of the task's prompts. Those that the grader could not grade are left out, with a line that says so."""
    task, sampler, seed = settings["task"], settings["sampler"], settings["seed"]
    count, size = settings["num_prompts"], settings["group_size"]
    common.require_model_path(settings)
    check(count is None or (isinstance(count, int) and count >= 1), "num_prompts", count, "an integer >= 1, or null for all")
    check(isinstance(size, int) and size >= 1, "group_size", size, "an integer >= 1")
    check(settings["split"] in ("train", "test"), "split", settings["split"], "train or test")
    sampler.check_length(task.completion_length)
    prompts = list(task.prompts(settings["split"]))[:count]
    policy = common.build_policy(settings)
    sampler.check_model(policy, task.completion_length)
    policy.network.to(common.accelerator_for_one_process().device)
    print(common.introduction(policy, prompts), flush=True)
    policy = sampler.prepared(policy)
    grader = settings["reward"].grader(task, policy.device, policy.tokenizer)
    rows, ungraded = [], 0
    for start in track(range(0, len(prompts), PROMPTS_AT_ONCE), "sampling", transient=True):
        part = prompts[start : start + PROMPTS_AT_ONCE]
        found = collect(policy, task, grader, sampler, part, size, seed=seed, step=start)
        for index, (prompt, text, reward) in enumerate(zip(found.prompts, found.texts, found.graded, strict=True)):
            if reward.verdict == "infra_error" or not text:
                ungraded += 1
                continue
            number = start * size + index
            rows.append({
                "prompt_id": prompt.id, "prompt": prompt.text, "completion": text, "reward": float(reward.value),
                "verdict": reward.verdict, "group": number // size, "likelihood_seed": (seed << 32) + number,
                **({"shots": prompt.shots} if prompt.shots else {}),
                **({"prefill": prompt.prefill} if prompt.prefill else {}),
            })
    if ungraded:
        print(f"left out: {ungraded} completions that were empty or that the grader could not grade")
    return rows


def rescored(settings: common.Settings) -> list[dict[str, Any]]:
    """The rows of `data` with the learned reward; the reward that they had becomes `previous_reward`."""
    reward = settings["reward"]
    if not isinstance(reward, LearnedReward):
        raise bad_value("reward", "task", "learned with data: a task grades its own prompts only")
    placed = load_placed_rows(str(settings["data"]), "train", ("prompt", "completion"), key="data")
    grader = reward.grader(settings["task"], common.accelerator_for_one_process().device)
    assert isinstance(grader, ModelGrader)
    values = grader.values([str(row["prompt"]) for _, row in placed], [str(row["completion"]) for _, row in placed])
    return [
        {**row, "group": row["prompt"] if absent(row.get("group")) else str(row["group"]), "reward": value,
         "previous_reward": row.get("reward")}
        for (_, row), value in zip(placed, values, strict=True)
    ]


def main() -> None:
    common.launch("rollout", run)


if __name__ == "__main__":
    main()
