"""Checkpoints that are either complete or not there.

A checkpoint is written to a temporary folder, its manifest (size and SHA-256 of every file) last, and then renamed. Random
numbers are keyed by the step (`diffusion/noise.py`), so the step is the state of every generator and of the data order.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from dllm_rl.models.policy import Policy
from dllm_rl.models.value_head import ValueModel
from dllm_rl.run_folder import MANIFEST, digest_of, latest_checkpoint, resolve_model_path, step_folders, weights_digest

__all__ = [
    "MANIFEST", "STATE", "latest_checkpoint", "load_state", "resolve_model_path", "save_checkpoint", "weights_digest",
]

STATE = "trainer.pt"


def save_checkpoint(
    run_dir: Path, step: int, policy: Policy, state: dict[str, Any], keep: int, critic: ValueModel | None = None
) -> Path:
    """Writes `checkpoints/step-NNNNNN` of a run and removes all but the newest `keep` complete ones.

    Args:
        step: optimizer steps or updates done.
        state: tensors and plain values needed to continue, such as the optimizer's `state_dict`.
        critic: saved beside the policy.
    """
    final = run_dir / "checkpoints" / f"step-{step:06d}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    policy.save(temporary)
    if critic:
        critic.save(temporary)
    torch.save({"step": step, **state}, temporary / STATE)
    _write_manifest(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(final.parent)
    for old in step_folders(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`, and `step`."""
    state: dict[str, Any] = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    return state


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest_of(path)} for path in files}
    for path in files:
        _sync(path)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
