"""Log-probabilities in chunks: the values and gradients of the whole logits, without ever holding them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GraniteConfig, GraniteForCausalLM

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.estimators import StratifiedCounts
from dllm_rl.models import linear_logps as module
from dllm_rl.models.linear_logps import linear_logps
from dllm_rl.models.policy import Policy, WithoutAdapter
from dllm_rl.models.pretrained import LoRAConfig, attach
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.objectives.base import Objective
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.objectives.dppo import DPPO
from dllm_rl.objectives.elbo_ratio import ELBORatio
from dllm_rl.scoring import Masks, Old
from tests.conftest import make_completions, make_policy
from tests.test_accumulate import ADVANTAGES

ROWS, WIDTH, WORDS, BANNED = 23, 8, 40, 39
CHUNK = 5 * WORDS


def inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Hidden rows, weight, bias, targets, and a weight for each row's log-probability."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(0, WORDS - 1, (ROWS,), generator=generator)
    weights = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return normal(ROWS, WIDTH), normal(WORDS, WIDTH), normal(WORDS) if bias else None, targets, weights


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The definition: a softmax over all tokens but the banned one."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    allowed = torch.arange(WORDS) != BANNED
    return logits[torch.arange(len(hidden)), targets] - logits[:, allowed].exp().sum(1).log()


def gradients(logps: Tensor, weights: Tensor, *of: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad((weights * logps).sum(), [tensor for tensor in of if tensor is not None]))


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", CHUNK)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_the_definition(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    hidden, weight, offset, targets, weights = inputs(dtype, bias)
    found, expected = linear_logps(hidden, weight, offset, targets, BANNED), dense(hidden, weight, offset, targets)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    for ours, theirs in zip(gradients(found, weights, hidden, weight, offset),
                            gradients(expected, weights, hidden, weight, offset), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("chunked")
def test_gradients_are_finite_differences() -> None:
    hidden, weight, bias, targets, _ = inputs()
    assert torch.autograd.gradcheck(lambda *given: linear_logps(*given, targets, BANNED), (hidden, weight, bias))


@pytest.mark.usefixtures("chunked")
def test_a_head_without_gradients_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *given: calls.append(len(given[0])) or linear(*given))
    hidden, weight, bias, targets, weights = inputs()
    assert bias is not None
    (whole,) = gradients(linear_logps(hidden, weight, bias, targets, BANNED), weights, hidden)
    assert sum(calls) == 2 * ROWS, "the backward pass computes the logits again"
    calls.clear()
    (ahead,) = gradients(linear_logps(hidden, weight.detach(), bias.detach(), targets, BANNED), weights, hidden)
    assert sum(calls) == ROWS and max(calls) == CHUNK // WORDS
    torch.testing.assert_close(ahead, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("chunked")
def test_half_precision_sums_in_float32() -> None:
    hidden, weight, bias, targets, weights = inputs(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    found = linear_logps(hidden, weight, bias, targets, BANNED)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense(*exact, targets), rtol=0, atol=0.06)  # logits near 8 have steps of 1/32
    for ours, theirs in zip(gradients(found, weights, hidden, weight, bias),
                            gradients(dense(*exact, targets), weights, *exact), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_autocast_is_the_same_in_chunks_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets, weights = inputs(torch.float32)
    found = []
    for size in (CHUNK, 10**6):
        monkeypatch.setattr(module, "AT_ONCE", size)
        with torch.autocast("cpu", torch.bfloat16):
            logps = linear_logps(hidden, weight, bias, targets, BANNED)
        found.append([logps, *gradients(logps, weights, hidden, weight, bias)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()
    exact = dense(hidden, weight, bias, targets)
    assert 1e-4 < (found[0][0] - exact).abs().max() < 0.1, "logits are in half precision, as autocast asks"


@pytest.mark.usefixtures("chunked")
def test_onlookers_see_every_logit_once() -> None:
    hidden, weight, bias, targets, _ = inputs()
    seen: list[tuple[slice, Tensor]] = []
    linear_logps(hidden, weight, bias, targets, BANNED, lambda logits, rows: seen.append((rows, logits.clone())))
    assert [(part.start, len(logits)) for part, logits in seen] == [(0, 5), (5, 5), (10, 5), (15, 5), (20, 3)]
    assert bias is not None
    expected = (hidden @ weight.T + bias).index_fill(1, torch.tensor([BANNED]), -torch.inf)
    torch.testing.assert_close(torch.cat([logits for _, logits in seen]), expected.detach())


OBJECTIVES: dict[str, Objective] = {
    "bgpo": BGPO(), "elbo_ratio": ELBORatio(), "dppo_topk": DPPO(divergence="topk_tv", delta_low=1e-3, delta_high=1e-3),
    "dppo_exact": DPPO(divergence="exact_kl", delta_low=1e-3, delta_high=1e-3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_updates_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Off-policy, so that log-probabilities, divergences and ratios all matter."""
    objective, sampler, completions = OBJECTIVES[name], make_policy(), make_completions(make_policy())
    policy = make_policy()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.mul_(1.05)
    engine = Engine(completions, Masks(StratifiedCounts(num_samples=3), seed=0, step=0), micro_samples=7)
    words, found = len(policy.tokenizer), []
    for size in (10**9, 4 * words):
        monkeypatch.setattr(module, "AT_ONCE", size)
        old = Old(engine.score(sampler, top_k=objective.support_size), sampler)
        policy.network.zero_grad()
        scores, _ = engine.backward(policy, objective, ADVANTAGES, Totals(6, 48, 8), old=old)
        grads = torch.cat([parameter.grad.flatten() for parameter in policy.network.parameters()])
        found.append((scores.logps, old.scores.logps, grads))
    assert found[0][2].norm() > 1e-3
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return found


