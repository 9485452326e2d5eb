"""How many bytes autograd keeps alive: the figure that BGPO holds constant in the number of samples.

Counting saved tensors is deterministic, unlike the resident size of the process.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """Context manager: the peak of the bytes saved for backward at any one time, parameters not counted.

    Tensors that share storage count once, and stop counting when the last graph node that saved them is freed.

    Example:
        with SavedBytes() as saved:
            loss = (x.exp() * y).sum()
            loss.backward()
        saved.peak
    """

    def __init__(self) -> None:
        self.peak = 0
        self._live = 0
        self._references: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> Tensor | _Held:
        # A linear layer saves its transposed weight: a view of the parameter, not memory of its own.
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return tensor
        return _Held(self, tensor)

    def _unpack(self, packed: Tensor | _Held) -> Tensor:
        return packed.tensor if isinstance(packed, _Held) else packed

    def _add(self, storage: int, size: int) -> None:
        self._references[storage] += 1
        if self._references[storage] == 1:
            self._live += size
            self.peak = max(self.peak, self._live)

    def _remove(self, storage: int, size: int) -> None:
        self._references[storage] -= 1
        if not self._references[storage]:
            self._live -= size
            del self._references[storage]


class _Held:
    """A saved tensor; autograd drops this object when it frees the graph node that saved it."""

    __slots__ = ("_meter", "_size", "_storage", "tensor")

    def __init__(self, meter: SavedBytes, tensor: Tensor) -> None:
        self.tensor = tensor
        self._meter = meter
        storage = tensor.untyped_storage()
        self._storage, self._size = storage.data_ptr(), storage.nbytes()
        meter._add(self._storage, self._size)

    def __del__(self) -> None:
        self._meter._remove(self._storage, self._size)


def memory_metrics() -> dict[str, float]:
    """Peak resident size of the process, and peak GPU memory where there is a GPU, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    metrics = {"memory/rss_gb": peak / 1e9}
    if torch.cuda.is_available():
        metrics["memory/gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return metrics
