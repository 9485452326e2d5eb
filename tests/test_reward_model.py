"""Learned rewards: against transformers called by hand, in rollouts and files, and from fine-tuning to PPO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from dllm_rl.errors import UserError
from dllm_rl.models.reward_model import LearnedReward, ModelGrader
from dllm_rl.models.tiny import build_tokenizer
from dllm_rl.task import Prompt, TaskReward
from tests.conftest import make_policy
from tests.test_cli import dllm, good
from tests.test_presets import QUICK, SMALL
from tests.test_scripts import run
from tests.test_trainer import Letters

PAIRS = [("q", "abcd"), ("qq", "A"), ("qqq", "xy z"), ("q", "")]


def save_reward_model(folder: Path) -> None:
    """A reward model of random weights with three outputs."""
    tokenizer = build_tokenizer([])
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=3, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "reward"
    save_reward_model(folder)
    return folder


def grader(path: Path, **options: object) -> ModelGrader:
    found = LearnedReward(path=str(path), **options).grader(Letters(), torch.device("cpu"))  # type: ignore[arg-type]
    assert isinstance(found, ModelGrader)
    return found


def by_hand(path: Path, prompt: str, completion: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(path)
    network = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return network(**tokenizer(prompt + completion, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_values_are_those_of_the_model_whatever_the_batch(path: Path, batch_size: int) -> None:
    prompts, completions = zip(*PAIRS, strict=True)
    logits = torch.stack([by_hand(path, *pair) for pair in PAIRS])
    for options, expected in (
        ({"label": 1}, logits[:, 1]), ({"label": 2, "activation": "sigmoid"}, logits[:, 2].sigmoid()),
        ({"label": 0, "activation": "softmax"}, logits.softmax(-1)[:, 0]),
    ):
        values = grader(path, batch_size=batch_size, **options).values(prompts, completions)
        assert values == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_reward_of_the_task_is_kept_beside_it(path: Path) -> None:
    rewards = grader(path).score_batch([Prompt("0", "q")], ["abCD"])
    assert rewards[0].parts["task"] == 0.5 and rewards[0].verdict == "wrong"
    assert rewards[0].value == pytest.approx(by_hand(path, "q", "abCD")[0].item(), abs=1e-5)
    assert TaskReward().grader(Letters(), "cpu").score_batch([Prompt("0", "q")], ["abCD"])[0].value == 0.5


def test_a_chat_template_lays_out_the_exchange(path: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    AutoModelForSequenceClassification.from_pretrained(path).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts, completions = zip(*PAIRS, strict=True)
    expected = [by_hand(tmp_path, f"<user>{prompt}", f"<assistant>{text}")[0].item() for prompt, text in PAIRS]
    assert grader(tmp_path).values(prompts, completions) == pytest.approx(expected, abs=1e-5)


def test_long_texts_are_cut_where_asked(path: Path) -> None:
    expected = by_hand(path, "q", "ab")[0].item()
    assert grader(path, max_length=3).values(["q"], ["abXYZ"]) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"label": 3}, r"reward\.label=3: must be an integer from 0 to 2, the outputs of"),
    ({"batch_size": 0}, r"reward\.batch_size=0"), ({"max_length": 0}, r"reward\.max_length=0"),
    ({"label": -1}, r"reward\.label=-1"),
])
def test_bad_values_name_their_key(path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grader(path, **options)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded, must be a folder or hub name of a sequence-classification model"):
        grader(tmp_path)


def test_a_policy_is_no_reward_model(tmp_path: Path) -> None:
    make_policy().save(tmp_path)
    with pytest.raises(UserError, match=r"reward\.path=.*: has no weights for score\.weight; must be"):
        grader(tmp_path)


def test_failures_of_graders_are_told_apart(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = LearnedReward(path=str(path)).grader(Letters(infra_every=2), torch.device("cpu"))
    assert isinstance(found, ModelGrader)
    prompts = [Prompt(str(number), "q") for number in range(3)]
    first, second, third = found.score_batch(prompts, ["ab", "cd", "ef"])
    assert (first.verdict, second.verdict) == ("wrong", "wrong") and "task" not in first.parts and "task" in second.parts
    monkeypatch.setattr(found, "values", lambda *_: [float("nan"), 1.0, float("inf")])
    verdicts = [reward.verdict for reward in found.score_batch(prompts, ["ab", "cd", "ef"])]
    assert verdicts == ["infra_error", "wrong", "infra_error"]
    assert third.verdict == "wrong"


# --- as a user does it

@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    good(folder, "sft", "task=word_problems", *SMALL, "run_dir=start")
    return folder / "start"


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_scored_again(path: Path, start: Path, tmp_path: Path) -> None:
    sample = ("rollout", "task=word_problems", f"model.path={start}", "num_prompts=3", "group_size=2")
    text = good(tmp_path, *sample, "output=scored.jsonl")
    assert "6 completions of 3 prompts" in text
    first = rows(tmp_path / "scored.jsonl")
    assert [row["group"] for row in first] == [0, 0, 1, 1, 2, 2]
    assert len({row["likelihood_seed"] for row in first}) == 6
    good(tmp_path, "rollout", "data=scored.jsonl", "reward=learned", f"reward.path={path}", "output=again.jsonl")
    again = rows(tmp_path / "again.jsonl")
    for before, after in zip(first, again, strict=True):
        expected = by_hand(path, str(before["prompt"]), str(before["completion"]))[0].item()
        assert after["reward"] == pytest.approx(expected, abs=1e-5) and after["previous_reward"] == before["reward"]
        assert after["group"] == str(before["group"]) and after["likelihood_seed"] == before["likelihood_seed"]
    good(tmp_path, *sample, "reward=learned", f"reward.path={path}", "output=learned.jsonl")
    assert [row["reward"] for row in rows(tmp_path / "learned.jsonl")] == pytest.approx([row["reward"] for row in again])


@pytest.mark.parametrize(("arguments", "words"), [
    ([], ["output=None", ".jsonl or .parquet"]),
    (["output=scored.txt"], ["output=scored.txt"]),
    (["output=new.jsonl", "data=scored.jsonl"], ["reward=task", "learned with data"]),
    (["output=new.jsonl"], ["model.path=None"]),
    (["output=new.jsonl", "model.path=x", "split=dev"], ["split=dev", "train or test"]),
    (["output=new.jsonl", "model.path=x", "group_size=0"], ["group_size=0"]),
    (["output=new.jsonl", "model.path=x", "num_prompts=0"], ["num_prompts=0"]),
])
def test_rollout_refuses_with_one_line(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = dllm(tmp_path, "rollout", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.iterdir())


def test_from_fine_tuning_over_a_reward_model_to_ppo(start: Path, tmp_path: Path) -> None:
    good(tmp_path, "rollout", "task=word_problems", f"model.path={start}", "num_prompts=32", "output=scored.jsonl")
    text = run("train_reward_model", "--data", str(tmp_path / "scored.jsonl"), "--model", str(start), "--epochs", "1",
               "--out", str(tmp_path / "reward"), "--json", str(tmp_path / "figures.json"))
    assert "pairs ranked rightly" in text and json.loads((tmp_path / "figures.json").read_text())["n"] > 0
    good(tmp_path, "train", "algorithm=ppo", f"model.path={start}", "reward=learned", f"reward.path={tmp_path / 'reward'}",
         "reward.activation=sigmoid", *QUICK, "run_dir=run")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 < metrics["reward/mean"] < 1 and metrics["reward/std"] > 0 and 0 <= metrics["reward/task"] <= 1
    assert metrics["critic/loss"] > 0 and metrics["grad/norm"] > 0
