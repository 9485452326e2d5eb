"""Weights in four bits (QLoRA, arXiv 2305.14314), by bitsandbytes: frozen, with adapters in full precision on top."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dllm_rl.errors import UserError

QUANTIZATIONS = ("nf4",)


def require_quantization() -> None:
    """Raises:
        UserError: bitsandbytes is not installed, or there is no CUDA device.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError("model.quantization=nf4: needs bitsandbytes: pip install 'dllm-rl[qlora]'")
    if not torch.cuda.is_available():
        raise UserError("model.quantization=nf4: needs a CUDA device; model.quantization=null works everywhere")


def four_bit(network: Any, name: str, linear: nn.Linear) -> Any:
    """Replaces a linear layer of the network by an empty one of bitsandbytes, once; returns it."""
    import bitsandbytes

    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        return linear
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4",
        device="meta",
    )
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)
    network.is_loaded_in_4bit = True  # peft looks here
    return layer


def packed(weight: torch.Tensor, device: torch.device) -> Any:
    """A weight as the parameter of such a layer; it is quantised on its way to the device."""
    import bitsandbytes

    return bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
