"""From random weights in LLaDA's and Dream's formats to a trained, resumed, exported and reloaded model, as users do it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dllm_rl.models.policy import load_policy
from tests import original_models
from tests.original_models import write_checkpoint
from tests.test_cli import good
from tests.test_lora import newest

SIZES = {"WIDTH": 64, "LAYERS": 3, "HEADS": 4, "KV_HEADS": 2, "INNER": 192}
MODES = {"lora": (["model.lora.r=16", "optimizer.lr=1e-3"], "adapter_model.safetensors"), "full": ([], "model.safetensors")}


@pytest.fixture(scope="module", params=["llada", "dream"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `random` and `base`, both in the original format: before and after fine-tuning on Sudoku."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SIZES.items():
            patch.setattr(original_models, name, value)
        write_checkpoint(request.param, folder / "random")
    good(folder, "sft", "task=sudoku", "model=auto", "model.path=random", "run_dir=sft")
    good(folder, "export", "model.path=sft", "output=base", "format=original")
    return folder


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.heavy
@pytest.mark.parametrize("mode", MODES)
def test_bgpo_lifts_a_family_and_its_export_is_the_same_model(pretrained: Path, mode: str) -> None:
    folder, (settings, weights) = pretrained, MODES[mode]
    train = ["train", "task=sudoku", "model=auto", "model.path=base", "likelihood.num_samples=4", *settings]
    good(folder, *train, f"run_dir={mode}")
    rows = evaluations(folder / mode)
    first, last = rows[0], rows[-1]
    print(f"\n{folder.name} {mode}: greedy {first['greedy/reward']:.3f} to {last['greedy/reward']:.3f}, "
          f"sampled {first['sampled/reward']:.3f} to {last['sampled/reward']:.3f}, n = {last['n']}")
    assert last["intervals"]["greedy/reward"][0] > first["intervals"]["greedy/reward"][1], "95 % intervals are apart"
    assert last["sampled/reward"] > first["sampled/reward"]

    # As if the run had been killed: without its last checkpoint, it ends in the same weights bit for bit.
    shutil.copytree(folder / mode, folder / f"{mode}-half")
    shutil.rmtree(newest(folder / f"{mode}-half"))
    good(folder, *train, f"run_dir={mode}-half", "resume=auto")
    whole, half = (load_file(newest(folder / name) / weights) for name in (mode, f"{mode}-half"))
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())

    trained = load_policy(str(folder / mode))
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 12::2] = trained.mask_id
    expected = trained.network(input_ids=ids, use_cache=False).logits
    good(folder, "export", f"model.path={mode}", f"output={mode}-native")
    plain = AutoModelForCausalLM.from_pretrained(folder / f"{mode}-native").eval()
    assert torch.equal(plain(input_ids=ids, use_cache=False).logits, expected), "plain transformers, the same logits"
    good(folder, "export", f"model.path={mode}", f"output={mode}-original", "format=original")
    again = load_policy(str(folder / f"{mode}-original"))
    assert torch.equal(again.network(input_ids=ids, use_cache=False).logits, expected)
    base = load_policy(str(folder / "base")).network(input_ids=ids, use_cache=False).logits
    assert (base - expected).abs().max() > 0.1
