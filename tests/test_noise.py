"""Keyed random numbers: the right hash, the right distribution, and nothing global."""

from __future__ import annotations

import random

import numpy
import torch

from dllm_rl.diffusion.noise import Purpose, fold, make_key, uniform

MODULUS = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """splitmix64's finaliser on Python integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % MODULUS
    x = (x ^ x >> 27) * 0x94D049BB133111EB % MODULUS
    return x ^ x >> 31


def reference_fold(key: int, part: int) -> int:
    return mix((key * GOLDEN + mix((part + GOLDEN) % MODULUS)) % MODULUS)


def test_the_hash_is_splitmix64() -> None:
    # First output of splitmix64 for seed 0, as published with the generator.
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF
    assert ((mix(GOLDEN) >> 12) + 0.5) * 2.0**-52 == uniform(torch.tensor(0), 1).item()
    for key, part in ((0, 0), (1, 2), (-5, 7), (2**63 - 1, 2**63 - 1), (123456789, -1)):
        assert fold(torch.tensor(key), torch.tensor(part)).item() % MODULUS == reference_fold(key % MODULUS, part % MODULUS)


def test_uniform_is_uniform() -> None:
    draws = uniform(make_key(0, Purpose.SAMPLE, torch.arange(200)), 1000)
    assert draws.dtype == torch.float64 and draws.shape == (200, 1000)
    assert draws.min() > 0 and draws.max() < 1
    ordered = draws.flatten().sort().values
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded with probability 0.001.
    assert (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max() < 1.95 / len(ordered) ** 0.5
    for pair in (draws[:, 1:] * draws[:, :-1], draws[1:] * draws[:-1]):
        assert abs(pair.mean() - 0.25) < 4 * (7 / 144 / pair.numel()) ** 0.5  # neighbours are uncorrelated


def test_every_part_of_the_key_matters() -> None:
    keys = [make_key(*parts).item() for parts in (
        (0, Purpose.SAMPLE, 1, 2), (1, Purpose.SAMPLE, 1, 2), (0, Purpose.CORRUPT, 1, 2), (0, Purpose.SAMPLE, 2, 1),
        (0, Purpose.SAMPLE, 1, 3), (0, Purpose.SAMPLE, 1), (0, Purpose.SAMPLE, -1, 2),
    )]
    assert len(set(keys)) == len(keys)


def test_draws_do_not_depend_on_the_batch() -> None:
    ids = torch.tensor([7, 3, 11])
    together = uniform(make_key(5, Purpose.SAMPLE, 1, ids), 4)
    for row, sample_id in enumerate(ids.tolist()):
        assert torch.equal(together[row], uniform(make_key(5, Purpose.SAMPLE, 1, sample_id), 4))
    assert torch.equal(together[:, :2], uniform(make_key(5, Purpose.SAMPLE, 1, ids), 2))


def test_global_generators_are_untouched() -> None:
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    uniform(make_key(0, Purpose.SAMPLE, torch.arange(3)), 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]
