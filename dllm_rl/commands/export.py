"""dllm-rl export: a trained model as a folder for others, adapters merged, in the published key format or transformers'.

    dllm-rl export model.path=outputs/train-sudoku-bgpo-seed0 output=exported
    dllm-rl export model.path=RUN output=exported format=original results=EVALUATION push=owner/name
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError

from dllm_rl.commands import common
from dllm_rl.errors import UserError, check
from dllm_rl.models.export import FORMATS, evaluation_table, export, facts_of, model_card
from dllm_rl.models.policy import Policy


def run(settings: common.Settings, config: DictConfig) -> None:
    """Writes the folder, complete or not at all, and pushes it if asked to."""
    del config
    source, kind = common.require_model_path(settings), settings["format"]
    check(settings["output"] is not None, "output", None, "a folder to write")
    check(kind in FORMATS, "format", kind, " or ".join(FORMATS))
    folder = Path(settings["output"]).expanduser()
    if folder.exists() and not settings["overwrite"]:
        raise UserError(f"output={folder}: is there already; overwrite=true replaces it")
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"output={folder}: holds no exported model; overwrite=true replaces only one")
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    check(nearest.is_dir(), "output", folder, f"a folder to write: {nearest} is a file")
    results = _results(settings["results"])
    model = replace(settings["model"], quantization=None)
    policy = common.build_policy({"model": model, "seed": 0})
    check(not policy.adapted, "model.lora.r", model.lora.r, "0: an adapter is exported by its path")
    check(kind == "native" or bool(facts_of(policy)), "format", kind, "native: this model was never in another format")
    notes = _write(policy, folder, kind, model_card(policy, kind, source, _choices(source), results))
    print("\n".join([*(f"note: {note}" for note in notes), f"exported: {folder} ({kind} format)"]))
    if settings["push"]:
        _push(folder, str(settings["push"]))


def _write(policy: Policy, folder: Path, kind: str, card: str) -> list[str]:
    """Writes beside the folder first, and puts it in place when it is complete. Returns notes for the user."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        notes = export(policy, temporary, kind)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"output={folder}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return notes


def _results(path: str | None) -> dict[str, Any]:
    """The content of a results.json, given by its path or by the folder of an evaluation."""
    if path is None:
        return {}
    file = Path(path).expanduser()
    file = file / "results.json" if file.is_dir() else file
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        evaluation_table(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"results={path}: must be a results.json of dllm-rl evaluate, or its folder ({reason})") from None
    return found


def _choices(source: str) -> dict[str, str]:
    """What the run behind a model path was made with, where the path is a run folder."""
    file = Path(source).expanduser() / common.CHOICES
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _push(folder: Path, name: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        url = api.upload_folder(repo_id=name, folder_path=folder)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"push={name}: cannot be written on the hub ({reason}); the folder {folder} is complete") from None
    print(f"pushed: {url}")


def main() -> None:
    common.launch("export", run)


if __name__ == "__main__":
    main()
