"""Shared set-up: one thread, no hub, no progress bars; a tiny random policy and random completions."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch
from hydra.core.config_store import ConfigStore
from torch import Tensor
from transformers.utils import logging

from dllm_rl.config import GROUPS
from dllm_rl.models.families import FAMILIES
from dllm_rl.models.policy import Policy
from dllm_rl.models.tiny import TinyModel
from dllm_rl.objectives.base import LossInputs
from dllm_rl.sandbox import SandboxConfig, configure
from dllm_rl.types import Completions

torch.set_num_threads(1)
logging.disable_progress_bar()
configure(SandboxConfig(allow_unisolated=True))  # tests that are not about isolation run anywhere


def make_policy(dtype: torch.dtype = torch.float64, seed: int = 0) -> Policy:
    policy = TinyModel(hidden_size=16, num_layers=2, num_heads=2).build([], seed=seed)
    policy.network.to(dtype)
    return policy


def make_completions(policy: Policy, batch: int = 6, length: int = 8, seed: int = 0) -> Completions:
    """Random completions, with EOS tails of different lengths, of prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompts = policy.encode_prompts(["q" * (1 + row % 4) for row in range(batch)], torch.arange(batch) + 100)
    ids = torch.randint(10, 80, (batch, length), generator=generator)
    for row in range(batch):
        ids[row, length - row % 4 :] = policy.eos_id
    return Completions(prompts.ids, prompts.mask, prompts.sample_ids, ids, torch.zeros_like(ids))


def loss_inputs(
    logps: Tensor, old_logps: Tensor, weights: Tensor, advantages: Tensor, *, scored: Tensor | None = None,
    coefficients: Tensor | None = None, region: Tensor | None = None, ref_logps: Tensor | None = None,
    divergence: Tensor | None = None, num_samples: int | None = None,
) -> LossInputs:
    """Inputs of a whole update: everything scored, and the mean over sequences, unless told otherwise."""
    batch, samples, length = logps.shape
    return LossInputs(
        logps=logps, old_logps=old_logps, weights=weights, advantages=advantages, ref_logps=ref_logps, divergence=divergence,
        scored=torch.ones_like(logps, dtype=torch.bool) if scored is None else scored,
        coefficients=torch.full((batch,), 1 / batch, dtype=torch.float64) if coefficients is None else coefficients,
        region=torch.ones(batch, length, dtype=torch.bool) if region is None else region,
        num_samples=num_samples or samples,
    )


@pytest.fixture(autouse=True)
def _own_plugins() -> Iterator[None]:
    """What a test's plugins add is gone after it."""
    store, families = ConfigStore.instance().repo, dict(FAMILIES)
    known = {group: {*store.get(group, {})} for group in GROUPS}
    yield
    for group, names in known.items():
        for name in {*store.get(group, {})} - names - {f"{own}.yaml" for own in GROUPS[group]}:
            del store[group][name]
    FAMILIES.clear()
    FAMILIES.update(families)


@pytest.fixture
def policy() -> Policy:
    """A float64 policy: rounding does not hide mistakes."""
    return make_policy()


@pytest.fixture
def completions(policy: Policy) -> Completions:
    return make_completions(policy)
