"""Adapters that were trained with a checkpoint's own code: the names of the layers in them become ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from dllm_rl.models.families import Family, named, rules_of

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def translated(network: Any, folder: Path, target: Path) -> Path:
    """The adapter of `folder` with our names, written into `target`; `folder` itself where it has them already.

    Example: LLaDA's `base_model.model.model.transformer.blocks.3.attn_out.lora_A.weight` becomes
    `base_model.model.model.layers.3.self_attn.o_proj.lora_A.weight`.

    Raises:
        ValueError: the adapter has more than products of matrices.
    """
    family = named(rules_of(network.config).family)
    weights = load_file(folder / WEIGHTS)
    names = {name: _native(family, name) for name in weights}
    if not family.keys or not any(names.values()):
        return folder
    if unknown := [name for name, ours in names.items() if ours is None]:
        raise ValueError(f"{min(unknown)} is no layer of the family {family.name}")
    _settings(network, family, folder).save_pretrained(str(target))
    save_file({str(names[name]): tensor for name, tensor in weights.items()}, target / WEIGHTS)
    return target


def _native(family: Family, name: str) -> str | None:
    """Our name of an adapter's tensor that has a name of the original; None if it has none."""
    module, mark, rest = name.removeprefix(PREFIX).partition(".lora_")
    ours = family.to_native(f"{module}.weight")
    return None if ours is None or not mark else f"{PREFIX}{ours.removesuffix('.weight')}.lora_{rest}"


def _settings(network: Any, family: Family, folder: Path) -> Any:
    """The adapter's configuration with the full names here of the layers that it names there."""
    from peft import PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    settings: Any = PeftConfig.from_pretrained(str(folder))
    if settings.modules_to_save or settings.rank_pattern or settings.alpha_pattern:
        raise ValueError("modules_to_save, rank_pattern and alpha_pattern must be empty in an adapter with the names of the "
                         "original")
    chosen = []
    for name, module in network.named_modules():
        original = family.to_original(f"{name}.weight")
        if original and isinstance(module, (nn.Linear, nn.Embedding)):
            chosen += [name] if check_target_module_exists(settings, original.removesuffix(".weight")) else []
    settings.target_modules = sorted(chosen)
    settings.exclude_modules = settings.layers_to_transform = settings.layers_pattern = None
    return settings
