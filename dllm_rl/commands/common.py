"""What the commands share: composing the configuration, one-line errors, run folder names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dllm_rl import sandbox
from dllm_rl.checkpoint import load_state
from dllm_rl.config import load_plugins, register
from dllm_rl.diffusion.likelihood import Denoiser
from dllm_rl.errors import UserError, bad_value, check
from dllm_rl.models.adapter import is_adapter
from dllm_rl.models.policy import Policy, WithoutAdapter
from dllm_rl.run_folder import latest_checkpoint, resolve_model_path
from dllm_rl.task import Prompt
from dllm_rl.tracking import FREE_KEYS, RunFolder, replace_text

Settings = dict[str, Any]
CHOICES = "choices.json"
"""File of a run folder: what was chosen by name in each group."""


def launch(config_name: str, body: Callable[[Settings, DictConfig], None]) -> None:
    """Composes conf/`config_name`.yaml with the command line and calls `body(settings, config)`.

    `settings` holds one instance per group and section; `config` is the same as plain values. Mistakes of the user end
    the process with one line on stderr and exit code 2.
    """
    _quiet_libraries()
    sys.argv[1:] = [re.sub("^protocol=", "task.protocol=", argument) for argument in sys.argv[1:]]
    # Hydra would print its own multi-line message and exit; with this it raises, and the message below is one line.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")

    @hydra.main(version_base="1.3", config_path="pkg://dllm_rl.conf", config_name=config_name)
    def entry(config: DictConfig) -> None:
        try:
            body(instances(config), config)
        except UserError as error:
            fail(str(error))

    try:
        register(sys.argv[1:])
        load_plugins(plugin_names(sys.argv[1:]))
        entry()
    except UserError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; nothing is left to say on stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        fail("interrupted; resume=auto continues from the last checkpoint", code=130)


def plugin_names(arguments: Sequence[str]) -> list[str]:
    """What `plugins=[a,b.py]` on the command line names; it is read before Hydra looks at any group."""
    found = [argument.partition("=")[2] for argument in arguments if argument.startswith("plugins=")]
    return [name.strip("'\" ") for text in found for name in text.strip("[]").split(",") if name.strip("'\" ")]


def instances(config: DictConfig) -> Settings:
    """The configuration as instances of the dataclasses, each of which checks its own values. `sandbox` takes effect."""
    try:
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    assert isinstance(settings, dict)
    if "sandbox" in settings:
        sandbox.configure(settings["sandbox"])
    return {str(key): value for key, value in settings.items()}


def explain(error: Exception) -> str:
    """Hydra's message on one line, with the valid keys where a key is unknown."""
    message = re.sub(r"\.?\s*(To append to your config use|Config search path:).*", "", str(error), flags=re.DOTALL)
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException):
        message += f" ({cause.msg or cause})".replace(str(error), "")
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and isinstance(cause.parent_node, DictConfig):
            message += f"; valid are {', '.join(sorted(str(key) for key in cause.parent_node if key != 'hydra'))}"
    one_line = re.sub(r":\s*\n\s+", ": ", message.strip()).replace("\n\t", ", ")
    return " ".join(one_line.split())


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def run_directory(command: str, settings: Settings, names: Sequence[str], labels: Sequence[str] | None = None) -> Path:
    """`run_dir` if given, else a name that depends on the configuration only: no clock, so that a run can be found again.

    It begins with the choices in the groups `names`, or with `labels` in their place.
    Example: outputs/train-sudoku-bgpo-likelihood.num_samples_4-seed0
    """
    if settings["run_dir"]:
        return Path(settings["run_dir"])
    hydra_config = HydraConfig.get()
    choices = [re.sub(r"[^\w.+-]+", "_", label) for label in labels or map(group_choice, names)]
    skip = {*names, "seed", *FREE_KEYS}
    changed = [item for item in hydra_config.overrides.task if item.split("=")[0].lstrip("+~") not in skip]
    # Only signs that need no quoting in a shell or in another command's `model.path=`.
    suffix = re.sub(r"[^\w.-]+", "_", "-".join(sorted(changed)))
    if len(suffix) > 120:
        suffix = hashlib.sha256(suffix.encode()).hexdigest()[:12]
    parts = [command, *choices, *([suffix] if suffix else []), f"seed{settings['seed']}"]
    return Path(settings["output_dir"]) / "-".join(parts)


