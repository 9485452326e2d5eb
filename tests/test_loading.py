"""How weights come into memory, and the switches of a loaded model: precision, gradient checkpointing, compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_rl.memory import SavedBytes
from dllm_rl.models import loading
from dllm_rl.models.adapter import LoRAConfig
from dllm_rl.models.loading import LoadOptions, load
from dllm_rl.models.policy import load_policy
from dllm_rl.models.pretrained import PretrainedModel
from tests.original_models import write_checkpoint
from tests.test_families import logits_of, sequences


def test_weights_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time is there more of the checkpoint than one tensor beside the network."""
    write_checkpoint("llada", tmp_path, shards=2, dtype=torch.bfloat16)
    live: list[int] = []
    place = loading.place

    def counting(network: Any, name: str, tensor: Tensor, *rest: Any) -> None:
        live.append(sum(parameter.numel() for parameter in network.parameters() if not parameter.is_meta))
        place(network, name, tensor, *rest)
        parameter = network.get_parameter(name)
        assert parameter.dtype == torch.float32 and parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        assert parameter.data_ptr() != tensor.data_ptr()

    monkeypatch.setattr(loading, "place", counting)
    network, _ = load(str(tmp_path))
    sizes = [parameter.numel() for parameter in network.parameters()]
    steps = [after - before for before, after in zip(live, [*live[1:], sum(sizes)], strict=True)]
    assert live[0] == 0 and sorted(steps) == sorted(sizes), "every tensor enters once, by itself"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_precision(tmp_path: Path, dtype: str) -> None:
    weights = write_checkpoint("dream", tmp_path)
    policy = PretrainedModel(path=str(tmp_path), dtype=dtype).build([], 0)
    wanted = getattr(torch, dtype)
    assert {parameter.dtype for parameter in policy.network.parameters()} == {wanted}
    assert torch.equal(policy.network.lm_head.weight, weights["lm_head.weight"].to(wanted))
    assert policy.network.model.rotary_emb.inv_freq.dtype == torch.float32


def test_gradient_checkpointing_saves_memory_and_changes_nothing(tmp_path: Path) -> None:
    write_checkpoint("dream", tmp_path)
    prompts, canvas = sequences("dream")
    gradients, peaks = [], []
    for checkpointing in (False, True):
        policy = PretrainedModel(path=str(tmp_path), gradient_checkpointing=checkpointing).build([], 0)
        batch = policy.pad_prompts([row.tolist() for row in prompts], torch.arange(4))
        with SavedBytes() as saved:
            kept = policy.logits(batch, canvas, torch.ones_like(canvas, dtype=torch.bool))[:, :200]
            kept.logsumexp(-1).sum().backward()
        peaks.append(saved.peak)
        gradients.append([parameter.grad.clone() for parameter in policy.network.parameters()])
        assert not any(module.training for module in policy.network.modules() if "Layer" not in type(module).__name__)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert peaks[1] < 0.7 * peaks[0]


def test_a_second_load_is_the_same(tmp_path: Path) -> None:
    write_checkpoint("sdar", tmp_path)
    one, two = (load(str(tmp_path), options=LoadOptions())[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_compiled_layers_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as torch.compile does it; only the code generator, which needs a compiler, is left out."""
    write_checkpoint("dream", tmp_path)
    prompts, canvas = sequences("dream")
    plain = logits_of(load_policy(str(tmp_path)), prompts, canvas)
    graphs: list[Any] = []
    real = torch.compile

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **more: real(model, backend=backend, **more))
    policy = PretrainedModel(path=str(tmp_path), compile=True).build([], 0)
    torch.testing.assert_close(logits_of(policy, prompts, canvas), plain, rtol=0, atol=1e-5)
    assert graphs
    policy.save(tmp_path / "saved")
    assert torch.equal(logits_of(load_policy(str(tmp_path / "saved")), prompts, canvas), plain)
    adapted = PretrainedModel(path=str(tmp_path), compile=True, lora=LoRAConfig(r=2)).build([], 0)
    torch.testing.assert_close(logits_of(adapted, prompts, canvas), plain, rtol=0, atol=1e-5)
