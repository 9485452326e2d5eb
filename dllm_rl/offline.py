"""Scored completions in a file: writing them, reading them with every row checked, and a source of experience made of them.

    {"prompt": "...", "completion": "...", "reward": 1.0, "group": 0, "likelihood_seed": 17}

`prompt`, `completion` and `reward` are required. Rows with equal `group` (without that column: equal prompts) are responses
to one prompt and are always learned from together. `likelihood_seed` keys the masks of a row (without it: the row's number).
`shots` and `prefill` say what else the model read (see task.Prompt).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dllm_rl.errors import UserError, check
from dllm_rl.experience import Experience, pick
from dllm_rl.models.policy import Policy
from dllm_rl.rows import Row, load_placed_rows
from dllm_rl.task import Prompt
from dllm_rl.types import Completions

COLUMNS = ("prompt", "completion", "reward")
FORMATS = (".jsonl", ".parquet")
CHOICES = ("refuse", "skip")
REWARDS = ("raw", "standardised")
MASKS = ("fresh", "fixed")


@dataclass
class OfflineConfig:
    """How a file of scored completions is read (`data=FILE`)."""

    bad_rows: str = "refuse"
    """What happens where a row lacks a column or has no finite reward, an empty completion or one that does not fit: refuse
    | skip (both name file and line; skipped rows are listed in skipped.jsonl)."""
    small_groups: str = "refuse"
    """The same for prompts with fewer responses than the objective can learn from."""
    rewards: str = "raw"
    """raw. standardised: (r − mean) / std over the file."""
    masks: str = "fresh"
    """fresh: new masks whenever a row is used. fixed: each row keeps its masks, keyed by its likelihood_seed (ELBO-KTO)."""

    def __post_init__(self) -> None:
        check(self.bad_rows in CHOICES, "offline.bad_rows", self.bad_rows, " or ".join(CHOICES))
        check(self.small_groups in CHOICES, "offline.small_groups", self.small_groups, " or ".join(CHOICES))
        check(self.rewards in REWARDS, "offline.rewards", self.rewards, " or ".join(REWARDS))
        check(self.masks in MASKS, "offline.masks", self.masks, " or ".join(MASKS))


class Scored(NamedTuple):
    """One usable row."""

    place: str
    """File and line."""
    prompt: str
    completion: str
    reward: float
    seed: int
    shots: tuple[tuple[str, str], ...] = ()
    """Solved examples before the prompt; with `prefill` and `prompt` what the model was asked (see task.Prompt)."""
    prefill: str = ""

    @property
    def asked(self) -> Prompt:
        """What the model reads."""
        return Prompt(self.place, self.prompt, shots=self.shots, prefill=self.prefill)


class Skipped(NamedTuple):
    """A row that was left out, and why."""

    place: str
    reason: str


def load_scored(
    source: str, config: OfflineConfig, policy: Policy, length: int, least_group: tuple[int, str]
) -> tuple[list[list[Scored]], list[Skipped]]:
    """The groups of responses of a file, in the order in which they begin, and what was left out.

    Args:
        source: `.jsonl`, `.json`, `.csv` or `.parquet`, or the name of a data set on the hub (its split `train`).
        policy: for the tokenizer, which decides whether a completion fits.
        length: L, the tokens of the canvas.
        least_group: the fewest responses per prompt, and why.

    Raises:
        UserError: a row or group is refused, or nothing is left.
    """
    rows: list[tuple[object, Scored]] = []
    skipped: list[Skipped] = []
    prompts: dict[object, Scored] = {}
    for number, (place, row) in enumerate(load_placed_rows(source, "train", (), key="data")):
        reason, scored = _parse(row, place, number, policy, length)
        group = ("prompt", row.get("prompt")) if absent(row.get("group")) else row["group"]
        if scored and not isinstance(group, str | int | tuple):
            reason = f"`group` is {group!r}, not a text or an integer"
        elif scored and prompts.setdefault(group, scored).prompt != scored.prompt:
            reason = f"group {group} has another prompt at {prompts[group].place}"
        if reason or scored is None:
            skipped.append(Skipped(place, reason))
        else:
            rows.append((group, scored))
    _refuse(skipped, config.bad_rows, "offline.bad_rows")

    groups: dict[object, list[Scored]] = {}
    for group, scored in rows:
        groups.setdefault(group, []).append(scored)
    least, why = least_group
    small = [Skipped(found[0].place, f"{len(found)} of at least {least} responses to its prompt: {why}")
             for found in groups.values() if len(found) < least]
    _refuse(small, config.small_groups, "offline.small_groups")
    kept = [found for found in groups.values() if len(found) >= least]
    if not kept:
        raise UserError(f"data={source}: no usable rows are left ({_listed([*skipped, *small])})")
    return (_standardised(kept, source) if config.rewards == "standardised" else kept), [*skipped, *small]


def _parse(row: Row, place: str, number: int, policy: Policy, length: int) -> tuple[str, Scored | None]:
    """Why a row cannot be used, or its content."""
    missing = [column for column in COLUMNS if row.get(column) is None]
    if missing:
        return f"has no `{'` and no `'.join(missing)}` (required are {', '.join(COLUMNS)})", None
    for column in ("prompt", "completion"):
        if not isinstance(row[column], str):
            return f"`{column}` is {row[column]!r}, not a text", None
        if not row[column]:
            return f"`{column}` is empty", None
    if str(policy.tokenizer.mask_token) in row["prompt"]:
        return f"`prompt` spells the mask token {policy.tokenizer.mask_token}", None
    try:
        reward = float(row["reward"])
    except (TypeError, ValueError):
        return f"`reward` is {row['reward']!r}, not a number", None
    if not math.isfinite(reward):
        return f"`reward` is {reward}, not a finite number", None
    tokens = policy.tokenizer.encode(row["completion"], add_special_tokens=False)
    if len(tokens) > length:
        return f"`completion` has {len(tokens)} tokens and task.completion_length is {length}", None
    if {policy.mask_id, policy.eos_id} & {*tokens}:
        return "`completion` spells the mask token or the end of the text, which no completion contains", None
    seed = row.get("likelihood_seed")
    try:
        seed = number if seed is None or absent(seed) else int(seed)
    except (TypeError, ValueError):
        return f"`likelihood_seed` is {seed!r}, not an integer", None
    if not 0 <= seed < 2**63:
        return f"`likelihood_seed` is {seed}, not an integer from 0 to 2^63 - 1", None
    shots, prefill = row.get("shots") or [], row.get("prefill") or ""
    if not isinstance(prefill, str) or not all(_is_pair(shot) for shot in shots):
        return "`shots` must be pairs of texts (question, answer) and `prefill` a text", None
    pairs = tuple((str(question), str(answer)) for question, answer in shots)
    return "", Scored(place, row["prompt"], row["completion"], reward, seed, pairs, prefill)


def _is_pair(shot: object) -> bool:
    return isinstance(shot, list | tuple) and len(shot) == 2 and all(isinstance(text, str) for text in shot)


def absent(value: object) -> bool:
    """Whether an optional column has nothing to say; CSV files have empty texts for that."""
    return value is None or value == ""


def _refuse(found: Sequence[Skipped], choice: str, key: str) -> None:
    if found and choice == "refuse":
        raise UserError(f"{_listed(found)}; {key}=skip leaves such rows out")


def _listed(found: Sequence[Skipped]) -> str:
    """The first of them by file and line, and how many more there are."""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0].place}: {found[0].reason}{more}" if found else "it holds none"


def _standardised(groups: list[list[Scored]], source: str) -> list[list[Scored]]:
    """Rewards with mean 0 and standard deviation 1 over all rows."""
    rewards = torch.tensor([row.reward for group in groups for row in group], dtype=torch.float64)
    mean, spread = float(rewards.mean()), float(rewards.std(correction=0))
    if spread < 1e-12:
        raise UserError(f"data={source}: every reward is {mean:g}, so that there is nothing to learn from "
                        "(offline.rewards=raw takes them as they are)")
    return [[row._replace(reward=(row.reward - mean) / spread) for row in group] for group in groups]


@dataclass(frozen=True)
class FileSource:
    """`groups_per_step` prompts a step with all of their responses, in passes over the file, each in a new order."""

    groups: list[list[Scored]]
    policy: Policy
    completion_length: int
    groups_per_step: int
    masks: str
    seed: int

    def experience(self, step: int) -> Experience:
        """The completions whose turn it is."""
        chosen = pick(self.groups, self.groups_per_step, seed=self.seed, step=step - 1)
        rows = [row for group in chosen for row in group]
        device = self.policy.device
        seeds = torch.tensor([row.seed for row in rows])
        prompts = self.policy.encode_prompts([row.asked for row in rows], seeds)
        ids = self.policy.encode_completions([row.completion for row in rows], self.completion_length)
        numbers = [number for number, group in enumerate(chosen) for _ in group]
        rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64, device=device)
        return Experience(
            completions=Completions(prompts.ids, prompts.mask, prompts.sample_ids, ids, torch.full_like(ids, -1)),
            rewards=rewards, valid=torch.ones(len(rows), dtype=torch.bool, device=device),
            groups=torch.tensor(numbers, device=device), advantages=torch.zeros_like(rewards),
            mask_step=step if self.masks == "fresh" else 0,
        )

    def state_dict(self) -> dict[str, int]:
        """Nothing: the step says where in the file it is."""
        return {}


def check_output(path: Path, overwrite: bool, key: str = "output") -> None:
    """Refuses, before anything is computed, a file that could not be written.

    Raises:
        UserError: unknown suffix, or the file exists.
    """
    check(path.suffix in FORMATS, key, path, f"a file that ends in {' or '.join(FORMATS)}")
    if path.exists() and not overwrite:
        raise UserError(f"{key}={path}: already exists; overwrite=true replaces it")


def write_scored(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the rows as JSONL or Parquet, completely or not at all."""
    import datasets

    datasets.disable_progress_bars()
    columns = dict.fromkeys(name for row in rows for name in row)  # those of any row, in the order of their appearance
    table = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".parquet":
        table.to_parquet(str(temporary))
    else:
        table.to_json(str(temporary), force_ascii=False)
    os.replace(temporary, path)
