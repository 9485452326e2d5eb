"""The generators of reasoning_gym, one task each: `task=reasoning_gym/NAME`.

Example question and answer of `chain_sum` (reasoning_gym 0.1.25, Apache-2.0; `pip install dllm-rl[reasoning-gym]`):

    State the final answer to the following arithmetic problem: 4 + 3 =        7

Questions are generated, and answers graded by the generator's own `score_answer`, in a process of their own
(`reasoning_gym_worker.py`): it takes seconds to import the package, some graders evaluate the answer as Python, some
hang on hostile texts, and some generators depend on the hash seed.
"""

from __future__ import annotations

import atexit
import difflib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar, NamedTuple

from dllm_rl.errors import UserError, bad_value, check
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task, normalised
from dllm_rl.tasks.answers import answer_block, tagged
from dllm_rl.tasks.generated import check_integer

DRAWS = 10_000
"""Questions that are drawn per split at most. Some generators make other questions where this number differs."""
SEEDS: Mapping[Split, int] = {"train": 1_000_000, "test": 2_000_000}
"""Question i of a split is made from this seed plus i, so they must be more than `DRAWS` apart."""
MAX_CHARACTERS = 20_000
"""No answer is as long as this; a longer text is wrong."""
# SYSTEM_PROMPTS["default"] of reasoning_gym (Apache-2.0).
_INSTRUCTION = """\
Given a problem, your task is to answer the question by thinking step-by-step in a clear and specific manner.
Once you have thought about the reasoning process, provide the answer in the following format:
<answer>answer here</answer>
Do not explain your reasoning inside the answer tags, provide only the final answer. When an example is provided, you \
should strictly follow the format of the output/answer in that example.
"""
_WORKER = Path(__file__).with_name("reasoning_gym_worker.py")


class Question(NamedTuple):
    """A generated question; some generators know no answer."""

    number: int
    text: str
    answer: str | None


@dataclass
class ReasoningGym(Task):
    """A generator of reasoning_gym: the reward is the score that its own grader gives, `correct` means a score of 1.

    The answer is the last complete `<answer>` block, else the whole completion. Many graders give a little for any
    answer in the right form; `partial_credit=False` makes the reward 0 or 1. `parts` has `score`.

    A grader that fails on an answer makes it wrong if it can grade the generator's own answer, else the verdict is
    `infra_error`. Known holes of graders are closed (`is_unearned` in `reasoning_gym_worker.py`).

    Example: `ReasoningGym("chain_sum", params={"min_terms": 3, "max_terms": 5})`
    """

    protocols: ClassVar[tuple[str, ...]] = ("plain", "reasoning_gym")
    name: str
    """Name of the generator, as in `reasoning_gym.create_dataset`."""
    completion_length: int = 256
    train_size: int = 1024
    """Most generators make thousands of questions a second, but `knight_swap` two, and some have few distinct ones."""
    test_size: int = 256
    params: dict[str, Any] = field(default_factory=dict)
    """Settings of the generator; on the command line `+task.params.KEY=VALUE`."""
    timeout_seconds: float = 10.0
    """For grading one answer."""
    partial_credit: bool = True
    protocol: str = "plain"
    """`plain`: the bare question. `reasoning_gym`: after that package's default instruction, which asks for the block."""

    def __post_init__(self) -> None:
        self.check_protocol()
        check_name(self.name)
        check_integer("completion_length", self.completion_length, 1)
        check_integer("train_size", self.train_size, 1, DRAWS)
        check_integer("test_size", self.test_size, 1, DRAWS)
        check(isinstance(self.timeout_seconds, int | float) and 0 < self.timeout_seconds <= 600,
              "task.timeout_seconds", self.timeout_seconds, "a number above 0, at most 600")
        check(isinstance(self.params, Mapping) and not {"seed", "size"} & set(self.params), "task.params", self.params,
              "settings of the generator without seed and size, which the split decides")

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The questions of a split; no question is in both."""
        return _prompts(split, self.name, self._params, self.train_size, self.test_size, self.protocol)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """The generator's score; 0 for an answer that its grader cannot cope with."""
        block = answer_block(completion)
        answer = completion.strip() if block is None else block
        gold = prompt.data["answer"]
        if not answer and gold != "":  # "" is the answer to some questions of ab
            return Reward(0.0, "no_answer", {"score": 0.0})
        if len(answer) > MAX_CHARACTERS:
            return Reward(0.0, "wrong", {"score": 0.0})
        reply = self._graded(prompt, answer)
        if "value" in reply:
            return self._reward(reply["value"])
        if reply.get("ended") == -signal.SIGALRM:
            return Reward(0.0, "timeout", {"score": 0.0})
        own = self._graded(prompt, gold or "")
        return Reward(0.0, "wrong" if "value" in own else "infra_error", {"score": 0.0})

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """Grades each distinct completion of a prompt once."""
        pairs = list(zip(prompts, completions, strict=True))
        rewards = {(prompt.id, text): self.score(prompt, text)
                   for prompt, text in {(prompt.id, text): (prompt, text) for prompt, text in pairs}.values()}
        return [rewards[prompt.id, text] for prompt, text in pairs]

    def fingerprint(self, prompt: Prompt) -> str:
        """The question, whatever the protocol."""
        return normalised(prompt.data["question"])

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """The training questions with the generator's answers, shuffled anew for every pass over them."""
        prompts = [prompt for prompt in self.prompts("train") if prompt.data["answer"]]
        if not prompts:
            raise UserError(f"task.name={self.name}: has no demonstrations, because this generator gives no answers")
        rng = Random(f"reasoning_gym demonstrations {seed}")
        chosen: list[Prompt] = []
        while len(chosen) < count:
            chosen.extend(rng.sample(prompts, len(prompts)))
        return [Demonstration(prompt.text, self._completion(prompt.data["answer"])) for prompt in chosen[:count]]

    def _completion(self, answer: str) -> str:
        return answer if self.protocol == "plain" else tagged(answer)

    @property
    def _params(self) -> str:
        return json.dumps(dict(self.params), sort_keys=True)

    def _graded(self, prompt: Prompt, answer: str) -> Mapping[str, Any]:
        return _worker.ask({
            "request": "score", "dataset": _dataset(prompt.data["split"], self.name, self._params), "answer": answer,
            "index": prompt.data["index"], "question": prompt.data["question"], "seconds": self.timeout_seconds,
        })

    def _reward(self, score: float) -> Reward:
        correct = score >= 1
        value = score if self.partial_credit else float(correct)
        return Reward(value, "correct" if correct else "wrong", {"score": score})


