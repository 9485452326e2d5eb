"""A look at a network before it is used: does it attend as its family should?

An older transformers ignores `is_causal=False` without a word, and some modelling code ignores the attention mask; either
would train a different model from the one that samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dllm_rl.errors import UserError
from dllm_rl.types import PromptBatch

if TYPE_CHECKING:
    from dllm_rl.models.policy import Policy


@torch.no_grad()
def probe(policy: Policy) -> None:
    """A completion of two blocks (of one token each where there are no blocks) after a prompt of one block and padding.

    Raises:
        UserError: a position does not see what it should, or sees what it should not.
    """
    special = set(policy.tokenizer.all_special_ids)
    plain = [i for i in range(len(policy.tokenizer)) if i not in special]
    first, other = plain[0], plain[-1]
    shift, block = policy.rules.logit_shift, policy.rules.block_length
    size = block or 2
    prompt = torch.tensor([[policy.pad_id] + [first] * size])
    canvas = torch.tensor([[first, policy.mask_id] + [first] * (2 * size - 2)])
    # The hidden state at the first canvas position; in both directions, the one before it does as well.
    asked = shift if block else 0

    def look(ids: Tensor, tail: Tensor) -> Tensor:
        batch = PromptBatch(ids, torch.arange(ids.shape[1]).unsqueeze(0) > 0, torch.zeros(1, dtype=torch.int64))
        positions = (torch.arange(tail.shape[1]) == asked).unsqueeze(0)
        return policy.logits(batch.to(policy.device), tail.to(policy.device), positions.to(policy.device))

    def unchanged(place: int, in_prompt: bool = False) -> bool:
        """Whether another token at `place` leaves the logits as they are."""
        ids, tail = prompt.clone(), canvas.clone()
        (ids if in_prompt else tail)[0, place] = other
        return torch.equal(look(prompt, canvas), look(ids, tail))

    name = type(policy.network).__name__
    if size > 1 and unchanged(size - 1 if block else 2 * size - 1):
        raise UserError(f"{name} attends causally although masked diffusion needs both directions; set is_causal=false "
                        "in its config.json and use a transformers release that honours it")
    if block and not unchanged(size):
        raise UserError(f"{name} sees later blocks although its attention is causal between blocks of {block} tokens")
    if not unchanged(0, in_prompt=True):
        raise UserError(f"{name} ignores the attention mask: padding changes its logits")


@torch.no_grad()
def linear_head(policy: Policy) -> bool:
    """Whether the network's logits are its output head's, bit by bit: some models scale or cap them afterwards."""
    head = policy.network.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    plain = torch.tensor([[policy.eos_id] * 4])
    batch = PromptBatch(plain, torch.ones_like(plain, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)).to(policy.device)
    where = torch.ones_like(batch.mask)
    logits = policy.logits(batch, batch.ids, where)
    return torch.equal(logits, policy.without_mask(head(policy.hidden(batch, batch.ids, where))))
