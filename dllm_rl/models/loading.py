"""From a path to a network and its tokenizer, without any code of the checkpoint's.

A path is a run folder (its newest checkpoint), a checkpoint in its original format or in ours, a folder with a LoRA
adapter, or a name on the hub. An original checkpoint is streamed: tensor by tensor from its files into an empty network, on
the target device and in the target precision.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dllm_rl.errors import UserError, check
from dllm_rl.models.adapter import base_of, is_adapter, merge
from dllm_rl.models.families import FACTS, HEAD, NATIVE, Family, recognise
from dllm_rl.models.quantization import four_bit, packed
from dllm_rl.run_folder import resolve_model_path

CHECKPOINT_FILES = "config.json, model.safetensors and the tokenizer's files"
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
"""What is fetched from the hub: no code."""
INDEX = "model.safetensors.index.json"
TOKENS = ("mask", "eos", "pad")
STORED = "stored"
PRECISIONS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of safetensors and of torch, the widest first."""


@dataclass(frozen=True)
class LoadOptions:
    """How a network is loaded."""

    dtype: str = "float32"
    """A precision of torch, or `stored`: that of the checkpoint's files."""
    attn_implementation: str | None = None
    quantization: str | None = None
    block_length: int | None = None


def load(
    path: str, key: str = "model.path", options: LoadOptions | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Network and tokenizer. `key` is what messages call the path.

    Raises:
        UserError: the folder lacks the configuration, weights or tokenizer, or the hub has no such model.
    """
    options = options or LoadOptions()
    folder = local_folder(path, key)
    if is_adapter(folder):
        nf4 = options.quantization
        check(nf4 is None, "model.quantization", nf4, f"null with {key}={folder}: an adapter is merged into whole weights")
        # Rounded to 16 bits, the sum would lose what a short training has changed.
        options = replace(options, dtype="float32") if options.dtype == STORED else options
        network, tokenizer = load(base_of(folder, key), f"{key}={folder}: base_model_name_or_path", options)
        network = merge(network, folder, key, options.block_length)
        own = (folder / "tokenizer.json").is_file()
        return network, AutoTokenizer.from_pretrained(folder) if own else tokenizer
    _check_folder(folder, key)
    try:
        if options.dtype == STORED:
            options = replace(options, dtype=widest(folder))
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        check(isinstance(settings, dict), f"{key}={path}: config.json", settings, "an object with names")
        family = recognise(settings, f"{key}={path}")
        if family is NATIVE:
            return _load_native(folder, options, f"{key}={path}"), AutoTokenizer.from_pretrained(folder)
        return _load_family(folder, settings, family, options, f"{key}={path}", source=path)
    except UserError:
        raise
    except Exception as error:  # what a damaged file makes the libraries raise is anybody's guess
        raise _cannot(path, key, error) from None


@contextmanager
def construction(key: str, attention: str | None = None) -> Iterator[None]:
    """Around what turns a config.json into a network: whatever fails there becomes one line that names the folder.

    A bad value makes transformers raise almost any exception, from its own checks down to a division by zero.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ImportError) and attention:
            raise UserError(f"model.attn_implementation={attention}: cannot be used here ({reason})") from None
        raise UserError(f"{key}: config.json makes no network ({type(error).__name__}: {reason})") from None


