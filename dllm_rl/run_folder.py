"""Which checkpoint of a run folder to load (the newest whose files are those of its manifest), and which weights it has."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dllm_rl.errors import UserError

MANIFEST = "manifest.json"
ADAPTER_CONFIG = "adapter_config.json"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run. Damaged ones are passed over with a message; None if none is left."""
    for folder in reversed(step_folders(run_dir)):
        damage = _damage(folder)
        if damage is None:
            return folder
        print(f"passing over {folder}: {damage}")
    return None


def resolve_model_path(path: str, key: str = "model.path") -> str:
    """A run folder stands for its newest complete checkpoint; any other path is returned as it is.

    Raises:
        UserError: a run folder without a complete checkpoint. `key` is what the message calls the path.
    """
    run_dir = Path(path).expanduser()
    if not (run_dir / "checkpoints").is_dir():
        return path
    newest = latest_checkpoint(run_dir)
    if newest is None:
        raise UserError(f"{key}={path}: is a run folder without a complete checkpoint; must be a run folder with one, "
                        "a checkpoint folder, or a hub name")
    return str(newest)


def weights_digest(path: str) -> str:
    """Tells the weights in a folder from others: a hash of the names, sizes and times of its files, or with a manifest of
    their contents. An adapter's is of its base as well. A hub name stands for itself."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    if (folder / MANIFEST).is_file():
        own = (folder / MANIFEST).read_bytes()
    else:
        files = sorted(folder.glob("*.safetensors"))
        own = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]).encode()
    if (folder / ADAPTER_CONFIG).is_file():
        settings = adapter_settings(folder, "model.path")
        base = str(settings.get("base_model_name_or_path"))
        resolved = resolve_model_path(base, f"model.path={path}: base_model_name_or_path")
        own = repr((own, settings, weights_digest(resolved))).encode()
    return hashlib.sha256(own).hexdigest()[:16]


def adapter_settings(folder: Path, key: str) -> dict[str, Any]:
    """What peft wrote down about the adapter in a folder. `key` is what messages call the folder."""
    try:
        settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{key}={folder}: {ADAPTER_CONFIG} is not JSON ({error})") from None
    return settings


def step_folders(run_dir: Path) -> list[Path]:
    """All checkpoints of a run, the oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        if digest_of(path) != facts["sha256"]:
            return f"{name} has another SHA-256"
    return None
