'''HumanEval: Python functions from a signature, a docstring and hidden tests.

Example row (openai/human-eval, MIT; `openai/openai_humaneval` on the hub):

    {"task_id": "HumanEval/53", "entry_point": "add",
     "prompt": "\\n\\ndef add(x: int, y: int):\\n    \\"\\"\\"Add two numbers x and y\\n    >>> add(2, 3)\\n    5 ...",
     "canonical_solution": "    return x + y\\n",
     "test": "\\n\\nMETADATA = {}\\n\\n\\ndef check(candidate):\\n    import random\\n\\n    assert candidate(0, 1) == ..."}

There is a test split only. The function under test is the row's `entry_point`, never one guessed from the answer, and
an answer is right only if every assertion of `check` was executed and held.
'''

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

from dllm_rl.errors import UserError, check
from dllm_rl.rows import Row, load_placed_rows
from dllm_rl.sandbox import Assertion, Call, Program
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task, normalised
from dllm_rl.tasks.code.check_function import assertions_of
from dllm_rl.tasks.code.grading import (
    check_reward,
    check_timeout,
    defined_names,
    extract_code,
    fenced,
    grade,
    is_program,
    shuffled,
)
from dllm_rl.tasks.code.spoiling import spoilt
from dllm_rl.tasks.generated import check_integer

COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_INDENT = "    "


class Answer(NamedTuple):
    """What makes one program with its tests differ from another."""

    source: str
    prompt: str
    entry_point: str
    test: str


@dataclass
class HumanEval(Task):
    """HumanEval: reward 1 when every assertion of the row holds, otherwise 0.

    A completion may be a whole program or the body of the function, fenced or not, with or without the prompt before
    it. Programs run in `dllm_rl.sandbox` with the standard library only. `pass_rate` is the share of the tests that
    pass; an assertion that any program passes is no test.

    Protocols: `bgpo` asks to complete the code (the words of OpenCompass, Apache-2.0, that BGPO's evaluation uses),
    `bare` is the prompt alone, `drift` asks for one fenced block (ant-research/Drift, Apache-2.0).

    Example: `HumanEval(data="HumanEval.jsonl.gz")`
    """

    protocols: ClassVar[tuple[str, ...]] = ("bgpo", "bare", "drift")

    data: str = "openai/openai_humaneval"
    """Name on the hub, or a local file with rows of `task_id`, `prompt`, `entry_point`, `canonical_solution` and `test`.
    A folder may hold rows of your own to train on (`train.jsonl`) besides `test.jsonl`."""
    protocol: str = "bgpo"
    reward: str = "all"
    """What is paid: `all`, 1 if every test passes; `fraction`, the share of tests that pass."""
    completion_length: int = 512
    timeout_seconds: float = 5.0
    """Wall clock per completion, its tests included."""

    def __post_init__(self) -> None:
        check(isinstance(self.data, str) and self.data != "", "task.data", self.data,
              "a data set name on the hub, a file or a folder")
        self.check_protocol()
        check_reward(self.reward)
        check_integer("completion_length", self.completion_length, 1)
        check_timeout(self.timeout_seconds)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The questions of a split; only a folder can have a train split."""
        return _prompts(self.data, split, self.protocol)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """The grade of one completion; batches are far cheaper for each."""
        return self.score_batch([prompt], [completion])[0]

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """Grades all completions in one batch of sandboxed programs; the same answer to a prompt runs once."""
        answers = [_answer(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return grade(answers, _program, self.timeout_seconds, self.reward)

    def fingerprint(self, prompt: Prompt) -> str:
        """The row's prompt, whatever the protocol says around it."""
        return normalised(prompt.data["prompt"])

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """The questions of the train split with their reference programs, shuffled anew for every pass over them."""
        chosen = shuffled(self.prompts("train"), count, Random(f"humaneval demonstrations {seed}"))
        return [Demonstration(prompt.text, fenced(_reference(prompt))) for prompt in chosen]

    def solved_rows(self) -> Iterator[tuple[Prompt, str, str]]:
        """Every question of the test split with a right completion and a wrong one, to check the grader with."""
        for prompt in self.prompts("test"):
            wrong = spoilt(_reference(prompt), [prompt.data["entry_point"]])
            yield prompt, prompt.data["solution"], fenced(wrong)


