"""Every sampler against a naive re-derivation from the published algorithm: alone, and in a ragged batch of eight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllm_rl.diffusion.reading import CacheConfig
from dllm_rl.diffusion.sampler import Dream, LowConfidence, Parallel, Sampler
from dllm_rl.diffusion.unmasking import (
    count_above,
    count_within_factor,
    gumbel,
    keep_top_k,
    keep_top_p,
    most_confident,
    time_schedule,
)
from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy
from dllm_rl.models.tiny import TinyModel
from dllm_rl.types import Completions, PromptBatch
from tests.naive_samplers import Naive, dream, fast_dllm, llada

LENGTH = 12
SAMPLE_IDS = torch.tensor([0, 3, 1, 9, 4, 12, 7, 2])


@pytest.fixture(scope="module")
def sharp() -> Policy:
    """A float64 policy sure enough of itself to pass thresholds, with EOS among its likely tokens."""
    policy = TinyModel(hidden_size=16, num_layers=2, num_heads=2).build([], seed=1)
    policy.network.to(torch.float64)
    with torch.no_grad():
        head = policy.network.get_output_embeddings().weight
        head *= 6
        head[policy.eos_id] = 1.1 * head[121]
    return policy


def ragged(policy: Policy) -> PromptBatch:
    texts = ["abcabca"[: 1 + row % 4] + "xyz"[row % 3] for row in range(8)]
    return policy.encode_prompts(texts, SAMPLE_IDS)


def one_of(policy: Policy, prompts: PromptBatch, row: int, **settings: object) -> Naive:
    prompt = prompts.ids[row][prompts.mask[row]]
    return Naive(policy, prompt, LENGTH, int(prompts.sample_ids[row]), **settings)  # type: ignore[arg-type]


def draw(sampler: Sampler, policy: Policy, prompts: PromptBatch) -> Completions:
    return sampler.sample(policy, prompts, LENGTH, seed=0, step=1)


def check_rows(policy: Policy, sampler: Sampler, naive: object, **settings: object) -> Completions:
    """Alone and in the batch: tokens, their steps and the number of passes of all eight rows."""
    prompts = ragged(policy)
    batch = draw(sampler, policy, prompts)
    for row in range(8):
        expected = naive(one_of(policy, prompts, row, temperature=sampler.temperature, **settings))  # type: ignore[operator]
        alone = draw(sampler, policy, prompts.rows(slice(row, row + 1)))
        for found, index in ((batch, row), (alone, 0)):
            assert found.ids[index].tolist() == expected.canvas
            assert found.unmask_step[index].tolist() == expected.order
            factor = 2 if sampler.cfg_scale else 1
            assert int(found.nfe[index]) == factor * expected.passes
    return batch


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("position_by", ["sampled_prob", "max_prob", "entropy", "margin", "random", "left_to_right"])
def test_llada_with_every_order(sharp: Policy, position_by: str, temperature: float) -> None:
    sampler = LowConfidence(block_length=4, denoising_steps=9, position_by=position_by, temperature=temperature,
                            stop_early=False)
    check_rows(sharp, sampler, lambda one: llada(one, 4, 9), position_by=position_by)


@pytest.mark.parametrize("settings", [
    {"cfg_scale": 1.5}, {"suppress_eos": True}, {"suppress_eos_confidence": True}, {"top_k": 3}, {"top_p": 0.7},
    {"top_k": 5, "top_p": 0.5, "cfg_scale": 0.5},
], ids=lambda settings: "-".join(settings))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_llada_with_every_option(sharp: Policy, settings: dict[str, float], temperature: float) -> None:
    sampler = LowConfidence(block_length=6, denoising_steps=6, temperature=temperature, stop_early=False, **settings)  # type: ignore[arg-type]
    found = check_rows(sharp, sampler, lambda one: llada(one, 6, 6), **settings)
    without = {name: getattr(LowConfidence(), name) for name in settings}
    plain = draw(replace(sampler, **without), sharp, ragged(sharp))
    filters_at_zero = temperature == 0 and set(settings) <= {"top_k", "top_p"}
    assert torch.equal(found.ids, plain.ids) == filters_at_zero and (plain.ids == sharp.eos_id).any()
    assert (found.ids == sharp.eos_id).any() or "suppress_eos" in settings


class Sure:
    """Is nearly sure of EOS at the even positions, less so of other tokens at the odd ones."""

    mask_id, eos_id, end_ids = 0, 1, (1, 2)

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        del prompts
        logits = torch.zeros(*canvas.shape, 6)
        logits[..., ::4, 1], logits[..., 2::4, 2], logits[..., 1::2, 4] = 30.0, 25.0, 12.0
        logits[..., 0] = -torch.inf
        return logits[positions]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("position_by", ["sampled_prob", "entropy"])
def test_ends_come_last_in_their_block_at_any_temperature(position_by: str, temperature: float) -> None:
    """The published code hides EOS from the confidences at temperature 0 only."""
    prompts = PromptBatch(torch.ones(50, 1).long(), torch.ones(50, 1).bool(), torch.arange(50))
    for suppress in (False, True):
        sampler = LowConfidence(block_length=6, denoising_steps=12, temperature=temperature, position_by=position_by,
                                suppress_eos_confidence=suppress, stop_early=False)
        found = sampler.sample(Sure(), prompts, LENGTH, seed=0, step=0)  # type: ignore[arg-type]
        assert (found.ids[:, ::4] == 1).all() and (found.ids[:, 2::4] == 2).all()
        order = found.unmask_step.view(-1, 6)
        ends, others = order[:, ::2], order[:, 1::2]
        assert (ends.amin(1) > others.amax(1)).all() if suppress else (ends.amax(1) < others.amin(1)).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
def test_dream_counts_every_row_for_itself(sharp: Policy, alg: str, temperature: float) -> None:
    for steps in (1, 5, 12):
        sampler = Dream(alg=alg, denoising_steps=steps, temperature=temperature, top_p=0.9)
        check_rows(sharp, sampler, lambda one, n=steps: dream(one, n, alg), top_p=0.9)


def test_dream_draws_positions_by_softmax_without_replacement() -> None:
    """Two of four positions: the chance of a pair is p_i p_j (1/(1 - p_i) + 1/(1 - p_j))."""
    confidence = torch.tensor([0.1, 0.4, 0.2, 0.9], dtype=torch.float64)
    noise = torch.rand(60_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranked = Dream(alg="entropy", alg_temp=0.5).ranked(confidence.expand(60_000, 4), noise)
    chosen = most_confident(ranked, torch.ones(60_000, 4, dtype=torch.bool), 2)
    p = (confidence / 0.5).softmax(0)
    for i in range(4):
        for j in range(i):
            expected = p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j]))
            found = (chosen[:, i] & chosen[:, j]).double().mean()
            assert abs(found - expected) < 4.5 * (expected * (1 - expected) / 60_000).sqrt()


def test_dream_writes_positions_of_origin_at_random(sharp: Policy) -> None:
    prompts = sharp.encode_prompts(["ab"] * 400, torch.arange(400))
    found = draw(Dream(alg="origin", denoising_steps=4, eps=0.0), sharp, prompts)
    counts = torch.stack([(found.unmask_step == step).sum(1) for step in range(3)], 1).double()
    # Every token is written at each of four equally likely times; passes that write nothing are not made.
    assert abs(counts[:, 0].mean() - 3) < 0.4 and counts[:, 0].std() > 1
    assert ((found.unmask_step >= 0).all(1)).all() and int(found.nfe.max()) == 4


PARALLEL = [{"threshold": 0.5}, {"threshold": 0.9}, {"threshold": 0.3, "max_tokens": 2}, {"threshold": None, "factor": 0.8},
            {"threshold": None, "factor": 1.5, "max_tokens": 3}, {"threshold": None, "max_tokens": 5}]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("settings", PARALLEL, ids=str)
def test_parallel_decoding(sharp: Policy, settings: dict[str, float], temperature: float) -> None:
    sampler = Parallel(block_length=4, temperature=temperature, stop_early=False, **settings)  # type: ignore[arg-type]
    found = check_rows(sharp, sampler, lambda one: fast_dllm(
        one, 4, settings["threshold"], settings.get("factor"), settings.get("max_tokens")  # type: ignore[arg-type]
    ))
    assert int(found.nfe.max()) <= LENGTH
    if settings.get("threshold") in (0.3, 0.5):
        assert len(set(found.nfe.tolist())) > 1, "rows go their own ways"


@pytest.mark.parametrize("threshold", [1.5, float("inf")])
def test_a_threshold_above_one_is_one_token_per_step(sharp: Policy, threshold: float) -> None:
    prompts = ragged(sharp)
    for temperature in (0.0, 1.0):
        fast = Parallel(threshold=threshold, block_length=6, temperature=temperature)
        slow = LowConfidence(denoising_steps=LENGTH, block_length=6, temperature=temperature)
        for sampler in (fast, fast.exact(), Parallel(threshold=0.2, block_length=6, temperature=temperature).exact()):
            found, expected = draw(sampler, sharp, prompts), draw(slow, sharp, prompts)
            assert torch.equal(found.ids, expected.ids) and torch.equal(found.unmask_step, expected.unmask_step)


def test_no_limit_is_the_whole_block_at_once(sharp: Policy) -> None:
    prompts = ragged(sharp)
    everything = Parallel(threshold=None, max_tokens=100, block_length=6, stop_early=False)
    assert torch.equal(draw(everything, sharp, prompts).ids,
                       draw(LowConfidence(denoising_steps=2, block_length=6, stop_early=False), sharp, prompts).ids)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize(("sampler", "naive"), [
    (LowConfidence(block_length=4, denoising_steps=9, stop_early=False), lambda one: llada(one, 4, 9)),
    (LowConfidence(block_length=6, denoising_steps=12, stop_early=False), lambda one: llada(one, 6, 12)),
    (Parallel(block_length=4, threshold=0.4, stop_early=False), lambda one: fast_dllm(one, 4, 0.4)),
], ids=["steps 9", "steps 12", "threshold"])
@pytest.mark.parametrize("refresh", [None, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_caches(sharp: Policy, sampler: Sampler, naive: object, kind: str, refresh: int | None, temperature: float) -> None:
    cached = replace(sampler, cache=CacheConfig(kind, refresh), temperature=temperature)
    found = check_rows(sharp, cached, naive, cache=kind, refresh=refresh)
    assert found.passes is not None and (found.passes.sum(0) > 0).all() and cached.approximate
    for always in (cached.exact(), replace(cached, cache=CacheConfig(kind, 1))):
        exact = draw(always, sharp, ragged(sharp))
        if isinstance(sampler, LowConfidence) or always.cache.kind != "none":
            uncached = draw(replace(sampler, temperature=temperature), sharp, ragged(sharp))
            assert torch.equal(exact.ids, uncached.ids)


def test_a_cache_with_guidance(sharp: Policy) -> None:
    """Refreshed at every step it changes nothing; both halves are remembered apart."""
    prompts = ragged(sharp)
    plain = LowConfidence(block_length=4, denoising_steps=6, cfg_scale=0.7, stop_early=False)
    cached = draw(replace(plain, cache=CacheConfig("dual", 1)), sharp, prompts)
    assert torch.equal(cached.ids, draw(plain, sharp, prompts).ids)
    remembered = draw(replace(plain, cache=CacheConfig("dual")), sharp, prompts)
    assert remembered.passes is not None and remembered.passes.tolist() == [[6, 6]] * 8


def test_finished_rows_leave_the_batch(sharp: Policy) -> None:
    """Rows with an EOS in a finished block are not computed again; what is written does not change."""
    sizes: list[int] = []
    hook = sharp.network.register_forward_pre_hook(
        lambda _module, _args, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    prompts = ragged(sharp)
    sampler = Parallel(block_length=2, threshold=0.5)
    found, slow = draw(sampler, sharp, prompts), draw(replace(sampler, stop_early=False), sharp, prompts)
    hook.remove()
    assert sum(sizes) == int(found.nfe.sum() + slow.nfe.sum())
    assert int(found.nfe.sum()) < int(slow.nfe.sum())
    written = found.unmask_step >= 0
    assert torch.equal(found.ids[written], slow.ids[written]) and (found.ids[~written] == sharp.eos_id).all()


@pytest.mark.parametrize("sampler", [
    LowConfidence(block_length=4), Dream(alg_temp=0.3, top_k=6), Parallel(threshold=0.4, block_length=4),
    Parallel(threshold=0.4, block_length=4, cache=CacheConfig("prefix", 3)), LowConfidence(cfg_scale=1.0, block_length=4),
    Parallel(threshold=None, max_tokens=2, position_by="left_to_right", cache=CacheConfig("dual"), block_length=6),
], ids=lambda sampler: type(sampler).__name__)
def test_results_do_not_depend_on_the_batch(sharp: Policy, sampler: Sampler) -> None:
    prompts, order = ragged(sharp), torch.tensor([5, 0, 3, 6, 1, 7, 2, 4])
    whole = draw(replace(sampler, record_logps=not sampler.cfg_scale), sharp, prompts)
    for other, rows in ((replace(sampler, batch_size=3), prompts), (sampler, prompts.rows(order))):
        found = draw(replace(other, record_logps=not sampler.cfg_scale), sharp, rows)
        expected = whole if rows is prompts else whole.rows(order)
        for name in ("ids", "unmask_step", "passes"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        if not sampler.cfg_scale:
            torch.testing.assert_close(found.behaviour_logps, expected.behaviour_logps)


def test_behaviour_logps_are_those_of_the_states_that_were_written(sharp: Policy) -> None:
    prompts = ragged(sharp)
    for sampler in (LowConfidence(block_length=4, temperature=2.0, record_logps=True),
                    LowConfidence(block_length=4, suppress_eos=True, top_k=5, record_logps=True),
                    Dream(suppress_eos=True, suppress_eos_confidence=True, top_p=0.9, record_logps=True),
                    Parallel(threshold=0.3, record_logps=True)):
        found = draw(sampler, sharp, prompts)
        assert found.behaviour_logps is not None
        for row in range(8):
            prompt = prompts.ids[row][prompts.mask[row]]
            for place, now in enumerate(found.unmask_step[row].tolist()):
                if now < 0:
                    assert found.behaviour_logps[row, place] == 0
                    continue
                state = torch.where(found.unmask_step[row] >= now, sharp.mask_id, found.ids[row])
                if sampler.stop_early:
                    state = torch.where(found.unmask_step[row] < 0, sharp.mask_id, state)
                with torch.no_grad():
                    logits = sharp.network(input_ids=torch.cat([prompt, state]).unsqueeze(0)).logits[0, len(prompt) + place]
                logits[sharp.mask_id] = -torch.inf
                expected = logits.log_softmax(-1)[found.ids[row, place]]
                assert found.behaviour_logps[row, place].item() == pytest.approx(expected.item(), rel=1e-9)
    assert draw(LowConfidence(), sharp, prompts).behaviour_logps is None


class Bare:
    """A model that remembers nothing."""

    mask_id, eos_id = 0, 1


def test_a_cache_needs_a_model_that_has_one(sharp: Policy) -> None:
    for sampler in (LowConfidence(cache=CacheConfig("dual")), Parallel(cache=CacheConfig("exact"))):
        with pytest.raises(UserError, match=r"sampler\.cache\.kind=\w+: must be none with this model: it has no cache"):
            sampler.check_model(Bare(), LENGTH)
    LowConfidence().check_model(Bare(), LENGTH)
    LowConfidence(cache=CacheConfig("dual")).check_model(sharp, LENGTH)


def test_logits_only_where_they_are_needed(sharp: Policy) -> None:
    rows: list[int] = []
    hook = sharp.network.get_output_embeddings().register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    prompts = ragged(sharp)
    draw(LowConfidence(block_length=4, denoising_steps=6, stop_early=False), sharp, prompts)
    assert rows == [32, 16] * 3
    rows.clear()
    draw(LowConfidence(block_length=4, denoising_steps=6, stop_early=False, position_by="left_to_right"), sharp, prompts)
    hook.remove()
    assert rows == [16, 16] * 3, "two positions per row and step are known beforehand"


def test_large_vocabularies_are_read_in_parts(sharp: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    for sampler in (LowConfidence(block_length=4, record_logps=True), LowConfidence(position_by="random")):
        whole = draw(sampler, sharp, ragged(sharp))
        with monkeypatch.context() as patch:
            patch.setattr("dllm_rl.diffusion.decoding.AT_ONCE", 3 * len(sharp.tokenizer) + 1)
            found = draw(sampler, sharp, ragged(sharp))
        assert torch.equal(found.ids, whole.ids)
        assert sampler.record_logps == (found.behaviour_logps is not None)
        if found.behaviour_logps is not None and whole.behaviour_logps is not None:
            assert torch.equal(found.behaviour_logps, whole.behaviour_logps)


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()

    def kept(filtered: Tensor) -> list[int]:
        return filtered[0].isfinite().nonzero().flatten().tolist()

    assert kept(keep_top_k(logits, 2)) == [0, 2] and kept(keep_top_k(logits, 9)) == [0, 1, 2, 3]
    assert kept(keep_top_p(logits, 0.1)) == [0] and kept(keep_top_p(logits, 0.45)) == [0, 2]
    assert kept(keep_top_p(logits, 0.75)) == [0, 2, 3] and kept(keep_top_p(logits, 0.95)) == [0, 1, 2, 3]


def test_counts_by_hand() -> None:
    score, masked = torch.tensor([[0.95, 0.5, 0.8, 0.99]]), torch.tensor([[True, True, True, False]])
    assert count_above(score, masked, 0.8).tolist() == [2]
    # (n + 1)(1 - c_n): 0.1, 0.6, 2.0
    assert [count_within_factor(score, masked, factor).item() for factor in (0.05, 0.3, 0.7, 3.0)] == [0, 1, 2, 3]
    torch.testing.assert_close(time_schedule(4, 0.0), torch.tensor([0.25, 1 / 3, 0.5, 1.0]))
    assert gumbel(torch.tensor([0.5])).item() == pytest.approx(0.36651292)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Parallel(threshold=0), r"sampler\.threshold=0: must be a number > 0, or null"),
    (lambda: Parallel(factor=1.0), r"sampler\.factor=1\.0: must be null with sampler\.threshold"),
    (lambda: Parallel(threshold=None), r"sampler\.max_tokens=None: must be an integer >= 1 without threshold and factor"),
    (lambda: Parallel(position_by="entropy"), r"sampler\.position_by=entropy: must be sampled_prob, max_prob or margin"),
    (lambda: Parallel(denoising_steps=4), r"sampler\.denoising_steps=4: must be null"),
    (lambda: Dream(alg="greedy"), r"sampler\.alg=greedy: must be origin, maskgit_plus, topk_margin, entropy"),
    (lambda: Dream(alg_temp=-1), r"sampler\.alg_temp=-1"),
    (lambda: Dream(alg="origin", alg_temp=1), r"sampler\.alg_temp=1: must be 0 with sampler\.alg=origin"),
    (lambda: Dream(eps=1), r"sampler\.eps=1"),
    (lambda: LowConfidence(top_p=0), r"sampler\.top_p=0"),
    (lambda: LowConfidence(top_k=0), r"sampler\.top_k=0"),
    (lambda: LowConfidence(cfg_scale=-1), r"sampler\.cfg_scale=-1"),
    (lambda: LowConfidence(dtype="int8"), r"sampler\.dtype=int8: must be null, bfloat16, float16"),
    (lambda: LowConfidence(cfg_scale=1, record_logps=True), r"sampler\.record_logps=True: must be false with"),
    (lambda: CacheConfig("all"), r"sampler\.cache\.kind=all: must be none, prefix, dual, exact"),
    (lambda: CacheConfig("none", 2), r"sampler\.cache\.refresh=2"),
])
def test_bad_values_name_their_key(make: type, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_an_exact_cache_needs_block_causal_attention(sharp: Policy) -> None:
    with pytest.raises(UserError, match=r"sampler\.cache\.kind=exact: must be none, prefix or dual with this model"):
        draw(LowConfidence(cache=CacheConfig("exact")), sharp, ragged(sharp))
