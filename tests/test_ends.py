"""Where a text ends, alike for decoding, stopping early and counting: EOS, and the end of a turn in a chat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllm_rl.diffusion.corruption import through_first
from dllm_rl.diffusion.estimators import OneStep
from dllm_rl.diffusion.sampler import Dream, LowConfidence, Parallel, Sampler
from dllm_rl.drift import disagreement
from dllm_rl.evaluation import EvaluationConfig, evaluate
from dllm_rl.models.policy import Policy
from dllm_rl.models.pretrained import PretrainedModel
from dllm_rl.types import PromptBatch
from tests.original_models import token_id, write_checkpoint
from tests.test_trainer import Letters

LENGTH, EOT, A = 16, token_id("llada", "<|eot_id|>"), ord("a")


@pytest.fixture
def chatting(tmp_path: Path) -> Policy:
    """A LLaDA-format policy that writes one token and the end of its turn, again and again; it never writes EOS."""
    write_checkpoint("llada", tmp_path)
    policy = PretrainedModel(path=str(tmp_path)).build([], 0)
    forward = policy.logits

    def logits(prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        found = forward(prompts, canvas, positions).clamp(-5, 5)
        place = positions.nonzero()[:, 1]
        found[:, policy.eos_id], found[:, policy.mask_id] = -50.0, -torch.inf
        found[place % 4 == 1, EOT] = 60.0
        return found

    policy.logits = logits  # type: ignore[method-assign]
    return policy


def prompts_of(policy: Policy) -> PromptBatch:
    return policy.encode_prompts(["a", "bc", "def"], torch.arange(3))


@pytest.mark.parametrize("sampler", [LowConfidence(block_length=4), LowConfidence(block_length=8, temperature=0.0),
                                     Parallel(block_length=4), LowConfidence(block_length=4, cfg_scale=0.5)], ids=str)
def test_a_turn_that_ends_stops_its_row(chatting: Policy, sampler: Sampler) -> None:
    assert chatting.turn_end_id == EOT and chatting.stop_ids == [chatting.eos_id, EOT] and EOT in chatting.end_ids
    block = sampler.block_length or LENGTH
    prompts = prompts_of(chatting)
    short = sampler.sample(chatting, prompts, LENGTH, seed=0, step=0)
    sampler.stop_early = False
    long = sampler.sample(chatting, prompts, LENGTH, seed=0, step=0)
    sampler.stop_early = True
    assert chatting.decode(short.ids) == chatting.decode(long.ids)
    assert (short.ids[:, block:] == chatting.eos_id).all() and (short.unmask_step[:, block:] == -1).all()
    assert torch.equal(short.ids[:, :block], long.ids[:, :block]) and (long.ids[:, 1::4] == EOT).all()
    assert int(long.nfe.sum()) >= LENGTH // block * int(short.nfe.sum())


def test_counts_end_where_the_text_does(chatting: Policy) -> None:
    class Chat(Letters):
        pass

    result = evaluate(chatting, Chat(completion_length=LENGTH), LowConfidence(block_length=4),
                      EvaluationConfig(num_prompts=3), seed=0)
    assert {sample.tokens for sample in result.samples} == {1}

    class Both(LowConfidence):
        """Its exact sampler writes the same first token, and others behind the end of the turn."""

        def exact(self) -> Sampler:
            return Late(temperature=0.0)

    class Late(LowConfidence):
        def sample(self, *args: object, **names: object) -> object:  # type: ignore[override]
            found = super().sample(*args, **names)  # type: ignore[arg-type]
            found.ids[:, 2:] = 7
            return found

    assert disagreement(chatting, Both(), prompts_of(chatting), LENGTH) == {
        "sampler/disagreement": 0.0, "sampler/changed": 0.0}


def test_regions_of_likelihoods_end_with_eos_only(chatting: Policy) -> None:
    ids = torch.tensor([[A, EOT, chatting.eos_id, chatting.eos_id]])
    assert OneStep().region_of(ids, chatting.eos_id).tolist() == [[True, True, True, False]]
    assert through_first(ids, *chatting.stop_ids).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", [LowConfidence, Dream])
def test_ends_of_a_turn_come_last_in_their_block(chatting: Policy, kind: type[Sampler], temperature: float) -> None:
    """`end_ids` has <|eot_id|>, of which the policy is surest."""
    for suppress in (False, True):
        sampler = kind(denoising_steps=LENGTH, temperature=temperature, suppress_eos_confidence=suppress, stop_early=False)
        found = sampler.sample(chatting, prompts_of(chatting), LENGTH, seed=0, step=0)
        ends = found.ids == EOT
        assert ends.any(1).all() and not ends.all(1).any()
        for order, end in zip(found.unmask_step, ends, strict=True):
            assert (order[end].min() > order[~end].max()) == suppress