@pytest.mark.parametrize("lora", [False, True])
def test_an_update_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    policy, completions = make_policy(torch.float32), make_completions(make_policy())
    if lora:
        policy = Policy(attach(policy.network, LoRAConfig(r=2), "base", 0), policy.tokenizer)
    words, weights = len(policy.tokenizer), max(parameter.numel() for parameter in policy.network.parameters())
    engine = Engine(completions, Masks(StratifiedCounts(num_samples=8), seed=0, step=0), micro_samples=48)
    largest = {}
    for size in (10**9, 16 * words):
        monkeypatch.setattr(module, "AT_ONCE", size)
        with Largest() as largest[size]:
            engine.backward(policy, BGPO(), ADVANTAGES.float(), Totals(6, 48, 8))
    assert largest[10**9].numel > 100 * words
    layers = 48 * (completions.prompt_ids.shape[1] + 8) * 64  # every token of the chunk, as wide as the feed-forward layer
    assert largest[16 * words].numel <= max(16 * words, weights, layers)
    assert largest[16 * words].numel < 0.5 * largest[10**9].numel


def test_sharded_weights_are_read_and_get_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2: the head's weight is whole only within the network's own forward pass."""
    completions, found = make_completions(make_policy()), []
    monkeypatch.setattr(module, "AT_ONCE", 500)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            policy = make_policy(torch.float32)
            if sharded:
                mesh = init_device_mesh("cpu", (1,))
                for part in (*policy.network.model.layers, policy.network):
                    fully_shard(part, mesh=mesh)
            engine = Engine(completions, Masks(StratifiedCounts(num_samples=2), seed=0, step=0), micro_samples=5)
            engine.backward(policy, ELBORatio(), ADVANTAGES.float(), Totals(6, 48, 8))
            grads = [parameter.grad for parameter in policy.network.parameters()]
            assert all(isinstance(grad, DTensor) == sharded for grad in grads)
            whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
            found.append(torch.cat([grad.flatten() for grad in whole]))
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_reference_without_adapter_scores_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    base, completions = make_policy(torch.float32), make_completions(make_policy())
    engine = Engine(completions, Masks(StratifiedCounts(num_samples=2), seed=0, step=0), micro_samples=12)
    expected = engine.score(base).logps
    policy = Policy(attach(base.network, LoRAConfig(r=2), "base", 0), base.tokenizer)
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    monkeypatch.setattr(module, "AT_ONCE", 500)
    torch.testing.assert_close(engine.score(WithoutAdapter(policy)).logps, expected, rtol=0, atol=1e-5)
    assert (engine.score(policy).logps - expected).abs().max() > 0.01


def test_a_network_that_scales_its_logits_is_read_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head alone would give other probabilities; Granite divides its logits, Gemma caps them."""
    tokenizer = make_policy().tokenizer
    config = GraniteConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, logits_scaling=8.0)
    config.is_causal = False
    policy, completions = Policy(GraniteForCausalLM(config).double(), tokenizer), make_completions(make_policy())
    monkeypatch.setattr(module, "AT_ONCE", 100)
    everywhere = torch.ones_like(completions.ids, dtype=torch.bool)
    given = completions.prompts, torch.full_like(completions.ids, policy.mask_id), everywhere
    expected = policy.logits(*given).log_softmax(-1).gather(1, completions.ids.view(-1, 1)).squeeze(1)
    torch.testing.assert_close(policy.logps(*given, completions.ids.flatten()), expected)


@pytest.mark.parametrize(("version", "taken"), [("0.8.1", False), ("0.8.2", True), ("0.10.0", True), ("unknown", False)])
def test_only_a_liger_with_right_gradients_is_taken(monkeypatch: pytest.MonkeyPatch, version: str, taken: bool) -> None:
    class Kernel:
        LigerFusedLinearCrossEntropyFunction = "kernel"

    monkeypatch.setattr(module.importlib.metadata, "version", lambda _name: version)
    monkeypatch.setattr(module.importlib, "import_module", lambda _name: Kernel)
    assert (module._liger.__wrapped__() == "kernel") == taken


def test_liger_gives_the_same() -> None:
    """On a GPU, or on a CPU in Triton's interpreter: TRITON_INTERPRET=1."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (pip install 'dllm-rl[liger]')")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Liger's kernel needs a GPU, or TRITON_INTERPRET=1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for bias in (False, True):
        hidden, weight, offset, targets, weights = inputs(torch.float32, bias)
        given = [None if tensor is None else tensor.detach().to(device).requires_grad_()
                 for tensor in (hidden, weight, offset)]
        found = module._by_liger(module._liger(), *given, targets.to(device), BANNED)
        expected = dense(hidden, weight, offset, targets)
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=1e-5)
        for ours, theirs in zip(gradients(found, weights.to(device), *given),
                                gradients(expected, weights, hidden, weight, offset), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)