def group_choice(group: str) -> str:
    """The name chosen in a configuration group, such as `sudoku` for `task`."""
    return str(HydraConfig.get().runtime.choices[group])


def accelerator_for_one_process() -> Accelerator:
    """The accelerator: a CUDA device if there is one, else the CPU (random keys need 64-bit floats, which MPS has not).

    Raises:
        UserError: the launcher started several processes.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1:
        raise bad_value("num_processes", accelerator.num_processes, "1, the only number this version supports")
    return accelerator


@dataclass(frozen=True)
class Start:
    """What a training command starts or continues with."""

    policy: Policy
    accelerator: Accelerator
    checkpoint: Path | None
    """The last complete checkpoint of the run, if it is continued."""
    state: dict[str, Any]
    """What the checkpoint keeps beside the weights."""

    @property
    def done(self) -> int:
        """Steps that an earlier process of the same run has done."""
        return int(self.state.get("step", 0))


def start(settings: Settings, path: Path) -> Start:
    """Loads or makes the model, from the last complete checkpoint of the run if `resume=auto`. Writes nothing."""
    checkpoint = latest_checkpoint(path) if settings["resume"] == "auto" else None
    policy = build_policy(settings, checkpoint)
    kind = getattr(settings["model"], "quantization", None)
    check(kind is None or policy.adapted, "model.lora.r", 0, f"an integer >= 1 with model.quantization={kind}")
    trained = {parameter.dtype for parameter in policy.network.parameters() if parameter.requires_grad}
    if trained & {torch.bfloat16, torch.float16}:
        print("note: all weights are trained in 16 bits, where updates below a 256th of a weight are lost; model.lora.r=16 "
              "trains an adapter in 32 bits, model.dtype=float32 the weights")
    accelerator = accelerator_for_one_process()
    policy.network = accelerator.prepare(policy.network)
    return Start(policy, accelerator, checkpoint, load_state(checkpoint) if checkpoint else {})


def open_folder(path: Path, record: Settings, done: int) -> RunFolder:
    """The run folder, with `record` as its configuration. Call it after everything that may refuse the configuration: from
    here on there are files."""
    folder = RunFolder.open(path, record, from_step=done)
    groups = {name: choice for name, choice in HydraConfig.get().runtime.choices.items() if "/" not in name and choice}
    replace_text(path / CHOICES, json.dumps(groups, indent=1))
    print(f"run folder: {path}" + (f" (continuing after step {done})" if done else ""), flush=True)
    return folder


def build_policy(settings: Settings, checkpoint: Path | None = None) -> Policy:
    """The policy at `checkpoint`, else at `model.path`, else with random weights. The adapter of a checkpoint stays one."""
    model = settings["model"]
    if checkpoint and is_adapter(checkpoint):
        resumed: Policy = model.resume(checkpoint)
        return resumed
    if checkpoint or model.path:
        model = replace(model, path=str(checkpoint or resolve_model_path(model.path)))
    words = settings["task"].words if "task" in settings else []
    policy: Policy = model.build(words, settings["seed"])
    return policy


def reference_policy(settings: Settings, accelerator: Accelerator, trained: Policy) -> Denoiser:
    """The policy that a KL term pulls towards: the one at `model.path`, frozen, in the precision of the trained one.

    With a LoRA adapter that is the trained network without its adapter."""
    if trained.adapted:
        return WithoutAdapter(trained)
    policy = build_policy(settings).freeze()
    policy.network = accelerator.prepare_model(policy.network, evaluation_mode=True)
    return policy


def introduction(policy: Policy, prompts: Sequence[Prompt]) -> str:
    """How text becomes tokens: the special tokens, and the first prompt. To be made before there is a run folder.

    Raises:
        UserError: a prompt spells the mask token, or the chat template cannot lay the first one out.
    """
    for prompt in prompts:
        policy.check_prompt(prompt)
    return policy.introduction(prompts[0])


def require_model_path(settings: Settings) -> str:
    path: str | None = settings["model"].path
    if not path:
        raise bad_value("model.path", path, "a run folder (dllm-rl sft makes one), a checkpoint folder or a hub name")
    return path


def check_seed(seed: Any) -> int:
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise bad_value("seed", seed, "an integer from 0 to 2147483647")
    return seed


def plain(config: DictConfig) -> Settings:
    """The configuration as plain values, for config.yaml."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _quiet_libraries() -> None:
    """No progress bars or advice of libraries between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
