"""A policy as a folder for others: in the key format that its checkpoint was published in, or as transformers has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from dllm_rl.errors import UserError
from dllm_rl.models.families import FACTS, HEAD, named
from dllm_rl.models.policy import Policy

FORMATS = ("native", "original")
COPIED = ("tokenizer*.json", "tokenizer*.model", "vocab*.json", "vocab*.txt", "merges*.txt", "special_tokens_map.json",
          "added_tokens.json", "generation_config.json", "chat_template*.jinja", "chat_template*.json", "*.py", "LICENSE*")
"""Files of an original checkpoint that belong to its copy; whatever else lies in its folder does not."""


def export(policy: Policy, folder: Path, kind: str, max_shard_size: str = "5GB") -> list[str]:
    """Writes weights, configuration and tokenizer; returns notes for the user. Adapters must be merged already.

    Raises:
        UserError: the policy never was in another format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "original":
        return _original(policy, folder, max_shard_size)
    facts = facts_of(policy)
    if facts:
        facts["source"] = _public(facts["source"])
    policy.network.save_pretrained(folder, max_shard_size=max_shard_size)
    policy.tokenizer.save_pretrained(folder)
    return []


def _public(source: str) -> str:
    """A hub name as it is, of a folder only the name."""
    return Path(source).name if Path(source).is_absolute() else source


def facts_of(policy: Policy) -> dict[str, Any]:
    """What is known of the checkpoint that the policy comes from; empty where it never had another format."""
    found: dict[str, Any] = getattr(policy.network.config, FACTS, None) or {}
    return found


def _original(policy: Policy, folder: Path, max_shard_size: str) -> list[str]:
    facts = facts_of(policy)
    if not facts:
        raise UserError("format=original: this model was never in another format; must be native")
    save_torch_state_dict(_original_tensors(policy, facts), folder, max_shard_size=max_shard_size)
    written = dict(facts["original"])
    if facts["block_length"] not in (None, written.get("block_length", written.get("block_size"))):  # model.block_length=
        written["block_length" if "block_length" in written else "block_size"] = facts["block_length"]
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    source = _published(facts)
    if source is None:
        policy.tokenizer.save_pretrained(folder)
        return ["the tokenizer's files are as transformers writes them, and code that config.json names is not here: copy "
                f"both from {facts['source']} to load this folder with the published code"]
    for file in sorted({file for pattern in COPIED for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, folder / file.name)
    if "auto_map" in facts["original"] and not any(folder.glob("*.py")):
        return [f"code that config.json names is not here: copy it from {facts['source']} to load this folder with it"]
    return []


def _original_tensors(policy: Policy, facts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights under their published names, each in the precision that it was stored in."""
    family, tied = named(facts["family"]), policy.network.config.tie_word_embeddings
    others, state = facts.get("other_dtypes", {}), {}
    for name, tensor in policy.network.state_dict().items():
        key = family.to_original(name)
        if key is None:
            raise UserError(f"format=original: the family {family.name} has no name for {name}")
        if name != HEAD or not tied:
            state[key] = tensor.detach().to("cpu", getattr(torch, others.get(key, facts["dtype"])))
        elif facts.get("head_stored"):  # a copy: files hold no two names for the same memory
            state[key] = tensor.detach().to("cpu", getattr(torch, others.get(key, facts["dtype"])), copy=True)
    return state


def _published(facts: dict[str, Any]) -> Path | None:
    """The folder of the checkpoint that the policy comes from, if it is still there and still that checkpoint."""
    from huggingface_hub import snapshot_download

    source = Path(facts["source"])
    if not source.is_absolute():  # the name of a folder, which says nothing here, or one on the hub
        try:
            source = Path(snapshot_download(facts["source"], local_files_only=True))
        except (OSError, ValueError):
            return None
    try:
        same = json.loads((source / "config.json").read_text(encoding="utf-8")) == facts["original"]
    except (OSError, ValueError):
        return None
    return source if same else None


def model_card(policy: Policy, kind: str, source: str, choices: dict[str, str], results: dict[str, Any]) -> str:
    """README.md of an exported model.

    Args:
        source: what `model.path` named.
        choices: of the run, such as `{"algorithm": "bgpo", "task": "sudoku"}`.
        results: content of a results.json of `dllm-rl evaluate`; may be empty.
    """
    rules, base = policy.rules, facts_of(policy).get("source", "")
    hub = base if "/" in base and not Path(base).is_absolute() else None
    head = ["---", *([f"base_model: {hub}"] if hub else []), "library_name: transformers", "pipeline_tag: text-generation",
            "tags:", "- masked-diffusion", "- dllm-rl", *([f"- {choices['algorithm']}"] if "algorithm" in choices else []),
            "---", ""]
    made = f"algorithm `{choices['algorithm']}` on " if "algorithm" in choices else ""
    trained = f"Trained with dllm-rl: {made}task `{choices['task']}`." if "task" in choices else "Exported by dllm-rl."
    attention = "both directions" + (f" in blocks of {rules.block_length} tokens" if rules.block_length else "")
    facts = [f"# {Path(source).name}", "", trained, "", "| | |", "|---|---|",
             f"| family | {rules.family} |", f"| base model | {hub or Path(base).name or 'none'} |",
             f"| format | {kind} |", f"| attention | {attention} |", f"| logit shift | {rules.logit_shift} |",
             f"| mask, EOS, padding | {policy.mask_id}, {policy.eos_id}, {policy.pad_id} |", ""]
    return "\n".join([*head, *facts, *evaluation_table(results), *_usage(kind)]) + "\n"


def evaluation_table(results: dict[str, Any]) -> list[str]:
    """The lines of a model card about the content of a results.json; of anything else it raises one of Python's errors."""
    if not results:
        return []
    lines = ["## Evaluation", "", "| task | protocol | metric | prompts | value | 95 % interval |", "|---" * 6 + "|"]
    for task, found in results.items():
        for row in found["metrics"]:
            lines.append(f"| {task} | {found.get('protocol', '')} | {row['metric']} | {row['n']} | {row['value']:.3f} "
                         f"| {row['low']:.3f} to {row['high']:.3f} |")
    return [*lines, ""]


def _usage(kind: str) -> list[str]:
    if kind == "original":
        return ["The keys and the configuration are those of the published checkpoint: its own code loads this folder."]
    return ["`transformers.AutoModelForCausalLM` loads this folder without remote code. It is a masked-diffusion model: its",
            "logits predict masked tokens, and `generate` does not apply. `dllm-rl generate model=auto model.path=FOLDER`",
            "samples from it."]
