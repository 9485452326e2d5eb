"""What differs between model families, as data: keys, configuration, attention, shift, special tokens, LoRA targets.

A published checkpoint is read without its own modelling code: its `config.json` becomes the configuration of a class that
transformers has, and its tensors are renamed. A family of your own is one more record: docs/add_a_family.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dllm_rl.errors import UserError, check

FACTS = "dllm_rl"
"""Key of a converted checkpoint's config.json under which the family and the original configuration are kept."""
HEAD = "lm_head.weight"
"""The output head's weight, as all classes of transformers here name it."""
PAGE = "docs/add_a_family.md"
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One model family.

    Example: LLaDA's `model.transformer.blocks.3.attn_out.weight` is `model.layers.3.self_attn.o_proj.weight` here, by the
    pair `("model.transformer.blocks.{n}.attn_out", "model.layers.{n}.self_attn.o_proj")` of `keys`.
    """

    name: str
    architectures: tuple[str, ...] = ()
    """`architectures` in the config.json of an original checkpoint."""
    model_types: tuple[str, ...] = ()
    """`model_type`, for a config.json without `architectures`."""
    config_class: str = ""
    """Configuration class of transformers."""
    convert: Callable[[Json], dict[str, Any]] = dict
    """From an original config.json to the arguments of `config_class`."""
    keys: tuple[tuple[str, str], ...] = ()
    """(original, ours) module names; `{n}` is the number of a layer. Empty: the names are the same."""
    logit_shift: int = 0
    """1: the logits of a position come from the hidden state before it, as in a causal model."""
    block_length: int | None = None
    """None: attention in both directions. Else: within blocks of this length, and to all earlier blocks."""
    ids: Mapping[str, int] = field(default_factory=dict)
    """Published ids of `mask`, `eos` and `pad`, for checkpoints whose config.json and tokenizer do not say."""
    tokenizer_class: str = "AutoTokenizer"
    """Where the original names a class of its own, the class of transformers that reads the same files."""
    bos: bool = False
    """Whether a plain prompt starts with the BOS token. A chat template writes its own."""
    turn_end: str | None = None
    """The token that ends a turn of a chat, before EOS."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def to_native(self, key: str) -> str | None:
        """The name here of a tensor of the original; None if there is none."""
        return _translate(key, dict(self.keys))

    def to_original(self, key: str) -> str | None:
        """The inverse of `to_native`."""
        return _translate(key, {ours: original for original, ours in self.keys})


def _translate(key: str, names: Mapping[str, str]) -> str | None:
    if not names:
        return key
    module, _, leaf = key.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    pattern = module if number is None else module.replace(number[0], ".{n}.", 1)
    found = names.get(pattern)
    return None if found is None else found.replace("{n}", number[1] if number else "") + f".{leaf}"


@dataclass(frozen=True)
class Rules:
    """How a policy treats its network and its text; see the fields of `Family`."""

    family: str = "native"
    logit_shift: int = 0
    block_length: int | None = None
    bos: bool = False
    turn_end: str | None = None


def rules_of(config: Any) -> Rules:
    """The rules for a network with this configuration of transformers."""
    facts = getattr(config, FACTS, None)
    if not facts:
        return Rules()
    found = named(facts["family"])
    return Rules(found.name, found.logit_shift, facts["block_length"], found.bos, found.turn_end)


def recognise(config: Json, key: str) -> Family:
    """The family of a checkpoint with this config.json, in its original format or in ours. `key` is what messages call it.

    Raises:
        UserError: neither the table nor transformers knows the architecture.
    """
    if FACTS in config:
        return named(config[FACTS]["family"], key)
    given, kind = config.get("architectures") or [], str(config.get("model_type"))
    architectures = [str(name) for name in (given if isinstance(given, list) else [given])]
    for family in FAMILIES.values():
        if (set(architectures) & set(family.architectures)) if architectures else kind in family.model_types:
            return family
    import transformers

    # Code of a checkpoint's own often takes the model_type of the model that it was made from, and another architecture.
    known = not architectures or any(hasattr(transformers, name) for name in architectures)
    if known and kind in transformers.CONFIG_MAPPING:
        return NATIVE
    raise UserError(f"{key}: has the architecture {', '.join(architectures) or kind}, which is not known; must be of the "
                    f"families {', '.join(FAMILIES)}, or a model of transformers; {PAGE} says how to add one")


def named(name: str, key: str = "model.path") -> Family:
    if name not in FAMILIES:
        raise UserError(f"{key}: was converted from the family {name}, which is not known; must be one of "
                        f"{', '.join(FAMILIES)}, or one that a module named by plugins= adds ({PAGE})")
    return FAMILIES[name]