def prompt_text(prompt: str, protocol: str) -> str:
    """What the model reads."""
    if protocol == "bgpo":
        return f"Complete the following python code:\n{prompt}"
    if protocol == "drift":
        return (f"{prompt}\nPlace your code within a single Python code block ```python ```. "
                "Do not include more than one code block. ")
    return prompt


def program_source(prompt: str, entry_point: str, code: str) -> str:
    """The program of an answer: its own function where it defines `entry_point`, else the prompt with its body.

    Example: `program_source("def add(x, y):\\n", "add", "return x + y")` ends on "    return x + y".
    """
    if entry_point not in defined_names(code):
        return _with_body(prompt if prompt.endswith("\n") else f"{prompt}\n", code)
    futures = "".join(line.rstrip("\n") + "\n" for line in _FUTURE.findall(code))  # they must come first
    return f"{futures}{preamble(prompt, entry_point)}\n\n{_FUTURE.sub('', code)}"


@lru_cache(maxsize=1024)
def preamble(prompt: str, entry_point: str) -> str:
    """The imports and helper functions of a prompt: all of it but the function that is asked for."""
    statements = _stub(prompt).body
    kept: list[ast.stmt] = [node for node in statements if getattr(node, "name", None) != entry_point]
    return ast.unparse(ast.Module(kept, []))


def _stub(prompt: str) -> ast.Module:
    try:
        return ast.parse(prompt)
    except SyntaxError:  # a signature without docstring
        return ast.parse(f"{prompt}\n{_INDENT}pass\n")


def _with_body(prompt: str, code: str) -> str:
    """The prompt and the body, whose indentation may have been lost in part and which text may follow.

    The first reading that is a program counts; if none is, so does the first of all, and fails.
    """
    lines = code.split("\n")
    block = [lines[0], *takewhile(lambda line: not line.strip() or line[0].isspace(), lines[1:])]
    readings = [
        reading for text in dict.fromkeys((code, "\n".join(block)))
        for reading in (text, _INDENT + text.lstrip(), textwrap.indent(textwrap.dedent(text), _INDENT))
    ]
    sources = [f"{prompt}{reading}\n" for reading in readings]
    return next((source for source in sources if is_program(source)), sources[0])


def _answer(prompt: Prompt, completion: str) -> Answer | None:
    data = prompt.data
    code = extract_code(completion, (data["entry_point"],))
    if not code:
        return None
    source = program_source(data["prompt"], data["entry_point"], code)
    return Answer(source, data["prompt"], data["entry_point"], data["test"])


def _program(answer: Answer) -> Program:
    return Program(answer.source, _tests(answer.prompt, answer.entry_point, answer.test))


@lru_cache(maxsize=1024)
def _tests(prompt: str, entry_point: str, test: str) -> tuple[Call | Assertion, ...]:
    return assertions_of(test, entry_point, preamble(prompt, entry_point))


def _reference(prompt: Prompt) -> str:
    return str(prompt.data["prompt"] + prompt.data["solution"])


@lru_cache(maxsize=8)
def _prompts(data: str, split: Split, protocol: str) -> tuple[Prompt, ...]:
    if split == "train" and not Path(data).expanduser().is_dir():
        raise UserError(f"task.data={data}: HumanEval has a test split only; to train, use another task, or a folder "
                        "with train.jsonl and test.jsonl")
    placed = load_placed_rows(data, split, COLUMNS)
    return tuple(_prompt(_checked(row, place), split, protocol) for place, row in placed)


def _prompt(row: Row, split: Split, protocol: str) -> Prompt:
    data = {"prompt": row["prompt"], "entry_point": row["entry_point"], "test": row["test"],
            "solution": row["canonical_solution"]}
    return Prompt(f"{split}/{row['task_id']}", prompt_text(row["prompt"], protocol), data)


def _checked(row: Row, place: str) -> dict[str, str]:
    """The row with Unix line ends, once its parts are known to fit together."""
    for column in COLUMNS:
        if not isinstance(row[column], str):
            raise UserError(f"{place}: {column}={row[column]}: must be a string")
    clean = {column: row[column].replace("\r\n", "\n") for column in COLUMNS}
    entry_point = clean["entry_point"]
    try:
        functions = [getattr(node, "name", None) for node in _stub(clean["prompt"]).body]
    except (SyntaxError, ValueError):
        functions = []
    if not functions or functions[-1] != entry_point:
        raise UserError(f"{place}: entry_point={entry_point}: must be the function that `prompt` ends on")
    try:
        _tests(clean["prompt"], entry_point, clean["test"])
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{place}: test: {error}") from None
    return clean
