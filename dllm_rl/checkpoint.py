"""Checkpoints that are either complete or not there.

A checkpoint is written to a temporary folder, its manifest (size and SHA-256 of every file) last, and then renamed. Random
numbers are keyed by the step (`diffusion/noise.py`), so the step is the state of every generator and of the data order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy
from dllm_rl.models.value_head import ValueModel

MANIFEST = "manifest.json"
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
    for old in _step_folders(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run. Damaged ones are passed over with a message; None if none is left."""
    for folder in reversed(_step_folders(run_dir)):
        damage = _damage(folder)
        if damage is None:
            return folder
        print(f"passing over {folder}: {damage}")
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`, and `step`."""
    state: dict[str, Any] = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    return state


def resolve_model_path(path: str) -> str:
    """A run folder stands for its newest complete checkpoint; any other path is returned as it is.

    Raises:
        UserError: a run folder without a complete checkpoint.
    """
    run_dir = Path(path).expanduser()
    if not (run_dir / "checkpoints").is_dir():
        return path
    newest = latest_checkpoint(run_dir)
    if newest is None:
        raise UserError(f"model.path={path}: is a run folder without a complete checkpoint; must be a run folder with one, "
                        "a checkpoint folder, or a hub name")
    return str(newest)


def weights_digest(path: str) -> str:
    """Tells the weights in a folder from others: a hash of the names, sizes and times of its files, or with a manifest of
    their contents. A hub name stands for itself."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    if (folder / MANIFEST).is_file():
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _step_folders(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files}
    for path in files:
        _sync(path)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, facts in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return f"{name} is missing or has another size"
        if _digest(path) != facts["sha256"]:
            return f"{name} has another SHA-256"
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
