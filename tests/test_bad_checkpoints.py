"""Checkpoints and settings with mistakes: one line that names the folder or the key, and what is wrong."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_rl.errors import UserError
from dllm_rl.models.policy import load_policy
from dllm_rl.models.pretrained import PretrainedModel
from tests.conftest import make_policy
from tests.original_models import token_id, write_checkpoint
from tests.test_families import edit


def drop(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def add(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    save_file(load_file(folder / "model.safetensors") | {name: torch.zeros(shape)}, folder / "model.safetensors")


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: edit(folder, architectures=["OtherLM"], model_type="other"),
     ["the architecture OtherLM", "llada, dream, sdar", "docs/add_a_family.md"]),
    (lambda folder: edit(folder, architectures="OtherLM", model_type="llama"), ["the architecture OtherLM, which is"]),
    (lambda folder: edit(folder, n_layers=None), ["config.json: has no n_layers"]),
    (lambda folder: edit(folder, alibi=True), ["config.json: alibi=True: must be False"]),
    (lambda folder: edit(folder, include_bias=True), ["config.json: include_bias=True: must be False"]),
    (lambda folder: drop(folder, "model.transformer.blocks.1.ff_proj.weight"), ["no model.layers.1.mlp.gate_proj.weight"]),
    (lambda folder: add(folder, "model.transformer.blocks.1.q_norm.weight", (4,)),
     ["model.transformer.blocks.1.q_norm.weight, which the architecture does not"]),
    (lambda folder: add(folder, "model.transformer.ln_f.weight", (31,)), ["ln_f.weight has the shape [31]; must be [32]"]),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"xx"), ["cannot be loaded"]),
    (lambda folder: (folder / "config.json").write_text("{"), ["cannot be loaded"]),
    (lambda folder: (folder / "tokenizer.json").unlink(), ["has no tokenizer.json"]),
])
def test_mistakes_are_named(tmp_path: Path, damage: Any, words: list[str]) -> None:
    write_checkpoint("llada", tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as raised:
        load_policy(str(tmp_path))
    message = str(raised.value)
    assert "\n" not in message and all(word in message for word in [str(tmp_path), *words]), message


MANY = [{"rope_scaling": 3}, {"rope_theta": "x"}, {"rms_norm_eps": "x"}]


@pytest.mark.parametrize(("family", "changes"), [
    *(("llada", changes) for changes in (
        *MANY, {"n_heads": 5}, {"n_heads": "4"}, {"n_heads": 0}, {"d_model": 0}, {"n_kv_heads": 3}, {"mask_token_id": "x"},
        {"mask_token_id": 3.0}, {"eos_token_id": {}}, {"architectures": 3}, {"architectures": None, "model_type": ["a"]})),
    *(("dream", changes) for changes in (*MANY, {"rope_scaling": {"type": "none_such"}}, {"vocab_size": "x"})),
    *(("sdar", changes) for changes in (*MANY, {"block_size": "4"}, {"block_size": -4}, {"head_dim": []})),
    *(("tiny", changes) for changes in ({"num_attention_heads": 5}, {"hidden_size": "x"}, {"architectures": ["ForeignLM"]})),
    ("llada", []),
])
def test_bad_values_in_config_json_are_one_line(tmp_path: Path, family: str, changes: Any) -> None:
    if family == "tiny":
        make_policy(torch.float32).save(tmp_path)
    else:
        write_checkpoint(family, tmp_path)
    if isinstance(changes, dict):
        edit(tmp_path, **changes)
    else:
        (tmp_path / "config.json").write_text(json.dumps(changes))
    with pytest.raises(UserError) as raised:
        load_policy(str(tmp_path))
    message = str(raised.value)
    assert message.startswith(f"model.path={tmp_path}: ") and "\n" not in message and "cannot be loaded" not in message


def test_an_index_of_another_form_is_named(tmp_path: Path) -> None:
    write_checkpoint("llada", tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: weight_map="):
        load_policy(str(tmp_path))


def test_lists_of_ids_may_be_empty(tmp_path: Path) -> None:
    write_checkpoint("llada", tmp_path)
    edit(tmp_path, eos_token_id=[], architectures="LLaDAModelLM")
    assert load_policy(str(tmp_path)).eos_id == token_id("llada", "<|endoftext|>")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
@pytest.mark.parametrize("family", ["dream", "tiny"])
def test_an_attention_that_is_not_installed_is_named(tmp_path: Path, family: str) -> None:
    if family == "tiny":
        make_policy(torch.float32).save(tmp_path)
    else:
        write_checkpoint(family, tmp_path)
    with pytest.raises(UserError, match=r"model\.attn_implementation=flash_attention_2: cannot be used here \(.*installed"):
        PretrainedModel(path=str(tmp_path), attn_implementation="flash_attention_2").build([], 0)


@pytest.mark.parametrize("template", ["{{ raise_exception('no shots here') }}", "{{ 1 + 'a' }}", "{% if %}"])
def test_a_chat_template_that_fails_is_one_line(tmp_path: Path, template: str) -> None:
    write_checkpoint("dream", tmp_path)
    policy = load_policy(str(tmp_path))
    policy.tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"the chat template of .* cannot .*model\.chat_template=false") as raised:
        policy.render("q")
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(("fields", "message"), [
    ({"dtype": "int8"}, r"model\.dtype=int8"), ({"attn_implementation": "fast"}, r"model\.attn_implementation=fast"),
    ({"block_length": 0}, r"model\.block_length=0"), ({"quantization": "int4"}, r"model\.quantization=int4"),
    ({}, r"model\.path=None: must be"),
])
def test_bad_settings_name_their_key(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PretrainedModel(**fields).build([], 0)


def test_blocks_are_for_block_causal_families(tmp_path: Path) -> None:
    write_checkpoint("llada", tmp_path)
    with pytest.raises(UserError, match=r"model\.block_length=4: must be null with the family llada"):
        PretrainedModel(path=str(tmp_path), block_length=4).build([], 0)
