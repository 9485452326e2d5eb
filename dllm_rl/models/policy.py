"""A masked-diffusion model behind one forward method, used alike by rollout, likelihood and evaluation.

The network is transformers' own class with `is_causal=False`; what a family does otherwise (attention in blocks, logits one
position late) is in `families.Rules`. The logits come only from the positions asked for: a pre-hook on the output head
keeps those rows, so the head module itself is still called and wrappers around it (peft, FSDP2, ZeRO) keep working.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from dllm_rl.diffusion.likelihood import Look
from dllm_rl.models import adapter
from dllm_rl.models.attention import attention_inputs, shifted
from dllm_rl.models.families import rules_of
from dllm_rl.models.kv_cache import KeyValueCache
from dllm_rl.models.linear_logps import linear_logps
from dllm_rl.models.loading import load
from dllm_rl.models.probe import linear_head, probe
from dllm_rl.models.text import TextFormat
from dllm_rl.types import PromptBatch


class Policy(TextFormat):
    """Network, tokenizer and special ids.

    Args:
        network: a causal-LM class of transformers with `config.is_causal = False`.
        tokenizer: must have a mask, an EOS and a padding token.

    Raises:
        UserError: a special token is missing, or the network turns out to be causal or to read padding.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, rules_of(network.config))
        self.network: Any = network
        self._head_rows: Tensor | None = None
        self._kept: Tensor | None = None
        self._reads: Callable[[Tensor, Any], Tensor] | None = None
        network.eval()  # no dropout: the log-probabilities of a corruption are a function of the weights alone
        self._checkpointed = [module for module in network.modules()
                              if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing]
        head = network.get_output_embeddings()
        head.register_forward_pre_hook(self._keep_rows)
        head.register_forward_hook(self._read_rows)
        probe(self)
        self._linear = linear_head(self)

    @property
    def adapted(self) -> bool:
        """Whether the network has a LoRA adapter, which alone is trained."""
        return hasattr(self.network, "peft_config")

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """The one forward pass.

        The mask token gets -inf: the model predicts data, never the mask (MDLM, arXiv 2406.07524, section 3.2.3).

        Args:
            prompts: B prompts, padded left or right.
            canvas: [B, L] int64, the completion with some tokens masked.
            positions: [B, L] bool, K of them True.

        Returns:
            [K, V] logits in the network's precision, rows in row-major order of `positions`.
        """
        return self.without_mask(self._forward(prompts, canvas, positions))

    def without_mask(self, logits: Tensor) -> Tensor:
        """The logits [K, V] with -inf for the mask token."""
        return logits.index_fill(-1, torch.tensor([self.mask_id], device=logits.device), -torch.inf)

    def hidden(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """What the output head would read, [K, H], for the arguments of `logits`; the head itself is given no rows."""
        found: list[Tensor] = []

        def keep(rows: Tensor, _head: Any) -> Tensor:
            found.append(rows)
            return rows[:0]

        self._forward(prompts, canvas, positions, keep)
        return found[0]

    def logps(
        self, prompts: PromptBatch, canvas: Tensor, positions: Tensor, targets: Tensor, look: Look | None = None
    ) -> Tensor:
        """Log-probabilities of `targets` [K] int64 at the positions of `logits`, [K] in float32 or wider.

        The logits of all rows never exist together where they are large (`linear_logps`), unless the network changes what
        its output head gives (softcapping). `look` is shown them, chunk by chunk.
        """
        if not self._linear:
            logits = self.logits(prompts, canvas, positions)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if look is not None:
                look(logits.detach(), slice(0, len(logits)))
            return -F.cross_entropy(logits, targets, reduction="none")
        return self._forward(
            prompts, canvas, positions,
            lambda rows, head: linear_logps(rows, head.weight, head.bias, targets, self.mask_id, look),
        )

    def _forward(
        self, prompts: PromptBatch, canvas: Tensor, positions: Tensor, reads: Callable[[Tensor, Any], Tensor] | None = None
    ) -> Tensor:
        """The network's output; with `reads`, which gets the rows [K, H] and the head, what that makes of them."""
        ids = torch.cat([prompts.ids, canvas], dim=1)
        attention = attention_inputs(prompts.mask, positions.shape[1], self.rules.block_length, self.network)
        rows = torch.cat([torch.zeros_like(prompts.mask), positions], dim=1)
        if self.rules.logit_shift:
            rows = shifted(rows, prompts.mask, self.rules.logit_shift)
        self._reads = reads
        try:
            return self.run(rows, input_ids=ids, use_cache=False, **attention)
        finally:
            self._reads = None

    def run(self, head_rows: Tensor, **inputs: Any) -> Tensor:
        """[K, V]: the network's own output for the K True entries of `head_rows`, a bool of the shape of its input ids."""
        for layer in self._checkpointed:
            # It checkpoints only then, and would pass a cache over; what is inside it stays in evaluation mode.
            layer.training = torch.is_grad_enabled()
        self._head_rows = head_rows
        try:
            logits: Tensor = self.network(**inputs).logits
        finally:
            self._head_rows = None
        return logits

    def cache(self, prompts: PromptBatch, length: int, *, exact: bool) -> KeyValueCache:
        """An empty cache for completions of `length` tokens, for samplers (`sampler.cache`)."""
        block, shift = self.rules.block_length, self.rules.logit_shift
        return KeyValueCache(self, prompts, length, exact=exact, attention_block=block, shift=shift)

    def _keep_rows(self, _head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._head_rows is None:
            return None
        self._kept = inputs[0][self._head_rows]
        return (self._kept if self._reads is None else self._kept[:0], *inputs[1:])

    def _read_rows(self, head: torch.nn.Module, _inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor | None:
        # Inside the call of the head: wrappers that gather its weights (ZeRO-3) have done so, and see its gradient.
        kept, self._kept = self._kept, None
        return None if self._reads is None or kept is None else self._reads(kept, head)

    def frozen_copy(self) -> Policy:
        """The policy as it is now; its parameters take no gradient."""
        return self.twin().freeze()

    def twin(self) -> Policy:
        """A copy with memory of its own for what is trained; parameters without gradients never change and are shared."""
        fixed = {id(parameter): parameter for parameter in self.network.parameters() if not parameter.requires_grad}
        return copy.deepcopy(self, fixed)

    def is_in(self, dtype: torch.dtype) -> bool:
        """Whether all parameters have this precision; weights in four bits have none."""
        return all(parameter.dtype == dtype for parameter in self.network.parameters() if parameter.is_floating_point())

    def in_dtype(self, dtype: torch.dtype) -> Policy:
        """The policy itself where it is in this precision, else a frozen copy that is; rotary tables and other buffers keep
        theirs. What is not trained and needs no change is shared."""
        if self.is_in(dtype):
            return self

        def changed(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
            same = parameter.dtype == dtype or not parameter.is_floating_point()
            if same and not parameter.requires_grad:
                return parameter
            return torch.nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)

        kept: dict[int, Any] = {id(parameter): changed(parameter) for parameter in self.network.parameters()}
        kept[id(self.tokenizer)] = self.tokenizer
        return copy.deepcopy(self, kept)  # deepcopy takes what it is given in place of a copy of its own

    def freeze(self) -> Policy:
        """The policy itself, its parameters without gradients."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        return self

    def save(self, folder: Path) -> None:
        """Writes config.json, model.safetensors and the tokenizer: plain transformers classes load them again. Of a network
        with a LoRA adapter, only the adapter."""
        if self.adapted:
            adapter.save(self.network, folder)
        else:
            self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class WithoutAdapter:
    """A policy as it is without its LoRA adapter: the model that training started from, without a second copy."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.mask_id, self.eos_id = policy, policy.mask_id, policy.eos_id

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """See `Policy.logits`; there is no gradient."""
        with torch.no_grad(), self.policy.network.disable_adapter():
            return self.policy.logits(prompts, canvas, positions)

    def logps(
        self, prompts: PromptBatch, canvas: Tensor, positions: Tensor, targets: Tensor, look: Look | None = None
    ) -> Tensor:
        """See `Policy.logps`; there is no gradient."""
        with torch.no_grad(), self.policy.network.disable_adapter():
            return self.policy.logps(prompts, canvas, positions, targets, look)


def load_policy(path: str, key: str = "model.path") -> Policy:
    """A policy from a run folder (its newest checkpoint), a checkpoint folder, a folder with a LoRA adapter, or a hub name.

    An adapter is merged into the weights of the base model that its `adapter_config.json` names. `key` is what messages call
    the path.

    Raises:
        UserError: the folder lacks the configuration, weights or tokenizer, or the hub has no such model.
    """
    return Policy(*load(path, key))
