"""Samplers of models in Dream's and LLaDA's formats, with caches and guidance, against the naive re-derivations."""

from __future__ import annotations

import pytest
import torch

from dllm_rl.diffusion.reading import CacheConfig
from dllm_rl.diffusion.sampler import Dream, LowConfidence, Parallel, Sampler
from dllm_rl.models.policy import Policy
from dllm_rl.models.pretrained import PretrainedModel
from dllm_rl.types import PromptBatch
from tests.naive_samplers import Naive, dream, fast_dllm, llada
from tests.original_models import write_checkpoint

LENGTH = 8
CACHES = [CacheConfig(), CacheConfig("prefix"), CacheConfig("dual"), CacheConfig("dual", 2)]
NAMES = ["no cache", "prefix", "dual", "dual, refreshed"]


@pytest.fixture(scope="module", params=["dream", "llada"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """In the family's published format, in float64, sure enough of itself to pass thresholds."""
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(request.param, folder)
    policy = PretrainedModel(path=str(folder)).build([], 0)
    policy.network.double()
    with torch.no_grad():
        policy.network.get_output_embeddings().weight *= 3
    assert policy.rules.logit_shift == (request.param == "dream")
    return policy


def ragged(policy: Policy) -> PromptBatch:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 250, (count,), generator=generator).tolist() for count in (1, 2, 3, 4, 5, 7, 8, 11)]
    return policy.pad_prompts(rows, torch.tensor([0, 3, 1, 9, 4, 12, 7, 2]))


def check_rows(policy: Policy, sampler: Sampler, naive: object, **settings: object) -> None:
    """In a ragged batch of eight, and the first and last of its rows alone."""
    prompts = ragged(policy)
    sampler.stop_early = False
    batch = sampler.sample(policy, prompts, LENGTH, seed=0, step=1)
    cache = {"cache": sampler.cache.kind, "refresh": sampler.cache.refresh}
    for row in range(8):
        prompt = prompts.ids[row][prompts.mask[row]]
        one = Naive(policy, prompt, LENGTH, int(prompts.sample_ids[row]), temperature=sampler.temperature,
                    cfg_scale=sampler.cfg_scale, **cache, **settings)  # type: ignore[arg-type]
        expected = naive(one)  # type: ignore[operator]
        assert batch.ids[row].tolist() == expected.canvas
        assert batch.unmask_step[row].tolist() == expected.order
        if row in (0, 7):
            alone = sampler.sample(policy, prompts.rows(slice(row, row + 1)), LENGTH, seed=0, step=1)
            assert torch.equal(alone.ids[0], batch.ids[row]) and torch.equal(alone.unmask_step[0], batch.unmask_step[row])


@pytest.mark.parametrize("cache", CACHES, ids=NAMES)
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_llada(model: Policy, temperature: float, cfg_scale: float, cache: CacheConfig) -> None:
    sampler = LowConfidence(block_length=4, denoising_steps=6, temperature=temperature, cfg_scale=cfg_scale, cache=cache)
    check_rows(model, sampler, lambda one: llada(one, 4, 6))


@pytest.mark.parametrize("cache", CACHES, ids=NAMES)
@pytest.mark.parametrize(("temperature", "cfg_scale"), [(0.0, 0.0), (0.8, 0.0), (0.0, 0.7)])
def test_parallel(model: Policy, temperature: float, cfg_scale: float, cache: CacheConfig) -> None:
    sampler = Parallel(block_length=4, threshold=0.3, temperature=temperature, cfg_scale=cfg_scale, cache=cache)
    check_rows(model, sampler, lambda one: fast_dllm(one, 4, 0.3))


@pytest.mark.parametrize(("alg", "alg_temp"), [
    ("origin", 0.0), *((alg, alg_temp) for alg in ("entropy", "maskgit_plus", "topk_margin") for alg_temp in (0.0, 0.3)),
])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_dream(model: Policy, temperature: float, alg: str, alg_temp: float) -> None:
    sampler = Dream(alg=alg, alg_temp=alg_temp, denoising_steps=6, temperature=temperature)
    check_rows(model, sampler, lambda one: dream(one, 6, alg), alg_temp=alg_temp)


@pytest.mark.parametrize("cache", CACHES[1:], ids=NAMES[1:])
def test_dream_with_a_cache(model: Policy, cache: CacheConfig) -> None:
    """One block of the whole canvas: the prompt is what is remembered."""
    sampler = Dream(alg="entropy", alg_temp=0.3, denoising_steps=8, temperature=0.8, cache=cache)
    check_rows(model, sampler, lambda one: dream(one, 8, "entropy"), alg_temp=0.3)
