"""Adapters as model paths: the weights are the base's plus the scaled product, by hand, and mistakes have names."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dllm_rl.checkpoint import save_checkpoint
from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy, load_policy
from dllm_rl.models.tiny import build_tokenizer
from dllm_rl.run_folder import weights_digest
from tests.conftest import make_completions, make_policy
from tests.original_models import write_checkpoint
from tests.test_cli import SMALL, dllm, good

RANK, ALPHA = 3, 12
TARGETS = ["q_proj", "down_proj", "lm_head"]


def make_adapter(base: Path, folder: Path, **settings: object) -> None:
    """Saves an adapter of the model at `base` that changes it."""
    network = AutoModelForCausalLM.from_pretrained(base)
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, **settings}
    adapted = peft.get_peft_model(network, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(3)  # a fresh adapter has B = 0 and changes nothing
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    adapted.save_pretrained(folder)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_policy(torch.float32).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    make_adapter(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def merged_by_hand(base: Path, adapter: Path) -> Policy:
    """W + alpha/r B A in float64, from the saved files."""
    policy = load_policy(str(base))
    policy.network.double()
    weights = {name: value.double() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    changed = 0
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in weights:
                parameter += ALPHA / RANK * weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
                changed += 1
    assert changed == sum("lora_B" in name for name in weights) == 5
    return policy


def logits_of(policy: Policy) -> torch.Tensor:
    policy.network.double()
    completions = make_completions(policy)
    everywhere = torch.ones_like(completions.ids, dtype=torch.bool)
    with torch.no_grad():
        logits = policy.logits(completions.prompts, completions.ids, everywhere)
    return logits[:, torch.arange(logits.shape[1]) != policy.mask_id]


def test_logits_are_those_of_the_base_plus_the_product(base: Path, adapter: Path) -> None:
    loaded = load_policy(str(adapter))
    assert not [name for name, _ in loaded.network.named_parameters() if "lora" in name]
    found = logits_of(loaded)
    assert (found - logits_of(merged_by_hand(base, adapter))).abs().max() < 1e-6
    assert (found - logits_of(load_policy(str(base)))).abs().max() > 0.1


def test_a_merged_adapter_is_saved_as_a_whole_model(tmp_path: Path, adapter: Path) -> None:
    loaded = load_policy(str(adapter))
    loaded.save(tmp_path / "whole")
    shutil.rmtree(adapter)
    again = load_policy(str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    for (name, a), (_, b) in zip(loaded.network.named_parameters(), again.network.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_tokenizer_is_the_adapters_if_it_has_one(base: Path, adapter: Path) -> None:
    assert load_policy(str(adapter)).tokenizer.encode("x12") == load_policy(str(base)).tokenizer.encode("x12")
    tokenizer = build_tokenizer([])
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(adapter)
    assert load_policy(str(adapter)).tokenizer.chat_template == tokenizer.chat_template
    assert load_policy(str(base)).tokenizer.chat_template is None


def test_an_adapter_of_an_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    make_adapter(base, tmp_path / "second")
    edit(tmp_path / "second", base_model_name_or_path=str(adapter))
    folders = (tmp_path / "second", adapter, base)
    twice, once, plain = (load_policy(str(folder)).network.model.layers[0].mlp.down_proj.weight for folder in folders)
    torch.testing.assert_close(twice - once, once - plain, rtol=0, atol=1e-6)


def test_shared_weights_are_not_changed_at_one_end_only(tmp_path: Path) -> None:
    """The head of tied embeddings: an addition to it would change what the model reads as well."""
    write_checkpoint("llada", tmp_path / "base", tied=True)
    load_policy(str(tmp_path / "base")).save(tmp_path / "native")
    for target in ("lm_head", "embed_tokens"):
        make_adapter(tmp_path / "native", tmp_path / target, target_modules=["q_proj", target])
        with pytest.raises(UserError, match=r"would change the embeddings and the output head, which share their weights"):
            load_policy(str(tmp_path / target))
    make_adapter(tmp_path / "native", tmp_path / "fine", target_modules=["q_proj"])
    load_policy(str(tmp_path / "fine"))


ORIGINAL_TARGETS = {"list": ["q_proj", "attn_out", "ff_out"], "regex": r".*\.(q_proj|attn_out|ff_out)"}


@pytest.mark.parametrize("targets", ORIGINAL_TARGETS.values(), ids=ORIGINAL_TARGETS)
def test_an_adapter_with_the_names_of_the_published_code(tmp_path: Path, targets: object) -> None:
    """As peft saves it with LLaDA's own code: `ff_out` is a layer's down-projection and the output head."""
    weights = write_checkpoint("llada", tmp_path / "base")
    names = [name for name in weights if name.split(".")[-2] in ORIGINAL_TARGETS["list"]]
    assert len(names) == 2 * 3 + 1
    generator, found = torch.Generator().manual_seed(0), {}
    for name in names:
        (rows, columns), stem = weights[name].shape, f"base_model.model.{name.removesuffix('.weight')}"
        found[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / 10
        found[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / 10
        weights[name] = weights[name] + ALPHA / RANK * found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    config.base_model_name_or_path = str(tmp_path / "base")
    config.save_pretrained(str(tmp_path / "adapter"))
    save_file(found, tmp_path / "adapter" / "adapter_model.safetensors")
    merged = load_policy(str(tmp_path / "adapter"))
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    save_file(weights, tmp_path / "whole" / "model.safetensors")
    whole = load_policy(str(tmp_path / "whole"))
    for (name, a), (_, b) in zip(merged.network.named_parameters(), whole.network.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    assert merged.rules.family == "llada"

    rewrite(tmp_path / "adapter", lambda weights: {
        name: value for name, value in weights.items() if "blocks.1.attn_out" not in name})
    with pytest.raises(UserError, match=r"o_proj\.lora_A\.weight is only in one of them"):
        load_policy(str(tmp_path / "adapter"))
    edit(tmp_path / "adapter", alpha_pattern={"attn_out": 3})
    with pytest.raises(UserError, match="alpha_pattern must be empty"):
        load_policy(str(tmp_path / "adapter"))


def test_the_base_must_see_both_directions(base: Path, adapter: Path) -> None:
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "is_causal": True}))
    with pytest.raises(UserError, match="attends causally"):
        load_policy(str(adapter))


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replaces the adapter's weights by what `change` makes of them."""
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


