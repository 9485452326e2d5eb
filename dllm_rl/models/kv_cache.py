"""Keys and values of a batch of rows, remembered between denoising steps.

The store stands where transformers' own caches stand: every attention layer hands it the keys and values of the columns that
were computed and gets those of all columns back. Nothing here knows the architecture; Llama, Qwen2 and Qwen3 call it alike.
Columns count the padded prompt and the canvas: [0, P + L).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.reading import EXACT_ONLY
from dllm_rl.errors import check
from dllm_rl.types import PromptBatch

if TYPE_CHECKING:
    from dllm_rl.models.policy import Policy


class Store:
    """What the attention layers see in place of a cache of transformers."""

    def __init__(self, batch: int, columns: int) -> None:
        self._shape = batch, columns
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows = self._columns = self._write = torch.empty(0)
        self._everything = False

    def open(self, rows: Tensor, columns: Tensor, write: Tensor) -> None:
        """Says what the next pass computes.

        Args:
            rows: [R] int64, rows of the batch.
            columns: [R, Q] int64.
            write: [R, Q] bool, False for columns whose remembered values stay.
        """
        self._rows, self._columns, self._write = rows, columns, rearrange(write, "r q -> r q 1 1")
        self._everything = len(rows) == self._shape[0]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """[R, H, Q, D] of the columns computed -> [R, H, P + L, D] of all."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = self._empty(keys), self._empty(values)
        return self._put(self._layers[layer_idx][0], keys), self._put(self._layers[layer_idx][1], values)

    def _empty(self, like: Tensor) -> Tensor:
        batch, columns = self._shape
        return like.new_zeros(batch, columns, like.shape[1], like.shape[3])

    def _put(self, kept: Tensor, new: Tensor) -> Tensor:
        place = rearrange(self._rows, "r -> r 1"), self._columns
        kept[place] = torch.where(self._write, rearrange(new, "r h q d -> r q h d"), kept[place])
        return rearrange(kept if self._everything else kept[self._rows], "r t h d -> r h t d")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """For transformers' masks: no column lies before those given here, the positions say where they are."""
        del layer_idx
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """For transformers' masks: the number of keys, and the first one."""
        del query_length, layer_idx
        return self._shape[1], 0


class KeyValueCache:
    """See `dllm_rl.diffusion.reading.BlockCache`.

    Args:
        exact: serves a sampler that never refreshes.
        attention_block: positions per block where attention is causal between blocks; None: full attention.
        shift: how many columns further left the network predicts a token.

    Raises:
        UserError: `exact` with full attention, where everything depends on everything.
    """

    def __init__(
        self, policy: Policy, prompts: PromptBatch, length: int, *, exact: bool = False, attention_block: int | None = None,
        shift: int = 0,
    ) -> None:
        check(not exact or attention_block is not None, "sampler.cache.kind", "exact", EXACT_ONLY)
        if shift and not bool(prompts.mask[:, -1].all()):
            raise ValueError("prompts must be padded on the left: the logits of a completion's first token stand before it")
        self._policy, self._prompts, self._shift = policy, prompts, shift
        canvas = torch.ones(len(prompts), length, dtype=torch.bool, device=prompts.ids.device)
        self._attended = torch.cat([prompts.mask, canvas], dim=1)
        self._padded = not bool(prompts.mask.all())
        self._positions = (self._attended.cumsum(1) - 1).clamp(min=0)
        self._blocks = None if attention_block is None else self._positions // attention_block
        self._store = Store(*self._attended.shape)
        self._settled = torch.zeros(len(prompts), dtype=torch.int64, device=prompts.ids.device)

    def logits(self, rows: Tensor, canvas: Tensor, positions: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """[K, V] logits at `positions` [R, L] of rows number `rows` [R]; columns start..end [R] are computed anew."""
        first = (start - self._shift).clamp(min=0)
        width = int((end - first).max())
        # Equal widths: a row whose own window is narrower also computes some columns before it (or behind), unremembered.
        columns = (end - width).clamp(min=0).unsqueeze(1) + torch.arange(width, device=rows.device)
        write = (columns >= start.unsqueeze(1)) & (columns < end.unsqueeze(1))
        self._store.open(rows, columns, write)
        ids = torch.cat([self._prompts.ids[rows], canvas], dim=1)
        asked = torch.cat([torch.zeros_like(self._prompts.mask[rows]), positions], dim=1).roll(-self._shift, dims=1)
        logits = self._policy.run(
            asked.gather(1, columns), input_ids=ids.gather(1, columns), past_key_values=self._store, use_cache=True,
            position_ids=self._positions[rows].gather(1, columns), attention_mask=self._mask(rows, columns),
        )
        return self._policy.without_mask(logits)

    def unsettled(self, rows: Tensor, canvas: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """For block-causal attention: the columns that must be computed to know those before `end` [R].

        A column is settled once it was computed with no mask token left in its block of attention or before it. Returns the
        first unsettled column and the end of the block of attention that holds column `end` - 1.
        """
        assert self._blocks is not None
        blocks = self._blocks[rows]
        start = self._settled[rows]
        last = blocks.gather(1, (end - 1).unsqueeze(1))
        stop = (blocks <= last).sum(1)
        masked = torch.cat([torch.zeros_like(self._prompts.mask[rows]), canvas == self._policy.mask_id], dim=1)
        unfinished = blocks.masked_fill(~masked, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        self._settled[rows] = torch.minimum((blocks < unfinished).sum(1), stop)
        return start, stop

    def _mask(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Who may be attended: [R, P + L] where only padding may not, else [R, 1, Q, P + L] to be added to the scores."""
        if self._blocks is None:
            return self._attended[rows].long() if self._padded else None
        blocks = self._blocks[rows]
        allowed = blocks.unsqueeze(1) <= blocks.gather(1, columns).unsqueeze(2)
        allowed = rearrange(allowed & self._attended[rows].unsqueeze(1), "r q t -> r 1 q t")
        precision = next(self._policy.network.parameters()).dtype
        least = torch.finfo(precision).min
        return torch.zeros(allowed.shape, dtype=precision, device=allowed.device).masked_fill(~allowed, least)
