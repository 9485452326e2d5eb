"""What a run says and refuses about its text before there is a folder, and likelihoods where attention goes in blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_rl.diffusion.estimators import Block, LeftToRight, StratifiedCounts, Trajectory, elbo_of
from dllm_rl.errors import UserError
from dllm_rl.lm_eval_model import MaskedDiffusionLM
from dllm_rl.models.policy import Policy, load_policy
from dllm_rl.supervised import demonstration_loss
from dllm_rl.types import Completions, PromptBatch
from tests.original_models import BLOCK, write_checkpoint
from tests.test_cli import bad, good
from tests.test_lora import RL, VARIED

SFT = ("sft", "plugins=[varied.py]", "task=varied", "supervised.steps=1", "supervised.batch_size=2", "model=auto",
       "model.path=base")
NOTE = "note: this model sees blocks of 4 tokens"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "varied.py").write_text(VARIED)
    return tmp_path


def test_plain_text_stays_plain_text(folder: Path) -> None:
    write_checkpoint("llada", folder / "base")
    assert "first prompt (plain text" in good(folder, *SFT, "model.chat_template=false", "run_dir=plain")
    assert not load_policy(str(folder / "plain")).chat
    train = (*RL[:-1], "trainer.steps=1", "model.path=plain", "likelihood.num_samples=1")
    assert "first prompt (plain text" in good(folder, *train, "run_dir=rl")
    assert "first prompt (plain text" in good(folder, *train, "model.lora.r=2", "run_dir=adapter")
    assert not load_policy(str(folder / "adapter")).chat
    assert "first prompt (chat template" in good(folder, *SFT, "run_dir=chat")


@pytest.mark.parametrize("command", ["train", "sft", "evaluate"])
def test_a_template_in_error_leaves_no_folder(folder: Path, command: str) -> None:
    write_checkpoint("llada", folder / "base")
    settings = json.loads((folder / "base" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('no') }}"
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    arguments = {"train": RL, "sft": SFT, "evaluate": ("evaluate", *RL[1:3], "model=auto", "model.path=base")}[command]
    assert "cannot lay a prompt out" in bad(folder, *arguments, "run_dir=run")
    assert not (folder / "run").exists()


def test_prompts_that_spell_the_mask_are_refused_at_the_start(folder: Path) -> None:
    write_checkpoint("llada", folder / "base")
    (folder / "varied.py").write_text(VARIED.replace('f"{split} {n}")', 'f"{split} {n}" + "<|mdm_mask|>" * (n == 3))'))
    message = bad(folder, *RL, "run_dir=run", "leaks=allow")
    assert "prompt test/3: has the text <|mdm_mask|>" in message and not (folder / "run").exists()
    (folder / "varied.py").write_text(VARIED)
    rows = [{"prompt": f"<|mdm_mask|>{n}", "completion": "b", "reward": n} for n in range(2)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = bad(folder, *RL, "algorithm=dro", "data=data.jsonl", "run_dir=run")
    assert "data.jsonl:1" in message and "`prompt` spells the mask token <|mdm_mask|>" in message


@pytest.mark.parametrize(("file", "text"), [
    ("tokenizer.json", '{"model": {"type": "Unheard"}}'), ("tokenizer_config.json", "[1]"),
    ("config.json", '{"dllm_rl": 5}'),
])
def test_damaged_files_are_one_line(tmp_path: Path, file: str, text: str) -> None:
    write_checkpoint("llada", tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match="cannot be loaded") as raised:
        load_policy(str(tmp_path))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_an_export_keeps_the_block_length_that_was_asked_for(folder: Path) -> None:
    write_checkpoint("sdar", folder / "base")
    good(folder, "export", "model.path=base", "model.block_length=8", "output=wider", "format=original")
    assert json.loads((folder / "wider" / "config.json").read_text())["block_size"] == 8
    assert load_policy(str(folder / "wider")).rules.block_length == 8
    good(folder, "export", "model.path=base", "output=same", "format=original")
    assert (folder / "same" / "config.json").read_text() != (folder / "wider" / "config.json").read_text()


def test_likelihoods_know_whether_they_fit_blocks() -> None:
    fitting = [Block(block_length=4, count_from="prompt"), Block(block_length=2, count_from="prompt"), Trajectory(),
               LeftToRight()]
    others = [StratifiedCounts(), Block(block_length=4), Block(block_length=8, count_from="prompt"),
              Block(block_length=4, count_from="prompt", clean_mask_prob=0.1), Trajectory(steps_per_slice=2)]
    assert all(one.fits_blocks(4) for one in fitting) and not any(one.fits_blocks(4) for one in others)
    assert isinstance(elbo_of(None, 3), StratifiedCounts) and elbo_of(4, 3).fits_blocks(4)


def test_training_says_what_does_not_fit(folder: Path) -> None:
    write_checkpoint("sdar", folder / "base")
    train = (*RL, "trainer.steps=1", "likelihood.num_samples=1")
    assert NOTE in good(folder, *train, "run_dir=elbo")
    blocks = ("likelihood=block", "likelihood.block_length=4", "likelihood.count_from=prompt")
    assert NOTE not in good(folder, *train, *blocks, "run_dir=block")
    assert NOTE not in good(folder, *train, "likelihood=trajectory", "run_dir=trajectory")
    write_checkpoint("llada", folder / "both_ways")
    assert NOTE not in good(folder, *train, "model.path=both_ways", "run_dir=llada")


def seen(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[PromptBatch, Tensor, Tensor]]:
    """Fills with the prompts, canvases and scored positions that the policy is asked about."""
    calls: list[tuple[PromptBatch, Tensor, Tensor]] = []
    logps = policy.logps

    def spy(prompts: PromptBatch, canvas: Tensor, positions: Tensor, *more: Any) -> Tensor:
        calls.append((prompts, canvas, positions))
        return logps(prompts, canvas, positions, *more)

    monkeypatch.setattr(policy, "logps", spy)
    return calls


def masks_before_scored_blocks(policy: Policy, call: tuple[PromptBatch, Tensor, Tensor]) -> bool:
    prompts, canvas, positions = call
    block = (prompts.mask.sum(1, keepdim=True) + torch.arange(canvas.shape[1])) // BLOCK
    first = torch.where(positions, block, 10**6).amin(1, keepdim=True)
    return bool(((canvas == policy.mask_id) & (block < first)).any())


def test_fine_tuning_and_lm_eval_meet_the_states_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("sdar", tmp_path)
    policy = load_policy(str(tmp_path))
    prompts = policy.encode_prompts(["abc", "ab", "a"], torch.arange(3))
    ids = policy.encode_completions(["some words here"] * 3, 20)
    completions = Completions(prompts.ids, prompts.mask, prompts.sample_ids, ids, torch.zeros_like(ids))
    calls = seen(policy, monkeypatch)
    for step in range(10):
        assert demonstration_loss(policy, completions, seed=0, step=step).isfinite()
    lm = MaskedDiffusionLM(str(tmp_path), num_samples=8, device="cpu")
    asked = seen(lm.policy, monkeypatch)
    lm._elbos(completions)
    assert len(calls) == 10 and asked
    assert not any(masks_before_scored_blocks(policy, call) for call in [*calls, *asked])
    assert len({tuple(positions[0].tolist()) for _, _, positions in calls}) > 3
    with pytest.raises(UserError, match="likelihood=coupled: must be elbo: the model's attention is causal between blocks"):
        MaskedDiffusionLM(str(tmp_path), likelihood="coupled", device="cpu")


def test_a_cache_wants_prompts_padded_on_the_left(tmp_path: Path) -> None:
    write_checkpoint("dream", tmp_path)
    policy = load_policy(str(tmp_path))
    ids = torch.tensor([[1, 2, 3], [4, 5, policy.pad_id]])
    batch = PromptBatch(ids, ids != policy.pad_id, torch.arange(2))
    with pytest.raises(ValueError, match="padded on the left"):
        policy.cache(batch, 4, exact=False)
