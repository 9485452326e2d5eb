"""The exact path of the math graders: properties, hostile texts, and the named defects of others' rewards."""

from __future__ import annotations

import random
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_rl.task import Prompt
from dllm_rl.tasks.math.answers import compare, is_echo, symbolic_form
from dllm_rl.tasks.math.competition import Math
from dllm_rl.tasks.math.extraction import final_text, last_boxed
from dllm_rl.tasks.math.gsm8k import GSM8K
from dllm_rl.tasks.math.latex import cleaned, squeezed
from dllm_rl.tasks.math.protocols import PROTOCOLS, format_parts, worded, written
from dllm_rl.tasks.math.quantities import Quantity, quantity

PIECES = st.lists(st.sampled_from((
    "\\boxed{", "{", "}", "(", ")", "[", "]", "18", "-", "/", "0", ",", " ", "\\frac", "\\text{", "\\left", "\\sqrt", "^",
    "_8", "=", "\\%", "\\$", "$", "\\\\", "x", " or ", "cm", "\\circ", "\\times 10^", "\\pm", "####", "<answer>",
    "</answer>", "\\{", "\\overline{", ".", "٣", "½", "\x00", "\ud800", "million", "\\approx", "∞", "\\begin{pmatrix}", "&",
    "e5",
))).map("".join)
ANYTHING = st.text() | PIECES
GOLDS = ("18", "\\frac{1}{2}", "10\\%", "x=5", "\\$18.90", "90^\\circ", "(3,4]", "1,-2", "\\text{(C)}", "52_8",
         "3\\sqrt{13}", "\\text{A, B}", "0.56 = 56\\%", "")


@pytest.mark.parametrize(("text", "content"), [
    ("\\boxed{18}", "18"), ("<answer>\n18\n</answer>", "18"), ("<answer>18", "18"), ("x\n#### 18\nmore", "18"),
    ("\\boxed{1}<answer>2</answer>", "2"), ("<answer>\\boxed{1}</answer>", "1"), ("<answer>1</answer> \\boxed{2}", "2"),
    ("<answer>1</answer><answer>2</answer>", "2"), ("\\boxed{1} #### 2", "1"), ("<answer>1</answer>\n#### 2", "1"),
    ("\\boxed{}", ""), ("<answer></answer>", ""), ("####", ""), ("18", None), ("", None), ("\\boxed{18", None),
    ("\\boxed{1}" + " " * 20_000, None),
])
def test_final_text(text: str, content: str | None) -> None:
    assert final_text(text) == content


@pytest.mark.parametrize(("text", "plain"), [
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"), ("\\left( \\dfrac12, \\, 3 \\right]", "( \\frac{1}{2}, 3 ]"),
    ("$\\tfrac{1}2$.", "\\frac{1}{2}"), ("\\mbox{ cm}", "\\text{ cm}"), ("90^{ \\circ }", "90^\\circ"),
    ("1{,}000{,}000", "1000000"), ("{1}{2}", "{1}{2}"),
    ("{{18}}", "18"), ("\\{1, 2\\}", "\\{1, 2\\}"), ("1 \\text{ and } 2", "1, 2"), ("a \\\\ 2", "a \\\\ 2"),
    ("\\$5", "\\$5"), ("\\sqrt2", "\\sqrt{2}"), ("", ""),
])
def test_cleaned(text: str, plain: str) -> None:
    assert cleaned(text) == plain


def test_squeezing_keeps_the_space_of_a_mixed_number() -> None:
    assert squeezed("( 1 2/3 , x )") == "(1 2/3,x)"


@pytest.mark.parametrize(("text", "value", "unit"), [
    ("864 \\text{ inches}^2", 864, "inch"), ("\\$18.90", Fraction(189, 10), "dollar"), ("50%", 50, "%"), ("5 apples", 5, ""),
    ("1,000,000.5", Fraction(2000001, 2), ""), ("1 4/5", Fraction(9, 5), ""), ("-1\\frac{1}{2}", Fraction(-3, 2), ""),
    ("6.72 \\times 10^{-5}", Fraction(672, 10**7), ""), ("0.1\\overline{6}", Fraction(1, 6), ""), (".\\overline{9}", 1, ""),
    ("\\frac{2.5}{5}", Fraction(1, 2), ""), ("60 \\text{ miles per hour}", 60, ""), ("10 m", 10, "m"),
])
def test_quantities(text: str, value: object, unit: str) -> None:
    assert quantity(text) == Quantity(value, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [
    "", "x", "1,00", "(1,000)", "0,123", "1e999", "1/0", "\\frac{1}{0}", "1 7/3", "5x", "5!", "2^3", "1+1", "٣", "３",
    "5 million", "10m", "1..2", "--1", "1 -", "5 \\text{ or so, not } 6", "\\$5 \\text{ cents}", "10^{5", "1\\overline{}",
])
def test_what_is_no_quantity(text: str) -> None:
    assert quantity(text) is None


