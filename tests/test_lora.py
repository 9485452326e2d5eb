"""Adapters are trained: only they change, the reference is the network without them, and a run goes on bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dllm_rl.commands import common
from dllm_rl.errors import UserError
from dllm_rl.memory import SavedBytes
from dllm_rl.models.adapter import LoRAConfig
from dllm_rl.models.policy import Policy, WithoutAdapter, load_policy
from dllm_rl.models.pretrained import PretrainedModel
from dllm_rl.models.value_head import ValueModel
from tests.original_models import write_checkpoint
from tests.test_cli import bad, good
from tests.test_families import logits_of, sequences

VARIED = '''
from dataclasses import dataclass
from dllm_rl.config import add
from dllm_rl.task import Demonstration, Prompt, Reward, Task

@dataclass
class Varied(Task):
    """The share of even characters: it varies even for a model that knows nothing."""
    completion_length: int = 8

    def prompts(self, split):
        return [Prompt(f"{split}/{n}", f"{split} {n}") for n in range(4)]

    def score(self, prompt, completion):
        value = sum(ord(c) % 2 == 0 for c in completion) / 8
        return Reward(value, "correct" if value > 0.5 else "wrong")

    def demonstrations(self, count, seed):
        return [Demonstration(f"train {n}", "bdbd") for n in range(count)]

add("task", "varied", Varied)
'''
RL = ("train", "plugins=[varied.py]", "task=varied", "trainer.prompts_per_step=2", "trainer.group_size=4", "trainer.steps=2",
      "trainer.eval_every=0", "trainer.save_every=1", "optimizer.lr=1e-2", "optimizer.warmup_steps=1", "model=auto",
      "model.path=base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the task."""
    (tmp_path / "varied.py").write_text(VARIED)
    return tmp_path


def adapted(folder: Path, **fields: Any) -> Policy:
    return PretrainedModel(path=str(folder), lora=LoRAConfig(**{"r": 2, **fields})).build([], 0)


