"""MBPP: short Python functions from a sentence and three assertions.

Example row (google-research MBPP, CC-BY-4.0; `google-research-datasets/mbpp` on the hub):

    {"task_id": 3, "text": "Write a python function to identify non-prime numbers.",
     "code": "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n    ...", "test_setup_code": "",
     "test_list": ["assert is_not_prime(2) == False", "assert is_not_prime(10) == True", ...]}

The assertions are in the prompt, so that a program can answer them by heart; only `protocol=drift` hides all but one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

from dllm_rl.errors import UserError, check
from dllm_rl.rows import Row, load_placed_rows
from dllm_rl.sandbox import Assertion, Call, Program, assert_to_test
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task, normalised
from dllm_rl.tasks.code.check_function import holds_assertion, names_read, trusted_setup
from dllm_rl.tasks.code.grading import (
    check_reward,
    check_timeout,
    defined_names,
    extract_code,
    fenced,
    grade,
    parsed,
    shuffled,
)
from dllm_rl.tasks.code.spoiling import spoilt
from dllm_rl.tasks.generated import check_integer

TASK_IDS: Mapping[str, range] = {
    "prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975),
}
SHOT_IDS = (2, 3, 4)
"""The solved examples of the papers: rows of the split `prompt`."""


class Answer(NamedTuple):
    """What makes one program with its tests differ from another."""

    code: str
    setup: str
    asserts: tuple[str, ...]
    reference: str


@dataclass
class MBPP(Task):
    """MBPP: reward 1 when every assertion of the row holds, otherwise 0.

    The program is the last fenced Python block of a completion, else its last fenced block, else what stands between
    `[BEGIN]` and `[DONE]`, else all of it. It runs in `dllm_rl.sandbox` with the standard library only. `pass_rate` is
    the share of the assertions that hold.

    Protocols: `bgpo` is OpenCompass's (Apache-2.0), which BGPO uses: the sentence and the assertions after three solved
    examples, rows 2 to 4 of the data set, that answer between `[BEGIN]` and `[DONE]`. `plain` has the words of it without
    the examples. `drift` is that of ant-research/Drift (Apache-2.0): one assertion is shown, one fenced block is asked for.

    Example: `MBPP(data="mbpp.jsonl")`
    """

    protocols: ClassVar[tuple[str, ...]] = ("plain", "bgpo", "drift")

    data: str = "google-research-datasets/mbpp"
    """Name on the hub, or a local file or folder with rows of `task_id`, `text`, `code`, `test_list` and, if need be,
    `test_setup_code`. Of a single file, `task_id` 601 to 974 are the train split and 11 to 510 the test split. The
    solved examples of `protocol=bgpo` are rows 2 to 4, in the split `prompt` of a folder or the hub."""
    protocol: str = "plain"
    reward: str = "all"
    """What is paid: `all`, 1 if every assertion holds; `fraction`, the share of them that hold."""
    completion_length: int = 256
    timeout_seconds: float = 5.0
    """Wall clock per completion, its assertions included."""

    def __post_init__(self) -> None:
        check(isinstance(self.data, str) and self.data != "", "task.data", self.data,
              "a data set name on the hub, a file or a folder")
        self.check_protocol()
        check_reward(self.reward)
        check_integer("completion_length", self.completion_length, 1)
        check_timeout(self.timeout_seconds)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The questions of a split."""
        return _prompts(self.data, split, self.protocol)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """The grade of one completion; batches are far cheaper for each."""
        return self.score_batch([prompt], [completion])[0]

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """Grades all completions in one batch of sandboxed programs; the same answer to a prompt runs once."""
        answers = [_answer(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return grade(answers, _program, self.timeout_seconds, self.reward)

    def fingerprint(self, prompt: Prompt) -> str:
        """The row's sentence, whatever its assertions and the protocol."""
        return normalised(prompt.data["text"])

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """The training questions with their reference programs, shuffled anew for every pass over them."""
        chosen = shuffled(self.prompts("train"), count, Random(f"mbpp demonstrations {seed}"))
        return [Demonstration(prompt.text, self._solution(prompt)) for prompt in chosen]

    def solved_rows(self) -> Iterator[tuple[Prompt, str, str]]:
        """Every row of a single file, of other sources those of the train and test splits, as a question with a right
        completion and a wrong one, to check the grader with."""
        for split in TASK_IDS if _is_file(self.data) else ("train", "test"):
            for row in _rows(self.data, split):
                prompt = _prompt(row, split, self.protocol, ())
                functions = functions_under_test(prompt.data["asserts"], prompt.data["code"])
                yield prompt, self._solution(prompt), fenced(spoilt(prompt.data["code"], functions))

    def _solution(self, prompt: Prompt) -> str:
        code = prompt.data["code"]
        return bracketed(code) if self.protocol == "bgpo" else fenced(code)


def prompt_text(text: str, asserts: Sequence[str], protocol: str = "plain") -> str:
    """What the model reads."""
    if protocol == "drift":
        return (f"{text.strip()}\nYour code should pass the test:\n{asserts[0]}\n\nPlace your code within a single Python "
                "code block ```python ```. Do not include more than one code block. ")
    tests = "\n".join(asserts)
    tests = f" {tests}  " if protocol == "bgpo" else tests  # OpenCompass has these spaces
    return (f"You are an expert Python programmer, and here is your task: {text.strip()} "
            f"Your code should pass these tests:\n\n{tests}\n")


def bracketed(code: str) -> str:
    """A reference program as the answer of a solved example."""
    return f"[BEGIN]\n '{code.strip()}' \n[DONE]"


def _answer(prompt: Prompt, completion: str) -> Answer | None:
    data = prompt.data
    asserts = tuple(data["asserts"])
    code = extract_code(completion, functions_under_test(asserts, data["code"]))
    return Answer(code, data["setup"], asserts, data["code"]) if code else None


def _program(answer: Answer) -> Program:
    return Program(f"{answer.code}\n{answer.setup}", _tests(answer.asserts, answer.reference))


@lru_cache(maxsize=1024)
def _tests(asserts: tuple[str, ...], reference: str) -> tuple[Call | Assertion, ...]:
    tests = (assert_to_test(statement) for statement in asserts)
    return tuple(_guarded(test, asserts, reference) if isinstance(test, Assertion) else test for test in tests)


def _guarded(test: Assertion, asserts: tuple[str, ...], reference: str) -> Assertion:
    """The assertion with the modules and built-in functions that it names, whatever the program calls by these names.

    The modules are those that the reference program imports: row 596 is tested with `sys.getsizeof`.
    """
    needed, tree = names_read(ast.parse(test.code)), parsed(reference)
    imports = [ast.unparse(node) for node in (tree.body if tree else []) if isinstance(node, ast.Import)
               and needed & {alias.asname or alias.name for alias in node.names}]
    return Assertion(test.code, trusted_setup("\n".join(imports), test.code, functions_under_test(asserts, reference)))


@lru_cache(maxsize=1024)
def functions_under_test(asserts: tuple[str, ...], reference: str) -> tuple[str, ...]:
    """The functions that assertions are about: those that they name and the reference program defines.

    Example: `functions_under_test(("assert add(1, 2) == 3",), "def add(a, b): return a + b")` is `("add",)`.
    """
    named = {name for statement in asserts for name in names_read(ast.parse(statement))}
    return tuple(sorted(named & defined_names(reference)))


@lru_cache(maxsize=32)
def _rows(data: str, split: str) -> tuple[Row, ...]:
    """The rows of a split. The hub and folders keep the splits apart; of a single file, `task_id` decides."""
    placed = load_placed_rows(data, split, ("task_id", "text", "code", "test_list"), config_name="full")
    for place, row in placed:
        _check_row(row, place)
    return tuple(row for _, row in placed if not _is_file(data) or row["task_id"] in TASK_IDS[split])


@lru_cache(maxsize=8)
def _prompts(data: str, split: Split, protocol: str) -> tuple[Prompt, ...]:
    rows, ids = _rows(data, split), TASK_IDS[split]
    if not rows:
        raise UserError(f"task.data={data}: holds no row of the {split} split (task_id {ids[0]} to {ids[-1]})")
    shots = _shots(data) if protocol == "bgpo" else ()
    return tuple(_prompt(row, split, protocol, shots) for row in rows)


def _shots(data: str) -> tuple[tuple[str, str], ...]:
    """The solved examples, read from the data."""
    rows = {row["task_id"]: row for row in _rows(data, "prompt")}
    missing = [number for number in SHOT_IDS if number not in rows]
    if missing:
        raise UserError(f"task.data={data}: holds no row of task_id {missing[0]}; task.protocol=bgpo shows the rows "
                        f"{', '.join(map(str, SHOT_IDS))} of the split `prompt` as solved examples")
    prompts = [_prompt(rows[number], "prompt", "bgpo", ()) for number in SHOT_IDS]
    return tuple((prompt.text, bracketed(prompt.data["code"])) for prompt in prompts)


def _prompt(row: Row, split: str, protocol: str, shots: tuple[tuple[str, str], ...]) -> Prompt:
    asserts = tuple(statement.strip() for statement in row["test_list"])
    data = {"text": row["text"], "asserts": asserts, "setup": _unix(row.get("test_setup_code") or ""),
            "code": _unix(row["code"])}
    return Prompt(f"{split}/{row['task_id']}", prompt_text(row["text"], asserts, protocol), data, shots)


def _unix(code: str) -> str:
    return code.replace("\r\n", "\n")


def _is_file(data: str) -> bool:
    return Path(data).expanduser().is_file()


def _check_row(row: Row, place: str) -> None:
    if not isinstance(row["task_id"], int):
        raise UserError(f"{place}: task_id={row['task_id']}: must be an integer")
    for column in ("text", "code"):
        if not isinstance(row[column], str):
            raise UserError(f"{place}: {column}={row[column]}: must be a string")
    asserts = row["test_list"]
    if not (isinstance(asserts, list) and asserts and all(isinstance(text, str) for text in asserts)):
        raise UserError(f"{place}: test_list={asserts}: must be a list of at least one assertion")
    for statement in asserts:
        tree = parsed(statement.strip())
        if not tree or not holds_assertion(tree):
            raise UserError(f"{place}: test_list: `{statement}`: must be Python with an `assert`")
