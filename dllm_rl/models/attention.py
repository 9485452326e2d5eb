"""Who sees whom: all of a sequence, or blocks that see themselves and what is before them; nobody sees padding. And where
the logits of a token stand."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.errors import check

BLOCKWISE = ("sdpa", "eager")
"""Attention implementations that take a mask of any form."""


def attention_inputs(prompt_mask: Tensor, length: int, block_length: int | None, network: Any) -> dict[str, Tensor]:
    """The arguments of a network for padded prompts [B, P] and completions of `length` tokens.

    Without padding and blocks there are none, so that the attention kernel without a bias is used.

    Raises:
        UserError: the attention implementation takes no mask of blocks.
    """
    if block_length is None and prompt_mask.all():
        return {}
    attended = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt_mask), length)], dim=1)
    position_ids = (attended.cumsum(1) - 1).clamp(min=0)
    if block_length is None:
        return {"attention_mask": attended.long(), "position_ids": position_ids}
    chosen = network.config._attn_implementation
    check(chosen in BLOCKWISE, "model.attn_implementation", chosen, f"{' or '.join(BLOCKWISE)} with attention in blocks")
    seen = block_mask(attended, position_ids // block_length)
    if chosen == "eager":  # which adds the mask to the scores
        dtype = network.dtype
        seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": seen, "position_ids": position_ids}


def block_mask(attended: Tensor, blocks: Tensor) -> Tensor:
    """[B, 1, T, T] bool: whether a query (third dimension) sees a key: no padding, and no later block than its own.

    Args:
        attended: [B, T] bool, False on padding.
        blocks: [B, T] int64, the number of each token's block, counted from the start of the prompt as SDAR does.
    """
    earlier = rearrange(blocks, "b q -> b 1 q 1") >= rearrange(blocks, "b k -> b 1 1 k")
    return earlier & rearrange(attended, "b k -> b 1 1 k")


def shifted(rows: Tensor, prompt_mask: Tensor, shift: int) -> Tensor:
    """Where the logits of the positions `rows` [B, P + L] stand in a model that predicts `shift` tokens ahead.

    Those of a completion's first token stand on the last token of its prompt [B, P], on whichever side that is padded.
    """
    width, found = prompt_mask.shape[1], rows.roll(-shift, dims=1)
    last = width - 1 - prompt_mask.flip(1).long().argmax(1, keepdim=True)
    first, found[:, width - 1] = found[:, width - 1 : width].clone(), False
    return found.scatter(1, last, first)
