"""Math tasks: reading numbers out of text, one-step word problems, GSM8K."""

from __future__ import annotations

import json
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_rl.errors import UserError
from dllm_rl.models.tiny import build_tokenizer
from dllm_rl.task import Prompt
from dllm_rl.tasks.math.extraction import last_boxed
from dllm_rl.tasks.math.gsm8k import GSM8K
from dllm_rl.tasks.math.numbers import final_answer, last_number
from dllm_rl.tasks.math.word_problems import MAX_NUMBER, MINUS_VERBS, PLUS_VERBS, WordProblems

DATA = Path(os.environ.get("DLLM_RL_DATA", Path(__file__).parents[1] / "../shared/data")) / "gsm8k"
HOSTILE = "".join(("0123456789.,/-−+$%{}\\ #=", "boxed\n", "３٣³\x00\ud800"))

PIECES = ("\\boxed{", "}", "18", "####", "-", "/0")


@pytest.mark.parametrize(("text", "number"), [
    ("18", 18), ("1,000", 1000), ("18.0", 18), ("$18", 18), ("$18.00", 18), ("18.", 18), ("50%", 50), ("-7", -7),
    ("−7", -7), ("-$7", -7), ("$-7", -7), ("\\$18", 18), ("1,450,000", 1450000), ("1{,}000", 1000), ("1\\,000", 1000),
    (".5", Fraction(1, 2)), ("0.50", Fraction(1, 2)), ("3/4", Fraction(3, 4)), ("16-3", 3), ("16 - 3", 3),
    ("(2)-3", 3), ("16-3=13", 13), ("1,2,3", 3), ("10–12", 12), ("007", 7), ("18 dollars", 18), ("x=-2", -2),
    ("1.5.", Fraction(3, 2)), ("", None), ("none", None), ("-", None), ("$", None), ("1/0", None), ("１８", None),
    ("9" * 41, None), ("1/" + "9" * 41, None), ("9" * 40, int("9" * 40)),
])
def test_last_number(text: str, number: object) -> None:
    """R3: a number counts however it is written."""
    assert last_number(text) == number


@pytest.mark.parametrize(("text", "number"), [
    ("3 + 4 = 7", 7), ("so 5\n#### 1,000", 1000), ("#### 3\n#### 18 eggs\nnot 19", 18), ("\\boxed{18} and then 7", 18),
    ("\\boxed{1} or \\boxed{18} #### 7", 18), ("\\boxed{\\$18.00}", 18), ("\\boxed{18\\%}", 18), ("\\boxed {18}", 18),
    ("\\boxed{18 \\text{ dollars}}", 18), ("\\boxed{\\boxed{18}}", 18), ("\\boxed{18} \\boxed{19", 18),
    ("\\boxed{18", 18), ("\\boxed{\\frac{3}{4}} 4", Fraction(3, 4)), ("\\boxed{}", None), ("\\boxed{10, 18}", None),
    ("7 ####", None), ("#### -3", -3), ("#### 18 (not 19)", None), ("#### about 18", 18), ("\\boxed{3/4}", Fraction(3, 4)),
])
def test_final_answer(text: str, number: object) -> None:
    assert final_answer(text) == number


@pytest.mark.parametrize(("text", "content"), [
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\boxed{\\{1\\}}", "\\{1\\}"), ("} \\boxed{1} {", "1"),
    ("\\boxed{1", None), ("{\\boxed{1}", "1"), ("\\boxed{{1}", None), ("boxed{1}", None), ("\\fbox{1}", None),
])
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize("text", [
    "9" * 10**6, "1," * 10**6, "1,000" * 10**5, "\\boxed{" * 10**5, "\\boxed{" * 2000 + "1" + "}" * 2000, "{" * 10**6,
    "1/" * 10**5, "-" * 10**6, "." * 10**6, "#" * 10**6, "\\boxed" + " " * 10**5, ",000" * 10**5, "$" * 10**5,
    "{,}" * 10**5,
])
def test_hostile_texts_are_read_at_once(text: str) -> None:
    start = time.process_time()
    final_answer(text)
    last_number(text)
    assert time.process_time() - start < 0.5


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(HOSTILE, max_size=60) | st.lists(st.sampled_from(PIECES)).map("".join))
def test_score_never_raises(text: str) -> None:
    prompt = Prompt("test/0", "", {"answer": "18"})
    assert GSM8K().score(prompt, text).value in (0.0, 1.0)
    assert WordProblems().score(Prompt("test/0", "", {"answer": 18}), text).value in (0.0, 1.0)


