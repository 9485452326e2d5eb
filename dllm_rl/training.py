"""What a training run consists of: the five choices, their settings, and how far it has come."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from accelerate import Accelerator

from dllm_rl.advantages import AdvantageConfig
from dllm_rl.critic import Critic
from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.likelihood import Denoiser
from dllm_rl.diffusion.sampler import Sampler
from dllm_rl.errors import check
from dllm_rl.evaluation import EvaluationConfig
from dllm_rl.experience import Source
from dllm_rl.kl_reward import KLReward
from dllm_rl.models.policy import Policy
from dllm_rl.objectives.base import Objective
from dllm_rl.optimization import Optimizer
from dllm_rl.task import Task
from dllm_rl.tracking import RunFolder


@dataclass
class TrainerConfig:
    """The size and rhythm of a run. A step is one batch of completions, sampled or read from a file."""

    steps: int = 60
    prompts_per_step: int = 16
    group_size: int = 8
    """G: completions sampled per prompt, compared with each other. A file has groups of its own."""
    inner_updates: int = 1
    """Optimizer steps per rollout batch. 1 is on-policy."""
    resample_masks: bool = False
    """false: all inner updates use the same masks, so the first one finds the old values of the later ones. true: new masks
    for each, whose old values take a pass of their own (diffu-GRPO and its descendants). No effect with one inner update."""
    micro_samples: int = 128
    """Pairs of sequence and corruption per forward pass: memory against speed; the gradient is the same."""
    eval_every: int = 20
    """Steps between evaluations; 0: none."""
    save_every: int = 20
    """Steps between checkpoints, of which the newest `keep` stay; the last step is always saved."""
    keep: int = 2
    max_infra_errors: float = 0.1
    """The run stops when the grader failed on more than this share of the completions of the last ten steps."""
    max_identical_steps: int = 20
    """The run stops when all completions of each prompt are the same for so many steps in a row; 0: never."""
    sampler_check: int = 4
    """Prompts per step on which an approximate sampler (a cache, parallel decoding, half precision) is compared with the
    exact one; 0: none."""
    gradient_cosine: bool = False
    """Also log the cosine between the gradients of the even and of the odd Monte Carlo samples."""

    def __post_init__(self) -> None:
        least = {"eval_every": 0, "max_identical_steps": 0, "sampler_check": 0, "resample_masks": 0, "gradient_cosine": 0}
        share = self.max_infra_errors
        check(0 <= share <= 1, "trainer.max_infra_errors", share, "a number from 0 to 1")
        for name, value in asdict(self).items():
            if name == "max_infra_errors":
                continue
            check(value >= least.get(name, 1), f"trainer.{name}", value, f"an integer >= {least.get(name, 1)}")


@dataclass
class Training:
    """Everything a run consists of: the five choices, their settings, and how far it has come."""

    policy: Policy
    task: Task
    """What the policy is evaluated on."""
    source: Source
    """Where completions and their rewards come from."""
    sampler: Sampler
    likelihood: Likelihood
    objective: Objective
    advantage: AdvantageConfig
    optimizer: Optimizer
    config: TrainerConfig
    evaluation: EvaluationConfig
    accelerator: Accelerator
    folder: RunFolder
    seed: int
    done: int = 0
    reference: Denoiser | None = None
    """What KL terms and log-ratios refer to; None where there are none."""
    critic: Critic | None = None
    kl_reward: KLReward | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return {
            **self.optimizer.state_dict(),
            "source": self.source.state_dict(),
            "critic": self.critic.state_dict() if self.critic else {},
            "kl_reward_coef": self.kl_reward.coef if self.kl_reward else 0.0,
        }
