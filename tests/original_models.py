"""Tiny random checkpoints in the formats that LLaDA, Dream and SDAR are published in, and what their architectures compute.

The forward passes are written from the architectures' definitions in plain torch (rotary embedding, RMSNorm, SwiGLU, grouped
queries, biases, normalised queries and keys), for one sequence without padding at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

FAMILIES = ("llada", "dream", "sdar")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WIDTH, LAYERS, HEADS, KV_HEADS, INNER, ROWS = 32, 2, 4, 2, 48, 272
BLOCK = 4
QWEN_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLADA_TEMPLATE = ("{% for m in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m.role }}"
                  "<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
                  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
SPECIAL = {
    "llada": ["<|startoftext|>", "<|endoftext|>", "<|reserved_token_0|>", "<|mdm_mask|>", "<|start_header_id|>",
              "<|end_header_id|>", "<|eot_id|>"],
    "dream": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"],
    "sdar": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"],
}
MASK = {"llada": "<|mdm_mask|>", "dream": "<|mask|>", "sdar": "<|MASK|>"}


def token_id(family: str, token: str) -> int:
    return len(BYTES) + SPECIAL[family].index(token)


def write_tokenizer(family: str, folder: Path) -> None:
    """The files that the family publishes; Dream's and SDAR's name classes that only their own code has."""
    special = {str(token_id(family, token)): {"content": token, "special": True, "lstrip": False, "rstrip": False,
                                              "normalized": False, "single_word": False} for token in SPECIAL[family]}
    settings: dict[str, Any] = {"added_tokens_decoder": special, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
                                "clean_up_tokenization_spaces": False, "model_max_length": 1000}
    vocabulary = {byte: number for number, byte in enumerate(BYTES)}
    if family == "llada":
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(SPECIAL[family])
        tokenizer.save(str(folder / "tokenizer.json"))
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>",
                     "chat_template": LLADA_TEMPLATE, "trust_remote_code": True}
    else:
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        name = "DreamTokenizer" if family == "dream" else "SDARTokenizer"
        settings |= {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"tokenization.{name}", None]},
                     "chat_template": QWEN_TEMPLATE, "bos_token": "<|beginoftext|>" if family == "dream" else None}
        if family == "dream":
            settings["mask_token"] = "<|mask|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def original_config(family: str, tied: bool = False) -> dict[str, Any]:
    """A config.json with the published names and small sizes."""
    eos = token_id(family, "<|endoftext|>")
    ids = {"mask_token_id": token_id(family, MASK[family]), "eos_token_id": eos, "pad_token_id": eos}
    if family == "llada":
        return {
            "architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu", "alibi": False,
            "attention_dropout": 0.0, "attention_layer_norm": False, "bias_for_layer_norm": False, "block_group_size": 1,
            "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}, "block_type": "llama", "d_model": WIDTH,
            "embedding_size": ROWS, "flash_attention": False, "include_bias": False, "include_qkv_bias": False,
            "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "max_sequence_length": 256,
            "mlp_hidden_size": INNER, "mlp_ratio": 4, "multi_query_attention": None, "n_heads": HEADS,
            "n_kv_heads": KV_HEADS, "n_layers": LAYERS,
            "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 500000.0, "scale_logits": False,
            "vocab_size": ROWS - 8, "weight_tying": tied, **ids,
        }
    name = {"dream": "DreamModel", "sdar": "SDARForCausalLM"}[family]
    return {
        "architectures": [name], "model_type": {"dream": "Dream", "sdar": "sdar"}[family], "attention_dropout": 0.0,
        "auto_map": {"AutoModel": f"modeling.{name}"}, "hidden_act": "silu", "hidden_size": WIDTH, "initializer_range": 0.02,
        "intermediate_size": INNER, "max_position_embeddings": 256, "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": tied, "use_sliding_window": False,
        "torch_dtype": "float32", "vocab_size": ROWS, **ids,
        **({"head_dim": 12, "block_size": BLOCK} if family == "sdar" else {}),
    }


def shapes(family: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The published tensor names and shapes of a family, for any size."""
    if family == "llada":
        width, inner, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
        keys = width // config["n_heads"] * config["n_kv_heads"]
        found: dict[str, tuple[int, ...]] = {"model.transformer.wte.weight": (rows, width),
                                             "model.transformer.ln_f.weight": (width,)}
        for n in range(config["n_layers"]):
            block = f"model.transformer.blocks.{n}."
            found |= {block + name + ".weight": shape for name, shape in {
                "attn_norm": (width,), "ff_norm": (width,), "q_proj": (width, width), "k_proj": (keys, width),
                "v_proj": (keys, width), "attn_out": (width, width), "ff_proj": (inner, width), "up_proj": (inner, width),
                "ff_out": (width, inner)}.items()}
        return found if config["weight_tying"] else found | {"model.transformer.ff_out.weight": (rows, width)}
    width, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim", width // config["num_attention_heads"])
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        found |= {layer + name + ".weight": shape for name, shape in {
            "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}.items()}
        if family == "dream":
            found |= {f"{layer}self_attn.{name}_proj.bias": (rows_,) for name, rows_ in
                      (("q", queries), ("k", keys), ("v", keys))}
        else:
            found |= {f"{layer}self_attn.{name}_norm.weight": (size,) for name in "qk"}
    return found if config["tie_word_embeddings"] else found | {"lm_head.weight": (rows, width)}


def random_weights(family: str, config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * (0.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.2)
            + ("norm" in name or "ln_f" in name) for name, shape in shapes(family, config).items()}


def write_checkpoint(
    family: str, folder: Path, *, shards: int = 1, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Tensor]:
    """Writes a checkpoint as it is published; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = original_config(family, tied)
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(family, config, seed).items()}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(family, folder)
    names = sorted(weights)
    parts = [names[number::shards] for number in range(shards)]
    files = ["model.safetensors"] if shards == 1 else [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return weights


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [T, heads, size]: the two halves of a head are the coordinates that are turned."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """LLaDA's tensors under short names, for one forward pass of all families."""
    short = {"wte": "embed", "ln_f": "norm", "ff_out": "head", "embed_tokens": "embed", "norm": "norm", "lm_head": "head"}
    inner = {"attn_norm": "norm1", "ff_norm": "norm2", "q_proj": "q", "k_proj": "k", "v_proj": "v", "attn_out": "o",
             "ff_proj": "gate", "up_proj": "up", "ff_out": "down"}
    qwen = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2", "self_attn.q_proj": "q",
            "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o", "mlp.gate_proj": "gate",
            "mlp.up_proj": "up", "mlp.down_proj": "down", "self_attn.q_norm": "qn", "self_attn.k_norm": "kn"}
    found = {}
    for name, tensor in weights.items():
        parts, leaf = name.split(".")[:-1], name.split(".")[-1]
        if "blocks" in parts:
            new = f"{parts[3]}.{inner[parts[4]]}.{leaf}"
        elif "layers" in parts:
            new = f"{parts[2]}.{qwen['.'.join(parts[3:])]}.{leaf}"
        else:
            new = short[parts[-1]] + ".weight"
        found[new] = tensor.double()
    return found


def expected_logits(family: str, config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[T, V] float64 logits of one sequence [T], position for position, without a family's shift."""
    w = plain_names(weights)
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    block = torch.arange(len(ids)) // (config["block_size"] if family == "sdar" else len(ids))
    allowed = block[:, None] >= block[None, :]
    x = w["embed.weight"][ids]
    for n in range(LAYERS):
        def linear(name: str, value: Tensor, n: int = n) -> Tensor:
            return F.linear(value, w[f"{n}.{name}.weight"], w.get(f"{n}.{name}.bias"))

        h = rms(x, w[f"{n}.norm1.weight"], eps)
        counts = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        q, k, v = (linear(name, h).view(len(ids), heads, -1) for name, heads in counts.items())
        if family == "sdar":
            q, k = rms(q, w[f"{n}.qn.weight"], eps), rms(k, w[f"{n}.kn.weight"], eps)
        q, k = rotate(q, theta), rotate(k, theta)
        outputs = []
        for head in range(HEADS):
            other = head // (HEADS // KV_HEADS)
            scores = (q[:, head] @ k[:, other].T / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
            outputs.append(scores.softmax(-1) @ v[:, other])
        x = x + linear("o", torch.cat(outputs, dim=-1))
        h = rms(x, w[f"{n}.norm2.weight"], eps)
        x = x + linear("down", F.silu(linear("gate", h)) * linear("up", h))
    return F.linear(rms(x, w["norm.weight"], eps), w.get("head.weight", w["embed.weight"]))