def ways(value: Fraction, rng: random.Random) -> str:
    """A number written in one of the ways that mean the same to a reader."""
    sign, size = "-" if value < 0 else "", abs(value)
    whole, rest = divmod(size, 1)
    forms = [f"{sign}\\frac{{{size.numerator}}}{{{size.denominator}}}", f"{sign}{size.numerator * 3}/{size.denominator * 3}",
             f"\\dfrac{{{value.numerator}}}{{{value.denominator}}}", f"x = {value}", f"{value} \\text{{ cm}}"]
    if rest == 0:
        grouped = f"{sign}{int(size):,}"
        forms += [f"{value}", grouped, f"{value}.00", grouped.replace(",", "{,}"), f"${value}$."]
    else:
        forms += [f"{sign}{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}"]
    return rng.choice(forms)


@settings(max_examples=500, deadline=None)
@given(st.fractions(max_denominator=50), st.fractions(max_denominator=50), st.integers())
def test_numbers_are_right_exactly_when_their_values_are_equal(one: Fraction, other: Fraction, seed: int) -> None:
    rng = random.Random(seed)
    assert compare(ways(one, rng), ways(one, rng)) == "right"
    assert compare(ways(one, rng), ways(other, rng)) == ("right" if one == other else "wrong")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5), st.lists(st.integers(-99, 99), min_size=2, max_size=5))
def test_lists_have_no_order_and_tuples_have(one: list[int], other: list[int]) -> None:
    plain, others = ", ".join(map(str, one)), ",".join(map(str, other))
    assert compare(plain, others) == ("right" if sorted(one) == sorted(other) else "wrong")
    if len(one) == len(other):
        assert compare(f"({plain})", f"({others})") == ("right" if one == other else "wrong")
        assert compare(f"({plain})", f"[{others}]") == "wrong"