def add_family(family: Family) -> None:
    """Adds a family of your own, in a module that `plugins=` names.

    Raises:
        UserError: one of the table has that name.
    """
    check(family.name not in BUILT_IN, "family", family.name, "a name other than " + ", ".join(sorted(BUILT_IN)))
    FAMILIES[family.name] = family


def needed(config: Json, name: str) -> Any:
    """A value that a config.json must have."""
    if config.get(name) is None:
        raise UserError(f"config.json: has no {name}, without which this architecture has no shape; add it as published")
    return config[name]


def only(config: Json, **valid: Any) -> None:
    """Refuses a config.json with other values than these; a missing one is fine."""
    for name, value in valid.items():
        rest = "nothing else of this architecture is supported, choose another checkpoint"
        check(config.get(name) in (value, None), f"config.json: {name}", config.get(name), f"{value}: {rest}")


def rope(config: Json) -> dict[str, Any]:
    """The rotary embedding's settings as transformers 5 has them."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
    return {"rope_theta": config.get("rope_theta", 10_000.0), **scaling, "rope_type": kind}


def _llada(config: Json) -> dict[str, Any]:
    only(config, alibi=False, rope=True, layer_norm_type="rms", activation_type="silu", include_bias=False,
         include_qkv_bias=False, attention_layer_norm=False, input_emb_norm=False, scale_logits=False, block_type="llama")
    heads, width = needed(config, "n_heads"), needed(config, "d_model")
    return {
        "vocab_size": config.get("embedding_size") or needed(config, "vocab_size"),
        "hidden_size": width,
        "intermediate_size": config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * width,
        "num_hidden_layers": needed(config, "n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads),
        "max_position_embeddings": needed(config, "max_sequence_length"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "rope_parameters": rope(config),
        "tie_word_embeddings": bool(config.get("weight_tying", False)),
    }


def _qwen(*more: str) -> Callable[[Json], dict[str, Any]]:
    """Configurations with the names that transformers uses for Qwen; `more` are those of one family."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", *more)

    def convert(config: Json) -> dict[str, Any]:
        only(config, hidden_act="silu", use_sliding_window=False)
        return {
            **{name: needed(config, name) for name in names},
            "rope_parameters": rope(config),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        }

    return convert


_LAYER = "model.transformer.blocks.{n}."
NATIVE = Family("native", lora_targets=())
"""A causal-LM class of transformers with `is_causal=false` in its config.json, such as the embedded tiny model."""
FAMILIES: dict[str, Family] = {family.name: family for family in (
    Family(  # LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5 (arXiv 2502.09992, 2505.19223): a Llama that sees both directions
        "llada", ("LLaDAModelLM",), ("llada",), "LlamaConfig", _llada,
        keys=(
            ("model.transformer.wte", "model.embed_tokens"),
            ("model.transformer.ln_f", "model.norm"),
            ("model.transformer.ff_out", "lm_head"),
            *((_LAYER + original, "model.layers.{n}." + ours) for original, ours in (
                ("attn_norm", "input_layernorm"), ("q_proj", "self_attn.q_proj"), ("k_proj", "self_attn.k_proj"),
                ("v_proj", "self_attn.v_proj"), ("attn_out", "self_attn.o_proj"),
                ("ff_norm", "post_attention_layernorm"), ("ff_proj", "mlp.gate_proj"), ("up_proj", "mlp.up_proj"),
                ("ff_out", "mlp.down_proj"),
            )),
        ),
        ids={"mask": 126336, "eos": 126081, "pad": 126081}, tokenizer_class="PreTrainedTokenizerFast",
        turn_end="<|eot_id|>",
    ),
    Family(  # Dream-v0-*-7B (arXiv 2508.15487), DiffuCoder-7B-* (arXiv 2506.20639): Qwen2 in both directions, shifted
        "dream", ("DreamModel",), ("Dream",), "Qwen2Config", _qwen(), logit_shift=1,
        ids={"mask": 151666, "eos": 151643, "pad": 151643}, tokenizer_class="Qwen2Tokenizer", bos=True,
        turn_end="<|im_end|>",
    ),
    Family(  # SDAR-*, TraDo-* (arXiv 2510.06303, 2509.06949): Qwen3, both directions within blocks, causal between them
        "sdar", ("SDARForCausalLM",), ("sdar",), "Qwen3Config", _qwen("head_dim"), block_length=4,
        ids={"mask": 151669, "eos": 151643, "pad": 151643}, tokenizer_class="Qwen2Tokenizer", turn_end="<|im_end|>",
    ),
    NATIVE,
)}
BUILT_IN = frozenset(FAMILIES)
