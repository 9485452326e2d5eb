"""Sampling in half precision: from a copy, which is no larger than it must be and is made no oftener."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dllm_rl.diffusion.reading import CacheConfig
from dllm_rl.diffusion.sampler import LowConfidence, Parallel
from dllm_rl.models.adapter import LoRAConfig
from dllm_rl.models.policy import Policy
from dllm_rl.models.pretrained import PretrainedModel
from dllm_rl.models.tiny import TinyModel
from tests.test_samplers import LENGTH, draw, ragged, sharp
from tests.test_trainer import training

__all__ = ["sharp"]  # the fixture


def test_half_precision_samples_from_a_copy(sharp: Policy) -> None:
    seen: list[torch.dtype] = []
    before = [parameter.clone() for parameter in sharp.network.parameters()]
    copied = sharp.in_dtype(torch.bfloat16)
    copied.network.register_forward_hook(lambda _m, _i, out: seen.append(out.logits.dtype))
    found = LowConfidence().sample(copied, ragged(sharp), LENGTH, seed=0, step=1)
    assert set(seen) == {torch.bfloat16} and not any(parameter.requires_grad for parameter in copied.network.parameters())
    assert copied.network.model.rotary_emb.inv_freq.dtype == sharp.network.model.rotary_emb.inv_freq.dtype
    assert torch.equal(draw(LowConfidence(dtype="bfloat16"), sharp, ragged(sharp)).ids, found.ids)
    assert all(torch.equal(a, b) for a, b in zip(before, sharp.network.parameters(), strict=True))
    assert LowConfidence(dtype="bfloat16").approximate and not LowConfidence(dtype="bfloat16").exact().approximate


def test_half_precision_of_what_is_in_it_already(tmp_path: Path) -> None:
    """The policy itself where there is nothing to convert; else what is not trained is shared: a frozen base of LoRA."""
    half = TinyModel(hidden_size=16, num_layers=2, num_heads=2).build([], seed=1)
    half.network.to(torch.bfloat16)
    asked: list[int] = []
    half.network.register_forward_hook(lambda network, *_: asked.append(id(network)))
    sampler = LowConfidence(dtype="bfloat16")
    draw(sampler, half, ragged(half))
    assert half.in_dtype(torch.bfloat16) is half and set(asked) == {id(half.network)}
    assert sampler.approximate and not sampler.approximates(half)
    assert replace(sampler, dtype="float16").approximates(half) and Parallel(dtype="bfloat16").approximates(half)
    assert replace(sampler, cache=CacheConfig("dual")).approximates(half)

    half.save(tmp_path)
    adapted = PretrainedModel(path=str(tmp_path), dtype="bfloat16", lora=LoRAConfig(r=4)).build([], 0)
    assert {parameter.dtype for parameter in adapted.network.parameters()} == {torch.bfloat16, torch.float32}
    assert sampler.approximates(adapted)
    copied = adapted.in_dtype(torch.bfloat16)
    assert copied.in_dtype(torch.bfloat16) is copied and copied.tokenizer is adapted.tokenizer
    theirs = dict(copied.network.named_parameters())
    for name, parameter in adapted.network.named_parameters():
        assert (theirs[name] is parameter) == (not parameter.requires_grad)
        assert theirs[name].dtype == torch.bfloat16 and not theirs[name].requires_grad
    trained = TinyModel(hidden_size=16, num_layers=2, num_heads=2).build([], seed=1)
    trained.network.model.embed_tokens.to(torch.bfloat16)  # trained, in the precision asked for: still a copy
    first, second = (policy.network.model.embed_tokens.weight for policy in (trained, trained.in_dtype(torch.bfloat16)))
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)


def test_a_step_converts_the_policy_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copies: list[Policy] = []
    in_dtype = Policy.in_dtype

    def counting(policy: Policy, dtype: torch.dtype) -> Policy:
        found = in_dtype(policy, dtype)
        copies.extend([found] * (found is not policy))
        return found

    monkeypatch.setattr(Policy, "in_dtype", counting)
    run = training(tmp_path, 1)
    for precision, converted, checked in ((torch.float32, 1, True), (torch.bfloat16, 0, False)):
        run.policy.network.to(precision)
        copies.clear()
        source = replace(run.source, sampler=LowConfidence(dtype="bfloat16"), check_prompts=2)  # type: ignore[type-var]
        found = source.experience(1)
        assert len(copies) == converted
        assert ("sampler/disagreement" in found.metrics()) == checked
