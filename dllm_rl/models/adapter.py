"""LoRA adapters as model paths: a folder that peft wrote, merged into the base model that it names."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dllm_rl.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: Path, key: str) -> str:
    """The path of the base model, as the adapter's configuration has it. `key` is what messages call the folder.

    Raises:
        UserError: the folder is incomplete, holds no LoRA adapter, or peft is not installed.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{key}={folder}: {CONFIG} is not JSON ({error})") from None
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind != "LORA":
        raise UserError(f"{key}={folder}: {CONFIG} has peft_type={kind}; must be LORA, whose weights can be merged")
    if not base:
        raise UserError(f"{key}={folder}: {CONFIG} has no base_model_name_or_path; must be a model folder or a hub name")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{key}={folder}: has {CONFIG} but no {WEIGHTS}")
    if find_spec("peft") is None:
        raise UserError(f"{key}={folder}: is an adapter, which needs peft: pip install 'dllm-rl[lora]'")
    return str(base)


def merge(network: Any, folder: Path, key: str) -> Any:
    """The base model with the adapter's product of matrices added to its weights; nothing else of the adapter is left.

    Raises:
        UserError: the adapter does not fit the network.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is an error below
            adapted = PeftModel.from_pretrained(network, str(folder))
            # Weights that only one side has would leave a part of the base model as it was.
            wanted = {*get_peft_model_state_dict(adapted, save_embedding_layers=False)}
        with safe_open(folder / WEIGHTS, "pt") as weights:
            found = {*weights.keys()}
        if odd := (wanted - found) | {name for name in found - wanted if "lora_" in name}:
            raise ValueError(f"{min(odd)} is only in one of them")
        return adapted.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{key}={folder}: the adapter does not fit its base model ({reason})") from None
