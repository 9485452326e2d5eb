"""Checkpoints are complete or not there: every kind of damage falls back to the one before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dllm_rl.checkpoint import STATE, load_state, save_checkpoint
from dllm_rl.errors import UserError
from dllm_rl.run_folder import MANIFEST, latest_checkpoint, resolve_model_path
from tests.conftest import make_policy


def save(run: Path, *steps: int, keep: int = 5) -> None:
    policy = make_policy(torch.float32)
    for step in steps:
        save_checkpoint(run, step, policy, {"adamw": {"value": torch.tensor([float(step)])}}, keep)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 3)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-000003"
    state = load_state(newest)
    assert state["step"] == 3 and state["adamw"]["value"].item() == 3.0


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 10, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000010"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: list[Callable[[Path], object]] = [
    lambda folder: flip(folder / "model.safetensors"),
    lambda folder: flip(folder / STATE),
    lambda folder: (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-1]),
    lambda folder: (folder / "model.safetensors").unlink(),
    lambda folder: (folder / MANIFEST).unlink(),
    lambda folder: (folder / MANIFEST).write_text('{"model'),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=["weights", "state", "cut", "missing", "unfinished", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "step-000002")
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-000001"
    assert "step-000002" in capsys.readouterr().out


def test_what_a_killed_save_leaves_is_ignored_and_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".step-000002.tmp"
    leftover.mkdir()
    (leftover / "config.json").write_text("{")
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-000001"
    save(tmp_path, 2)
    assert not leftover.exists()


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    assert resolve_model_path("owner/model") == "owner/model"
    save(tmp_path, 1, 2)
    assert resolve_model_path(str(tmp_path)).endswith("step-000002")
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:06d}" / MANIFEST).unlink()
    with pytest.raises(UserError, match="without a complete checkpoint"):
        resolve_model_path(str(tmp_path))


def test_a_pickle_in_the_state_is_not_executed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step-000001"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "owned",)

    torch.save({"step": 1, "adamw": Payload()}, folder / STATE)
    with pytest.raises(Exception, match="weights_only"):
        load_state(folder)
    assert not (tmp_path / "owned").exists()