@lru_cache(maxsize=1)
def generator_names() -> tuple[str, ...]:
    """Every NAME of `task=reasoning_gym/NAME`.

    Raises:
        UserError: reasoning_gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("task=reasoning_gym/...: needs the package reasoning-gym: pip install dllm-rl[reasoning-gym]")
    reply = _worker.ask({"request": "names"})
    if "value" not in reply:
        raise UserError(f"task=reasoning_gym/...: the package reasoning-gym cannot be used ({_reason(reply)})")
    return tuple(reply["value"])


def check_name(name: object) -> None:
    """Raises `UserError`, with the names that look like it, unless a generator has this name."""
    names = generator_names()
    near = difflib.get_close_matches(str(name), names, n=5, cutoff=0.5)
    valid = f"did you mean {', '.join(near)}?" if near else f"one of {', '.join(names)}"
    if name not in names:
        raise UserError(f"task=reasoning_gym/{name}: is no generator of reasoning_gym; {valid}")


@lru_cache(maxsize=16)
def _prompts(
    split: Split, name: str, params: str, train_size: int, test_size: int, protocol: str
) -> tuple[Prompt, ...]:
    questions = _test_questions(name, params, test_size)
    if split == "train":
        taken = {normalised(question.text) for question in questions}
        questions = _distinct("train", name, params, train_size, taken)
    start = "" if protocol == "plain" else f"{_INSTRUCTION}\n"
    return tuple(
        Prompt(f"{split}/{index}", start + text, {"split": split, "index": index, "question": text, "answer": answer})
        for index, text, answer in questions
    )


@lru_cache(maxsize=16)
def _test_questions(name: str, params: str, count: int) -> tuple[Question, ...]:
    return _distinct("test", name, params, count, ())


def _distinct(split: Split, name: str, params: str, count: int, taken: Collection[str]) -> tuple[Question, ...]:
    """The first `count` distinct questions of a split that are not in `taken`."""
    found: dict[str, Question] = {}
    drawn = 0
    while len(found) < count and drawn < DRAWS:
        stop = min(drawn + count - len(found), DRAWS)
        for question in _questions(split, name, params, drawn, stop):
            key = normalised(question.text)
            if key not in taken:
                found.setdefault(key, question)
        drawn = stop
    if len(found) < count:
        raise bad_value(f"task.{split}_size", count,
                        f"at most {len(found)}, the distinct questions of {name} left among {DRAWS:,} draws")
    return tuple(found.values())


def _questions(split: Split, name: str, params: str, start: int, stop: int) -> list[Question]:
    reply = _worker.ask({"request": "entries", "dataset": _dataset(split, name, params), "start": start, "stop": stop})
    if "value" not in reply:
        raise UserError(f"task.params={params}: {name} makes no questions ({_reason(reply)})")
    return [Question(index, *made) for index, made in enumerate(reply["value"], start) if made]


def _dataset(split: Split, name: str, params: str) -> list[Any]:
    return [name, params, SEEDS[split], DRAWS]


def _reason(reply: Mapping[str, Any]) -> str:
    reason = reply.get("error") or f"its process ended with code {reply.get('ended')}"
    return " ".join(reason.split())


class _Worker:
    """The process that runs reasoning_gym: started when needed, and again after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """`{"value": ...}`, `{"error": ...}` where the request failed, or `{"ended": code}` where the process did."""
        with self._lock:
            try:
                process = self._process or self._start()
                assert process.stdin and process.stdout
                print(json.dumps(request), file=process.stdin, flush=True)
                line = process.stdout.readline()
            except OSError:
                line = ""
            except BaseException:  # after an interrupt the next reply would be to this request
                self.stop()
                raise
            reply: Mapping[str, Any] = json.loads(line) if line.endswith("\n") else {"ended": self.stop()}
            return reply

    def stop(self) -> int | None:
        """Ends the process; its exit code, negative for the signal that it died of."""
        process, folder, self._process, self._folder = self._process, self._folder, None, None
        if process is None:
            return None
        try:
            process.communicate(timeout=1)
        except (subprocess.TimeoutExpired, OSError, ValueError):
            process.kill()
            process.wait()
        if folder:
            folder.cleanup()
        return process.returncode

    def _start(self) -> subprocess.Popen[str]:
        # The programs of codeio write files; and numerical libraries need no threads here.
        self._folder = tempfile.TemporaryDirectory(prefix="dllm-rl-", ignore_cleanup_errors=True)
        settings = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, cwd=self._folder.name, env={**os.environ, **settings}, start_new_session=True,
        )
        return self._process


_worker = _Worker()
atexit.register(_worker.stop)
