"""dllm-rl generate: samples completions and shows the order in which their tokens were unmasked.

    dllm-rl generate task=sudoku model.path=outputs/train-sudoku-bgpo-seed0
    dllm-rl generate task=gsm8k model.path=... prompt='How much is 3 + 4?' sampler.temperature=0 watch=true
"""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from dllm_rl.commands import common
from dllm_rl.errors import check
from dllm_rl.models.policy import Policy
from dllm_rl.task import Prompt

# From the first token written to the last: colours of the 256-colour terminal palette, cold to hot.
SCALE = (21, 27, 33, 39, 45, 49, 46, 118, 190, 226, 214, 208, 202, 196)
HIDDEN = "·"
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def run(settings: common.Settings, config: DictConfig) -> None:
    """Samples and prints completions; writes nothing."""
    del config
    seed, task, sampler = common.check_seed(settings["seed"]), settings["task"], settings["sampler"]
    common.require_model_path(settings)
    check(isinstance(settings["count"], int) and settings["count"] >= 1, "count", settings["count"], "an integer >= 1")
    sampler.check_length(task.completion_length)
    if settings["prompt"] is None:
        prompts = list(task.prompts("test")[: settings["count"]])
    else:
        prompts = [Prompt("", str(settings["prompt"]))] * settings["count"]
    policy = common.build_policy(settings)
    sampler.check_model(policy, task.completion_length)
    policy.network.to(common.accelerator_for_one_process().device)
    print(common.introduction(policy, prompts), flush=True)
    batch = policy.encode_prompts(prompts, torch.arange(len(prompts)))
    completions = sampler.sample(policy, batch, task.completion_length, seed=seed, step=0)
    console = Console(highlight=False)
    for prompt, text, ids, order in zip(
        prompts, policy.decode(completions.ids), completions.ids.tolist(), completions.unmask_step.tolist(), strict=True
    ):
        console.print(Text("prompt      " + indented(policy.render(prompt)), style="bold"))
        console.print(Text("completion  " + indented(text)))
        if settings["watch"]:
            for now in range(max(order) + 1):
                console.print(Text(f"step {now + 1:>4}   ") + canvas(policy, ids, order, now))
        console.print(Text("order       ") + unmasking_order(policy, ids, order))
        console.print()
    console.print(legend())


def indented(text: str) -> str:
    """Further lines start below the first one, after the 12 characters of a label."""
    return text.rstrip("\n").replace("\n", "\n" + " " * 12)


def unmasking_order(policy: Policy, ids: list[int], order: list[int]) -> Text:
    """Every token with the step that wrote it, coloured from first to last, without the EOS filled in later."""
    last = max(order)
    text = Text()
    for token, step in zip(ids, order, strict=True):
        if step >= 0:
            number = str(step + 1).translate(SUBSCRIPTS)
            text.append(show(policy, token), style=colour(step, last)).append(f"{number} ", style="dim")
    return text


def canvas(policy: Policy, ids: list[int], order: list[int], now: int) -> Text:
    """The canvas after step `now`: what is still masked is a dot."""
    text, last = Text(), max(order)
    for token, step in zip(ids, order, strict=True):
        written = 0 <= step <= now
        text.append(show(policy, token) if written else HIDDEN, style=colour(step, last) if written else "dim")
    return text


def show(policy: Policy, token: int) -> str:
    """One token as visible text on one line."""
    text = str(policy.tokenizer.decode([token]))
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def colour(step: int, last: int) -> str:
    return f"color({SCALE[step * (len(SCALE) - 1) // max(1, last)]})"


def legend() -> Text:
    text = Text("first ", style="dim")
    for shade in SCALE:
        text.append("■", style=f"color({shade})")
    return text.append(" last to be unmasked; the small number is the denoising step", style="dim")


def main() -> None:
    common.launch("generate", run)


if __name__ == "__main__":
    main()
