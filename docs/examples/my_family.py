"""A model family of your own: `dllm-rl evaluate plugins=[docs/examples/my_family.py] model=auto model.path=FOLDER ...`."""

from dllm_rl.models.families import Family, add_family, needed, only


def convert(config):
    """From the checkpoint's config.json to the arguments of transformers' LlamaConfig."""
    only(config, bias=False)  # refuse what LlamaForCausalLM cannot do
    return {
        "vocab_size": needed(config, "vocab"),
        "hidden_size": needed(config, "dim"),
        "intermediate_size": needed(config, "ffn_dim"),
        "num_hidden_layers": needed(config, "depth"),
        "num_attention_heads": needed(config, "heads"),
        "max_position_embeddings": needed(config, "context"),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.get("theta", 10_000.0)},
    }


LAYER = [
    ("norm_attention", "input_layernorm"), ("norm_ffn", "post_attention_layernorm"),
    ("attention.query", "self_attn.q_proj"), ("attention.key", "self_attn.k_proj"),
    ("attention.value", "self_attn.v_proj"), ("attention.out", "self_attn.o_proj"),
    ("ffn.gate", "mlp.gate_proj"), ("ffn.up", "mlp.up_proj"), ("ffn.down", "mlp.down_proj"),
]
add_family(Family(
    "pebble",
    architectures=("PebbleForMaskedDiffusion",),
    config_class="LlamaConfig",
    convert=convert,
    keys=(
        ("tokens", "model.embed_tokens"), ("norm", "model.norm"), ("logits", "lm_head"),
        *(("layers.{n}." + theirs, "model.layers.{n}." + ours) for theirs, ours in LAYER),
    ),
    logit_shift=0,       # 1: the logits of a token stand one position before it, as in Dream
    block_length=None,   # 4: attention within blocks of four tokens and to earlier ones, as in SDAR
    turn_end="<|end|>",  # what ends a turn of a chat, before EOS
))
