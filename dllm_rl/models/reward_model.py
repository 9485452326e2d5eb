"""A learned reward: any sequence-classification model of transformers reads prompt and completion and gives a number.

With a chat template, the tokenizer lays out the exchange of user and assistant; without one, the completion follows the
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dllm_rl.errors import UserError, check
from dllm_rl.task import Grader, Prompt, Reward, Task

ACTIVATIONS = ("none", "sigmoid", "softmax")


@dataclass
class LearnedReward:
    """Reward by a model (`reward=learned`)."""

    path: str | None = None
    """A folder or hub name of a sequence-classification model with its tokenizer."""
    label: int = 0
    """The output that is the reward."""
    activation: str = "none"
    """none: the output itself. sigmoid. softmax: the label's share among all outputs."""
    max_length: int | None = None
    """Tokens of prompt and completion that the model reads, from the first one on; null: all."""
    batch_size: int = 64

    def __post_init__(self) -> None:
        check(self.activation in ACTIVATIONS, "reward.activation", self.activation, ", ".join(ACTIVATIONS))
        check(self.label >= 0, "reward.label", self.label, "an integer >= 0")
        check(self.batch_size >= 1, "reward.batch_size", self.batch_size, "an integer >= 1")
        fits = self.max_length is None or self.max_length >= 1
        check(fits, "reward.max_length", self.max_length, "an integer >= 1, or null")

    def grader(self, task: Task, device: torch.device, tokenizer: Any = None) -> Grader:
        """Loads the model; the policy's tokenizer plays no part.

        Raises:
            UserError: no path, no such model, or it has no output of that number.
        """
        del tokenizer
        valid = "a folder or hub name of a sequence-classification model"
        check(bool(self.path), "reward.path", self.path, valid)
        path = str(self.path)
        if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
            raise UserError(f"reward.path={path}: no such folder; must be {valid}")
        try:
            own_tokenizer = AutoTokenizer.from_pretrained(path)
            network, found = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"reward.path={path}: cannot be loaded, must be {valid} ({reason})") from None
        if found["missing_keys"]:  # transformers would fill them with random numbers
            missing = ", ".join(sorted(found["missing_keys"]))
            raise UserError(f"reward.path={path}: has no weights for {missing}; must be {valid}")
        outputs = int(network.config.num_labels)
        check(self.label < outputs, "reward.label", self.label, f"an integer from 0 to {outputs - 1}, the outputs of {path}")
        return ModelGrader(self, task, network.to(device).eval(), own_tokenizer)


class ModelGrader:
    """Grades by the model; the task's own reward is kept as the part `task`, to see when the two come apart."""

    def __init__(self, config: LearnedReward, task: Task, network: Any, tokenizer: Any) -> None:
        if tokenizer.pad_token is None:
            raise UserError(f"reward.path={config.path}: its tokenizer has no padding token")
        network.config.pad_token_id = tokenizer.pad_token_id
        self._config, self._task, self._network, self._tokenizer = config, task, network, tokenizer

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """The model's value for each completion, with the task's verdict and parts. A value that is not finite is a failure
        of the grader; a failure of the task's grader is none, and leaves out the part `task`."""
        graded = self._task.score_batch(prompts, completions)
        values = self.values([prompt.text for prompt in prompts], completions)
        return [_combined(reward, value) for reward, value in zip(graded, values, strict=True)]

    @torch.no_grad()
    def values(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The model's value for each pair of texts."""
        values: list[float] = []
        for start in range(0, len(prompts), self._config.batch_size):
            part = slice(start, start + self._config.batch_size)
            inputs = self._encode(prompts[part], completions[part]).to(self._network.device)
            values += self._value(self._network(**inputs).logits.float()).tolist()
        return values

    def _encode(self, prompts: Sequence[str], completions: Sequence[str]) -> Any:
        options = {"padding": True, "truncation": self._config.max_length is not None, "max_length": self._config.max_length,
                   "return_tensors": "pt"}
        return encode(self._tokenizer, prompts, completions, **options)

    def _value(self, logits: torch.Tensor) -> torch.Tensor:
        if self._config.activation == "softmax":
            return logits.softmax(-1)[:, self._config.label]
        value = logits[:, self._config.label]
        return value.sigmoid() if self._config.activation == "sigmoid" else value


def encode(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], **options: Any) -> Any:
    """What a reward model reads of pairs of texts; `options` go to the tokenizer."""
    pairs = list(zip(prompts, completions, strict=True))
    if tokenizer.chat_template is None:
        return tokenizer([prompt + completion for prompt, completion in pairs], **options)
    chats = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
             for prompt, completion in pairs]
    return tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **options)


def _combined(by_task: Reward, value: float) -> Reward:
    if not math.isfinite(value):
        return Reward(0.0, "infra_error", note=f"the learned reward is {value}")
    if by_task.verdict == "infra_error":
        return Reward(value, "wrong", by_task.parts)  # the task cannot tell, but the model has graded it
    return Reward(value, by_task.verdict, {**by_task.parts, "task": by_task.value})
