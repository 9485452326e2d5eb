"""Published checkpoint formats: every key has a place, and the logits are those of the architecture's definition."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_rl.errors import UserError
from dllm_rl.models.families import FAMILIES as TABLE
from dllm_rl.models.families import Family, recognise
from dllm_rl.models.loading import empty_network, load, native_config
from dllm_rl.models.policy import Policy, load_policy
from dllm_rl.models.pretrained import PretrainedModel
from dllm_rl.task import Prompt
from dllm_rl.types import PromptBatch
from tests.original_models import BLOCK, FAMILIES, MASK, expected_logits, original_config, shapes, token_id, write_checkpoint

PACKAGE = Path(__file__).parents[1] / "dllm_rl"
LLADA_8B = original_config("llada") | {
    "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "embedding_size": 126464,
    "vocab_size": 126464, "max_sequence_length": 4096, "mask_token_id": 126336, "eos_token_id": 126081,
    "pad_token_id": 126081,
}
"""config.json of LLaDA-8B-Instruct; Base and 1.5 have the same sizes."""
DREAM_7B = original_config("dream") | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072, "max_window_layers": 28,
    "bos_token_id": 151643, "mask_token_id": 151666, "eos_token_id": 151643, "pad_token_id": 151643,
}
"""config.json of Dream-v0-Instruct-7B; DiffuCoder-7B has the same sizes."""
SDAR_8B = original_config("sdar") | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36, "head_dim": 128,
    "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 32768, "mask_token_id": 151669,
}
"""The sizes of Qwen3-8B, from which SDAR-8B was made."""
SDAR_1_7B = SDAR_8B | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_hidden_layers": 28,
    "tie_word_embeddings": True,
}
"""The sizes of Qwen3-1.7B."""
LAYER_8B = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 12288 * 4096 + 2 * 4096 + 2 * 128
"""Queries and output, keys and values, the three of the MLP, two norms, two norms of a head."""
LAYER_1_7B = 2 * 2048 * 2048 + 2 * 1024 * 2048 + 3 * 6144 * 2048 + 2 * 2048 + 2 * 128
PUBLISHED = {
    # total_size 16,031,162,368 bytes of its index, two per parameter
    "LLaDA-8B": ("llada", LLADA_8B, 8_015_581_184),
    # that of Qwen2.5-7B
    "Dream-7B": ("dream", DREAM_7B, 7_615_616_512),
    "SDAR-8B": ("sdar", SDAR_8B, 36 * LAYER_8B + 2 * 151936 * 4096 + 4096),
    "SDAR-1.7B": ("sdar", SDAR_1_7B, 28 * LAYER_1_7B + 151936 * 2048 + 2048),
}
"""Family, config.json and number of parameters."""


@pytest.mark.parametrize(("family", "config", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_every_published_key_has_a_place_and_every_parameter_a_key(
    family: str, config: dict[str, Any], parameters: int
) -> None:
    record = recognise(config, "here")
    assert record is TABLE[family]
    network = empty_network(native_config(config, record))
    network.tie_weights()
    ours = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert all(parameter.is_meta for parameter in network.parameters())
    published = shapes(family, config)
    assert {record.to_native(name): shape for name, shape in published.items()} == ours
    assert {record.to_original(name): shape for name, shape in ours.items()} == published
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == parameters


def test_foreign_keys_have_no_place() -> None:
    assert TABLE["llada"].to_native("model.transformer.blocks.3.q_norm.weight") is None
    assert TABLE["llada"].to_native("model.transformer.blocks.3.ff_out.weight") == "model.layers.3.mlp.down_proj.weight"
    assert TABLE["llada"].to_native("model.transformer.ff_out.weight") == "lm_head.weight"


def sequences(family: str, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Prompts of different lengths, and completions [B, L] with masks on them."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 250, (length,), generator=generator) for length in (3, 7, 4, 1)]
    canvas = torch.randint(0, 250, (4, 9), generator=generator)
    canvas[torch.rand(canvas.shape, generator=generator) < 0.5] = token_id(family, MASK[family])
    return prompts, canvas


def logits_of(policy: Policy, prompts: list[Tensor], canvas: Tensor, extra: int = 0) -> Tensor:
    """[B, L, V]; `extra` more padding tokens on the left."""
    batch = policy.pad_prompts([row.tolist() for row in prompts], torch.arange(len(prompts)))
    ids = torch.nn.functional.pad(batch.ids, (extra, 0), value=policy.pad_id)
    mask = torch.nn.functional.pad(batch.mask, (extra, 0), value=False)
    with torch.no_grad():
        found = policy.logits(PromptBatch(ids, mask, batch.sample_ids), canvas, torch.ones_like(canvas, dtype=torch.bool))
    return found.view(*canvas.shape, -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_definition(tmp_path: Path, family: str, tied: bool, attention: str) -> None:
    weights = write_checkpoint(family, tmp_path, shards=3, tied=tied)
    policy = PretrainedModel(path=str(tmp_path), attn_implementation=attention).build([], 0)
    assert policy.network.config._attn_implementation == attention
    prompts, canvas = sequences(family)
    found = logits_of(policy, prompts, canvas)
    kept = torch.arange(found.shape[-1]) != policy.mask_id
    for row, prompt in enumerate(prompts):
        whole = expected_logits(family, original_config(family, tied), weights, torch.cat([prompt, canvas[row]]))
        start = len(prompt) - (1 if family == "dream" else 0)  # Dream's logits stand one position before their token
        assert (found[row][:, kept] - whole[start : start + canvas.shape[1], kept]).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_padding_nor_the_batch_changes_logits(tmp_path: Path, family: str) -> None:
    write_checkpoint(family, tmp_path)
    policy = load_policy(str(tmp_path))
    prompts, canvas = sequences(family)
    found = logits_of(policy, prompts, canvas)
    torch.testing.assert_close(logits_of(policy, prompts, canvas, extra=5), found, rtol=0, atol=1e-5)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(logits_of(policy, [prompt], canvas[row : row + 1])[0], found[row], rtol=0, atol=1e-5)
    if family == "sdar":  # what is right of a block does not change it: prompt of 3, so that the first block ends after one
        longer = torch.cat([canvas, canvas[:, :3]], dim=1)
        torch.testing.assert_close(logits_of(policy, prompts[:1], longer[:1])[0, :9], found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_may_be_padded_on_the_right(tmp_path: Path, family: str) -> None:
    """Or on both sides: where a row starts and ends is what its mask says."""
    write_checkpoint(family, tmp_path)
    policy = load_policy(str(tmp_path))
    prompts, canvas = sequences(family)
    expected = logits_of(policy, prompts, canvas)
    width = max(len(row) for row in prompts) + 2
    for starts in ([0] * len(prompts), [width - len(row) - 1 for row in prompts]):
        ids, mask = torch.full((len(prompts), width), policy.pad_id), torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            ids[row, start : start + len(prompt)] = prompt
            mask[row, start : start + len(prompt)] = True
        batch = PromptBatch(ids, mask, torch.arange(len(prompts)))
        for positions in (torch.ones_like(canvas, dtype=torch.bool), torch.arange(9).expand_as(canvas) % 4 == 0):
            with torch.no_grad():
                found = policy.logits(batch, canvas, positions)
            torch.testing.assert_close(found, expected[positions], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_token_does_not_come_from_text(tmp_path: Path, family: str) -> None:
    write_checkpoint(family, tmp_path)
    for chat in (True, False):
        policy = PretrainedModel(path=str(tmp_path), chat_template=chat).build([], 0)
        policy.encode_prompts(["mask"], torch.arange(1))
        text, words = f"what is {MASK[family]}?", f"has the text {MASK[family]}, which is this model's mask token"
        with pytest.raises(UserError, match=re.escape(f"prompt '{text}': {words}")):
            policy.encode_prompts([text], torch.arange(1))
        with pytest.raises(UserError, match=re.escape(f"completion '{text}': {words}")):
            policy.encode_completions(["fine", text], 20)
        for more in ({"text": text}, {"text": "a", "shots": ((text, "b"),)}, {"text": "a", "prefill": text}):
            with pytest.raises(UserError, match=re.escape(f"prompt test/3: {words}")):
                policy.encode_prompts([Prompt("test/3", **more)], torch.arange(1))


def test_blocks_are_counted_from_the_start_of_the_prompt(tmp_path: Path) -> None:
    """Prompt of 3, blocks of 4: canvas position 0 is the end of the first block, positions 1 to 4 are the second."""
    write_checkpoint("sdar", tmp_path)
    policy = load_policy(str(tmp_path))
    prompts, canvas = sequences("sdar")
    assert len(prompts[0]) == 3 and BLOCK == 4
    base = logits_of(policy, prompts[:1], canvas[:1])[0]
    for changed, sees in ((0, [0, 1, 4, 5, 8]), (1, [1, 4, 5, 8]), (4, [1, 4, 5, 8]), (5, [5, 8])):
        other = canvas[:1].clone()
        other[0, changed] = (other[0, changed] + 1) % 200
        moved = (logits_of(policy, prompts[:1], other)[0] != base).any(-1).tolist()
        assert [place for place in (0, 1, 4, 5, 8) if moved[place]] == sees
    wider = PretrainedModel(path=str(tmp_path), block_length=16).build([], 0)
    assert wider.rules.block_length == 16
    other = canvas[:1].clone()
    other[0, 8] = (other[0, 8] + 1) % 200
    assert not torch.equal(logits_of(wider, prompts[:1], other)[0, 0], logits_of(wider, prompts[:1], canvas[:1])[0, 0])


def test_a_network_that_does_not_attend_as_its_family_should_is_refused(tmp_path: Path) -> None:
    write_checkpoint("sdar", tmp_path)
    network, tokenizer = load(str(tmp_path))
    forward = network.forward
    network.forward = lambda attention_mask, **more: forward(attention_mask=torch.ones_like(attention_mask), **more)
    with pytest.raises(UserError, match="sees later blocks"):
        Policy(network, tokenizer)
    triangle = torch.ones(99, 99, dtype=torch.bool).tril()
    network.forward = lambda attention_mask, **more: forward(
        attention_mask=attention_mask & triangle[: attention_mask.shape[-1], : attention_mask.shape[-1]], **more)
    with pytest.raises(UserError, match="attends causally"):
        Policy(network, tokenizer)
    everyone = torch.zeros(1, 1, 1, 99, dtype=torch.bool)
    everyone[..., 0] = True
    network.forward = lambda attention_mask, **more: forward(
        attention_mask=attention_mask | everyone[..., : attention_mask.shape[-1]], **more)
    with pytest.raises(UserError, match="ignores the attention mask"):
        Policy(network, tokenizer)


def test_a_shifted_model_needs_a_prompt(tmp_path: Path) -> None:
    write_checkpoint("dream", tmp_path)
    policy = PretrainedModel(path=str(tmp_path), chat_template=False).build([], 0)
    with pytest.raises(UserError, match="prompt is empty: models of the family dream"):
        policy.pad_prompts([[1, 2], []], torch.arange(2))
    assert policy.encode_prompts([""], torch.arange(1)).ids.tolist() == [[token_id("dream", "<|beginoftext|>")]]


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_and_layout(tmp_path: Path, family: str) -> None:
    write_checkpoint(family, tmp_path)
    policy = load_policy(str(tmp_path))
    eos = token_id(family, "<|endoftext|>")
    assert (policy.mask_id, policy.eos_id, policy.pad_id) == (token_id(family, MASK[family]), eos, eos)
    end = "<|eot_id|>" if family == "llada" else "<|im_end|>"
    ids = policy.encode_completions(["ab"], 5)
    assert ids[0].tolist()[2:] == [token_id(family, end), eos, eos]
    assert policy.decode(ids) == ["ab"]
    rendered = {"llada": "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n2+2=<|eot_id|>"
                         "<|start_header_id|>assistant<|end_header_id|>\n\n"}
    expected = rendered.get(family, "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n")
    batch = policy.encode_prompts(["2+2="], torch.arange(1))
    assert policy.tokenizer.decode(batch.ids[0]) == expected
    text = policy.introduction("2+2=")
    assert f"mask {MASK[family]} {policy.mask_id}" in text and f"EOS <|endoftext|> {eos}" in text and "chat template" in text
    assert repr(expected) in text

    plain = PretrainedModel(path=str(tmp_path), chat_template=False).build([], 0)
    ids = plain.encode_prompts(["2+2="], torch.arange(1)).ids[0].tolist()
    assert ids[:-4] == ([token_id(family, "<|beginoftext|>")] if family == "dream" else [])
    assert plain.encode_completions(["ab"], 4)[0].tolist()[2:] == [eos, eos]


def test_ids_come_from_the_config_then_the_tokenizer_then_the_table(tmp_path: Path) -> None:
    write_checkpoint("dream", tmp_path)
    edit(tmp_path, mask_token_id=None)  # the tokenizer has one
    assert load_policy(str(tmp_path)).mask_id == token_id("dream", "<|mask|>")
    edit(tmp_path, mask_token_id=7)
    assert load_policy(str(tmp_path)).mask_id == 7
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "mask_token": None}))
    edit(tmp_path, mask_token_id=None)  # now only the published id is left, which so small a vocabulary does not have
    with pytest.raises(UserError, match="mask_token_id=151666: must be a token's number"):
        load_policy(str(tmp_path))


def edit(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_our_format_is_a_plain_model_of_transformers(tmp_path: Path, family: str) -> None:
    write_checkpoint(family, tmp_path / "original", dtype=torch.bfloat16)
    policy = load_policy(str(tmp_path / "original"))
    policy.save(tmp_path / "ours")
    again = load_policy(str(tmp_path / "ours"))
    assert again.rules == policy.rules and again.mask_id == policy.mask_id and again.turn_end_id == policy.turn_end_id
    prompts, canvas = sequences(family)
    assert torch.equal(logits_of(again, prompts, canvas), logits_of(policy, prompts, canvas))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for (name, a), (_, b) in zip(plain.named_parameters(), policy.network.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    if family != "sdar":  # whose blocks are a mask that one has to pass
        ids = torch.cat([prompts[0], canvas[0]]).unsqueeze(0)
        start = len(prompts[0]) - policy.rules.logit_shift
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0, start : start + canvas.shape[1]]
        kept = torch.arange(logits.shape[-1]) != policy.mask_id
        assert torch.equal(logits[:, kept], logits_of(policy, prompts[:1], canvas[:1])[0][:, kept])
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").mask_token_id == policy.mask_id


def test_an_own_family_in_our_format_needs_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("llada", tmp_path / "original")
    with monkeypatch.context() as patch:
        patch.setitem(TABLE, "mine", Family(**{**TABLE["llada"].__dict__, "name": "mine", "architectures": ("MineLM",)}))
        edit(tmp_path / "original", architectures=["MineLM"])
        load_policy(str(tmp_path / "original")).save(tmp_path / "ours")
    with pytest.raises(UserError, match=r"converted from the family mine, which is not known.*plugins="):
        load_policy(str(tmp_path / "ours"))


def test_a_name_on_the_hub_is_downloaded_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("llada", tmp_path / "cache")
    asked: list[Any] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    policy = load_policy("owner/model")
    assert policy.network.config.dllm_rl["source"] == "owner/model"
    ((name, patterns),) = asked
    assert name == "owner/model" and "*.safetensors" in patterns and not [item for item in patterns if "py" in item]


def test_remote_code_is_never_trusted() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py"), *(PACKAGE.parent / "conf").rglob("*.yaml")]
    assert len(files) > 50
    assert not [file for file in files if "trust_remote_code" in file.read_text()]