def test_word_problem_prompts() -> None:
    task = WordProblems()
    for split, size in (("train", 4096), ("test", 256)):
        prompts = task.prompts(split)
        assert len({prompt.text for prompt in prompts}) == len(prompts) == size
        for prompt in prompts:
            name, has, first, thing, conjunction, verb, second = prompt.text.split()
            assert (has, conjunction) == ("has", "and")
            assert verb in PLUS_VERBS + MINUS_VERBS
            sign = 1 if verb in PLUS_VERBS else -1
            assert prompt.data["answer"] == int(first) + sign * int(second) >= 0
            assert {int(first), int(second)} <= set(range(1, 21))
            assert (name + thing).isalpha()
    assert task.prompts("test")[17].id == "test/17"
    assert task.prompts("test") is WordProblems().prompts("test")


def test_word_problem_splits_are_disjoint_whatever_their_sizes() -> None:
    test = {prompt.text for prompt in WordProblems(test_size=3000).prompts("test")}
    assert not test & {prompt.text for prompt in WordProblems().prompts("train")}
    assert not test & {demo.prompt for demo in WordProblems().demonstrations(5000, 0)}


def test_word_problems_are_short_for_the_tiny_tokenizer() -> None:
    tokenizer = build_tokenizer(WordProblems.words)
    for demo in WordProblems(demonstrations_from="noisy").demonstrations(300, 0):
        assert len(tokenizer.encode(demo.prompt)) == 7
        ids = tokenizer.encode(demo.completion)
        assert len(ids) == 5 < WordProblems().completion_length
        assert tokenizer.decode(ids) == demo.completion


@pytest.mark.parametrize(("text", "verdict"), [
    (" 5 - 3 = 2", "correct"), ("5 - 3 = 2", "correct"), ("2", "correct"), ("= 2.0", "correct"),
    (" 7 + 1 = 2", "correct"), (" 5 + 3 = 8", "wrong"), (" 5 - 3 = -2", "wrong"), ("5 - 3 = 2 =", "no_answer"),
    ("", "no_answer"), ("two", "no_answer"),
])
def test_word_problem_grades(text: str, verdict: str) -> None:
    reward = WordProblems().score(Prompt("test/0", "Ann has 5 apples and loses 3", {"answer": 2}), text)
    assert reward.verdict == verdict
    assert reward.value == float(verdict == "correct")


def test_systematic_mistake_reads_loss_as_gain() -> None:
    losses = mistakes = 0
    for text, completion in WordProblems().demonstrations(4000, 1):
        _, _, first, _, _, verb, second = text.split()
        a, b = int(first), int(second)
        if verb in PLUS_VERBS:
            assert completion == f" {a} + {b} = {a + b}"
            continue
        losses += 1
        mistakes += completion == f" {a} + {b} = {a + b}"
        assert completion in (f" {a} + {b} = {a + b}", f" {a} - {b} = {a - b}")
    # Two in three; the variance is 4000 x 2/9.
    assert abs(losses - 8000 / 3) < 4 * (8000 / 9) ** 0.5
    assert abs(mistakes - 0.65 * losses) < 4 * (losses * 0.65 * 0.35) ** 0.5


def test_noisy_mistake_writes_a_random_result() -> None:
    wrong = 0
    for text, completion in WordProblems(demonstrations_from="noisy").demonstrations(4000, 1):
        _, _, first, _, _, verb, second = text.split()
        sign = "+" if verb in PLUS_VERBS else "-"
        equation, value = completion.split(" = ")
        assert equation == f" {first} {sign} {second}"
        assert 0 <= int(value) <= 2 * MAX_NUMBER
        wrong += int(value) != int(first) + int(sign + second)
    # One of the 2 x MAX_NUMBER + 1 results is the right one.
    rate = 0.65 * (2 * MAX_NUMBER) / (2 * MAX_NUMBER + 1)
    assert abs(wrong - 4000 * rate) < 4 * (4000 * rate * (1 - rate)) ** 0.5


def test_clean_word_problems_and_rates() -> None:
    for task in (WordProblems(demonstrations_from="clean"), WordProblems(mistake_rate=0.0)):
        for text, completion in task.demonstrations(300, 0):
            _, _, first, _, _, verb, second = text.split()
            sign = "+" if verb in PLUS_VERBS else "-"
            assert completion == f" {first} {sign} {second} = {int(first) + int(sign + second)}"
    always = WordProblems(mistake_rate=1.0).demonstrations(300, 0)
    assert all("+" in demo.completion for demo in always)


