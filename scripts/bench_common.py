"""What the benchmarks share: models with random weights, completions, clocks, and figures as files."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dllm_rl.models.policy import Policy
from dllm_rl.models.tiny import TinyModel, build_tokenizer
from dllm_rl.types import Completions

LLADA_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 32,
            "vocab_size": 126464, "max_position_embeddings": 4096, "tie_word_embeddings": False}
"""LLaDA-8B's layer shapes (config.json of GSAI-ML/LLaDA-8B-Instruct)."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tiny_policy(hidden_size: int, seed: int = 0) -> Policy:
    policy = TinyModel(hidden_size=hidden_size).build([], seed=seed)
    policy.network.to(device())
    return policy


def llada_policy(layers: int | None, hidden_size: int | None = None, checkpointed: bool = False) -> Policy:
    """Random bfloat16 weights in LLaDA-8B's shapes; `layers` cuts the depth, `hidden_size` the width at 128 per head."""
    tokenizer = build_tokenizer([])
    narrow = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_attention_heads": hidden_size // 128,
              } if hidden_size else {}
    config = LlamaConfig(**{**LLADA_8B, "num_hidden_layers": layers or LLADA_8B["num_hidden_layers"], **narrow})
    config.is_causal = False
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            network = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if checkpointed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name that every release of transformers 5 has
            network.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(network, tokenizer)


def make_completions(policy: Policy, sequences: int, prompt_length: int, length: int) -> Completions:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(policy.tokenizer), (sequences, prompt_length + length), generator=generator)
    mask = torch.ones(sequences, prompt_length, dtype=torch.bool)
    return Completions(
        ids[:, :prompt_length], mask, torch.arange(sequences), ids[:, prompt_length:],
        torch.zeros(sequences, length).long(),
    ).to(policy.device)


def random_advantages(policy: Policy, sequences: int) -> torch.Tensor:
    return torch.randn(sequences, generator=torch.Generator().manual_seed(1)).to(policy.device)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def parser(description: str | None, sizes: Mapping[str, int]) -> argparse.ArgumentParser:
    """--json FILE and one integer option per size."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in sizes.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    made.add_argument("--json", type=Path, help="write the figures to this file")
    return made


def write_json(path: Path | None, figures: Any) -> None:
    if path:
        path.write_text(json.dumps(figures, indent=1))
