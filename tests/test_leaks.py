"""The guard against leaks finds what is planted, and what it does about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dllm_rl.errors import UserError
from dllm_rl.leaks import guarded, leaked_texts
from dllm_rl.supervised import allowed_demonstrations
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task, normalised
from dllm_rl.tasks.math.gsm8k import GSM8K
from dllm_rl.tasks.planning.countdown import Countdown
from tests.test_cli import bad, good


@dataclass
class Questions(Task):
    """Prompts as given."""

    completion_length: int = 4
    train: tuple[str, ...] = ("How many?", "What?", "Who?")
    test: tuple[str, ...] = ("Where?",)
    seen: list[int] = field(default_factory=list)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(f"{split}/{i}", text) for i, text in enumerate(self.train if split == "train" else self.test)]

    def score(self, prompt: Prompt, completion: str) -> Reward:
        raise NotImplementedError

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        self.seen.append(count)
        return [Demonstration(self.train[(seed + i) % len(self.train)], "a") for i in range(count)]


def test_nothing_in_common(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(guarded(Questions(), "refuse")) == 3
    assert capsys.readouterr().out == "leak guard: 3 training and 1 test prompts, none in common\n"


@pytest.mark.parametrize("planted", ["How many?", " how   MANY ?", "how many", "\nＨow many?!\t"])
def test_a_planted_overlap_is_refused(planted: str) -> None:
    task = Questions(test=("Where?", planted))
    with pytest.raises(UserError) as caught:
        guarded(task, "refuse")
    assert "3 training and 2 test prompts, 1 in common: train/0 is test/1 ('how many')" in str(caught.value)
    assert "leaks=drop" in str(caught.value)


def test_drop_leaves_them_out_and_allow_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    task = Questions(test=("what", "Who?"))
    assert [prompt.text for prompt in guarded(task, "drop")] == ["How many?"]
    assert "left out" in capsys.readouterr().out
    assert len(guarded(task, "allow")) == 3
    assert "STAY" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing is left"):
        guarded(Questions(test=Questions.train), "drop")
    with pytest.raises(UserError, match="leaks=maybe: must be refuse, drop, allow"):
        guarded(task, "maybe")


def test_demonstrations_of_test_prompts_are_left_out() -> None:
    task = Questions(test=("what",))
    assert leaked_texts(Questions(), "drop") == frozenset()
    leaked = leaked_texts(task, "drop")
    kept = allowed_demonstrations(task, 5, 0, leaked)
    assert [item.prompt for item in kept] == ["How many?", "Who?", "How many?", "Who?", "How many?"]
    assert allowed_demonstrations(task, 5, 0, frozenset())[1].prompt == "What?"


def test_tasks_know_what_makes_a_question_the_same() -> None:
    countdown = Countdown()
    one, other = (Prompt("", str(numbers), {"numbers": numbers, "target": 23})
                  for numbers in ([30, 100, 93], [93, 30, 100]))
    assert countdown.fingerprint(one) == countdown.fingerprint(other)
    assert normalised("A\u00a0b.") == "a b"


def test_train_and_sft_refuse_a_file_with_a_planted_overlap(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({**rows[3], "question": "what is 3 + 3"}) + "\n")
    assert isinstance(GSM8K(data=str(tmp_path)).prompts("test")[0], Prompt)
    data = ("task=gsm8k", f"task.data={tmp_path}", "task.completion_length=32")
    assert "1 in common: train/3 is test/0" in bad(tmp_path, "sft", *data)
    assert not (tmp_path / "outputs").exists()
    text = good(tmp_path, "sft", *data, "leaks=drop", "supervised.steps=2", "supervised.batch_size=4", "run_dir=s")
    assert "They are left out" in text
    assert "1 in common" in bad(tmp_path, "train", *data, "model.path=s")
    (tmp_path / "scored.jsonl").write_text("".join(
        json.dumps({"prompt": row["question"], "completion": text, "reward": reward}) + "\n"
        for row in rows for text, reward in (("1", 0.0), ("2", 1.0))
    ))
    offline = (*data, "model.path=s", "data=scored.jsonl", "algorithm=rpo", "trainer.steps=1", "trainer.eval_every=0")
    assert "scored.jsonl:7 is test/0" in bad(tmp_path, "train", *offline)
    assert "8 training and 1 test prompts, 1 in common" in good(tmp_path, "train", *offline, "leaks=drop", "run_dir=r")
