"""Hydra's view of the toolkit: every dataclass that holds settings, under the group and name it has on the command line.

Values live in the dataclasses only; the YAML files in conf/ choose among them.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore

from dllm_rl.advantages import AdvantageConfig
from dllm_rl.critic import CriticConfig
from dllm_rl.diffusion.estimators import (
    Bernoulli,
    Block,
    Coupled,
    CoupledFull,
    LeftToRight,
    OneStep,
    Quadrature,
    StratifiedCounts,
    Trajectory,
)
from dllm_rl.diffusion.sampler import Dream, LowConfidence, Parallel
from dllm_rl.errors import UserError, check
from dllm_rl.evaluation import EvaluationConfig
from dllm_rl.kl_reward import KLRewardConfig
from dllm_rl.models.composed_reward import ComposedReward
from dllm_rl.models.pretrained import PretrainedModel
from dllm_rl.models.reward_model import LearnedReward
from dllm_rl.models.tiny import TinyModel
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.objectives.coupled_grpo import CoupledGRPO
from dllm_rl.objectives.dppo import DPPO
from dllm_rl.objectives.dro import DRO
from dllm_rl.objectives.drpo import DRPO, SPO
from dllm_rl.objectives.elbo_ratio import ELBORatio
from dllm_rl.objectives.espo import ESPO
from dllm_rl.objectives.kto import KTO
from dllm_rl.objectives.ppo_clip import GRPO, PPOClip
from dllm_rl.objectives.reinforce import Reinforce
from dllm_rl.objectives.rpo import RPO
from dllm_rl.objectives.sft import SFT
from dllm_rl.objectives.spg import SPG
from dllm_rl.objectives.unigrpo import UniGRPO
from dllm_rl.objectives.vrpo import VRPO
from dllm_rl.objectives.wd1 import WD1
from dllm_rl.offline import OfflineConfig
from dllm_rl.optimization import OptimizerConfig
from dllm_rl.sandbox import SandboxConfig
from dllm_rl.supervised import SupervisedConfig
from dllm_rl.task import TaskReward
from dllm_rl.tasks.code.humaneval import HumanEval
from dllm_rl.tasks.code.mbpp import MBPP
from dllm_rl.tasks.code.program_synthesis import ProgramSynthesis
from dllm_rl.tasks.math.competition import Math
from dllm_rl.tasks.math.gsm8k import GSM8K
from dllm_rl.tasks.math.word_problems import WordProblems
from dllm_rl.tasks.planning.countdown import Countdown
from dllm_rl.tasks.planning.sudoku import Sudoku
from dllm_rl.tasks.planning.sudoku9 import Sudoku9x9
from dllm_rl.tasks.reasoning_gym import ReasoningGym
from dllm_rl.training import TrainerConfig

GROUPS: dict[str, dict[str, type]] = {
    "model": {"tiny": TinyModel, "auto": PretrainedModel},
    "task": {
        "sudoku": Sudoku,
        "sudoku_9x9": Sudoku9x9,
        "countdown": Countdown,
        "word_problems": WordProblems,
        "gsm8k": GSM8K,
        "math": Math,
        "program_synthesis": ProgramSynthesis,
        "mbpp": MBPP,
        "humaneval": HumanEval,
    },
    "sampler": {"low_confidence": LowConfidence, "dream": Dream, "parallel": Parallel},
    "likelihood": {
        "elbo": StratifiedCounts,
        "bernoulli": Bernoulli,
        "quadrature": Quadrature,
        "coupled": Coupled,
        "coupled_full": CoupledFull,
        "one_step": OneStep,
        "block": Block,
        "trajectory": Trajectory,
        "left_to_right": LeftToRight,
    },
    "objective": {
        "bgpo": BGPO,
        "elbo_ratio": ELBORatio,
        "reinforce": Reinforce,
        "ppo_clip": PPOClip,
        "grpo": GRPO,
        "dppo": DPPO,
        "drpo": DRPO,
        "spo": SPO,
        "espo": ESPO,
        "wd1": WD1,
        "spg": SPG,
        "coupled_grpo": CoupledGRPO,
        "unigrpo": UniGRPO,
        "rpo": RPO,
        "dro": DRO,
        "kto": KTO,
        "vrpo": VRPO,
        "sft": SFT,
    },
    "reward": {"task": TaskReward, "learned": LearnedReward, "composed": ComposedReward},
}
SECTIONS: dict[str, dict[str, type]] = {
    "train": {
        "trainer": TrainerConfig,
        "advantage": AdvantageConfig,
        "critic": CriticConfig,
        "kl_reward": KLRewardConfig,
        "offline": OfflineConfig,
        "optimizer": OptimizerConfig,
        "evaluation": EvaluationConfig,
        "sandbox": SandboxConfig,
    },
    "sft": {"supervised": SupervisedConfig, "optimizer": OptimizerConfig},
    "evaluate": {"evaluation": EvaluationConfig, "sandbox": SandboxConfig},
    "rollout": {"sandbox": SandboxConfig},
}
"""Sections of each command's configuration that are no choice among several."""


def add(group: str, name: str, node: type) -> None:
    """Adds a choice of your own, such as a task: `add("task", "fruit", Fruit)` in a module that `plugins=` names.

    Raises:
        UserError: there is no such group, or `node` is no dataclass.
    """
    check(group in GROUPS, "plugins", group, "a group among " + ", ".join(GROUPS))
    check(is_dataclass(node), "plugins", node, "a dataclass, whose fields are the settings")
    ConfigStore.instance().store(group=group, name=name, node=node)


def load_plugins(names: Sequence[str]) -> None:
    """Imports modules, given by import path (the working directory counts) or as a `.py` file.

    Raises:
        UserError: there is no such module or file.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                path = Path(name).expanduser()
                spec = importlib.util.spec_from_file_location(path.stem, path)
                assert spec and spec.loader
                module = importlib.util.module_from_spec(spec)
                sys.modules[path.stem] = module  # dataclasses look their module up
                spec.loader.exec_module(module)
            else:
                sys.path.insert(0, str(Path.cwd()))
                importlib.import_module(name)
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise UserError(f"plugins={name}: must be a module that can be imported, or a .py file ({error})") from None


def register(arguments: Sequence[str] = ()) -> None:
    """Makes the groups and sections known to Hydra; `arguments` is the command line.

    Raises:
        UserError: the command line asks for a generator of reasoning_gym that cannot be had.
    """
    store = ConfigStore.instance()
    for group, choices in GROUPS.items():
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)
    for command, sections in SECTIONS.items():
        store.store(name=f"{command}_sections", node=sections)
    for name in reasoning_gym_names(arguments):
        store.store(group="task/reasoning_gym", name=name, node=ReasoningGym(name))


def reasoning_gym_names(arguments: Sequence[str]) -> set[str]:
    """The generators that a command line asks for. Only these are registered: to look one up takes seconds.

    Example: `reasoning_gym_names(["-m", "task=reasoning_gym/gcd,reasoning_gym/lcm"])` is {"gcd", "lcm"}.
    """
    tasks = (argument for argument in arguments if argument.startswith("task="))
    return {name for task in tasks for name in re.findall(r"reasoning_gym/(\w*)", task)}
