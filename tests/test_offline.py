"""Files of scored completions: what is accepted, what is refused or skipped with which words, what is learned from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy
from dllm_rl.objectives.dro import DRO
from dllm_rl.objectives.kto import KTO
from dllm_rl.objectives.rpo import RPO
from dllm_rl.objectives.sft import SFT
from dllm_rl.objectives.vrpo import VRPO
from dllm_rl.offline import FileSource, OfflineConfig, Scored, check_output, load_scored, write_scored
from dllm_rl.scoring import Masks
from dllm_rl.trainer import train
from dllm_rl.update import update
from tests.test_trainer import count_passes, tiny, training

LIKELIHOOD = StratifiedCounts(num_samples=2)
GOOD: dict[str, Any] = {"prompt": "q", "completion": "ab", "reward": 1.0, "group": 0, "likelihood_seed": 5}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, policy: Policy, least: int = 1, **options: str) -> tuple[list[list[Scored]], list[Any]]:
    return load_scored(path, OfflineConfig(**options), policy, 4, (least, "because"))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny()


def without(column: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != column}


BAD = [
    (without("reward"), "has no `reward` (required are prompt, completion, reward)"),
    ({"text": "x"}, "has no `prompt` and no `completion` and no `reward`"),
    ({**GOOD, "reward": float("nan")}, "`reward` is nan, not a finite number"),
    ({**GOOD, "reward": float("inf")}, "`reward` is inf, not a finite number"),
    ({**GOOD, "reward": "good"}, "`reward` is 'good', not a number"),
    ({**GOOD, "completion": ""}, "`completion` is empty"),
    ({**GOOD, "completion": 7}, "`completion` is 7, not a text"),
    ({**GOOD, "prompt": ""}, "`prompt` is empty"),
    ({**GOOD, "completion": "abcde"}, "`completion` has 5 tokens and task.completion_length is 4"),
    ({**GOOD, "prompt": "another"}, "group 0 has another prompt at"),
    ({**GOOD, "group": [1]}, "`group` is [1], not a text or an integer"),
    ({**GOOD, "completion": "a[MASK]"}, "`completion` spells the mask token or the end of the text"),
    ({**GOOD, "completion": "a[EOS]b"}, "`completion` spells the mask token or the end of the text"),
    ({**GOOD, "likelihood_seed": "x"}, "`likelihood_seed` is 'x', not an integer"),
    ({**GOOD, "likelihood_seed": -1}, "`likelihood_seed` is -1"),
]


@pytest.mark.parametrize(("row", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_rows_are_refused_or_skipped_with_file_and_line(
    tmp_path: Path, policy: Policy, row: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "scored.jsonl", [GOOD, row, GOOD])
    with pytest.raises(UserError) as refused:
        load(path, policy)
    assert f"{path}:2: " in str(refused.value) and words in str(refused.value)
    assert "offline.bad_rows=skip" in str(refused.value)
    groups, skipped = load(path, policy, bad_rows="skip")
    assert len(groups[0]) == 2 and len(groups) == 1
    assert [item.place for item in skipped] == [f"{path}:2"] and words in skipped[0].reason
    assert json.loads(Path(path).read_text().splitlines()[0]) == GOOD, "the file is left as it was"


def test_small_groups_are_refused_or_skipped_with_the_reason(tmp_path: Path, policy: Policy) -> None:
    path = write(tmp_path / "scored.jsonl", [GOOD, GOOD, {**GOOD, "prompt": "r", "group": 1}])
    with pytest.raises(UserError, match=r"scored.jsonl:3: 1 of at least 2 responses to its prompt: because"):
        load(path, policy, least=2)
    groups, skipped = load(path, policy, least=2, small_groups="skip")
    assert [len(group) for group in groups] == [2] and skipped[0].place.endswith(":3")
    assert [len(group) for group in load(path, policy)[0]] == [2, 1]


def test_how_many_responses_each_algorithm_needs() -> None:
    assert [objective.least_group[0] for objective in (RPO(), VRPO(), DRO(value="group_mean"))] == [2, 2, 2]
    assert [objective.least_group[0] for objective in (DRO(), KTO(), SFT())] == [1, 1, 1]


def test_nothing_left_is_an_error(tmp_path: Path, policy: Policy) -> None:
    path = write(tmp_path / "scored.jsonl", [{**GOOD, "completion": ""}])
    with pytest.raises(UserError, match=r"no usable rows are left \(.*:1: `completion` is empty\)"):
        load(path, policy, bad_rows="skip")


def test_rows_without_groups_are_grouped_by_prompt(tmp_path: Path, policy: Policy) -> None:
    rows = [{"prompt": name, "completion": "a", "reward": 0} for name in "xyx"]
    groups, _ = load(write(tmp_path / "scored.jsonl", rows), policy)
    assert [[row.prompt for row in group] for group in groups] == [["x", "x"], ["y"]]
    assert [row.seed for group in groups for row in group] == [0, 2, 1]


def test_empty_cells_of_a_csv_file_are_absent(tmp_path: Path, policy: Policy) -> None:
    (tmp_path / "scored.csv").write_text("prompt,completion,reward,group,likelihood_seed\nx,a,1,,\ny,b,0,,\nx,c,0.5,,7\n")
    groups, _ = load(str(tmp_path / "scored.csv"), policy)
    assert [[(row.completion, row.reward, row.seed) for row in group] for group in groups] == [
        [("a", 1.0, 0), ("c", 0.5, 7)], [("b", 0.0, 1)],
    ]


def test_columns_that_some_rows_lack_are_kept(tmp_path: Path) -> None:
    write_scored([{"prompt": "x"}, {"prompt": "y", "group": "a"}], tmp_path / "scored.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "x", "group": None}, {"prompt": "y", "group": "a"}]


def test_standardised_rewards_by_hand(tmp_path: Path, policy: Policy) -> None:
    rows = [{**GOOD, "reward": reward} for reward in (0.0, 0.0, 0.0, 4.0)]  # mean 1, standard deviation sqrt(3)
    path = write(tmp_path / "scored.jsonl", rows)
    groups, _ = load(path, policy, rewards="standardised")
    assert [row.reward for row in groups[0]] == pytest.approx([-(3**-0.5)] * 3 + [3**0.5])
    path = write(tmp_path / "scored.jsonl", [GOOD, GOOD])
    with pytest.raises(UserError, match="every reward is 1, so that there is nothing to learn from"):
        load(path, policy, rewards="standardised")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_written_can_be_read(tmp_path: Path, policy: Policy, suffix: str) -> None:
    rows = [{**GOOD, "completion": "é\n/", "reward": 0.5}, {**GOOD, "likelihood_seed": 2**40}]
    path = tmp_path / "folder" / f"scored{suffix}"
    write_scored(rows, path)
    groups, _ = load(str(path), policy)
    assert [(row.completion, row.reward, row.seed) for row in groups[0]] == [("é\n/", 0.5, 5), ("ab", 1.0, 2**40)]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output=.*scored\.csv: must be a file that ends in \.jsonl or \.parquet"):
        check_output(tmp_path / "scored.csv", False)
    (tmp_path / "scored.jsonl").touch()
    with pytest.raises(UserError, match="already exists; overwrite=true"):
        check_output(tmp_path / "scored.jsonl", False)
    check_output(tmp_path / "scored.jsonl", True)


@pytest.mark.parametrize(("options", "message"), [
    ({"bad_rows": "ignore"}, r"offline\.bad_rows=ignore: must be refuse or skip"),
    ({"small_groups": "keep"}, r"offline\.small_groups=keep"), ({"rewards": "z"}, r"offline\.rewards=z"),
    ({"masks": "none"}, r"offline\.masks=none: must be fresh or fixed"),
])
def test_bad_values_name_their_key(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OfflineConfig(**options)


def make_groups(count: int = 6) -> list[list[Scored]]:
    """Groups of different sizes; small letters are good, capital ones bad."""
    return [
        [Scored(f"file:{group}-{number}", "q" * (1 + group % 3), text, float(text.islower()), 10 * group + number)
         for number, text in enumerate(("abcd", "ABCD", "bcda", "XY")[: 2 + group % 3])]
        for group in range(count)
    ]


def test_a_step_has_whole_groups_in_passes_over_the_file(policy: Policy) -> None:
    source = FileSource(make_groups(), policy, 4, groups_per_step=2, masks="fresh", seed=0)
    steps = [source.experience(step) for step in (1, 2, 3)]
    seeds = [set((step.completions.sample_ids // 10).tolist()) for step in steps]
    assert sorted(number for step in seeds for number in step) == [0, 1, 2, 3, 4, 5]
    for step in steps:
        sizes = {2 + group % 3 for group in set((step.completions.sample_ids // 10).tolist())}
        assert {int((step.groups == number).sum()) for number in (0, 1)} == sizes
        assert step.valid.all() and not list(step.records(1))
    assert torch.equal(source.experience(1).completions.ids, steps[0].completions.ids)


def test_fixed_masks_stay_with_their_row(policy: Policy) -> None:
    def corruption(masks: str, step: int) -> dict[int, list[bool]]:
        source = FileSource(make_groups(1), policy, 4, groups_per_step=1, masks=masks, seed=0)
        experience = source.experience(step)
        completions = experience.completions
        drawn = Masks(LIKELIHOOD, 0, experience.mask_step).draw(policy, completions, torch.zeros(len(completions)).long())
        return dict(zip(completions.sample_ids.tolist(), drawn.scored.tolist(), strict=True))

    assert corruption("fixed", 1) == corruption("fixed", 2)
    assert any(corruption("fresh", step) != corruption("fresh", 1) for step in range(2, 8))


@pytest.mark.parametrize("objective", [RPO(partition="mc_mean", tau=0.5), DRO(value="group_mean"), KTO(threshold=0.5),
                                       KTO(threshold=0.5, reference_point="matched"), VRPO(), SFT()])
def test_every_algorithm_learns_what_the_file_prefers(tmp_path: Path, objective: Any) -> None:
    run = training(tmp_path, 30)
    run.source = FileSource(make_groups(), run.policy, 4, groups_per_step=6, masks="fresh", seed=0)
    run.objective = objective
    if objective.traits.uses_reference:
        run.reference = run.policy.frozen_copy()
    experience = run.source.experience(1)
    before = preference(run.policy, experience.completions, experience.rewards)
    train(run)
    assert preference(run.policy, experience.completions, experience.rewards) > before + 1
    rows = run.folder.read("metrics.jsonl")
    assert "rollout/unique" not in rows[0] and rows[0]["reward/mean"] > 0
    assert not run.folder.read("rollouts.jsonl")


def preference(policy: Policy, completions: Any, rewards: torch.Tensor) -> float:
    """Mean ELBO of the good completions minus that of the bad ones."""
    elbo = Engine(completions, Masks(LIKELIHOOD, 1, 1), 64).score(policy).terms.mean(1)
    return float(elbo[rewards == 1].mean() - elbo[rewards == 0].mean())


def test_a_group_that_failing_graders_left_alone_teaches_nothing(tmp_path: Path) -> None:
    run = training(tmp_path, 1)
    run.source = FileSource(make_groups(2), run.policy, 4, groups_per_step=2, masks="fresh", seed=0)
    run.objective, run.reference = RPO(), run.policy.frozen_copy()
    experience = run.source.experience(1)
    small = experience.groups == int((experience.groups.bincount() == 2).nonzero())
    valid = ~(small & (torch.arange(len(small)) == int(small.nonzero()[0])))
    metrics = update(run, replace(experience, valid=valid, advantages=experience.rewards))
    assert metrics["update/sequences"] == len(small) - 2, "the other one of its group says nothing alone"


def test_completions_that_are_not_chosen_cost_no_pass(tmp_path: Path) -> None:
    run = training(tmp_path, 1)
    run.source = FileSource(make_groups(), run.policy, 4, groups_per_step=6, masks="fresh", seed=0)
    run.objective, run.likelihood = SFT(), StratifiedCounts(num_samples=1)
    passes = count_passes(run.policy)
    train(run)
    assert passes == [6], "one completion of each of the six prompts"


def test_rows_keep_what_else_the_model_read(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": text, "reward": reward, "shots": [["1", "2"]], "prefill": "so "}
            for text, reward in (("a", 0.0), ("b", 1.0))]
    write_scored(rows, tmp_path / "file.jsonl")
    groups, _ = load(str(tmp_path / "file.jsonl"), tiny())
    assert tiny().render(groups[0][0].asked) == "12\n\nqso "
    write_scored([{**row, "shots": [["1"]]} for row in rows], tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="`shots` must be pairs of texts"):
        load(str(tmp_path / "bad.jsonl"), tiny())
