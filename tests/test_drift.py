"""What an approximate sampler costs is logged, and a run without variety is stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dllm_rl.checkpoint import load_state
from dllm_rl.diffusion.reading import CacheConfig
from dllm_rl.diffusion.sampler import LowConfidence, Parallel, Sampler
from dllm_rl.drift import Variety, disagreement, effort
from dllm_rl.errors import UserError
from dllm_rl.experience import RolloutSource
from dllm_rl.run_folder import latest_checkpoint
from dllm_rl.trainer import train
from dllm_rl.types import Completions
from tests.conftest import make_policy
from tests.test_trainer import Letters, training


def test_effort_by_hand() -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    steps = torch.tensor([[0, 1, 1, -1], [0, 0, 0, 0]])
    known = Completions(ids, ids.bool(), ids[:, 0], ids, steps, torch.tensor([[1, 1], [3, 0]]))
    assert effort(known) == {"sampler/nfe": 2.5, "sampler/tokens_per_pass": 7 / 5}
    assert effort(replace(known, passes=None)) == {"sampler/nfe": 1.5, "sampler/tokens_per_pass": 7 / 3}


def test_a_sampler_agrees_with_itself_and_parallel_decoding_does_not() -> None:
    policy = make_policy()
    prompts = policy.encode_prompts(["ab", "cd", "e"], torch.arange(3))
    agreeing: list[Sampler] = [Parallel(threshold=2.0, block_length=4),
                               LowConfidence(block_length=4, cache=CacheConfig("prefix", 1))]
    for sampler in agreeing:
        assert disagreement(policy, sampler, prompts, 12) == {"sampler/disagreement": 0.0, "sampler/changed": 0.0}
    hasty = disagreement(policy, Parallel(threshold=None, max_tokens=12, block_length=12), prompts, 12)
    assert 0 < hasty["sampler/disagreement"] <= 1 and 0 < hasty["sampler/changed"] <= 1


def test_disagreement_counts_the_text_and_its_end() -> None:
    """Rows of tokens by hand: two of three tokens of the first text differ, nothing that counts in the second."""
    policy = make_policy()
    end = policy.eos_id
    exact = torch.tensor([[7, 8, end, end], [9, end, end, end]])
    fast = torch.tensor([[7, 9, 9, end], [9, end, 5, 5]])

    prompts = policy.encode_prompts(["a", "b"], torch.arange(2))

    class Both(LowConfidence):
        def exact(self) -> LowConfidence:
            return Fixed(exact)

        def sample(self, *_: object, **__: object) -> Completions:  # type: ignore[override]
            return Completions(prompts.ids, prompts.mask, prompts.sample_ids, fast, fast)

    class Fixed(LowConfidence):
        def __init__(self, ids: torch.Tensor) -> None:
            self.ids = ids

        def sample(self, *_: object, **__: object) -> Completions:  # type: ignore[override]
            return Completions(prompts.ids, prompts.mask, prompts.sample_ids, self.ids, self.ids)

    assert disagreement(policy, Both(), prompts, 4) == {"sampler/disagreement": 2 / 5, "sampler/changed": 0.5}


def test_variety_counts_steps_in_a_row() -> None:
    groups = [0, 0, 1, 1]
    same, other = ["a", "a", "b", "b"], ["a", "a", "b", "c"]
    variety = Variety(3)
    for texts in (same, same, other, same, same):
        variety.count(groups, texts)
    with pytest.raises(UserError, match=r"trainer\.max_identical_steps=3: in so many steps"):
        variety.count(groups, same)
    off, alone = Variety(0), Variety(1)
    for _ in range(50):
        off.count(groups, same)
        alone.count([0, 1], ["a", "a"])  # one completion per prompt: nothing to compare


def source_of(run_source: object, sampler: Sampler, **changes: object) -> RolloutSource:
    assert isinstance(run_source, RolloutSource)
    return replace(run_source, sampler=sampler, **changes)  # type: ignore[arg-type]


def test_a_run_logs_drift_for_approximate_samplers_only(tmp_path: Path) -> None:
    for name, sampler in (("exact", LowConfidence()), ("fast", Parallel(threshold=0.02))):
        run = training(tmp_path / name, 2)
        run.source = source_of(run.source, sampler, check_prompts=2)
        train(run)
        rows = run.folder.read("metrics.jsonl")
        assert all(1 <= row["sampler/nfe"] <= 4 and row["sampler/tokens_per_pass"] >= 1 for row in rows)
        assert all(("sampler/disagreement" in row) == (name == "fast") for row in rows)


def test_the_count_survives_a_restart(tmp_path: Path) -> None:
    """Two such steps, a checkpoint, and one more in a new process."""
    run = training(tmp_path, 6, task=Letters())
    run.config.steps = 2
    run.source = source_of(run.source, LowConfidence(temperature=0.0), variety=Variety(3))
    train(run)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    state = load_state(checkpoint)
    assert state["step"] == 2 and state["source"] == {"identical_steps": 2}
    again = Variety(3, state["source"]["identical_steps"])
    with pytest.raises(UserError, match="max_identical_steps=3"):
        again.count([0, 0], ["a", "a"])


def test_a_run_with_identical_rollouts_is_stopped(tmp_path: Path) -> None:
    run = training(tmp_path, 6, task=Letters())
    run.source = source_of(run.source, LowConfidence(temperature=0.0), variety=Variety(3))
    with pytest.raises(UserError, match="max_identical_steps=3"):
        train(run)
    assert [row["step"] for row in run.folder.read("metrics.jsonl")] == [1, 2]
