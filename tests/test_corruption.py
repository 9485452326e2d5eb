"""The forward process: unbiased against the exact ELBO, stratified, and a pure function of its key."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
import torch
from torch import Tensor

from dllm_rl.diffusion.corruption import lowest, stratified_counts, through_first
from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.diffusion.likelihood import elbo_terms, token_logps
from dllm_rl.errors import UserError
from dllm_rl.types import Completions, PromptBatch

MASK, EOS, VOCABULARY = 0, 1, 5


class TableDenoiser:
    """Random logits for every pattern of visible tokens: an arbitrary denoiser whose ELBO can be enumerated."""

    mask_id, eos_id = MASK, EOS

    def __init__(self, length: int) -> None:
        size = VOCABULARY**length
        self.table = torch.randn(size, length, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.powers = VOCABULARY ** torch.arange(length)

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        assert (prompts.ids != MASK).all(), "the prompt is never masked"
        return self.table[(canvas * self.powers).sum(1)][positions]


def many(ids: list[int], count: int) -> Completions:
    """The same completion under `count` different sample ids."""
    rows = torch.tensor([ids]).expand(count, -1)
    prompt = torch.full((count, 2), 3)
    return Completions(prompt, torch.ones_like(prompt, dtype=torch.bool), torch.arange(count), rows, torch.zeros_like(rows))


def draw(likelihood: StratifiedCounts, completions: Completions, j: int, seed: int = 0, step: int = 0):  # type: ignore[no-untyped-def]
    sample = torch.full((len(completions),), j)
    return likelihood.draw(completions, sample, seed=seed, step=step, mask_id=MASK, eos_id=EOS)


def masked_sum(model: TableDenoiser, ids: list[int], hidden: tuple[int, ...], scored: tuple[int, ...]) -> float:
    """S(M) by hand: log-probabilities of the scored positions with the hidden ones masked."""
    canvas = torch.tensor([MASK if position in hidden else token for position, token in enumerate(ids)])
    logps = model.table[(canvas * model.powers).sum()].log_softmax(-1)
    return sum(logps[position, ids[position]].item() for position in scored)


def exact_elbo(model: TableDenoiser, ids: list[int], region: int) -> float:
    """B = Σ over non-empty M of S(M) / (k C(L, k)), tokens beyond the region hidden and not scored."""
    tail = tuple(range(region, len(ids)))
    return sum(
        masked_sum(model, ids, subset + tail, subset) / (k * comb(region, k))
        for k in range(1, region + 1) for subset in combinations(range(region), k)
    )


def any_order_elbo(model: TableDenoiser, ids: list[int]) -> float:
    """The same number as the mean over generation orders of the chain rule: each token with what came before visible."""
    length, total = len(ids), 0.0
    for k in range(1, length + 1):  # k tokens still hidden, one of which is predicted next
        for subset in combinations(range(length), k):
            total += sum(masked_sum(model, ids, subset, (position,)) for position in subset) / (k * comb(length, k))
    return total


def test_two_forms_of_the_exact_elbo_agree() -> None:
    model, ids = TableDenoiser(5), [2, 4, 3, 1, 2]
    assert exact_elbo(model, ids, 5) == pytest.approx(any_order_elbo(model, ids), abs=1e-12)


@pytest.mark.parametrize("region", ["canvas", "through_first_eos"])
@pytest.mark.parametrize("samples", [1, 4])
def test_the_estimator_is_unbiased(region: str, samples: int) -> None:
    model, ids = TableDenoiser(6), [2, 4, 3, EOS, EOS, EOS]
    exact = exact_elbo(model, ids, 6 if region == "canvas" else 4)
    completions, likelihood = many(ids, 20_000), StratifiedCounts(num_samples=samples, region=region)
    terms = []
    for j in range(samples):
        corruption = draw(likelihood, completions, j)
        logps = token_logps(model, completions, corruption)
        terms.append(elbo_terms(logps.unsqueeze(1), corruption.weight.unsqueeze(1)).squeeze(1))
    estimates = torch.stack(terms).mean(0)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - exact) < 4 * error


def test_length_norm_divides_by_the_canvas() -> None:
    completions = many([2, 3, 4, EOS, EOS], 50)
    for region in ("canvas", "through_first_eos"):
        plain = draw(StratifiedCounts(region=region), completions, 1)
        normed = draw(StratifiedCounts(region=region, length_norm="canvas"), completions, 1)
        torch.testing.assert_close(normed.weight * 5, plain.weight)
        assert torch.equal(normed.scored, plain.scored)


def test_weight_times_count_is_the_region_length() -> None:
    completions = many([2, 3, 4, EOS, EOS, EOS], 400)
    for region, length in (("canvas", 6), ("through_first_eos", 4)):
        corruption = draw(StratifiedCounts(region=region), completions, 0)
        torch.testing.assert_close(corruption.weight * corruption.scored.sum(1), torch.full((400,), length).double())


def test_counts_are_uniform_and_positions_too() -> None:
    corruption = draw(StratifiedCounts(num_samples=4), many([2] * 6, 24_000), 2)
    counts = corruption.scored.sum(1).bincount(minlength=7)
    assert counts[0] == 0
    # 4000 expected in each of six cells; five standard deviations are 289.
    assert (counts[1:] - 4000).abs().max() < 289
    # E[k/L] = 7/12 at every position.
    assert (corruption.scored.double().mean(0) - 7 / 12).abs().max() < 5 * (0.25 / 24_000) ** 0.5


def test_the_draws_of_a_sequence_are_stratified() -> None:
    start = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    length = torch.full((500,), 12)
    counts = torch.stack([stratified_counts((start + j / 4) % 1, length) for j in range(4)], 1)
    strata = (counts - 1) // 3  # {1..12} in four strata of three
    assert torch.equal(strata.sort(1).values, torch.arange(4).expand(500, 4))


def test_only_the_region_is_scored_and_the_tail_is_hidden() -> None:
    completions = many([2, 3, EOS, EOS, EOS], 300)
    corruption = draw(StratifiedCounts(region="through_first_eos"), completions, 3)
    assert not corruption.scored[:, 3:].any()
    assert (corruption.canvas[:, 3:] == MASK).all()
    visible = ~corruption.scored[:, :3]
    assert (corruption.canvas[:, :3][visible] == completions.ids[:, :3][visible]).all()
    assert (corruption.canvas[:, :3][~visible] == MASK).all()


def test_through_first() -> None:
    found = through_first(torch.tensor([[2, EOS, 3, EOS], [EOS, 2, 2, 2], [2, 2, 2, 2]]), EOS)
    assert found.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]


def test_lowest_takes_the_least_noise() -> None:
    region = torch.tensor([[True, True, False, True]])
    noise = torch.tensor([[0.5, 0.2, 0.0, 0.9]])
    assert lowest(region, torch.tensor([2]), noise).tolist() == [[True, True, False, False]]


def test_masks_depend_on_nothing_but_their_key() -> None:
    likelihood, completions = StratifiedCounts(num_samples=4), many([2] * 8, 32)
    whole = draw(likelihood, completions, 1).scored
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(likelihood, completions.rows(order), 1).scored, whole[order])
    assert torch.equal(draw(likelihood, completions.rows(slice(5, 9)), 1).scored, whole[5:9])
    for other in (draw(likelihood, completions, 2), draw(likelihood, completions, 1, seed=1),
                  draw(likelihood, completions, 1, step=1)):
        assert not torch.equal(other.scored, whole)
    assert len({tuple(row) for row in whole.tolist()}) > 20


@pytest.mark.parametrize(("fields", "message"), [
    ({"num_samples": 0}, r"likelihood\.num_samples=0: must be an integer >= 1"),
    ({"region": "all"}, r"likelihood\.region=all: must be canvas or through_first_eos"),
    ({"length_norm": "region"}, r"likelihood\.length_norm=region: must be none or canvas"),
])
def test_bad_values_name_their_key(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StratifiedCounts(**fields)  # type: ignore[arg-type]
