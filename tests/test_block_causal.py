"""Decoding where attention goes in blocks, against a naive re-derivation of SDAR's published sampler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllm_rl.diffusion.reading import CacheConfig
from dllm_rl.diffusion.sampler import Dream, LowConfidence, Parallel, Sampler, reproduces
from dllm_rl.errors import UserError
from dllm_rl.models.families import FACTS
from dllm_rl.models.policy import Policy
from dllm_rl.types import PromptBatch
from tests.naive_samplers import Naive, sdar
from tests.test_kv_cache import BLOCK, make

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 11)
SAMPLE_IDS = torch.tensor([0, 3, 1, 9, 4, 12, 7, 2])


@pytest.fixture(scope="module")
def blockwise() -> Policy:
    """A float64 Qwen3 with attention in blocks of four, sure enough of itself to pass thresholds."""
    base = make("qwen3")
    setattr(base.network.config, FACTS, {"family": "sdar", "block_length": BLOCK})
    with torch.no_grad():
        base.network.get_output_embeddings().weight *= 4
    return Policy(base.network, base.tokenizer)


def ragged(policy: Policy) -> PromptBatch:
    return policy.encode_prompts(["abcdefghijk"[:length] for length in LENGTHS], SAMPLE_IDS)


def attention_blocks(length: int) -> Tensor:
    """[8, L]: the block of attention of every token of a completion."""
    return (torch.tensor(LENGTHS)[:, None] + torch.arange(length)) // BLOCK


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("length", [12, 10, 3])
@pytest.mark.parametrize(("steps", "threshold"), [(4, None), (2, None), (3, None), (1, None), (4, 0.2), (4, 0.5)])
def test_the_published_sampler(
    blockwise: Policy, steps: int, threshold: float | None, length: int, temperature: float
) -> None:
    """Alone and in a ragged batch: tokens, their order and the passes, without a cache and with the exact one."""
    prompts = ragged(blockwise)
    sampler: Sampler = LowConfidence(
        denoising_steps=-(-length // BLOCK) * steps, temperature=temperature, stop_early=False)
    if threshold is not None:
        sampler = Parallel(threshold=threshold, temperature=temperature, stop_early=False)
    for cache in (CacheConfig(), CacheConfig("exact")):
        one = replace(sampler, cache=cache)
        batch = one.sample(blockwise, prompts, length, seed=0, step=1)
        assert batch.passes is not None
        for row in range(8):
            prompt = prompts.ids[row][prompts.mask[row]]
            expected = sdar(Naive(blockwise, prompt, length, int(SAMPLE_IDS[row]), temperature=temperature),
                            BLOCK, steps, threshold)
            alone = one.sample(blockwise, prompts.rows(slice(row, row + 1)), length, seed=0, step=1)
            for found, index in ((batch, row), (alone, 0)):
                assert found.ids[index].tolist() == expected.canvas
                assert found.unmask_step[index].tolist() == expected.order
                assert int(found.nfe[index]) == expected.passes


@pytest.mark.parametrize("sampler", [
    LowConfidence(), LowConfidence(position_by="random"), LowConfidence(block_length=2), LowConfidence(block_length=1),
    LowConfidence(block_length=4), Dream(), Dream(alg="origin"), Parallel(threshold=0.1), Parallel(max_tokens=3),
    LowConfidence(cfg_scale=0.5),
], ids=str)
def test_no_token_is_written_while_an_earlier_block_has_masks(blockwise: Policy, sampler: Sampler) -> None:
    found = replace(sampler, stop_early=False).sample(blockwise, ragged(blockwise), 12, seed=0, step=0)
    order, blocks = found.unmask_step, attention_blocks(12)
    earlier = blocks.unsqueeze(1) < blocks.unsqueeze(2)  # [row, token, other]: whether the other's block is an earlier one
    assert (order >= 0).all() and (found.ids != blockwise.mask_id).all()
    assert (order.unsqueeze(2) > order.unsqueeze(1))[earlier].all()


def test_stopping_early_leaves_the_later_blocks_of_attention(blockwise: Policy) -> None:
    """A row whose fifth token is EOS is done with that token's block, wherever the prompt ends in it."""
    prompts, end = ragged(blockwise), blockwise.eos_id

    class Ends:
        mask_id, eos_id, rules = blockwise.mask_id, end, blockwise.rules

        def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
            del prompts
            logits = torch.zeros(*canvas.shape, len(blockwise.tokenizer))
            logits[..., 7], logits[:, 4, end] = 9.0, 20.0
            return logits[positions]

    found = LowConfidence(temperature=0.0).sample(Ends(), prompts, 12, seed=0, step=0)  # type: ignore[arg-type]
    blocks = attention_blocks(12)
    decoded = blocks <= blocks[:, 4:5]
    assert torch.equal(found.unmask_step >= 0, decoded)
    assert (found.ids[~decoded] == end).all() and (found.ids[:, :4] == 7).all() and (found.ids[:, 4] == end).all()


@pytest.mark.parametrize("sampler", [LowConfidence(temperature=0.0), Parallel(threshold=0.3), Dream()], ids=str)
def test_an_approximate_cache_that_always_refreshes_changes_nothing(blockwise: Policy, sampler: Sampler) -> None:
    found = [replace(sampler, cache=cache).sample(blockwise, ragged(blockwise), 12, seed=0, step=0)
             for cache in (CacheConfig(), CacheConfig("prefix", 1), CacheConfig("dual", 1), CacheConfig("dual"))]
    for one in found[1:3]:
        assert torch.equal(one.ids, found[0].ids) and torch.equal(one.unmask_step, found[0].unmask_step)
    assert (found[3].ids != blockwise.mask_id).all()


def test_what_greedy_decoding_reproduces(blockwise: Policy) -> None:
    prompts = ragged(blockwise)
    decoded = LowConfidence(denoising_steps=12, temperature=0.0, stop_early=False).sample(
        blockwise, prompts, 12, seed=0, step=0).ids
    assert reproduces(blockwise, prompts, decoded).all()
    other = decoded.clone()
    other[::2, -1] = 7
    assert reproduces(blockwise, prompts, other).tolist() == (other == decoded).all(1).tolist() != [True] * 8


def test_plans_by_hand() -> None:
    assert LowConfidence().plan(256, 4) == (4, 2) and LowConfidence().plan(10, 4) == (4, 2)
    assert LowConfidence().plan(3, 32) == (32, 16) and Dream().plan(64, 4) == (4, 2)
    assert LowConfidence(denoising_steps=12).plan(10, 4) == (4, 4)
    assert LowConfidence(block_length=1).plan(10, 4) == (1, 1)
    assert LowConfidence(block_length=4).plan(12, 4) == LowConfidence(block_length=4).plan(12) == (4, 2)


@pytest.mark.parametrize(("sampler", "length", "message"), [
    (LowConfidence(block_length=32), 64, "block_length=32: must be null, or a divisor of the 4 tokens in a block"),
    (Parallel(block_length=3), 12, "block_length=3: must be null, or a divisor of the 4 tokens"),
    (LowConfidence(denoising_steps=8), 12, r"denoising_steps=8: must be .* number of blocks \(3\), at most 12"),
    (LowConfidence(denoising_steps=15), 10, r"denoising_steps=15: must be .* at most 12"),
])
def test_blocks_that_are_not_the_models_are_refused(
    blockwise: Policy, sampler: Sampler, length: int, message: str
) -> None:
    for ask in (lambda: sampler.check_model(blockwise, length),
                lambda: sampler.sample(blockwise, ragged(blockwise), length, seed=0, step=0)):
        with pytest.raises(UserError, match=r"sampler\." + message):
            ask()
