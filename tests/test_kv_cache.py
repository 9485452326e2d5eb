"""The cache under networks of several families, with left padding, block-causal attention and a logit shift."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dllm_rl.diffusion.reading import CacheConfig
from dllm_rl.diffusion.sampler import Dream, LowConfidence, Parallel, Sampler
from dllm_rl.models.families import FACTS, Family
from dllm_rl.models.families import FAMILIES as KNOWN
from dllm_rl.models.kv_cache import KeyValueCache
from dllm_rl.models.policy import Policy
from dllm_rl.models.tiny import build_tokenizer
from dllm_rl.types import PromptBatch

LENGTH, BLOCK = 12, 4
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def make(family: str, attention: str = "sdpa") -> Policy:
    """A tiny random network with grouped keys and values, in float64."""
    tokenizer = build_tokenizer([])
    config_of, network_of = FAMILIES[family]
    config = config_of(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, initializer_range=0.3, attn_implementation=attention, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )
    config.is_causal = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Policy(network_of(config).double(), tokenizer)


def prompts_of(policy: Policy) -> PromptBatch:
    return policy.encode_prompts(["abcdefg"[: 1 + row % 4] for row in range(6)], torch.arange(6))


def half_written(policy: Policy) -> Tensor:
    canvas = torch.randint(20, 90, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    return canvas.masked_fill(torch.arange(LENGTH) >= 5, policy.mask_id)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_over_the_whole_row_is_the_plain_one(family: str, attention: str) -> None:
    policy = make(family, attention)
    prompts, canvas = prompts_of(policy), half_written(policy)
    masked = canvas == policy.mask_id
    width = prompts.ids.shape[1] + LENGTH
    for some in (torch.arange(6), torch.tensor([1, 4])):
        cache = KeyValueCache(policy, prompts, LENGTH)
        with torch.no_grad():
            found = cache.logits(some, canvas[some], masked[some], torch.zeros_like(some), torch.full_like(some, width))
            plain = policy.logits(prompts.rows(some), canvas[some], masked[some])
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_window_is_computed_anew(family: str) -> None:
    """The window sees what the rest was when it was remembered: by hand with the keys and values of a full pass."""
    policy = make(family)
    prompts, before = prompts_of(policy), half_written(policy)
    after = before.clone()
    after[:, 5] = 33
    rows, width = torch.arange(6), prompts.ids.shape[1]
    start, end = torch.full((6,), width + 4), torch.full((6,), width + 8)
    cache = KeyValueCache(policy, prompts, LENGTH)
    everything = torch.zeros(6, dtype=torch.int64), torch.full((6,), width + LENGTH)
    asked = torch.zeros(6, LENGTH, dtype=torch.bool)
    asked[:, 6:8] = True
    computed: list[tuple[int, ...]] = []
    policy.network.register_forward_pre_hook(
        lambda _m, _a, given: computed.append(given["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        old = cache.logits(rows, before, asked, *everything)
        new = cache.logits(rows, after, asked, start, end)
        # Outside the window the canvas may say what it likes: those columns are remembered.
        other = after.clone()
        other[:, :4], other[:, 8:] = 44, 44
        again = cache.logits(rows, other, asked, start, end)
        true = policy.logits(prompts, after, asked)
    assert computed[1:3] == [(6, 4), (6, 4)]
    torch.testing.assert_close(new, again, rtol=0, atol=0)
    assert not torch.allclose(new, old) and not torch.allclose(new, true)
    finite = torch.isfinite(true)
    assert (new - true)[finite].abs().mean() < (old - true)[finite].abs().mean()


class BlockCausal(Policy):
    """Attention that is causal between blocks of four positions, by a mask of its own; optionally with a logit shift."""

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        attended = torch.cat([prompts.mask, torch.ones_like(positions)], 1)
        place = (attended.cumsum(1) - 1).clamp(min=0)
        block = place // BLOCK
        allowed = (block.unsqueeze(1) <= block.unsqueeze(2)) & attended.unsqueeze(1)
        bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e30).unsqueeze(1)
        everything = self.network(
            input_ids=torch.cat([prompts.ids, canvas], 1), attention_mask=bias, position_ids=place, use_cache=False
        ).logits
        asked = torch.cat([torch.zeros_like(prompts.mask), positions], 1).roll(-self.rules.logit_shift, 1)
        return self.without_mask(everything[asked])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sampler", [
    LowConfidence(denoising_steps=9), LowConfidence(block_length=2, denoising_steps=12, temperature=0.0),
    LowConfidence(position_by="random", stop_early=False), Parallel(threshold=0.35),
    Parallel(block_length=2, threshold=0.35, cfg_scale=0.5), Dream(alg_temp=0.2), Dream(alg="origin"),
], ids=["even", "parts of blocks", "random", "parallel", "guided", "dream", "origin"])
def test_the_cache_of_a_block_causal_model_is_exact(
    sampler: Sampler, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of every length modulo the block of attention."""
    base = make("qwen3")
    monkeypatch.setitem(KNOWN, "mine", Family("mine", logit_shift=shift))
    setattr(base.network.config, FACTS, {"family": "mine", "block_length": BLOCK})
    policy, ours = BlockCausal(base.network, base.tokenizer), Policy(base.network, base.tokenizer)
    prompts, canvas = prompts_of(policy), half_written(policy)
    masked = canvas == policy.mask_id
    with torch.no_grad():
        found, expected = (one.logits(prompts, canvas, masked) for one in (ours, policy))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    computed: list[int] = []
    hook = policy.network.register_forward_pre_hook(
        lambda _m, _a, given: computed.append(given["input_ids"].numel()), with_kwargs=True
    )
    plain = sampler.sample(policy, prompts, LENGTH, seed=0, step=0)
    without = sum(computed)
    computed.clear()
    cached = replace(sampler, cache=CacheConfig("exact"))
    written = cached.sample(policy, prompts, LENGTH, seed=0, step=0)
    hook.remove()
    assert torch.equal(written.ids, plain.ids) and torch.equal(written.unmask_step, plain.unmask_step)
    assert written.passes is not None and (written.passes[:, 0] == 0).all() and torch.equal(written.nfe, plain.nfe)
    assert sum(computed) < 0.8 * without
    assert cached.approximate == isinstance(sampler, Parallel)


