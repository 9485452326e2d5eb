"""What an approximate sampler does to rollouts: logged at every step, and a run that can learn nothing more is stopped.

Caches, parallel decoding and half precision write other tokens than the sampler that they stand for, and the difference
grows while a policy trains: confidences rise, more tokens pass a threshold at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dllm_rl.diffusion.corruption import through_first
from dllm_rl.diffusion.sampler import Sampler
from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy
from dllm_rl.types import Completions, PromptBatch


def effort(completions: Completions) -> dict[str, float]:
    """The `sampler/` figures that cost nothing: passes per completion, and tokens that a pass writes."""
    nfe, written = completions.nfe.double(), (completions.unmask_step >= 0).sum()
    return {"sampler/nfe": float(nfe.mean()), "sampler/tokens_per_pass": float(written / nfe.sum())}


def disagreement(
    policy: Policy, sampler: Sampler, prompts: PromptBatch, length: int, prepared: Policy | None = None
) -> dict[str, float]:
    """How far greedy decoding with `sampler` is from the sampler that it stands for, on a few prompts.

    `sampler/disagreement` is the share of the exact text's tokens, its end included, that differ; `sampler/changed` the
    share of completions that differ at all. Greedy, because another order of tokens draws other random numbers.
    `prepared` is the policy in the sampler's precision, if it is there already.
    """
    fast = replace(sampler, temperature=0.0, record_logps=False)
    found = fast.sample(prepared or policy, prompts, length, seed=0, step=0).ids
    exact = fast.exact().sample(policy, prompts, length, seed=0, step=0).ids
    text = through_first(exact, *policy.stop_ids)
    differs = (found != exact) & text
    return {"sampler/disagreement": float(differs.sum().double() / text.sum()),
            "sampler/changed": float(differs.any(1).double().mean())}


class Variety:
    """Stops a run whose rollouts are the same within every group, step after step: every advantage is 0.

    Example: `Variety(20)` allows 19 such steps in a row.

    Args:
        most: the number of steps that is too many; 0: none is.
        steps: how many there have been, in a run that is continued.
    """

    def __init__(self, most: int, steps: int = 0) -> None:
        self._most, self.steps = most, steps

    def count(self, groups: Sequence[int], texts: Sequence[str]) -> None:
        """Takes in one batch: the group and the text of every completion.

        Raises:
            UserError: it is the last straw.
        """
        alike = len({*zip(groups, texts, strict=True)}) == len({*groups}) < len(groups)
        self.steps = self.steps + 1 if alike else 0
        if self._most and self.steps >= self._most:
            raise UserError(
                f"trainer.max_identical_steps={self._most}: in so many steps all completions of a prompt were the same, so "
                "that there is nothing to learn from; a higher sampler.temperature varies them, a cache or a threshold may "
                "have collapsed them (see sampler/ in metrics.jsonl)"
            )
