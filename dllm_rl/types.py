"""Tensors that cross module borders. B sequences, P prompt length, L completion length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

Rows = TypeVar("Rows", bound="_Rows")


@dataclass(frozen=True)
class _Rows:
    """A set of tensors that share their first dimension."""

    def rows(self: Rows, index: Tensor | slice) -> Rows:
        """The same type holding only the chosen rows; `index` is a slice, a bool [B] or an integer tensor [C]."""
        return self._each(lambda tensor: tensor[index])

    def to(self: Rows, device: torch.device) -> Rows:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self: Rows, change: Callable[[Tensor], Tensor]) -> Rows:
        """`change` of every tensor; those that are optional and absent stay so."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return type(self)(**{name: None if value is None else change(value) for name, value in values.items()})

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))


@dataclass(frozen=True)
class PromptBatch(_Rows):
    """Left-padded prompts.

    Example: two prompts, `ids=[[0, 7, 8], [4, 5, 6]]`, `mask=[[False, True, True], [True, True, True]]`
    """

    ids: Tensor
    """[B, P] int64."""
    mask: Tensor
    """[B, P] bool, False on padding."""
    sample_ids: Tensor
    """[B] int64. Names the sequence within its step; every random draw for it is keyed by this number."""


@dataclass(frozen=True)
class Completions(_Rows):
    """Prompts with the canvas that the sampler filled.

    Example: L = 4, the answer is 9 9 and 2 is EOS: `ids=[[9, 9, 2, 2]]`, `unmask_step=[[0, 1, 0, 1]]`
    """

    prompt_ids: Tensor
    """[B, P] int64, left-padded."""
    prompt_mask: Tensor
    """[B, P] bool, False on padding."""
    sample_ids: Tensor
    """[B] int64."""
    ids: Tensor
    """[B, L] int64. No mask token is left on it."""
    unmask_step: Tensor
    """[B, L] int64: the denoising step that wrote the token; -1 where it was filled in after the end of the text."""
    passes: Tensor | None = None
    """[B, 2] int64: forward passes over the whole row, and over parts of it (with a cache), that wrote it. None: unknown."""
    behaviour_logps: Tensor | None = None
    """[B, L] float64: log-probability of each token, at temperature 1, at the state that the sampler wrote it in; 0 where
    unmask_step is -1. What `likelihood=trajectory` scores with steps_per_slice=1; ratios are to them. None: not recorded."""

    @property
    def nfe(self) -> Tensor:
        """[B] int64: forward passes of the network that wrote each completion."""
        return self.unmask_step.amax(1) + 1 if self.passes is None else self.passes.sum(1)

    @property
    def prompts(self) -> PromptBatch:
        return PromptBatch(self.prompt_ids, self.prompt_mask, self.sample_ids)


@dataclass(frozen=True)
class Corruption(_Rows):
    """One Monte Carlo draw of the forward process for each sequence.

    Example: L = 4, two of four tokens masked (mask id 3): `canvas=[[9, 3, 2, 3]]`,
    `scored=[[False, True, False, True]]`, `weight=[2.0]`, `prompt` as it was
    """

    canvas: Tensor
    """[B, L] int64: what the model sees."""
    scored: Tensor
    """[B, L] bool: positions whose log-probability counts."""
    weight: Tensor
    """[B] float64. ELBO term l_j = weight x sum of the log-probabilities at scored positions, in nats."""
    prompt: Tensor
    """[B, P] int64: the prompt as the model sees it; some estimators mask a part of it."""
