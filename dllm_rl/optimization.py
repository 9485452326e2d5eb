"""AdamW with a learning-rate schedule and gradient clipping, for reinforcement learning and fine-tuning alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from dllm_rl.errors import check

SCHEDULES = ("constant_with_warmup", "cosine", "linear")


@dataclass
class OptimizerConfig:
    """AdamW settings."""

    lr: float = 2e-4
    """Peak learning rate. 2e-4 suits the tiny model; the BGPO paper uses 5e-7 for LLaDA-8B."""
    warmup_steps: int = 10
    schedule: str = "linear"
    """linear or cosine (both fall to 0 at the last step), or constant_with_warmup."""
    beta2: float = 0.98
    """Decay of the squared gradient; beta1 is 0.9."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optimizer.lr", self.lr, "a number > 0")
        check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "an integer >= 0")
        check(self.schedule in SCHEDULES, "optimizer.schedule", self.schedule, ", ".join(SCHEDULES))
        check(0 <= self.beta2 < 1, "optimizer.beta2", self.beta2, "a number in [0, 1)")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "a number >= 0")
        check(self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "a number > 0")


class Optimizer:
    """Optimizer and schedule as one thing that steps, saves and loads."""

    def __init__(self, config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter], total_steps: int) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.max_grad_norm = config.max_grad_norm
        self.nonfinite_in_a_row = 0
        self._adamw = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay
        )
        self._schedule = get_scheduler(config.schedule, self._adamw, config.warmup_steps, total_steps)

    def step(self) -> float:
        """Clips, steps and clears the gradients; returns their norm before clipping.

        A gradient that is not finite changes neither parameters nor learning rate; the third in a row is an error.

        Raises:
            FloatingPointError: three gradients in a row were not finite.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        finite = norm < float("inf")
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        if self.nonfinite_in_a_row == 3:
            raise FloatingPointError("three gradients in a row were not finite; lower optimizer.lr")
        if finite:
            self._adamw.step()
            self._schedule.step()
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self._adamw.state_dict(), "schedule": self._schedule.state_dict(),
                "nonfinite_in_a_row": self.nonfinite_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adamw.load_state_dict(state["adamw"])
        self._schedule.load_state_dict(state["schedule"])
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
