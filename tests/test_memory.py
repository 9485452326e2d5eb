"""The saved-bytes meter on graphs that can be counted by hand."""

from __future__ import annotations

import torch

from dllm_rl.memory import SavedBytes


def leaf(count: int = 100) -> torch.Tensor:
    return torch.ones(count, dtype=torch.float64, requires_grad=True)


def test_one_saved_tensor() -> None:
    with SavedBytes() as saved:
        leaf().exp().sum().backward()  # exp saves its result: 100 x 8 bytes
    assert saved.peak == 800


def test_shared_storage_counts_once() -> None:
    x = leaf()
    with SavedBytes() as saved:
        (x * x).sum().backward()  # both factors are x
    assert saved.peak == 800


def test_freed_graphs_stop_counting() -> None:
    with SavedBytes() as saved:
        for _ in range(5):
            leaf().exp().sum().backward()
    assert saved.peak == 800


def test_kept_graphs_add_up() -> None:
    with SavedBytes() as saved:
        kept = [leaf().exp().sum() for _ in range(5)]
        sum(kept).backward()
    assert saved.peak == 4000


def test_parameters_do_not_count() -> None:
    weight = torch.nn.Parameter(torch.ones(100, dtype=torch.float64))
    x = torch.ones(100, dtype=torch.float64)
    with SavedBytes() as saved:
        (weight * x).sum().backward()  # saves x for the gradient of weight; weight itself is not needed
        (weight.exp() * 1.0).sum().backward()  # saves exp(weight)
    assert saved.peak == 800


def test_views_of_parameters_do_not_count() -> None:
    layer = torch.nn.Linear(30, 20, bias=False, dtype=torch.float64)
    x = torch.ones(2, 30, dtype=torch.float64, requires_grad=True)
    with SavedBytes() as saved:
        layer(x).sum().backward()  # saves x, and the weight as a transposed view
    assert saved.peak == 2 * 30 * 8


def test_gradients_are_unchanged() -> None:
    x, y = leaf(), leaf()
    with SavedBytes():
        (x.exp() * x).sum().backward()
    (y.exp() * y).sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