def drop_a_weight(folder: Path) -> None:
    rewrite(folder, lambda weights: {name: value for name, value in weights.items() if "lm_head.lora_B" not in name})


def drop_a_module(folder: Path) -> None:
    """The adapter's own copy of a whole layer is not in its file."""
    edit(folder, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    rewrite(folder, lambda weights: {name: value for name, value in weights.items() if "lm_head" not in name})


def other_layers(folder: Path) -> None:
    """The adapter belongs to a model with one layer more."""
    rewrite(folder, lambda weights: weights | {
        name.replace("layers.1", "layers.2"): value.clone() for name, value in weights.items()})


def other_shape(folder: Path) -> None:
    rewrite(folder, lambda weights: {
        name: value[1:].clone() if "lm_head.lora_B" in name else value for name, value in weights.items()})


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: edit(folder, base_model_name_or_path="./gone/base"),
     ["base_model_name_or_path=./gone/base: no such folder"]),
    (lambda folder: edit(folder, base_model_name_or_path="nobody/nothing"),
     ["base_model_name_or_path=nobody/nothing: cannot be loaded"]),
    (lambda folder: edit(folder, base_model_name_or_path=None), ["has no base_model_name_or_path"]),
    (lambda folder: edit(folder, base_model_name_or_path=str(folder.parent)), ["has no config.json"]),
    (lambda folder: edit(folder, peft_type="PROMPT_TUNING"), ["peft_type=PROMPT_TUNING; must be LORA"]),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), ["adapter_config.json is not JSON"]),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), ["no adapter_model.safetensors"]),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"xx"), ["does not fit"]),
    (lambda folder: edit(folder, target_modules=["k_proj"]), ["does not fit its base model", "only in one of them"]),
    (lambda folder: edit(folder, target_modules=["nothing_proj"]), ["does not fit its base model", "nothing_proj"]),
    (drop_a_module, ["does not fit its base model", "lm_head.weight"]),
    (drop_a_weight, ["does not fit its base model", "lm_head.lora_B.weight is only in one of them"]),
    (other_layers, ["does not fit its base model", "only in one of them"]),
    (other_shape, ["does not fit its base model"]),
])
def test_mistakes_name_the_folder_and_what_is_missing(
    adapter: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(adapter)
    with pytest.raises(UserError) as raised:
        load_policy(str(adapter))
    message = str(raised.value)
    assert message.startswith(f"model.path={adapter}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_without_peft_the_extra_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs peft: pip install 'dllm-rl\[lora\]'"):
        load_policy(str(adapter))


def test_the_digest_of_an_adapter_is_of_its_base_too(tmp_path: Path, base: Path, adapter: Path) -> None:
    """A resumed evaluation must notice that the base has been trained further."""
    run = tmp_path / "run"
    policy = load_policy(str(base))
    save_checkpoint(run, 1, policy, {}, keep=5)
    edit(adapter, base_model_name_or_path=str(run))
    digests = [weights_digest(str(adapter)), weights_digest(str(adapter))]
    save_checkpoint(run, 2, make_policy(torch.float32, seed=1), {}, keep=5)
    digests.append(weights_digest(str(adapter)))
    edit(adapter, lora_alpha=2 * ALPHA)
    digests.append(weights_digest(str(adapter)))
    drop_a_weight(adapter)
    digests.append(weights_digest(str(adapter)))
    assert digests[0] == digests[1] and len({*digests}) == 4


def test_an_adapter_on_the_hub_is_merged(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This stands in for the hub."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: {"owner/adapter": str(adapter)}[name])
    found = logits_of(load_policy("owner/adapter"))
    assert (found - logits_of(merged_by_hand(base, adapter))).abs().max() < 1e-6


def test_the_commands_take_an_adapter(tmp_path: Path) -> None:
    """The adapter of a run folder: evaluated, and with another outcome than its base."""
    good(tmp_path, "sft", "task=sudoku", *SMALL, "run_dir=start")
    (checkpoint,) = (tmp_path / "start" / "checkpoints").iterdir()
    make_adapter(checkpoint, tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "start"))
    for path, name in (("adapter", "a"), ("start", "b")):
        good(tmp_path, "evaluate", "task=sudoku", f"model.path={path}", "evaluation.num_prompts=4", f"run_dir={name}")
    results = [json.loads((tmp_path / name / "results.json").read_text())["sudoku"] for name in ("a", "b")]
    assert [result["n"] for result in results] == [4, 4]
    assert (tmp_path / "a" / "samples.jsonl").read_text() != (tmp_path / "b" / "samples.jsonl").read_text()
    edit(tmp_path / "adapter", base_model_name_or_path="./nowhere")
    done = dllm(tmp_path, "evaluate", "task=sudoku", "model.path=adapter", "run_dir=c")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "model.path=adapter: base_model_name_or_path=./nowhere: no such folder" in done.stderr
