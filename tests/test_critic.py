"""PPO's critic: what it sees and learns, the KL penalty in the reward, and runs that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from dllm_rl.assess import assess, at_the_end
from dllm_rl.checkpoint import load_state
from dllm_rl.critic import Critic, CriticConfig
from dllm_rl.diffusion.estimators import Trajectory
from dllm_rl.errors import UserError
from dllm_rl.kl_reward import KLReward, KLRewardConfig
from dllm_rl.models.policy import Policy, load_policy
from dllm_rl.models.value_head import ValueModel
from dllm_rl.objectives.ppo_clip import PPOClip
from dllm_rl.optimization import Optimizer, OptimizerConfig
from dllm_rl.run_folder import latest_checkpoint
from dllm_rl.task import Prompt, Reward, Task
from dllm_rl.trainer import train
from dllm_rl.training import Training
from dllm_rl.types import Completions
from tests.conftest import make_completions, make_policy
from tests.test_trainer import Letters, tiny, training, weights, without_clock


@dataclass
class LongPromptsPay(Letters):
    """The reward depends on the prompt alone: a critic can know it, a policy cannot change it."""

    def score(self, prompt: Prompt, completion: str) -> Reward:
        del completion
        return Reward((len(prompt.text) - 1) / 2, "wrong")

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        return [self.score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def ppo(
    folder: Path, steps: int, critic: CriticConfig, *, policy: Policy | None = None, task: Task | None = None,
    kl: KLRewardConfig | None = None, **config: int,
) -> Training:
    """A run of PPO on the trajectory."""
    run = training(folder, steps, policy=policy, task=task, **config)
    run.objective, run.likelihood = PPOClip(aggregation="token-mean"), Trajectory(num_samples=4)
    updates = steps * run.config.inner_updates
    run.critic = Critic(critic, run.policy, OptimizerConfig(lr=3e-3, warmup_steps=2), updates, Accelerator(), 128)
    parameters = [*run.policy.network.parameters(), *([] if run.critic.model.separate else run.critic.model.parameters())]
    run.optimizer = Optimizer(OptimizerConfig(lr=3e-3, warmup_steps=2), parameters, updates)
    if kl:
        run.kl_reward, run.reference = KLReward(kl), run.policy.frozen_copy()
    return run


def written_in_pairs(completions: Completions) -> Completions:
    steps = torch.arange(completions.ids.shape[1]).expand_as(completions.ids) // 2
    return replace(completions, unmask_step=steps.contiguous())


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_values_depend_on_the_state_only(trunk: str) -> None:
    """Not on the tokens of the decision itself, nor on later ones: the baseline must not know the action."""
    policy = make_policy()
    completions = written_in_pairs(make_completions(policy))
    critic = Critic(CriticConfig(mdp="trajectory", trunk=trunk), policy, OptimizerConfig(), 1, Accelerator(), 128)
    torch.nn.init.normal_(critic.model.head.weight, generator=torch.Generator().manual_seed(0))
    rewards = torch.ones(6, 4, dtype=torch.float64)
    values = critic.appraise(completions, rewards, seed=0).values.logps.sum(1)
    later = completions.ids.clone()
    later[:, 4:] = 15
    again = critic.appraise(replace(completions, ids=later), rewards, seed=0).values.logps.sum(1)
    assert torch.equal(values[:, :6], again[:, :6]), "steps 0 to 2 do not see what step 2 and 3 wrote"
    assert not torch.equal(values[:, 6:], again[:, 6:])
    bandit = Critic(CriticConfig(mdp="bandit", trunk=trunk), policy, OptimizerConfig(), 1, Accelerator(), 128)
    torch.nn.init.normal_(bandit.model.head.weight, generator=torch.Generator().manual_seed(0))
    first, second = (bandit.appraise(item, rewards[:, :1], seed=0).values.logps
                     for item in (completions, replace(completions, ids=later)))
    assert torch.equal(first, second) and first.any()


def test_a_fresh_critic_knows_nothing() -> None:
    policy = make_policy()
    completions = written_in_pairs(make_completions(policy))
    critic = Critic(CriticConfig(mdp="trajectory", whiten=False), policy, OptimizerConfig(), 1, Accelerator(), 128)
    final = torch.linspace(0, 1, 6, dtype=torch.float64)
    appraisal = critic.appraise(completions, at_the_end(final, critic.decisions(completions)), seed=0)
    assert not appraisal.values.logps.any()
    assert torch.allclose(appraisal.advantages, final.unsqueeze(1).expand(6, 8))
    assert appraisal.metrics(appraisal.returns)["critic/explained_variance"] == 0.0


def test_the_final_reward_is_put_on_the_last_decision() -> None:
    decisions = torch.tensor([[0, 1, 1, 2], [0, 0, -1, -1]])
    assert at_the_end(torch.tensor([3.0, 5.0]), decisions).tolist() == [[0.0, 0.0, 3.0], [5.0, 0.0, 0.0]]


def test_whitened_advantages_have_mean_zero_and_variance_one() -> None:
    policy = make_policy()
    completions = written_in_pairs(make_completions(policy))
    for mdp in ("trajectory", "bandit"):
        critic = Critic(CriticConfig(mdp=mdp), policy, OptimizerConfig(), 1, Accelerator(), 128)
        rewards = at_the_end(torch.linspace(0, 1, 6, dtype=torch.float64), critic.decisions(completions))
        advantages = critic.appraise(completions, rewards, seed=0).advantages
        assert advantages.mean().abs() < 1e-6 and advantages.var().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_a_separate_critic_leaves_the_policy_alone(trunk: str) -> None:
    policy = make_policy()
    completions = written_in_pairs(make_completions(policy))
    before = weights(policy)
    critic = Critic(CriticConfig(mdp="trajectory", trunk=trunk), policy, OptimizerConfig(lr=1e-2), 10, Accelerator(), 128)
    torch.nn.init.normal_(critic.model.head.weight, generator=torch.Generator().manual_seed(0))
    rewards = at_the_end(torch.linspace(0, 1, 6, dtype=torch.float64), critic.decisions(completions))
    appraisal = critic.appraise(completions, rewards, seed=0)
    metrics = critic.learn(appraisal, appraisal.returns)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))
    touched = [parameter.grad is not None for parameter in policy.network.model.parameters()]
    assert all(touched) if trunk == "shared" else not any(touched)
    assert metrics["critic/error"] > 0 and ("critic/grad_norm" in metrics) == (trunk == "separate")


@pytest.mark.parametrize("trunk", ["separate", "shared"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_critic_is_saved_and_loaded(tmp_path: Path, trunk: str, tied: bool) -> None:
    policy = make_policy()
    if tied:
        policy.network.get_output_embeddings().weight = policy.network.get_input_embeddings().weight
    model = ValueModel(policy, trunk)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save(tmp_path)
    other = ValueModel(policy, trunk)
    other.load(tmp_path)
    completions = make_completions(policy)
    canvas, asked = completions.ids, torch.ones_like(completions.ids, dtype=torch.bool)
    assert torch.equal(model.values(completions.prompts, canvas, asked), other.values(completions.prompts, canvas, asked))
    with pytest.raises(UserError, match="another shape"):
        ValueModel(policy, "shared" if trunk == "separate" else "separate").load(tmp_path)
    with pytest.raises(UserError, match="has no critic"):
        model.load(tmp_path / "elsewhere")


# --- KL in the reward

def test_the_adaptive_coefficient_by_hand() -> None:
    kl = KLReward(KLRewardConfig(coef=0.1, target=2.0, horizon=100))
    kl.adapt(kl=2.2, completions=50)  # error 0.1: 0.1 x (1 + 0.1 x 0.5)
    assert kl.coef == pytest.approx(0.105)
    kl.adapt(kl=40.0, completions=50)  # error cut to 0.2
    assert kl.coef == pytest.approx(0.105 * 1.1)
    fixed = KLReward(KLRewardConfig(coef=0.1))
    fixed.adapt(kl=40.0, completions=50)
    assert fixed.coef == 0.1


@pytest.mark.parametrize("mdp", ["none", "bandit", "trajectory"])
def test_the_penalty_is_taken_off_the_reward(tmp_path: Path, mdp: str) -> None:
    critic = CriticConfig(mdp=mdp, whiten=False)
    run = ppo(tmp_path, 1, critic, task=LongPromptsPay(), kl=KLRewardConfig(coef=0.5))
    if mdp == "none":
        run.critic, run.advantage.kind = None, "mean_only"
    experience = run.source.experience(1)
    at_start = assess(run, experience)
    assert at_start.metrics["kl_reward/kl"] == 0.0, "the policy is the reference"
    with torch.no_grad():
        for parameter in run.policy.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved = assess(run, experience)
    kl = moved.metrics["kl_reward/kl"]
    assert kl != 0.0
    lost = at_start.experience.advantages - moved.experience.advantages
    if mdp == "bandit":
        assert lost.mean().item() == pytest.approx(0.5 * kl)
    elif mdp == "trajectory":  # γ = λ = 1 and V = 0: tokens of the first decision lose all of it
        first = experience.completions.unmask_step == 0
        assert (lost * first).sum().item() / first.sum().item() == pytest.approx(0.5 * kl)
    else:  # compared within groups, the mean penalty goes away
        assert lost.mean().item() == pytest.approx(0, abs=1e-6) and lost.abs().max() > 1e-6


# --- runs

@pytest.mark.parametrize(("mdp", "trunk"), [("bandit", "separate"), ("bandit", "shared"), ("trajectory", "separate")])
def test_explained_variance_rises(tmp_path: Path, mdp: str, trunk: str) -> None:
    steps = 40 if mdp == "trajectory" else 120  # a bandit has one state per completion to learn from
    run = ppo(tmp_path, steps, CriticConfig(mdp=mdp, trunk=trunk, value_clip=None, value_coef=1.0), task=LongPromptsPay())
    train(run)
    explained = [row["critic/explained_variance"] for row in run.folder.read("metrics.jsonl")
                 if "critic/explained_variance" in row]
    assert abs(explained[0]) < 0.05 and explained[-1] > 0.8


def test_ppo_learns_with_a_critic(tmp_path: Path) -> None:
    run = ppo(tmp_path, 50, CriticConfig(mdp="trajectory", lam=0.95), inner_updates=2)
    train(run)
    rewards = [row["reward/mean"] for row in run.folder.read("metrics.jsonl")]
    assert sum(rewards[:3]) / 3 < 0.15 and sum(rewards[-3:]) / 3 > 0.3


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_a_run_with_a_critic_continues_bit_for_bit(tmp_path: Path, trunk: str) -> None:
    config, kl = CriticConfig(mdp="trajectory", trunk=trunk), KLRewardConfig(coef=0.05, target=0.1, horizon=100)
    whole = ppo(tmp_path / "whole", 4, config, kl=kl, inner_updates=2)
    train(whole)
    half = ppo(tmp_path / "half", 4, config, kl=kl, inner_updates=2)
    half.config.steps = 2
    train(half)

    checkpoint = latest_checkpoint(tmp_path / "half")
    assert checkpoint is not None
    rest = ppo(tmp_path / "rest", 4, config, policy=load_policy(str(checkpoint)), kl=kl, inner_updates=2)
    state = load_state(checkpoint)
    assert rest.critic and rest.kl_reward and whole.critic
    rest.reference, rest.done = tiny().freeze(), state["step"]
    rest.optimizer.load_state_dict(state)
    rest.critic.model.load(checkpoint)
    rest.critic.load_state_dict(state["critic"])
    rest.kl_reward.coef = state["kl_reward_coef"]
    train(rest)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.policy), weights(rest.policy), strict=True))
    own = zip(whole.critic.model.parameters(), rest.critic.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in own)
    expected, found = (without_clock(run.folder.read("metrics.jsonl")) for run in (whole, rest))
    assert expected[2:] == found
    assert expected[-1]["kl_reward/coef"] != 0.05


@pytest.mark.parametrize(("values", "message"), [
    ({"mdp": "td"}, r"critic\.mdp=td: must be none, bandit, trajectory"),
    ({"trunk": "both"}, r"critic\.trunk=both: must be separate or shared"),
    ({"gamma": 1.5}, r"critic\.gamma=1\.5"), ({"lam": -0.1}, r"critic\.lam=-0\.1"),
    ({"steps_per_slice": 0}, r"critic\.steps_per_slice=0"), ({"value_clip": 0.0}, r"critic\.value_clip=0"),
    ({"lr_scale": 0.0}, r"critic\.lr_scale=0"), ({"value_coef": 0.0}, r"critic\.value_coef=0"),
])
def test_bad_values_name_their_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CriticConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("values", "message"), [
    ({"coef": -1.0}, r"kl_reward\.coef=-1"), ({"target": 1.0}, r"kl_reward\.coef=0.0: must be a number > 0 with"),
    ({"coef": 0.1, "target": 0.0}, r"kl_reward\.target=0"), ({"horizon": 0}, r"kl_reward\.horizon=0"),
])
def test_bad_penalties_name_their_key(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KLRewardConfig(**values)  # type: ignore[arg-type]