def disturb(policy: Policy, seed: int = 5) -> None:
    """A new adapter has B = 0 and changes nothing; now it does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.network.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_only_the_adapter_is_trained_and_without_it_the_network_is_the_base(tmp_path: Path, family: str) -> None:
    write_checkpoint(family, tmp_path)
    base, policy = load_policy(str(tmp_path)), adapted(tmp_path)
    prompts, canvas = sequences(family)
    before = logits_of(base, prompts, canvas)
    assert policy.rules == base.rules and policy.adapted and not base.adapted
    assert torch.equal(logits_of(policy, prompts, canvas), before), "a new adapter changes nothing"
    trained = [name for name, parameter in policy.network.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    disturb(policy)
    after = logits_of(policy, prompts, canvas)
    kept = torch.arange(after.shape[-1]) != policy.mask_id
    assert (after - before)[..., kept].abs().max() > 0.1
    batch = policy.pad_prompts([row.tolist() for row in prompts], torch.arange(4))
    found = WithoutAdapter(policy).logits(batch, canvas, torch.ones_like(canvas, dtype=torch.bool))
    assert torch.equal(found.view_as(before), before) and not found.requires_grad
    assert torch.equal(logits_of(policy, prompts, canvas), after), "the adapter is back"
    assert [name for name, parameter in policy.network.named_parameters() if parameter.requires_grad] == trained


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_gradient_checkpointing_leaves_the_gradients_of_an_adapter(tmp_path: Path, family: str) -> None:
    """The embeddings take no gradient, so that nothing before the first adapter does."""
    write_checkpoint(family, tmp_path)
    prompts, canvas = sequences(family)
    found = []
    for checkpointing in (False, True):
        model = PretrainedModel(path=str(tmp_path), gradient_checkpointing=checkpointing, lora=LoRAConfig(r=2))
        policy = model.build([], 0)
        disturb(policy)
        batch = policy.pad_prompts([row.tolist() for row in prompts], torch.arange(4))
        with SavedBytes() as saved:
            policy.logits(batch, canvas, torch.ones_like(canvas, dtype=torch.bool))[:, :200].logsumexp(-1).sum().backward()
        trained = {name: parameter.grad for name, parameter in policy.network.named_parameters() if parameter.requires_grad}
        assert len(trained) == 2 * 7 * 2 and all(grad.abs().max() > 0 for grad in trained.values())
        found.append((trained, saved.peak))
    (plain, more), (checkpointed, less) = found
    assert all(torch.equal(grad, checkpointed[name]) for name, grad in plain.items())
    assert less < 0.8 * more


def test_a_frozen_copy_shares_the_base(tmp_path: Path) -> None:
    write_checkpoint("dream", tmp_path)
    policy = adapted(tmp_path)
    disturb(policy)
    prompts, canvas = sequences("dream")
    twin, before = policy.frozen_copy(), logits_of(policy, prompts, canvas)
    pairs = list(zip(policy.network.named_parameters(), twin.network.parameters(), strict=True))
    assert all((a is b) == ("lora_" not in name) for (name, a), b in pairs)
    disturb(policy, seed=6)
    assert torch.equal(logits_of(twin, prompts, canvas), before)
    assert not torch.equal(logits_of(policy, prompts, canvas), before)
    assert not any(parameter.requires_grad for parameter in twin.network.parameters())


def test_a_critic_of_its_own_trains_an_adapter_too(tmp_path: Path) -> None:
    write_checkpoint("dream", tmp_path / "base")
    policy = adapted(tmp_path / "base")
    model = ValueModel(policy, "separate")
    ours, theirs = ({id(item) for item in items} for items in (model.parameters(), policy.network.parameters()))
    assert not ours & theirs
    shared = theirs & {id(parameter) for parameter in model.trunk.network.parameters()}
    assert len(shared) == len(theirs) - 28 - 1, "all but the adapter and the output head, of which the critic has no rows"
    model.save(tmp_path)
    saved = load_file(tmp_path / "critic.safetensors")
    assert len(saved) == 2 + 28 and all("lora_" in name or name.startswith("head.") for name in saved)
    model.load(tmp_path)
    prompts, canvas = sequences("dream")
    batch = policy.pad_prompts([row.tolist() for row in prompts], torch.arange(4))
    positions = torch.arange(canvas.shape[1]).expand_as(canvas) == 0
    values = model.values(batch, canvas, positions)
    values.sum().backward()
    assert values.shape == (4,) and all(parameter.grad is not None for parameter in model.head.parameters())
    assert not any(parameter.grad is not None for parameter in policy.network.parameters())


@pytest.mark.parametrize(("targets", "count"), [([], 7), (["all"], 7), (["q_proj", "v_proj"], 2)])
def test_targets(tmp_path: Path, targets: list[str], count: int) -> None:
    write_checkpoint("llada", tmp_path)
    policy = adapted(tmp_path, targets=targets, alpha=6)
    assert sum("lora_A" in name for name, _ in policy.network.named_parameters()) == 2 * count
    settings = policy.network.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (2, 6, 0.0)


def test_the_first_adapter_depends_on_the_seed_only(tmp_path: Path) -> None:
    write_checkpoint("llada", tmp_path)
    before = torch.get_rng_state()
    model = PretrainedModel(path=str(tmp_path), lora=LoRAConfig(r=2))
    first, again, other = ([p for p in model.build([], seed).network.parameters() if p.requires_grad] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("fields", "message"), [
    ({"r": -1}, r"model\.lora\.r=-1"), ({"alpha": 0}, r"model\.lora\.alpha=0"),
    ({"targets": ["w_proj"]}, r"model\.lora\.targets=w_proj: must be \[all\], or names among down_proj"),
    ({"targets": ["lm_head"]}, r"model\.lora\.targets=lm_head"),
])
def test_bad_settings_name_their_key(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_checkpoint("llada", tmp_path)
    with pytest.raises(UserError, match=message):
        adapted(tmp_path, **fields)


def test_four_bits_need_bitsandbytes_and_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("llada", tmp_path)
    model = PretrainedModel(path=str(tmp_path), quantization="nf4", lora=LoRAConfig(r=2))
    monkeypatch.setattr("dllm_rl.models.quantization.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"model\.quantization=nf4: needs bitsandbytes: pip install 'dllm-rl\[qlora\]'"):
        model.build([], 0)
    monkeypatch.setattr("dllm_rl.models.quantization.find_spec", lambda _name: "there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        model.build([], 0)


def test_four_bits_are_not_trained_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes is stood in for: its layers are where they should be, and none of its weights takes a gradient."""
    write_checkpoint("dream", folder / "base")
    packed: list[str] = []
    monkeypatch.setattr("dllm_rl.models.pretrained.require_quantization", lambda: None)
    monkeypatch.setattr("dllm_rl.models.loading.four_bit", lambda _network, name, linear: packed.append(name) or linear)
    monkeypatch.setattr("dllm_rl.models.loading.packed", lambda weight, _device: torch.nn.Parameter(weight, False))
    message = bad(folder, *RL, "model.quantization=nf4", "run_dir=run")
    assert "model.lora.r=0: must be an integer >= 1 with model.quantization=nf4" in message and not (folder / "run").exists()
    assert {name.rpartition(".")[2] for name in packed} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                            "down_proj"}, "neither the embedding nor the output head"
    good(folder, *RL, "likelihood.num_samples=2", "model.quantization=nf4", "model.lora.r=2", "run_dir=run")
    message = bad(folder, *RL, "model.path=run", "model.quantization=nf4", "model.lora.r=2", "run_dir=next")
    assert "model.quantization=nf4: must be null" in message and "merged into whole weights" in message


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def go_on(folder: Path, arguments: list[str], files: tuple[str, ...]) -> None:
    """A run of two steps in `whole`, and one of one step and its continuation in `half`: the same weights, bit for bit."""
    good(folder, *arguments, "run_dir=whole")
    shutil.copytree(folder / "whole", folder / "half")
    shutil.rmtree(newest(folder / "half"))
    good(folder, *arguments, "run_dir=half", "resume=auto")
    for file in files:
        early, whole, half = (load_file(path / file) for path in (
            newest(folder / "whole").with_name("step-000001"), newest(folder / "whole"), newest(folder / "half")))
        assert whole.keys() == half.keys() and all(torch.equal(tensor, half[key]) for key, tensor in whole.items())
        assert any(not torch.equal(tensor, early[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_bgpo_trains_goes_on_and_is_exported(folder: Path, family: str, mode: str) -> None:
    original = write_checkpoint(family, folder / "base", dtype=torch.bfloat16)
    more = {"lora": ["model.lora.r=2"], "full": []}[mode]
    file = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}[mode]
    go_on(folder, [*RL, "likelihood.num_samples=2", *more], (file,))
    rows = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad/norm"] > 0 for row in rows)
    if mode == "lora":
        checkpoint = newest(folder / "whole")
        assert all("lora_" in key for key in load_file(checkpoint / file))
        assert not list(checkpoint.glob("model*.safetensors"))
        settings = json.loads((checkpoint / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str((folder / "base").resolve())

    prompts, canvas = sequences(family)
    before, after = (logits_of(load_policy(str(folder / name)), prompts, canvas) for name in ("base", "whole"))
    assert not torch.equal(after, before)
    good(folder, "export", "model.path=whole", "output=native")
    assert torch.equal(logits_of(load_policy(str(folder / "native")), prompts, canvas), after)
    good(folder, "export", "model.path=whole", "output=original", "format=original")
    exported = load_file(folder / "original" / "model.safetensors")
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in exported.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in original.items()}
    rounded = logits_of(load_policy(str(folder / "original")), prompts, canvas)
    assert not torch.equal(rounded, before)


def test_commands_take_a_run_with_an_adapter(folder: Path) -> None:
    write_checkpoint("dream", folder / "base")
    text = good(folder, *RL, "likelihood.num_samples=2", "model.lora.r=2", "run_dir=run")
    assert "tokens: mask <|mask|> 260, EOS <|endoftext|> 256" in text
    assert "first prompt (chat template" in text and "test 0" in text
    common_ones = ("plugins=[varied.py]", "task=varied", "model.path=run")
    text = good(folder, "evaluate", *common_ones, "evaluation.num_prompts=2", "run_dir=evaluated")
    assert "tokens: mask <|mask|> 260" in text
    text = good(folder, "generate", *common_ones, "model=auto", "count=1")
    assert "tokens: mask <|mask|> 260" in text and "first prompt (chat template" in text
    text = good(folder, "rollout", *common_ones, "model=auto", "num_prompts=1", "group_size=2", "output=scored.jsonl")
    assert "tokens: mask <|mask|> 260" in text and "train 0" in text.split("first prompt (chat template")[1]
    assert (folder / "scored.jsonl").is_file()


def test_fine_tuning_shows_a_prompt_and_how_a_completion_ends(folder: Path) -> None:
    write_checkpoint("dream", folder / "base")
    sft = ("sft", "plugins=[varied.py]", "task=varied", "supervised.steps=1", "supervised.batch_size=2", "model=auto",
           "model.path=base")
    text = good(folder, *sft, "run_dir=chat")
    assert "tokens: mask <|mask|> 260, EOS <|endoftext|> 256" in text
    assert "'<|im_start|>user\\ntrain 0<|im_end|>\\n<|im_start|>assistant\\n'" in text
    assert "first completion (6 tokens, then EOS up to 8) ends: 'bdbd<|im_end|><|endoftext|>'" in text
    text = good(folder, *sft, "run_dir=plain", "model.chat_template=false")
    assert "first completion (5 tokens, then EOS up to 8) ends: 'bdbd<|endoftext|>'" in text
    text = good(folder, *sft, "run_dir=short", "model.chat_template=false", "task.completion_length=4")
    assert "first completion (4 tokens, the whole canvas) ends: 'bdbd'" in text


def test_a_penalty_refers_to_the_network_without_its_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("dream", folder / "base")
    found: list[Any] = []
    real = common.reference_policy
    monkeypatch.setattr(common, "reference_policy", lambda *arguments: found.append(real(*arguments)) or found[-1])
    good(folder, *RL, "likelihood.num_samples=2", "model.lora.r=2", "kl_reward.coef=0.1", "trainer.steps=3",
         "run_dir=run")
    assert isinstance(found[0], WithoutAdapter)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl_reward/kl"] == 0 and rows[2]["kl_reward/kl"] != 0  # the first step is warm-up


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_ppo_with_a_critic_and_an_adapter_goes_on_bit_for_bit(folder: Path, trunk: str) -> None:
    write_checkpoint("dream", folder / "base")
    arguments = [*RL, "algorithm=ppo", f"critic.trunk={trunk}", "model.lora.r=2"]
    go_on(folder, arguments, ("adapter_model.safetensors", "critic.safetensors"))


def test_an_adapter_on_an_adapter(folder: Path) -> None:
    write_checkpoint("sdar", folder / "base")
    sft = ("sft", "plugins=[varied.py]", "task=varied", "supervised.steps=2", "supervised.batch_size=2", "model=auto",
           "model.lora.r=2", "optimizer.warmup_steps=1")
    good(folder, *sft, "model.path=base", "run_dir=one", "model.block_length=8")
    assert load_policy(str(folder / "one")).rules.block_length == 8, "the adapter's block length, not that of its base"
    good(folder, *sft, "model.path=one", "run_dir=two")
    prompts, canvas = sequences("sdar")
    base, one, two = (logits_of(load_policy(str(folder / name)), prompts, canvas) for name in ("base", "one", "two"))
    assert not torch.equal(one, base) and not torch.equal(two, one)


def test_the_block_length_asked_for_holds_with_adapters_too(folder: Path) -> None:
    write_checkpoint("sdar", folder / "base")
    sft = ("sft", "plugins=[varied.py]", "task=varied", "supervised.batch_size=2", "model=auto", "model.path=base",
           "model.lora.r=2", "optimizer.warmup_steps=1", "run_dir=run", "supervised.save_every=1")
    good(folder, *sft, "supervised.steps=1", "model.block_length=8")
    assert PretrainedModel(path=str(folder / "run")).build([], 0).rules.block_length == 8
    wide = PretrainedModel(path=str(folder / "run"), block_length=16)
    assert wide.build([], 0).rules.block_length == 16
    assert wide.resume(newest(folder / "run")).rules.block_length == 16
    assert PretrainedModel(path="").resume(newest(folder / "run")).rules.block_length == 8


def test_training_weights_in_16_bits_gets_a_note(folder: Path) -> None:
    write_checkpoint("dream", folder / "base")
    note = "note: all weights are trained in 16 bits"
    sft = ("sft", "plugins=[varied.py]", "task=varied", "supervised.steps=1", "supervised.batch_size=2", "model=auto",
           "model.path=base", "model.dtype=bfloat16")
    assert note in good(folder, *sft, "run_dir=full")
    assert {tensor.dtype for tensor in load_file(newest(folder / "full") / "model.safetensors").values()} == {torch.bfloat16}
    assert note not in good(folder, *sft, "model.lora.r=2", "run_dir=adapter")
    saved = load_file(newest(folder / "adapter") / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
