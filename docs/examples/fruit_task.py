"""A task of your own: count the fruit. Used as `dllm-rl sft plugins=[docs/examples/fruit_task.py] task=fruit`."""

from dataclasses import dataclass
from random import Random

from dllm_rl.config import add
from dllm_rl.task import Demonstration, Prompt, Reward, Task


@dataclass
class Fruit(Task):
    """Reward 1 for writing as many stars as there are fruits."""

    completion_length: int = 8
    most: int = 6

    def prompts(self, split):
        sizes = range(2, self.most + 1, 2) if split == "test" else range(1, self.most + 1, 2)
        return [Prompt(f"{split}/{n}", "o" * n, {"count": n}) for n in sizes]

    def score(self, prompt, completion):
        right = completion == "*" * prompt.data["count"]
        verdict = "correct" if right else "wrong" if completion else "no_answer"
        return Reward(float(right), verdict, {"stars": completion.count("*") / 8})

    def demonstrations(self, count, seed):
        prompts = self.prompts("train")
        chosen = Random(seed).choices(prompts, k=count)
        return [Demonstration(prompt.text, "*" * prompt.data["count"]) for prompt in chosen]


add("task", "fruit", Fruit)
