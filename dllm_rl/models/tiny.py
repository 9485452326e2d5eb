"""The embedded model: transformers' Llama with `is_causal=False`, small enough for a laptop, and its tokenizer.

This is the code path that LLaDA takes (LLaDA-8B is a Llama without the causal mask). The tokenizer spells text out
character by character (bytes for anything beyond printable ASCII, so every text survives), except for the words that a
task lists: those are one token each.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import Unigram
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dllm_rl.errors import bad_value, check
from dllm_rl.models.policy import Policy, load_policy

MASK, EOS, PAD, UNKNOWN = "[MASK]", "[EOS]", "[PAD]", "[UNK]"


@dataclass
class TinyModel:
    """Model settings (`model=tiny`). The sizes are read only when no `path` is given."""

    path: str | None = None
    """A run folder, a checkpoint folder, a folder with a LoRA adapter, or a name on the hub. null: random weights."""
    chat_template: bool = True
    """Lay prompts out by the tokenizer's chat template where it has one; false: as plain text."""
    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    rope_theta: float = 100.0
    """Base of the rotary embedding. Far below the usual 10,000, because the texts are far shorter."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "an integer >= 1")
        check(self.rope_theta > 1, "model.rope_theta", self.rope_theta, "a number > 1")
        valid = f"a multiple of 2 x model.num_heads={self.num_heads}"
        check(self.hidden_size % (2 * self.num_heads) == 0, "model.hidden_size", self.hidden_size, valid)

    def resume(self, checkpoint: Path) -> Policy:
        """Refuses a checkpoint that holds an adapter: this model trains whole weights."""
        raise bad_value("model", "tiny", f"auto to continue {checkpoint}, which holds a LoRA adapter")

    def build(self, words: Sequence[str], seed: int) -> Policy:
        """The checkpoint at `path`, or else random weights (a pure function of `seed`) and a tokenizer for `words`."""
        if self.path:
            policy = load_policy(self.path)
            policy.chat = policy.chat and self.chat_template
            return policy
        tokenizer = build_tokenizer(words)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            max_position_embeddings=4096,
            initializer_range=self.hidden_size**-0.5,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            use_cache=False,
        )
        config.is_causal = False
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = LlamaForCausalLM(config)
        return Policy(network.eval(), tokenizer)


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lossless tokenizer: `decode(encode(text)) == text` for every text.

    A unigram model takes the likeliest segmentation: a word beats the characters it replaces, and characters beat a byte
    token, so that bytes serve only what is not printable ASCII (and the text "<0x41>" stays six characters).
    """
    characters = sorted({*string.printable} - {*words})
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [(token, 0.0) for token in (MASK, EOS, PAD, UNKNOWN)]
    vocabulary += [(word, -1.0) for word in dict.fromkeys(words)]
    vocabulary += [(character, -10.0) for character in characters]
    vocabulary += [(token, -1000.0) for token in byte_tokens]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=3, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token=MASK, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False, padding_side="left",
    )