def test_word_problem_demonstrations_are_a_pure_function_of_the_seed() -> None:
    assert WordProblems().demonstrations(50, 3) == WordProblems().demonstrations(50, 3)
    assert WordProblems().demonstrations(50, 3) != WordProblems().demonstrations(50, 4)


@pytest.mark.parametrize("fields", [
    {"train_size": 0}, {"test_size": None}, {"completion_length": 0}, {"demonstrations_from": "good"},
    {"mistake_rate": -0.1}, {"mistake_rate": 0.65, "demonstrations_from": "clean"},
])
def test_bad_word_problem_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"^task\.{next(iter(fields))}=.*: must be "):
        WordProblems(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1,000", "1000.0", "$1000", "#### 1,000", "\\boxed{1000.00}", "so $1,000.", "1000%"])
def test_gsm8k_numbers_count_however_written(text: str) -> None:
    """R3: no exact comparison of strings."""
    assert GSM8K().score(Prompt("test/0", "", {"answer": "1000"}), text).verdict == "correct"


@pytest.mark.parametrize(("text", "verdict"), [
    ("1001", "wrong"), ("-1000", "wrong"), ("1000 or 3", "wrong"), ("<answer></answer>", "no_answer"),
    ("", "no_answer"),
])
def test_gsm8k_wrong_answers(text: str, verdict: str) -> None:
    reward = GSM8K().score(Prompt("test/0", "", {"answer": "1000"}), text)
    assert (reward.value, reward.verdict) == (0.0, verdict)


def write_rows(folder: Path, rows: list[dict[str, object]]) -> str:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


GOOD: dict[str, object] = {"question": "One plus one?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}


@pytest.mark.parametrize(("row", "problem"), [
    ({"answer": "#### 2"}, "has no `question`"), ({"question": "What?"}, "has no `answer`"),
    ({**GOOD, "answer": "2"}, "`answer` must end on ####"), ({**GOOD, "answer": "#### many"}, "must end on ####"),
    ({"question": 3, "answer": "#### 2"}, "question=3: must be a string"), ({**GOOD, "answer": 2}, "answer=2: must be"),
])
def test_bad_gsm8k_rows_name_their_line(tmp_path: Path, row: dict[str, object], problem: str) -> None:
    data = write_rows(tmp_path, [GOOD, row])
    with pytest.raises(UserError, match=rf"train\.jsonl:2: .*{problem}"):
        GSM8K(data=data).prompts("train")


def test_gsm8k_rows(tmp_path: Path) -> None:
    task = GSM8K(data=write_rows(tmp_path, [GOOD, {"question": "Two plus two?", "answer": "#### $4.00"}]))
    prompts = task.prompts("train")
    assert prompts[1] == Prompt("train/1", "Two plus two?", {"answer": "4"})
    assert task.prompts("train") is GSM8K(data=str(tmp_path)).prompts("train")
    demos = task.demonstrations(6, 0)
    assert [demos.count(demo) for demo in set(demos)] == [3, 3]
    assert (GOOD["question"], GOOD["answer"]) in demos
    assert demos == task.demonstrations(6, 0)
    with pytest.raises(UserError, match=r"holds no test\.jsonl"):
        task.prompts("test")


@pytest.mark.parametrize("fields", [{"data": ""}, {"data": 3}, {"completion_length": -1}])
def test_bad_gsm8k_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"^task\.{next(iter(fields))}=.*: must be "):
        GSM8K(**fields)  # type: ignore[arg-type]


def test_real_gsm8k_answers_are_right() -> None:
    if not DATA.is_dir():
        pytest.skip(f"needs the real questions at {DATA}; set DLLM_RL_DATA to the folder that holds gsm8k/")
    task = GSM8K(data=str(DATA))
    prompts = task.prompts("test")
    lines = (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(prompts) == len(answers) == 1319
    for prompt, answer in zip(prompts, answers, strict=True):
        gold = answer.split("####")[1].strip().replace(",", "")
        assert prompt.data["answer"] == gold
        for text in (answer, f"So it is \\boxed{{{gold}}}.", f"The answer is ${gold}.00."):
            assert task.score(prompt, text).verdict == "correct"
        assert task.score(prompt, f"{answer}1").verdict == "wrong"
    demos = task.demonstrations(8000, 0)
    assert len(demos) == 8000
    assert len(set(demos)) == 7473
    assert demos != task.demonstrations(8000, 1)