@settings(max_examples=500, deadline=None)
@given(ANYTHING, st.sampled_from(GOLDS), ANYTHING)
def test_no_exception_escapes(text: str, gold: str, question: str) -> None:
    assert compare(gold, text, question) in ("right", "wrong", "undecided")
    assert compare(text, gold) in ("right", "wrong", "undecided")
    assert is_echo(gold, text, question) in (True, False)
    assert isinstance(symbolic_form(text), str)
    content = final_text(text)
    assert content is None or content in text
    box = last_boxed(text)
    assert box is None or f"{{{box}}}" in text
    for protocol in PROTOCOLS:
        task = Math(protocol=protocol)
        assert task.score(Prompt("test/0", question, {"answer": "18"}), text).value in (0.0, 1.0)
        assert GSM8K(protocol=protocol).score(Prompt("test/0", question, {"answer": "18"}), text).value in (0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(PIECES)
def test_no_exception_escapes_where_answers_have_to_be_worked_out(text: str) -> None:
    reward = Math(timeout_seconds=3.0).score(Prompt("test/0", "", {"answer": "3\\sqrt{13}"}), f"\\boxed{{{text}}}")
    assert reward.value == 0.0
    assert reward.verdict in ("wrong", "no_answer", "timeout")


@settings(max_examples=300, deadline=None)
@given(ANYTHING)
def test_an_answer_is_never_wrong_against_itself(text: str) -> None:
    assert not cleaned(text) or len(text) > 500 or text.count("{") + text.count("(") + text.count("[") > 12 \
        or compare(text, text) == "right"


@pytest.mark.parametrize("text", [
    "9" * 10**6, "9" * 499, "1," * 249, "\\boxed{" * 10**5, "{" * 11, "a " * 249, "\\text{" * 12, "\\text{a}" * 60,
    "=" * 499, " " * 499 + "x", "\\frac" * 99, "\\frac{" * 11, "1 " * 249, "," * 499, "and " * 120, "\\left" * 99, "-" * 499,
    "^\\circ" * 80, "\\overline{" * 12, "1/" * 249, "x" * 10**6, "(" * 10**6, "0" * 499, "e" * 499, ". " * 249, "{}" * 249,
])
def test_hostile_answers_are_compared_at_once(text: str) -> None:
    start = time.process_time()
    for gold in GOLDS:
        if compare(gold, text) == "undecided":
            is_echo(gold, text, "What is it?")
    assert time.process_time() - start < 0.5


def test_a_copied_expression_is_an_echo_and_a_copied_answer_is_not() -> None:
    assert is_echo("3\\sqrt{13}", "\\sqrt{117}", "Simplify $\\sqrt{117}.$")
    assert is_echo("(x+1)^2", "x^2 + 2x + 1", "Factor $x^2+2x+1$.")
    assert not is_echo("3\\sqrt{13}", "\\sqrt{117}", "What is the length?")
    assert not is_echo("\\frac{\\pi}{2}", "\\pi/2", "Here $0 \\le x \\le \\pi/2$.")
    assert not is_echo("A", "x", "Find $x$.")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("task", [GSM8K, Math])
def test_demonstrations_of_every_protocol_score_one_and_have_its_form(task: type[GSM8K] | type[Math], protocol: str) -> None:
    boxed = task is Math
    text = written("9 + 9 = 18.", "18", protocol, boxed=boxed) if boxed or protocol != "bgpo" else "9 + 9 = 18\n#### 18"
    reward = task(protocol=protocol).score(Prompt("test/0", "", {"answer": "18"}), text)
    assert (reward.value, reward.verdict) == (1.0, "correct")
    assert reward.parts == ({} if protocol == "bgpo" else {"format": 1.0})


def test_prompts_of_every_protocol() -> None:
    assert worded("Why?", "bgpo", boxed=True) == "Why?"
    drift = "You need to put your final answer in \\boxed{}. This is the problem:\nWhy?"
    assert worded("Why?", "drift", boxed=False) == drift
    d1 = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\n\nWhy?"
    assert worded("Why?", "d1", boxed=False) == d1
    assert "Wrap the final answer in a \\boxed{}. \n\nWhy?" in worded("Why?", "d1", boxed=True)


MULTILINE = "<reasoning>\nFirst 9.\nThen 9 more.\n</reasoning>\n<answer>\n18\n</answer>\n"
ONE_LINE = "<reasoning>9 + 9</reasoning><answer>18</answer>"


def test_R1_a_format_with_line_breaks_counts_as_the_format() -> None:
    """d1's two format rewards use `re.match` without DOTALL: reasoning over several lines earned neither.

    Source: dllm-reasoning/d1 at 837888f, diffu-grpo/reward_func.py, soft_format_reward_func and strict_format_reward_func.
    """
    for text in (MULTILINE, ONE_LINE, f"\n\n{MULTILINE}\n"):
        assert format_parts(text, "d1", boxed=False) == {"format": 1.0}
    for text in ("18", f"So: {ONE_LINE}", ONE_LINE * 2, "<reasoning>9</reasoning>", ONE_LINE.replace("</answer>", "")):
        assert format_parts(text, "d1", boxed=False) == {"format": 0.0}


def test_R2_a_box_is_seen() -> None:
    r"""d1 looks for `"\boxed"`, whose `\b` is a backspace: boxing was never rewarded.

    Source: dllm-reasoning/d1 at 837888f, diffu-grpo/math500_utils.py, boxed_in_answer.
    """
    assert format_parts("so \\boxed{18}", "drift", boxed=True) == {"format": 1.0}
    for text in ("so 18", "so \boxed{18}", "boxed{18}"):
        assert format_parts(text, "drift", boxed=True) == {"format": 0.0}
    assert format_parts(MULTILINE, "d1", boxed=True) == {"format": 0.0}
    assert format_parts(MULTILINE.replace("18", "\\boxed{18}"), "d1", boxed=True) == {"format": 1.0}


@pytest.mark.parametrize(("gold", "text"), [
    ("1000", "1,000"), ("18", "18.0"), ("18", "$18"), ("18", "\\$18"), ("-7", "-7"), ("-1000", "-1,000"),
    ("18", "18 dollars"),
])
@pytest.mark.parametrize("place", ["\\boxed{%s}", "<answer>%s</answer>", "#### %s"])
def test_R3_numbers_count_however_written(gold: str, text: str, place: str) -> None:
    """d1 compares GSM8K answers as strings, so that 1,000, 18.0 and $18 scored 0; its integer reward fails for -7.

    Source: dllm-reasoning/d1 at 837888f, diffu-grpo/reward_func.py, correctness_reward_func and int_reward_func.
    """
    for task in (GSM8K(), Math()):
        assert task.score(Prompt("test/0", "", {"answer": gold}), place % text).verdict == "correct"


def test_R11_grading_prints_nothing_and_leaves_random_numbers_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """d1's rewards print samples (those for Countdown and Sudoku 40 %, chosen by numpy's global generator).

    Source: dllm-reasoning/d1 at 837888f, diffu-grpo/reward_func.py, compute_score and correctness_reward_func.
    """
    import numpy
    import torch

    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for task in (GSM8K(protocol="d1"), Math(protocol="d1")):
        prompts = [Prompt("test/0", "", {"answer": "\\sqrt{8}" if isinstance(task, Math) else "18"})] * 2
        task.score_batch(prompts, [MULTILINE, "\\boxed{2\\sqrt{2}}"])
    assert capfd.readouterr() == ("", "")
    assert before == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_R12_the_last_side_of_an_equation_is_the_answer() -> None:
    """d1's evaluation takes the first side of an equation (for Countdown).

    Source: dllm-reasoning/d1 at 837888f, its evaluation.
    """
    for task in (GSM8K(), Math()):
        prompt = Prompt("test/0", "", {"answer": "18"})
        assert task.score(prompt, "\\boxed{9 + 9 = 18}").verdict == "correct"
        assert task.score(prompt, "\\boxed{18 + 9 = 27}").verdict == "wrong"


def test_R13_the_format_alone_earns_nothing() -> None:
    """Rewards for the format make groups differ in which nobody is right: the gradient then teaches formatting.

    Source: dllm-reasoning/d1 at 837888f, diffu-grpo/reward_func.py, where the format of a wrong answer earns up to 2 of 4.
    """
    texts = [MULTILINE, "19", "", "\\boxed{20}", ONE_LINE, "<answer>18</answer>", MULTILINE.replace("18", "\\boxed{21}")]
    for protocol in PROTOCOLS:
        for task in (GSM8K(protocol=protocol), Math(protocol=protocol)):
            rewards = task.score_batch([Prompt("test/0", "", {"answer": "17"})] * len(texts), texts)
            assert {reward.value for reward in rewards} == {0.0}
            assert protocol == "bgpo" or {reward.parts["format"] for reward in rewards} == {0.0, 1.0}


def test_no_code_of_an_answer_is_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for code in (f"open('{victim}','w')", f"__import__('os').system('touch {victim}')", f"\\write18{{touch {victim}}}"):
        for gold in ("18", "3\\sqrt{13}"):
            assert Math().score(Prompt("test/0", "", {"answer": gold}), f"\\boxed{{{code}}}").value == 0.0
    assert not victim.exists()


@pytest.mark.parametrize("answer", [
    "-(18)", "negative 18", "$18k", "18 M", "sqrt(18)", "log 18", "18*x", "18x", "18 - x", "twice 18", "double 18",
    "one less than 18", "18 or nothing", "5 = 18", "x=5 or x=18", "18 thousands",
])
def test_an_answer_that_only_holds_the_number_is_not_it(answer: str) -> None:
    prompt = Prompt("test/0", "", {"answer": "18"})
    assert GSM8K().score(prompt, f"<answer>{answer}</answer>").value == 0.0
    assert GSM8K().score(prompt, f"So \\boxed{{{answer}}}").value == 0.0


@pytest.mark.parametrize("answer", [
    "`18`", "≈ 18", "**18**", "18 more eggs", "x = 18", "9 * 2 = 18", "$18.00", "18 twenty-dollar bills",
])
def test_an_answer_among_words_is_read(answer: str) -> None:
    assert GSM8K().score(Prompt("test/0", "", {"answer": "18"}), f"<answer>{answer}</answer>").value == 1.0


@pytest.mark.parametrize("answer", ["6 dozens", "6 thousands", "6 less than ten", "6 \\text{ or more}"])
def test_words_that_change_a_number_make_it_wrong(answer: str) -> None:
    assert Math().score(Prompt("test/0", "", {"answer": "6"}), f"\\boxed{{{answer}}}").value == 0.0