def local_folder(path: str, key: str = "model.path") -> Path:
    """The folder that a path stands for. A name on the hub is downloaded, into the cache of huggingface_hub."""
    path = resolve_model_path(path, key)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if _looks_local(path):
        raise UserError(f"{key}={path}: no such folder; must be a folder with {CHECKPOINT_FILES}, or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(path, allow_patterns=DOWNLOADED))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise _cannot(path, key, error) from None


def _cannot(path: str, key: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0]
    return UserError(f"{key}={path}: cannot be loaded, must be a folder with {CHECKPOINT_FILES}, or a hub name ({reason})")


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a folder: a hub name is `name` or `owner/name`, and asking the hub for
    anything else only makes the user wait."""
    parent = Path(path).parent
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or (parent != Path(".") and parent.is_dir())


def _check_folder(folder: Path, key: str) -> None:
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "merges.txt").is_file()
    missing = [name for name, there in (
        ("config.json", (folder / "config.json").is_file()),
        ("model.safetensors", any(folder.glob("*.safetensors"))),
        ("tokenizer.json", has_tokenizer),
    ) if not there]
    if missing:
        raise UserError(f"{key}={folder}: has no {' and no '.join(missing)}; must hold {CHECKPOINT_FILES}")


def _load_native(folder: Path, options: LoadOptions, key: str) -> Any:
    whole = options.quantization is None
    check(whole, "model.quantization", options.quantization, "null: only checkpoints of a family can be loaded in 4 bits")
    check(options.block_length is None, "model.block_length", options.block_length, "null: the model is not block-causal")
    with construction(key, options.attn_implementation):
        empty_network(transformers.AutoConfig.from_pretrained(folder), options.attn_implementation)
    choice = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype), **choice)


def _load_family(
    folder: Path, settings: dict[str, Any], family: Family, options: LoadOptions, key: str, source: str
) -> tuple[Any, PreTrainedTokenizerBase]:
    converted = FACTS in settings
    if converted:
        with construction(key):
            config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = getattr(transformers, family.tokenizer_class).from_pretrained(folder)
        with construction(key):
            config = native_config(settings, family)
        name_tokens(tokenizer, settings, family, config.vocab_size, key)
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        there = Path(source).expanduser()
        getattr(config, FACTS).update(source=str(there.resolve()) if there.is_dir() else source, **storage(folder, family))
    if options.block_length is not None:
        valid = f"null with the family {family.name}: it is not block-causal"
        check(family.block_length is not None, "model.block_length", options.block_length, valid)
        getattr(config, FACTS)["block_length"] = options.block_length
    with construction(key, options.attn_implementation):
        network = empty_network(config, options.attn_implementation)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    fill(network, folder, None if converted else family, getattr(torch, options.dtype), device, options.quantization, key)
    return network, tokenizer


def native_config(settings: dict[str, Any], family: Family) -> Any:
    """The configuration of transformers for an original config.json, which it keeps."""
    config = getattr(transformers, family.config_class)(**family.convert(settings), bos_token_id=None, use_cache=False)
    config.is_causal = False
    written = (settings.get(name) for name in ("block_length", "block_size"))
    block = next((value for value in written if value is not None), family.block_length)
    fits = family.block_length is None or (type(block) is int and block >= 1)
    check(fits, "config.json: block_size", repr(block), "an integer >= 1")
    facts = {"family": family.name, "block_length": block if family.block_length else None, "original": settings}
    setattr(config, FACTS, facts)
    return config


def empty_network(config: Any, attn_implementation: str | None = None) -> Any:
    """The network without weights: parameters on the meta device, buffers (rotary frequencies) as they are."""
    choice = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, **choice)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index where there is one."""
    if (folder / INDEX).is_file():
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        check(isinstance(places, dict), f"{folder / INDEX}: weight_map", places, "an object from tensors to files")
        return [folder / name for name in sorted({*map(str, places.values())})]
    return sorted(folder.glob("*.safetensors"))


def stored_dtypes(folder: Path) -> dict[str, tuple[str, int]]:
    """The precision of each tensor in a folder's files, and its number of entries."""
    found = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                kind = part.get_dtype()
                check(kind in PRECISIONS, f"{file}: precision of {name}", kind, ", ".join(PRECISIONS))
                found[name] = PRECISIONS[kind], math.prod(part.get_shape())
    return found


def widest(folder: Path) -> str:
    """The widest precision of a checkpoint's tensors."""
    found = {dtype for dtype, _ in stored_dtypes(folder).values()}
    if found == {"bfloat16", "float16"}:
        return "float32"  # which holds both
    return next((dtype for dtype in PRECISIONS.values() if dtype in found), "float32")


def storage(folder: Path, family: Family) -> dict[str, Any]:
    """How an original checkpoint is stored, as far as its tensors in a network do not tell: the precision of most entries,
    tensors with another one, and whether an output head is there (which a network with tied embeddings would do without).
    """
    found = stored_dtypes(folder)
    sizes: Counter[str] = Counter()
    for dtype, size in found.values():
        sizes[dtype] += size
    usual = max(sizes, key=lambda dtype: sizes[dtype], default="float32")
    others = {name: dtype for name, (dtype, _) in found.items() if dtype != usual}
    return {"dtype": usual, "other_dtypes": others, "head_stored": any(family.to_native(name) == HEAD for name in found)}


def fill(
    network: Any, folder: Path, family: Family | None, dtype: torch.dtype, device: torch.device, quantization: str | None,
    key: str,
) -> None:
    """Streams the weights of a folder into an empty network. `family` translates their names, None: they are ours.

    Raises:
        UserError: tensors are missing, unknown or of another shape.
    """
    shapes = {name: parameter.shape for name, parameter in network.named_parameters(remove_duplicate=False)}
    missing = {*shapes}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for original in tensors.keys():  # noqa: SIM118 - no mapping
                name = original if family is None else family.to_native(original)
                if name is None or name not in shapes:
                    raise UserError(f"{key}: {file.name} has the tensor {original}, which the architecture does not")
                tensor = tensors.get_tensor(original)
                if tensor.shape != shapes[name]:
                    raise UserError(f"{key}: {original} has the shape {list(tensor.shape)}; must be {list(shapes[name])}")
                place(network, name, tensor, dtype, device, quantization)
                missing.discard(name)
    if network.config.tie_word_embeddings:
        tie(network, key)
        missing.discard(HEAD)
    if missing:
        raise UserError(f"{key}: the weights have no {min(missing)}")
    network.to(device)  # the buffers; parameters are there already


def tie(network: Any, key: str) -> None:
    """Makes the embeddings the output head.

    Raises:
        UserError: the checkpoint has a head of its own, with other weights.
    """
    head, embeddings = network.get_output_embeddings().weight, network.get_input_embeddings().weight
    if not head.is_meta and not torch.equal(head, embeddings):
        raise UserError(f"{key}: config.json ties the output head to the embeddings, but the weights have another head; set "
                        "tie_word_embeddings (LLaDA: weight_tying) to false in config.json if that head is the model's")
    network.tie_weights()


def place(
    network: Any, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> None:
    """Puts one tensor in its place, as a copy: the file's memory is not kept."""
    module_name, _, leaf = name.rpartition(".")
    module = network.get_submodule(module_name)
    if quantization and isinstance(module, nn.Linear) and module is not network.get_output_embeddings():
        module = four_bit(network, module_name, module)
        if leaf == "weight":
            module.weight = packed(tensor.to(dtype), device)
            return
    setattr(module, leaf, nn.Parameter(tensor.to(device, dtype, copy=True)))


def name_tokens(
    tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], family: Family, rows: int, key: str
) -> None:
    """Tells the tokenizer its mask, EOS and padding tokens: by config.json, else as it has them, else as published.

    LLaDA's tokenizer, for one, has the mask token among many others without saying that it is the mask.

    Raises:
        UserError: nothing tells an id, or it is none of the tokenizer's tokens.
    """
    for name in TOKENS:
        given = settings.get(f"{name}_token_id")
        given = next(iter(given), None) if isinstance(given, list) else given
        own = getattr(tokenizer, f"{name}_token_id")
        number = next((item for item in (given, own, family.ids.get(name)) if item is not None), None)
        if type(number) is not int or not 0 <= number < min(rows, len(tokenizer)):
            raise UserError(f"{key}: {name}_token_id={number}: must be a token's number in config.json or in the tokenizer")
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
