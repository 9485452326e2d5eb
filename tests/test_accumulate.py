"""The gradient engine: exact for every chunk size, at constant memory, with no pass that can be avoided."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dllm_rl.accumulate import Masks, Scores, backward
from dllm_rl.diffusion.corruption import StratifiedCounts
from dllm_rl.diffusion.likelihood import token_logps
from dllm_rl.memory import SavedBytes
from dllm_rl.models.policy import Policy
from dllm_rl.objectives.base import LossInputs, LossOutput
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.types import Completions
from tests.conftest import make_completions, make_policy

ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 1.5], dtype=torch.float64)


def gradient(policy: Policy) -> Tensor:
    flat = torch.cat([parameter.grad.flatten() for parameter in policy.network.parameters()])
    policy.network.zero_grad()
    return flat


def engine(
    policy: Policy, completions: Completions, samples: int, micro: int, old: Scores | None = None,
    advantages: Tensor = ADVANTAGES,
) -> tuple[Scores, float, Tensor]:
    masks = Masks(StratifiedCounts(num_samples=samples), seed=3, step=5)
    scores, metrics = backward(
        policy, BGPO(), completions, advantages, masks, old=old,
        num_terms=len(completions) * samples, micro_samples=micro,
    )
    return scores, metrics["loss"], gradient(policy)


def elbo_by_hand(policy: Policy, completions: Completions, samples: int) -> Tensor:
    """l_j of every sequence and sample in one retained graph: [B, N]. Full logits of the plain network, no hook."""
    masks = Masks(StratifiedCounts(num_samples=samples), seed=3, step=5)
    columns = []
    for j in range(samples):
        corruption = masks.draw(policy, completions, torch.full((len(completions),), j))
        attended = torch.cat([completions.prompt_mask, torch.ones_like(corruption.scored)], 1)
        logits = policy.network(
            input_ids=torch.cat([completions.prompt_ids, corruption.canvas], 1), attention_mask=attended.long(),
            position_ids=(attended.cumsum(1) - 1).clamp(min=0),
        ).logits[:, completions.prompt_ids.shape[1] :]
        logits[..., policy.mask_id] = -torch.inf
        logps = logits.log_softmax(-1).gather(-1, completions.ids.unsqueeze(-1)).squeeze(-1)
        count = corruption.scored.sum(1)
        columns.append((logps * corruption.scored).sum(1) * completions.ids.shape[1] / count)
    return torch.stack(columns, 1)


def paper_loss(terms: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Minus eq. 13-14 of the paper, averaged over sequences, one sample at a time in plain Python."""
    total = torch.zeros((), dtype=terms.dtype)
    batch, samples = terms.shape
    for b in range(batch):
        for j in range(samples):
            delta, a = terms[b, j] - old[b, j], advantages[b]
            total = total + (a * (1 + delta) if a >= 0 else a * delta.exp()) / samples
    return -total / batch


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("off_policy", [False, True])
def test_accumulation_is_the_full_batch_gradient_for_every_split(
    policy: Policy, completions: Completions, samples: int, off_policy: bool
) -> None:
    old = engine(make_policy(seed=1), completions, samples, 6)[0] if off_policy else None
    terms = elbo_by_hand(policy, completions, samples)
    reference = paper_loss(terms, terms.detach() if old is None else old.terms, ADVANTAGES)
    reference.backward()
    expected = gradient(policy)
    for micro in range(1, 6 * samples + 1):
        _, loss, found = engine(policy, completions, samples, micro, old)
        assert loss == pytest.approx(reference.item(), rel=1e-11, abs=1e-12)
        assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_float32_agrees_with_float64() -> None:
    policy32, policy64 = make_policy(torch.float32), make_policy()
    completions = make_completions(policy64)
    exact = engine(policy64, completions, 4, 24)[2]
    for micro in (1, 5, 24):
        found = engine(policy32, completions, 4, micro, advantages=ADVANTAGES.float())[2]
        assert (found - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_delta_is_exactly_zero_at_the_old_policy(dtype: torch.dtype) -> None:
    policy = make_policy(dtype)
    completions = make_completions(policy)
    old = engine(policy, completions, 4, 5, advantages=ADVANTAGES.to(dtype))[0]
    again = engine(policy, completions, 4, 5, old, ADVANTAGES.to(dtype))[0]
    assert (again.terms - old.terms).abs().max().item() == 0.0
    masks = Masks(StratifiedCounts(num_samples=4), seed=3, step=5)
    with torch.no_grad():
        for j in range(4):
            corruption = masks.draw(policy, completions, torch.full((6,), j))
            logps = token_logps(policy, completions, corruption)
            # Another batch shape may round in another way; the stored values have the chunks of `micro_samples`.
            torch.testing.assert_close(logps, old.logps[:, j], rtol=0, atol=1e-5)


def test_on_policy_loss_is_minus_the_mean_advantage(policy: Policy, completions: Completions) -> None:
    assert engine(policy, completions, 4, 6)[1] == pytest.approx(-ADVANTAGES.mean().item(), abs=1e-12)


def test_saved_bytes_do_not_grow_with_the_number_of_samples() -> None:
    policy = make_policy(torch.float32)
    completions = make_completions(policy, batch=16, length=16)
    advantages = torch.linspace(-1, 1, 16)

    def peak(samples: int) -> int:
        with SavedBytes() as saved:
            engine(policy, completions, samples, 16, advantages=advantages)
        return saved.peak

    def alone(samples: int) -> list[int]:
        masks, peaks = Masks(StratifiedCounts(num_samples=samples), seed=3, step=5), []
        for j in range(samples):
            with SavedBytes() as saved:
                corruption = masks.draw(policy, completions, torch.full((16,), j))
                logps = token_logps(policy, completions, corruption).unsqueeze(1)
                weights = corruption.weight.unsqueeze(1)
                BGPO().loss(LossInputs(logps, logps.detach(), weights, advantages, 16 * samples)).loss.backward()
            peaks.append(saved.peak)
        policy.network.zero_grad()
        return peaks

    for samples in (4, 16, 64):
        assert peak(samples) <= 1.02 * max(alone(samples))

    with SavedBytes() as retained:
        terms = elbo_by_hand(policy, completions, 8)
        paper_loss(terms, terms.detach(), advantages).backward()
    assert retained.peak > 6 * max(alone(8)), "the meter must see graphs that are kept"


def test_no_pass_is_made_for_old_values(policy: Policy, completions: Completions) -> None:
    calls: list[bool] = []
    policy.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    old = engine(policy, completions, 4, 6)[0]
    engine(policy, completions, 4, 6, old)
    assert calls == [True] * 8  # 6 x 4 pairs in chunks of 6, twice


def test_rows_can_come_in_any_order(policy: Policy, completions: Completions) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    expected = engine(policy, completions, 4, 7)[2]
    found = engine(policy, completions.rows(order), 4, 7, advantages=ADVANTAGES[order])[2]
    assert (found - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_one_step_moves_the_elbo_with_the_sign_of_the_advantage(
    policy: Policy, completions: Completions, advantage: float
) -> None:
    one = completions.rows(slice(0, 1))
    before = elbo_by_hand(policy, one, 64).mean().item()
    step = engine(policy, one, 64, 64, advantages=torch.tensor([advantage], dtype=torch.float64))[2]
    offset = 0
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter -= 1e-4 * step[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
    assert (elbo_by_hand(policy, one, 64).mean().item() - before) * advantage > 0


def test_an_objective_that_is_not_separable_is_refused(policy: Policy, completions: Completions) -> None:
    class Joint:
        separable = False

        def loss(self, inputs: LossInputs) -> LossOutput:
            return LossOutput(inputs.logps.sum().exp(), {})

    with pytest.raises(TypeError, match="Joint is not separable"):
        backward(policy, Joint(), completions, ADVANTAGES, Masks(StratifiedCounts(), 0, 0), old=None, num_terms=1,
                 micro_samples=1)
