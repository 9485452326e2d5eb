"""Log-probabilities of tokens from what the output head reads, without the logits of all rows at once.

At LLaDA's vocabulary of 126,464 tokens the logits of one row take half a megabyte in float32, and cross-entropy with its
gradient holds three such copies. Here rows pass the head a chunk at a time, and the backward pass computes the logits of a
chunk again. A head that takes no gradient (LoRA) needs no second time: d log p(y)/dh = W_y - sum_v p_v W_v is known in the
forward pass already.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_rl.diffusion.likelihood import Look

AT_ONCE = 2**25
"""Logits held at a time: 128 MiB in float32."""


def linear_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, banned: int, look: Look | None = None
) -> Tensor:
    """log softmax(hidden W^T + bias) at the targets, the token `banned` having probability 0.

    Logits are in the precision of the arguments (that of autocast, where it is on), sums over the vocabulary in float32, or
    float64 for float64. The first derivative is exact; there is no second one.

    Args:
        hidden: [K, H].
        weight: [V, H].
        bias: [V], or None.
        targets: [K] int64.
        banned: number of the mask token.
        look: is shown the detached logits chunk by chunk.

    Returns:
        [K] float32 or float64.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        if len(hidden) * len(weight) <= AT_ONCE:
            logits = _logits(hidden, weight, bias, banned)
            if look is not None:
                look(logits.detach(), slice(0, len(hidden)))
            return -F.cross_entropy(logits, targets, reduction="none")
        # ZeRO-3 puts gathered weights into the parameter itself, and Liger keeps another tensor for its backward pass.
        if hidden.is_cuda and look is None and not hasattr(weight, "ds_id") and (liger := _liger()) is not None:
            return _by_liger(liger, hidden, weight, bias, targets, banned)
        found: Tensor = _Chunked.apply(hidden, weight, bias, targets, banned, look)
        return found


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, banned: int) -> Tensor:
    """[K, V] in float32 or wider, -inf for the banned token."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.index_fill(-1, torch.tensor([banned], device=logits.device), -torch.inf)


class _Chunked(torch.autograd.Function):
    """`linear_logps` chunk by chunk. Memory: one chunk of logits, and the gradients themselves."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, banned: int, look: Look | None
    ) -> Tensor:
        """The log-probabilities; without a gradient for the head also what the backward pass will need."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        top, total = torch.empty_like(logps), torch.empty_like(logps)
        wants_hidden, *wants_head = ctx.needs_input_grad[:3]
        ahead = wants_hidden and not any(wants_head)
        slope = torch.empty_like(hidden) if ahead else None
        for rows in _chunks(hidden, weight):
            logits = _logits_in_place(hidden[rows], weight, bias, banned)
            if look is not None:
                look(logits, rows)
            picked = logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            top[rows] = logits.amax(1)
            exponentials = logits.sub_(top[rows].unsqueeze(1)).exp_()
            total[rows] = exponentials.sum(1)
            logps[rows] = picked - top[rows] - total[rows].log()
            if slope is not None:
                slope[rows] = _slope(exponentials, total[rows], targets[rows]).to(weight.dtype) @ weight
            del logits, exponentials  # before the next chunk is made
        ctx.banned, ctx.ahead = banned, ahead
        if slope is not None:
            ctx.save_for_backward(slope)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, top, total)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias, from [K] those of the log-probabilities."""
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.ahead:
                (slope,) = ctx.saved_tensors
                return (grad.unsqueeze(1) * slope).to(slope.dtype), None, None, None, None, None
            found = _gradients(*ctx.saved_tensors, banned=ctx.banned, grad=grad, wanted=ctx.needs_input_grad[:3])
            return *found, None, None, None


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, top: Tensor, total: Tensor, *, banned: int,
    grad: Tensor, wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """With respect to hidden, weight and bias. Sums over chunks are in float32 or wider.

    The softmax is exp(logit - top) / total: from its logarithm, near -12, it would be a millionth off in every row alike.
    """
    wide = total.dtype
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    of_bias = weight.new_zeros(len(weight), dtype=wide) if wanted[2] else None
    for rows in _chunks(hidden, weight):
        logits = _logits_in_place(hidden[rows], weight, bias, banned)
        exponentials = logits.sub_(top[rows].unsqueeze(1)).exp_()
        slope = _slope(exponentials, total[rows], targets[rows]).mul_(grad[rows].unsqueeze(1))
        if of_bias is not None:
            of_bias += slope.sum(0)
        slope = slope.to(weight.dtype)
        if of_hidden is not None:
            torch.mm(slope, weight, out=of_hidden[rows])
        if of_weight is not None and of_weight.dtype == slope.dtype:
            of_weight.addmm_(slope.T, hidden[rows])
        elif of_weight is not None:
            of_weight += slope.T @ hidden[rows]
        del logits, exponentials, slope  # before the next chunk is made
    return (of_hidden, None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None or bias is None else of_bias.to(bias.dtype))


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, AT_ONCE // len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _logits_in_place(hidden: Tensor, weight: Tensor, bias: Tensor | None, banned: int) -> Tensor:
    """`_logits` without a copy."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits[:, banned] = -torch.inf
    return logits


def _slope(exponentials: Tensor, total: Tensor, targets: Tensor) -> Tensor:
    """d log p(target) / d logits = onehot(target) - exponentials / total: [K, V], in place."""
    ones = torch.ones_like(exponentials[:, :1])
    return exponentials.mul_(-1 / total.unsqueeze(1)).scatter_add_(1, targets.unsqueeze(1), ones)


@cache
def _liger() -> Any:
    """Liger's kernel, if it is installed in a release whose gradients are right for weighted tokens.

    Before 0.8.2 a loss without reduction multiplied every gradient by the first token's (Liger-Kernel, pull request 1298).
    """
    try:
        version = importlib.metadata.version("liger-kernel")
        if tuple(int(part) for part in version.split(".")[:3]) < (0, 8, 2):
            return None
        return importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    except (ImportError, ValueError):
        return None


def _by_liger(
    function: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, banned: int
) -> Tensor:
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    bias = bias.index_fill(0, torch.tensor([banned], device=bias.device), -torch.inf)
    losses = function.apply(hidden, weight, targets, bias, None, -100, 0.0, 0.0, "none", None, False, torch.float32)[0]
    found: Tensor = -losses
    return found
