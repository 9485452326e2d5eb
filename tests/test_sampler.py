"""LLaDA's sampler against a naive re-derivation, its schedule, and its independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.diffusion.unmasking import draw_tokens, most_confident, position_scores, sampling_law, transfer_schedule
from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy
from dllm_rl.types import Completions, PromptBatch
from tests.conftest import make_policy


def prompts_for(policy: Policy, count: int = 5) -> PromptBatch:
    return policy.encode_prompts(["ab" * (1 + row % 3) for row in range(count)], torch.arange(count))


def draw(policy: Policy, prompts: PromptBatch, length: int = 12, seed: int = 0, **settings: object) -> Completions:
    return LowConfidence(**settings).sample(policy, prompts, length, seed=seed, step=1)  # type: ignore[arg-type]


def naive_greedy(policy: Policy, prompt: Tensor, length: int, block: int, steps: int) -> list[int]:
    """The published algorithm for one sequence: full logits, Python loops, no code of the sampler."""
    canvas = [policy.mask_id] * length
    per_block = steps // (length // block)
    for start in range(0, length, block):
        for step in range(per_block):
            ids = torch.cat([prompt, torch.tensor(canvas)]).unsqueeze(0)
            logits = policy.network(input_ids=ids).logits[0, len(prompt) :]
            logits[:, policy.mask_id] = -torch.inf
            probabilities = logits.softmax(-1)
            candidates = []
            for position in range(start, start + block):
                if canvas[position] == policy.mask_id:
                    token = int(probabilities[position].argmax())
                    candidates.append((-probabilities[position, token].item(), position, token))
            take = block // per_block + (step < block % per_block)
            for _, position, token in sorted(candidates)[:take]:
                canvas[position] = token
    return canvas


@pytest.mark.parametrize(("block", "steps"), [(12, 6), (4, 12), (6, 4), (4, 9), (12, 1)])
def test_greedy_is_the_published_algorithm_token_for_token(policy: Policy, block: int, steps: int) -> None:
    prompts = prompts_for(policy)
    found = draw(policy, prompts, temperature=0.0, block_length=block, denoising_steps=steps, stop_early=False)
    for row in range(len(prompts)):
        prompt = prompts.ids[row][prompts.mask[row]]
        assert found.ids[row].tolist() == naive_greedy(policy, prompt, 12, block, steps)


def test_schedule() -> None:
    assert transfer_schedule(9, 4) == [3, 2, 2, 2]
    assert transfer_schedule(8, 8) == [1] * 8
    assert transfer_schedule(5, 1) == [5]


def test_blocks_come_in_order_and_steps_write_what_is_planned(policy: Policy) -> None:
    found = draw(policy, prompts_for(policy), block_length=4, denoising_steps=9, stop_early=False)
    assert (found.ids != policy.mask_id).all()
    for row in found.unmask_step.tolist():
        for block in range(3):
            steps = sorted(row[4 * block : 4 * block + 4])
            assert steps == [3 * block, 3 * block, 3 * block + 1, 3 * block + 2]


def test_default_steps_are_half_the_length() -> None:
    assert LowConfidence().plan(20) == (20, 10)
    assert LowConfidence().plan(9) == (9, 4)
    assert LowConfidence().plan(1) == (1, 1)
    assert LowConfidence().plan(256) == (32, 16)
    assert LowConfidence(denoising_steps=256).plan(256) == (32, 32)


@pytest.mark.parametrize("position_by", ["sampled_prob", "random"])
def test_results_do_not_depend_on_batch_size_or_order(policy: Policy, position_by: str) -> None:
    prompts = prompts_for(policy, 7)
    whole = draw(policy, prompts, position_by=position_by)
    for size in (1, 3):
        assert torch.equal(draw(policy, prompts, position_by=position_by, batch_size=size).ids, whole.ids)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    assert torch.equal(draw(policy, prompts.rows(order), position_by=position_by).ids, whole.ids[order])
    assert torch.equal(whole.prompt_ids, prompts.ids)


def test_float32_results_do_not_depend_on_batch_size() -> None:
    policy = make_policy(torch.float32)
    prompts = prompts_for(policy, 7)
    assert torch.equal(draw(policy, prompts).ids, draw(policy, prompts, batch_size=1).ids)


def test_seed_and_sample_id_matter(policy: Policy) -> None:
    same = policy.encode_prompts(["ab"] * 6, torch.arange(6))
    found = draw(policy, same)
    assert len({tuple(row) for row in found.ids.tolist()}) == 6
    assert not torch.equal(draw(policy, same, seed=1).ids, found.ids)


def test_no_network_call_builds_a_graph(policy: Policy) -> None:
    calls: list[bool] = []
    policy.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    draw(policy, prompts_for(policy), denoising_steps=6)
    assert calls == [False] * 6


def test_tokens_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -torch.inf]).expand(40_000, 5)
    noise = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits[0].double() / temperature).softmax(-1) * 40_000
        law = sampling_law(logits.double(), temperature, None, None).softmax(-1)
        counts = draw_tokens(law, noise).bincount(minlength=5)
        assert counts[4] == 0
        # Chi-square with three degrees of freedom: 16.3 is exceeded with probability 0.001.
        assert ((counts - expected)[:4] ** 2 / expected[:4]).sum() < 16.3


def test_extreme_noise_stays_in_range() -> None:
    law = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    assert draw_tokens(law, torch.full((2,), 1 - 2.0**-53, dtype=torch.float64)).tolist() == [1, 2]
    assert draw_tokens(law, torch.full((2,), 2.0**-53, dtype=torch.float64)).tolist() == [0, 1]


def test_scores_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    for rule, expected in (("sampled_prob", [0.25, 1.0]), ("max_prob", [0.5, 1.0]), ("margin", [0.25, 1.0]),
                           ("entropy", [-1.5 * math.log(2), 0.0])):
        assert position_scores(rule, probabilities, torch.tensor([2, 0])).tolist() == pytest.approx(expected)


def test_most_confident_takes_the_leftmost_of_equals() -> None:
    confidence, masked = torch.tensor([[0.5, 0.9, 0.5, 0.5]]), torch.tensor([[True, False, True, True]])
    assert most_confident(confidence, masked, 2).tolist() == [[True, False, True, False]]


class Ender:
    """Writes token 5 everywhere, and EOS at the last position of the first block for even sample ids."""

    mask_id, eos_id = 0, 1

    def __init__(self, ends: bool) -> None:
        self.calls, self.ends = 0, ends

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        self.calls += 1
        logits = torch.zeros(*canvas.shape, 8)
        logits[..., 5] = 10
        stops = torch.ones_like(prompts.sample_ids).bool() if self.ends else prompts.sample_ids % 2 == 0
        logits[stops, 3, 1] = 20
        return logits[positions]


def test_stop_early_gives_the_same_text_in_fewer_calls() -> None:
    prompts = PromptBatch(torch.ones(4, 1).long(), torch.ones(4, 1).bool(), torch.arange(4))
    settings = {"block_length": 4, "denoising_steps": 12, "temperature": 0.0}
    for ends, calls in ((True, 4), (False, 12)):
        early, late = Ender(ends), Ender(ends)
        short = LowConfidence(**settings, stop_early=True).sample(early, prompts, 12, seed=0, step=0)
        long = LowConfidence(**settings, stop_early=False).sample(late, prompts, 12, seed=0, step=0)
        assert (early.calls, late.calls) == (calls, 12)
        for a, b in zip(short.ids.tolist(), long.ids.tolist(), strict=True):
            assert (a[: a.index(1)] if 1 in a else a) == (b[: b.index(1)] if 1 in b else b)
        finished = (short.ids == 1).any(1)
        assert (short.ids[finished, 4:] == 1).all() and (short.unmask_step[finished, 4:] == -1).all()


@pytest.mark.parametrize(("settings", "message"), [
    ({"block_length": 5}, r"sampler\.block_length=5: must be a divisor of task\.completion_length=12"),
    ({"block_length": 4, "denoising_steps": 10}, r"sampler\.denoising_steps=10: must be a multiple of the number of blocks"),
    ({"denoising_steps": 13}, r"sampler\.denoising_steps=13"),
    ({"temperature": -1}, r"sampler\.temperature=-1"),
    ({"position_by": "length"}, r"sampler\.position_by=length: must be sampled_prob, max_prob, entropy, margin"),
    ({"batch_size": 0}, r"sampler\.batch_size=0"),
])
def test_bad_values_name_their_key(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LowConfidence(**settings).plan(12)  # type: ignore[arg-type]