def test_a_logit_shift_with_full_attention_reads_one_column_further_left() -> None:
    policy = make("qwen2")
    prompts, canvas = prompts_of(policy), half_written(policy)
    rows, width = torch.arange(6), prompts.ids.shape[1]
    asked = torch.zeros(6, LENGTH, dtype=torch.bool)
    asked[:, 5:8] = True
    with torch.no_grad():
        shifted = policy.logits(prompts, canvas, asked.roll(-1, 1))
        policy.rules = replace(policy.rules, logit_shift=1)
        assert torch.equal(policy.logits(prompts, canvas, asked), shifted)
        cache = policy.cache(prompts, LENGTH, exact=False)
        whole = cache.logits(rows, canvas, asked, torch.zeros_like(rows), torch.full_like(rows, width + LENGTH))
        part = cache.logits(rows, canvas, asked, torch.full_like(rows, width + 5), torch.full_like(rows, width + 8))
    torch.testing.assert_close(whole, shifted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(part, shifted, rtol=1e-10, atol=1e-12)


def test_a_cache_and_gradient_checkpointing_go_together() -> None:
    """transformers' layers drop the cache where they checkpoint; sampling needs no gradients."""
    plain, checkpointing = make("qwen3"), make("qwen3")
    checkpointing.network.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointing = Policy(checkpointing.network, checkpointing.tokenizer)
    sampler = LowConfidence(block_length=4, cache=CacheConfig("dual"))
    found, expected = (sampler.sample(policy, prompts_of(policy), LENGTH, seed=0, step=0).ids
                       for policy in (checkpointing, plain))
    assert torch.equal(found, expected)
