"""A published model, or one trained from it: `model=auto model.path=PATH`, or a name such as `model=llada_8b`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_rl.errors import bad_value, check
from dllm_rl.models.adapter import LoRAConfig, attach, base_of, resume
from dllm_rl.models.loading import STORED, LoadOptions, load
from dllm_rl.models.policy import Policy
from dllm_rl.models.quantization import QUANTIZATIONS, require_quantization
from dllm_rl.run_folder import resolve_model_path

DTYPES = ("float32", "bfloat16", "float16", STORED)
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")


@dataclass
class PretrainedModel:
    """Model settings (`model=auto`). The family is recognised from config.json; no code of the checkpoint runs."""

    path: str | None = None
    """A run folder, a folder with a checkpoint in its original format or in ours, a folder with a LoRA adapter, or a name on
    the hub."""
    dtype: str = "float32"
    """Precision of the weights: float32 | bfloat16 | float16 | stored, that of the checkpoint's files (the widest where they
    differ; float32 with an adapter, which is merged). Adapters are float32 whatever the weights are. Training all weights in
    16 bits loses updates smaller than a 256th of a weight: use float32 with `accelerate launch --mixed_precision bf16`."""
    attn_implementation: str | None = None
    """sdpa | eager | flash_attention_2 | flex_attention; null: what transformers prefers. Block-causal: sdpa or eager."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass instead of keeping what they computed."""
    compile: bool = False
    """Compile the layers with torch.compile."""
    chat_template: bool = True
    """Lay prompts out by the tokenizer's chat template where it has one; false: as plain text, and
    checkpoints are saved without the template."""
    block_length: int | None = None
    """Length of the blocks of a block-causal model. null: what its config.json says, else what its family published."""
    quantization: str | None = None
    """nf4: frozen weights in four bits (QLoRA); training then needs an adapter. null: none."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        check(self.dtype in DTYPES, "model.dtype", self.dtype, ", ".join(DTYPES))
        chosen = self.attn_implementation
        check(chosen is None or chosen in ATTENTION, "model.attn_implementation", chosen, f"{', '.join(ATTENTION)}, or null")
        block = self.block_length
        check(block is None or block >= 1, "model.block_length", block, "an integer >= 1, or null")
        kind = self.quantization
        check(kind is None or kind in QUANTIZATIONS, "model.quantization", kind, f"{', '.join(QUANTIZATIONS)}, or null")

    def build(self, words: object, seed: int) -> Policy:
        """The policy at `path`, with a new adapter (a pure function of `seed`) if `lora.r` > 0.

        Args:
            words: of the task; the tokenizer is the checkpoint's.

        Raises:
            UserError: there is no path, or nothing that can be loaded there.
        """
        del words
        if not self.path:
            raise bad_value("model.path", self.path, "a run folder, a checkpoint folder or a hub name with model=auto")
        network, tokenizer = self._load(self.path)
        if self.lora.r:
            network = attach(network, self.lora, _lasting(self.path), seed)
        return self._policy(network, tokenizer)

    def resume(self, checkpoint: Path) -> Policy:
        """The policy of a checkpoint that holds an adapter, on the base that it names; the adapter is trained on."""
        base = base_of(checkpoint, "model.path")
        network, tokenizer = self._load(base, f"model.path={checkpoint}: base_model_name_or_path")
        return self._policy(resume(network, checkpoint, self.block_length), tokenizer)

    def _load(self, path: str, key: str = "model.path") -> tuple[Any, Any]:
        if self.quantization:
            require_quantization()
        return load(path, key, LoadOptions(self.dtype, self.attn_implementation, self.quantization, self.block_length))

    def _policy(self, network: Any, tokenizer: Any) -> Policy:
        if self.gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the name that every release of transformers 5 has
                network.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile:
            base = network.get_base_model() if hasattr(network, "get_base_model") else network
            base.get_decoder().compile(dynamic=True)
        if not self.chat_template:
            tokenizer.chat_template = None  # nor will whoever loads what is saved lay out chats
        return Policy(network, tokenizer)


def _lasting(path: str) -> str:
    """A path that means the same from any directory, and the same weights when a run goes on."""
    folder = Path(resolve_model_path(path)).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path
