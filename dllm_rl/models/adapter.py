"""LoRA adapters: made, saved and read again by peft; as a model path an adapter is merged into the base that it names."""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dllm_rl.errors import UserError, bad_value, check
from dllm_rl.models.adapter_names import WEIGHTS, translated
from dllm_rl.models.families import FACTS, named, rules_of
from dllm_rl.run_folder import ADAPTER_CONFIG, adapter_settings


@dataclass
class LoRAConfig:
    """Training of low-rank additions to the weights (LoRA, arXiv 2106.09685) in place of the weights themselves.

    There is no dropout: all passes over a corruption must see the same function.
    """

    r: int = 0
    """Rank. 0: no adapter, all weights are trained."""
    alpha: int | None = None
    """The addition is scaled by alpha / r. null: 2 r."""
    targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get one. Empty: those of the model's family. [all]: every one but the output head."""

    def __post_init__(self) -> None:
        check(self.r >= 0, "model.lora.r", self.r, "an integer >= 0")
        check(self.alpha is None or self.alpha > 0, "model.lora.alpha", self.alpha, "an integer > 0, or null")


def attach(network: Any, config: LoRAConfig, base: str, seed: int) -> Any:
    """The network with a new adapter, which changes nothing yet; only the adapter takes gradients.

    Args:
        base: the path that the adapter's files will name.
        seed: the adapter's first weights depend on it alone.

    Raises:
        UserError: peft is not installed, or there is no such layer.
    """
    if find_spec("peft") is None:
        raise UserError(f"model.lora.r={config.r}: needs peft: pip install 'dllm-rl[lora]'")
    import peft

    alpha = 2 * config.r if config.alpha is None else config.alpha
    settings = peft.LoraConfig(r=config.r, lora_alpha=alpha, lora_dropout=0.0, target_modules=target_names(network, config))
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(network, settings)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def target_names(network: Any, config: LoRAConfig) -> list[str]:
    """The names of the layers that get an adapter."""
    head = network.get_output_embeddings()
    linear = {name.rpartition(".")[2] for name, module in network.named_modules()
              if isinstance(module, nn.Linear) and module is not head}
    if config.targets == ["all"]:
        return sorted(linear)
    wanted = list(config.targets) or [*named(rules_of(network.config).family).lora_targets] or sorted(linear)
    if unknown := {*wanted} - linear:
        raise bad_value("model.lora.targets", min(unknown), "[all], or names among " + ", ".join(sorted(linear)))
    return wanted


def resume(network: Any, folder: Path, block_length: int | None = None) -> Any:
    """The base network with the adapter of a checkpoint, to be trained on. `block_length`, if given, is kept."""
    from peft import PeftModel

    _adopt(network, folder, block_length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(network, str(folder), is_trainable=True)


def save(network: Any, folder: Path) -> None:
    """Writes the adapter alone, and the configuration of its base."""
    network.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form with blanks to fill in
    network.config.save_pretrained(folder)


def _adopt(network: Any, folder: Path, block_length: int | None) -> None:
    """Gives a network what the configuration beside an adapter says of its family, if it was saved here: it may have been
    trained with another block length than its base. One that the user asks for, which the base has already, wins."""
    file = folder / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8")).get(FACTS) if file.is_file() else None
    if facts and block_length is None:
        setattr(network.config, FACTS, facts)


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path, key: str) -> str:
    """The path of the base model, as the adapter's configuration has it. `key` is what messages call the folder.

    Raises:
        UserError: the folder is incomplete, holds no LoRA adapter, or peft is not installed.
    """
    settings = adapter_settings(folder, key)
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if kind != "LORA":
        raise UserError(f"{key}={folder}: {ADAPTER_CONFIG} has peft_type={kind}; must be LORA, whose weights can be merged")
    if not base:
        raise UserError(f"{key}={folder}: {ADAPTER_CONFIG} has no base_model_name_or_path; must be a folder or a hub name")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{key}={folder}: has {ADAPTER_CONFIG} but no {WEIGHTS}")
    if find_spec("peft") is None:
        raise UserError(f"{key}={folder}: is an adapter, which needs peft: pip install 'dllm-rl[lora]'")
    return str(base)


def merge(network: Any, folder: Path, key: str, block_length: int | None = None) -> Any:
    """The base model with the adapter's product of matrices added to its weights; nothing else of the adapter is left.

    Args:
        block_length: if given, kept in place of the one that the adapter was trained with.

    Raises:
        UserError: the adapter does not fit the network.
    """
    try:
        with tempfile.TemporaryDirectory() as temporary:
            merged = _merged(network, translated(network, folder, Path(temporary)))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{key}={folder}: the adapter does not fit its base model ({reason})") from None
    _adopt(merged, folder, block_length)
    return merged


def _merged(network: Any, folder: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    shared = {"lm_head", "embed_tokens"} if network.config.tie_word_embeddings else set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft warns of is an error below
        adapted = PeftModel.from_pretrained(network, str(folder))
        # Weights that only one side has would leave a part of the base model as it was.
        wanted = {*get_peft_model_state_dict(adapted, save_embedding_layers=False)}
    found = {*load_file(folder / WEIGHTS)}
    if odd := (wanted - found) | {name for name in found - wanted if "lora_" in name}:
        raise ValueError(f"{min(odd)} is only in one of them")
    if both := {name for name in wanted if shared & {*name.split(".")}}:
        raise ValueError(f"{min(both)} would change the embeddings and the output head, which share their weights")
    return adapted.merge_and_unload(safe_merge=True)
