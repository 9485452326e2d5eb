"""Likelihood estimators: unbiased against enumeration, exact where they claim it, and the masks of their sources."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import pytest
import torch
from torch import Tensor

from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.estimators import (
    Bernoulli,
    Block,
    Coupled,
    CoupledFull,
    LeftToRight,
    OneStep,
    Quadrature,
    StratifiedCounts,
    Trajectory,
    gauss_legendre,
)
from dllm_rl.diffusion.likelihood import elbo_terms, token_logps
from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy
from dllm_rl.types import Completions, Corruption, PromptBatch
from tests.test_corruption import EOS, MASK, TableDenoiser, exact_elbo, many, masked_sum

IDS = [2, 4, 3, EOS, EOS, EOS]
STEPS = [1, 0, 2, 0, 1, 3]
EVERY: list[Likelihood] = [
    StratifiedCounts(num_samples=4), Bernoulli(num_samples=4), Quadrature(num_samples=6), Coupled(num_samples=4),
    CoupledFull(num_samples=6), OneStep(num_samples=2), Block(num_samples=4, block_length=2, clean_mask_prob=0.3),
    Block(num_samples=4, block_length=2, scored="masked", clean_mask_prob=0.3), Trajectory(num_samples=2),
    Block(num_samples=4, block_length=3, count_from="prompt"),
    LeftToRight(num_samples=2),
]


def draw(likelihood: Likelihood, completions: Completions, j: int, seed: int = 0) -> Corruption:
    sample = torch.full((len(completions),), j)
    return likelihood.draw(completions, sample, seed=seed, step=0, mask_id=MASK, eos_id=EOS)


def estimates(model: TableDenoiser, likelihood: Likelihood, completions: Completions) -> Tensor:
    """The estimate of every row: the mean of its N ELBO terms."""
    terms = []
    for j in range(likelihood.num_samples):
        corruption = draw(likelihood, completions, j)
        logps = token_logps(model, completions, corruption)
        terms.append(elbo_terms(logps.unsqueeze(1), corruption.weight.unsqueeze(1)).squeeze(1))
    return torch.stack(terms).mean(0)


def block_elbo(model: TableDenoiser, ids: list[int], region: int, block: int, before: int = 0) -> float:
    """Σ over blocks of the exact ELBO of the block, earlier blocks visible and later ones hidden.

    The first block has `before` tokens of the prompt."""
    total = 0.0
    for start in range(-before, region, block):
        inside = range(max(start, 0), min(start + block, region))
        later = tuple(range(inside.stop, len(ids)))
        for k in range(1, len(inside) + 1):
            for subset in combinations(inside, k):
                total += masked_sum(model, ids, subset + later, subset) / (k * comb(len(inside), k))
    return total


def in_slices(model: TableDenoiser, ids: list[int], slices: list[int]) -> float:
    """Σ over slices of log p of their tokens given the tokens of earlier slices; -1 is never shown and never scored."""
    total = 0.0
    for current in range(max(slices) + 1):
        hidden = tuple(i for i, number in enumerate(slices) if number >= current or number < 0)
        total += masked_sum(model, ids, hidden, tuple(i for i, number in enumerate(slices) if number == current))
    return total


def exact_value(model: TableDenoiser, name: str, region: int) -> float:
    if name == "block":
        return block_elbo(model, IDS, region, 2)
    if name == "block, from the prompt":
        return block_elbo(model, IDS, region, 3, before=2)
    if name == "trajectory":
        return in_slices(model, IDS, STEPS)
    if name == "left_to_right":
        return in_slices(model, IDS, [i if i < region else -1 for i in range(len(IDS))])
    return exact_elbo(model, IDS, region)


@pytest.mark.parametrize("region", ["canvas", "through_first_eos"])
@pytest.mark.parametrize(("name", "likelihood"), [
    ("bernoulli", Bernoulli(num_samples=4, min_ratio=1e-3)), ("quadrature", Quadrature(num_samples=3)),
    ("coupled", Coupled(num_samples=2)), ("coupled, two pairs", Coupled(num_samples=4)),
    ("block", Block(num_samples=2, block_length=2)), ("trajectory", Trajectory(num_samples=3)),
    ("block, from the prompt", Block(num_samples=2, block_length=3, count_from="prompt")),
    ("left_to_right", LeftToRight(num_samples=3)),
])
def test_estimators_are_unbiased(name: str, likelihood: Likelihood, region: str) -> None:
    likelihood.region = region if name != "trajectory" else "canvas"  # its states are the sampler's, whatever the region
    model, completions = TableDenoiser(6), many(IDS, 20_000)
    completions = Completions(**{**completions.__dict__, "unmask_step": torch.tensor([STEPS]).expand(20_000, -1)})
    exact = exact_value(model, name, 6 if region == "canvas" else 4)
    found = estimates(model, likelihood, completions)
    # The floor of the mask ratio biases the Bernoulli form by the order of min_ratio.
    bias = 1e-3 * 10 if name == "bernoulli" else 0.0
    assert abs(found.mean() - exact) < 4 * found.std() / len(found) ** 0.5 + bias
    assert found.std() > 1e-6


def expected_at_ratio(model: TableDenoiser, ratio: float) -> float:
    """E[S(M)/t] at a fixed t, by enumeration of all masks."""
    total = 0.0
    for mask in product((False, True), repeat=6):
        hidden = tuple(i for i, chosen in enumerate(mask) if chosen)
        total += ratio ** len(hidden) * (1 - ratio) ** (6 - len(hidden)) * masked_sum(model, IDS, hidden, hidden) / ratio
    return total


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_quadrature_is_exact_iff_it_has_enough_nodes(nodes: int) -> None:
    model = TableDenoiser(6)
    ratios, weights = gauss_legendre(nodes)
    found = sum(w * expected_at_ratio(model, t) for t, w in zip(ratios.tolist(), weights.tolist(), strict=True))
    error = abs(found - exact_elbo(model, IDS, 6))
    if 2 * nodes - 1 >= 6 - 1:
        assert error < 1e-12
    else:
        assert error > 1e-3


def test_gauss_legendre_by_hand() -> None:
    ratios, weights = gauss_legendre(2)
    assert ratios.tolist() == pytest.approx([0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5], abs=1e-14)
    assert weights.tolist() == pytest.approx([0.5, 0.5], abs=1e-14)


def test_coupled_pairs_are_complements() -> None:
    completions = many([2, 3, 4, 2, EOS, EOS], 300)
    for region, length in (("canvas", 6), ("through_first_eos", 5)):
        likelihood = Coupled(num_samples=4, region=region)
        for pair in (0, 2):
            first, second = draw(likelihood, completions, pair), draw(likelihood, completions, pair + 1)
            assert (first.scored ^ second.scored)[:, :length].all()
            assert not (first.scored | second.scored)[:, length:].any()
            for corruption in (first, second):
                count = corruption.scored.sum(1).double()
                filled = count > 0
                assert torch.allclose((corruption.weight * count)[filled], torch.tensor(length + 1.0, dtype=torch.float64))
                assert (corruption.weight[~filled] == 0).all()
            assert set(first.scored.sum(1).tolist()) == set(range(length + 1))


def test_coupled_full_is_the_formula_of_the_source() -> None:
    model, completions = TableDenoiser(6), many([2, 4, 3, 2, 3, 4], 50)
    likelihood = CoupledFull(num_samples=3)
    draws = [draw(likelihood, completions, j) for j in range(3)]
    logps = [token_logps(model, completions, corruption) for corruption in draws]
    per_token = torch.stack([c.weight.unsqueeze(1) * p for c, p in zip(draws, logps, strict=True)]).mean(0)
    assert draws[0].scored.all() and (draws[1].scored ^ draws[2].scored).all()
    ratio = 1.5 / draws[1].weight
    assert ((ratio >= 0.2) & (ratio <= 0.8)).all() and torch.allclose(1.5 / draws[2].weight, 1 - ratio)
    inside = draws[1].scored
    other = torch.where(inside, logps[1] / ratio.unsqueeze(1), logps[2] / (1 - ratio).unsqueeze(1))
    torch.testing.assert_close(per_token, 0.5 * (logps[0] + other))


def test_one_step_masks_everything_and_some_of_the_prompt() -> None:
    completions = many([2, 3, EOS, EOS], 4000)
    completions = Completions(**{**completions.__dict__, "prompt_ids": torch.full((4000, 5), 3),
                                 "prompt_mask": torch.tensor([[False, True, True, True, True]]).expand(4000, -1)})
    likelihood = OneStep(num_samples=2, prompt_mask_prob=0.15)
    corruption = draw(likelihood, completions, 0)
    assert (corruption.canvas == MASK).all() and (corruption.weight == 1).all()
    assert corruption.scored.tolist() == [[True, True, True, False]] * 4000
    hidden = corruption.prompt == MASK
    assert not hidden[:, 0].any(), "padding stays padding"
    assert (hidden[:, 1:].double().mean(0) - 0.15).abs().max() < 5 * (0.15 * 0.85 / 4000) ** 0.5
    assert not torch.equal(draw(likelihood, completions, 1).prompt, corruption.prompt)
    assert (draw(OneStep(prompt_mask_prob=0.0), completions, 0).prompt == completions.prompt_ids).all()


def test_more_padding_changes_no_prompt_mask() -> None:
    narrow = many([2, 3, 4], 200)
    wide = Completions(**{**narrow.__dict__, "prompt_ids": torch.nn.functional.pad(narrow.prompt_ids, (3, 0), value=1),
                          "prompt_mask": torch.nn.functional.pad(narrow.prompt_mask, (3, 0))})
    for likelihood in (OneStep(prompt_mask_prob=0.5), Block(clean_mask_prob=0.5)):
        a, b = draw(likelihood, narrow, 0), draw(likelihood, wide, 0)
        assert torch.equal(a.prompt, b.prompt[:, 3:]) and torch.equal(a.canvas, b.canvas)


def test_a_block_sees_what_is_before_it_and_nothing_after() -> None:
    completions = many([2, 3, 4, 2, 3, 4, 2, EOS, EOS], 500)
    corruption = draw(Block(num_samples=4, block_length=3), completions, 1)
    hidden = corruption.canvas == MASK
    blocks = set()
    for row in range(500):
        scored = corruption.scored[row].nonzero().flatten().tolist()
        block = scored[0] // 3
        blocks.add(block)
        assert {position // 3 for position in scored} == {block}
        assert not hidden[row, : 3 * block].any() and hidden[row, 3 * block + 3 :].all()
        length = 2 if block == 2 else 3  # the last block holds the last token and the EOS
        assert corruption.weight[row].item() == pytest.approx(3 * length / len(scored))
    assert blocks == {0, 1, 2}


def test_spg_scores_every_masked_completion_token() -> None:
    completions = many([2, 3, 4, 2, 3, EOS, EOS, EOS], 500)
    corruption = draw(Block(num_samples=4, block_length=3, scored="masked", clean_mask_prob=0.4), completions, 1)
    hidden = corruption.canvas == MASK
    assert torch.equal(corruption.scored, hidden & torch.tensor([True] * 6 + [False] * 2))
    torch.testing.assert_close(corruption.weight * corruption.scored.sum(1), torch.full((500,), 6.0).double())
    assert hidden[:, 6:].all() and (corruption.prompt == MASK).any()


def test_only_earlier_blocks_are_hidden_besides_the_chosen_one() -> None:
    """With one block there is no earlier one: the number hidden is the count, uniform on 1..6."""
    corruption = draw(Block(num_samples=1, block_length=6, scored="masked", clean_mask_prob=1.0), many([2] * 6, 600), 0)
    assert set((corruption.canvas == MASK).sum(1).tolist()) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("stop_early", [True, False])
def test_the_trajectory_has_the_states_that_the_sampler_saw(policy: Policy, stop_early: bool) -> None:
    """Canvases are recorded inside the sampler; the log-probabilities of what was written are those at its own steps."""
    seen: list[Tensor] = []
    logits_of = policy.logits

    def spy(prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        seen.append(canvas.clone())
        return logits_of(prompts, canvas, positions)

    policy.logits = spy  # type: ignore[method-assign]
    sampler = LowConfidence(block_length=4, denoising_steps=6, temperature=2.0, stop_early=stop_early)
    prompts = policy.encode_prompts(["q"], torch.arange(1))
    completions = sampler.sample(policy, prompts, 12, seed=4, step=0)
    policy.logits = logits_of  # type: ignore[method-assign]

    likelihood = Trajectory(num_samples=16)
    total = torch.zeros((), dtype=torch.float64)
    for j in range(16):
        corruption = likelihood.draw(
            completions, torch.full((1,), j), seed=0, step=0, mask_id=policy.mask_id, eos_id=policy.eos_id
        )
        if j < len(seen):
            assert torch.equal(corruption.canvas, seen[j])
            assert torch.equal(corruption.scored, completions.unmask_step == j)
            with torch.no_grad():
                total += corruption.weight[0] * token_logps(policy, completions, corruption).sum() / 16
        else:
            assert not corruption.scored.any()
    by_hand = torch.stack([
        logits_of(prompts, canvas, completions.unmask_step == j).log_softmax(-1)
        .gather(-1, completions.ids[completions.unmask_step == j].unsqueeze(-1)).sum()
        for j, canvas in enumerate(seen)
    ]).sum()
    assert total.item() == pytest.approx(float(by_hand.detach()), rel=1e-10)


def test_aggregated_steps_are_scored_from_the_state_before_them() -> None:
    model, completions = TableDenoiser(6), many(IDS, 1)
    completions = Completions(**{**completions.__dict__, "unmask_step": torch.tensor([STEPS])})
    found = estimates(model, Trajectory(num_samples=2, steps_per_slice=2), completions)
    assert found.item() == pytest.approx(in_slices(model, IDS, [step // 2 for step in STEPS]), rel=1e-12)


def test_all_positions_give_the_exact_autoregressive_likelihood() -> None:
    model, completions = TableDenoiser(6), many([2, 4, 3, EOS, EOS, EOS], 3)
    found = estimates(model, LeftToRight(num_samples=9), completions)
    chain = 0.0
    for position in range(4):
        chain += masked_sum(model, IDS, tuple(range(position, 6)), (position,))
    assert found.tolist() == pytest.approx([chain] * 3, rel=1e-12)


@pytest.mark.parametrize("likelihood", EVERY, ids=lambda value: type(value).__name__)
def test_draws_depend_on_nothing_but_their_key(likelihood: Likelihood) -> None:
    completions = many([2, 3, 4, 2, 3, 4, EOS, EOS], 32)
    steps = torch.arange(8).expand(32, -1) // 2
    completions = Completions(**{**completions.__dict__, "unmask_step": steps})
    whole = draw(likelihood, completions, 1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    shuffled = draw(likelihood, completions.rows(order), 1)
    for name in ("canvas", "scored", "weight", "prompt"):
        assert torch.equal(getattr(shuffled, name), getattr(whole, name)[order])
    others = [draw(likelihood, completions, 1, seed=seed) for seed in (1, 2, 3)]
    same = [torch.equal(other.canvas, whole.canvas) and torch.equal(other.prompt, whole.prompt) for other in others]
    assert not all(same)
    assert ((whole.canvas == MASK) | (whole.canvas == completions.ids)).all()
    assert (whole.canvas == MASK)[whole.scored].all(), "what is scored is hidden"


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Bernoulli(min_ratio=1.0), r"likelihood\.min_ratio=1\.0"),
    (lambda: Quadrature(num_samples=4, nodes=3), r"likelihood\.num_samples=4: must be a multiple of likelihood\.nodes=3"),
    (lambda: Coupled(num_samples=3), r"likelihood\.num_samples=3: must be a multiple of 2"),
    (lambda: CoupledFull(num_samples=4), r"likelihood\.num_samples=4: must be a multiple of 3"),
    (lambda: CoupledFull(low=0.9), r"likelihood\.high=0\.8: must be a number >= likelihood\.low=0\.9"),
    (lambda: OneStep(prompt_mask_prob=2.0), r"likelihood\.prompt_mask_prob=2\.0"),
    (lambda: Block(scored="all"), r"likelihood\.scored=all: must be block or masked"),
    (lambda: Block(block_length=0), r"likelihood\.block_length=0"),
    (lambda: Block(count_from="end"), r"likelihood\.count_from=end: must be completion or prompt"),
    (lambda: Trajectory(steps_per_slice=0), r"likelihood\.steps_per_slice=0"),
])
def test_bad_values_name_their_key(make: type, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
