"""Hydra's view of the toolkit: every dataclass that holds settings, under the group and name it has on the command line.

Values live in the dataclasses only; the YAML files in conf/ choose among them.
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from dllm_rl.diffusion.corruption import StratifiedCounts
from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.evaluation import EvaluationConfig
from dllm_rl.models.tiny import TinyModel
from dllm_rl.objectives.bgpo import BGPO
from dllm_rl.optimization import OptimizerConfig
from dllm_rl.supervised import SupervisedConfig
from dllm_rl.tasks.code.mbpp import MBPP
from dllm_rl.tasks.code.program_synthesis import ProgramSynthesis
from dllm_rl.tasks.math.gsm8k import GSM8K
from dllm_rl.tasks.math.word_problems import WordProblems
from dllm_rl.tasks.planning.countdown import Countdown
from dllm_rl.tasks.planning.sudoku import Sudoku
from dllm_rl.trainer import TrainerConfig

GROUPS: dict[str, dict[str, type]] = {
    "model": {"tiny": TinyModel},
    "task": {
        "sudoku": Sudoku,
        "countdown": Countdown,
        "word_problems": WordProblems,
        "gsm8k": GSM8K,
        "program_synthesis": ProgramSynthesis,
        "mbpp": MBPP,
    },
    "sampler": {"low_confidence": LowConfidence},
    "likelihood": {"elbo": StratifiedCounts},
    "objective": {"bgpo": BGPO},
}
SECTIONS: dict[str, dict[str, type]] = {
    "train": {"trainer": TrainerConfig, "optimizer": OptimizerConfig, "evaluation": EvaluationConfig},
    "sft": {"supervised": SupervisedConfig, "optimizer": OptimizerConfig},
    "evaluate": {"evaluation": EvaluationConfig},
}
"""Sections of each command's configuration that are no choice among several."""


def register() -> None:
    """Makes the groups and sections known to Hydra."""
    store = ConfigStore.instance()
    for group, choices in GROUPS.items():
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)
    for command, sections in SECTIONS.items():
        store.store(name=f"{command}_sections", node=sections)
