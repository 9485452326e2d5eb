"""Published samplers for one sequence at a time, written from their descriptions: full logits, Python loops, no code of ours
but the random numbers.

LLaDA: arXiv 2502.09992, algorithm 5, and generate.py. Dream: arXiv 2508.15487 and generation_utils.py. Fast-dLLM: arXiv
2505.22618 and llada/generate.py. SDAR: arXiv 2510.06303 and generate.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from dllm_rl.diffusion.noise import Purpose, fold, make_key, uniform
from dllm_rl.models.policy import Policy

NEVER = -math.inf


@dataclass
class Naive:
    """A sequence being decoded: the network, its prompt, and the numbers that are drawn."""

    policy: Policy
    prompt: Tensor
    length: int
    sample_id: int = 0
    seed: int = 0
    step: int = 1
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    cfg_scale: float = 0.0
    suppress_eos: bool = False
    suppress_eos_confidence: bool = False
    position_by: str = "sampled_prob"
    judge_law: bool = False
    alg_temp: float = 0.0
    cache: str = "none"
    refresh: int | None = None
    canvas: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    passes: int = 0

    def __post_init__(self) -> None:
        self.canvas = [self.policy.mask_id] * self.length
        self.order = [-1] * self.length
        key = make_key(self.seed, Purpose.SAMPLE, self.step, torch.tensor([self.sample_id]))
        self.numbers: Callable[[int], list[float]] = lambda now: uniform(fold(key, now), 2 * self.length)[0].tolist()
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def masked(self, start: int = 0, end: int | None = None) -> list[int]:
        return [i for i in range(start, self.length if end is None else end) if self.canvas[i] == self.policy.mask_id]

    # What the network says.

    def logits(self, start: int, end: int, since_block: int) -> list[list[float]]:
        """Rows for the whole canvas; only those of the block are looked at."""
        ids = torch.cat([self.prompt, torch.tensor(self.canvas)]).unsqueeze(0)
        logits = self.looked(ids, start, end, since_block, 0)
        if self.cfg_scale:
            blind = ids.clone()
            blind[:, : len(self.prompt)] = self.policy.mask_id
            free = self.looked(blind, start, end, since_block, 1)
            logits = free + (self.cfg_scale + 1) * (logits - free)
        found: list[list[float]] = logits.tolist()
        return found

    def looked(self, ids: Tensor, start: int, end: int, since_block: int, half: int) -> Tensor:
        """[L, V] for the prompt as it is (half 0) or hidden (1); a shifted model says at a place what the next one is."""
        width, shift = len(self.prompt), self.policy.rules.logit_shift
        if self.cache == "none":
            logits = self.policy.network(input_ids=ids).logits[0]
        elif since_block == 0 or (self.refresh and since_block % self.refresh == 0):
            cache = DynamicCache()
            logits = self.policy.network(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
            self.kept[half] = [(layer.keys, layer.values) for layer in cache.layers]
        else:
            logits = self.cached(ids, width + start, width + (self.length if self.cache == "prefix" else end), half)
        return logits[width - shift : width - shift + self.length]

    def cached(self, ids: Tensor, start: int, stop: int, half: int) -> Tensor:
        """Fast-dLLM's caches by transformers' own cache, filled by a full pass and cut at the window [start, stop).

        A shifted model also computes the column before the window, which sees the window as it is and itself and all else
        as it was; nobody sees the new one.
        """
        first, others = start - self.policy.rules.logit_shift, [i for i in range(ids.shape[1]) if not start <= i < stop]
        cache, place = DynamicCache(), torch.arange(first, stop)
        for number, (keys, values) in enumerate(self.kept[half]):
            cache.update(keys[:, :, others], values[:, :, others], number)
        seen = torch.ones(1, 1, len(place), len(others) + len(place), dtype=torch.bool)
        seen[..., len(others) : len(others) + start - first] = False
        found = self.policy.network(
            input_ids=ids[:, place], past_key_values=cache, use_cache=True, position_ids=place.unsqueeze(0),
            attention_mask=seen,
        ).logits[0]
        logits: Tensor = found.new_zeros(ids.shape[1], found.shape[-1])
        logits[first:stop] = found
        return logits

    # What a position would write, and how sure it is.

    def law(self, row: list[float]) -> list[float]:
        scaled = [x / self.temperature if self.temperature else x for x in row]
        if self.top_p is not None:
            probabilities, total, kept = softmax(scaled), 0.0, set()
            for token in sorted(range(len(row)), key=lambda t: -scaled[t]):
                if total > self.top_p:
                    break
                kept.add(token)
                total += probabilities[token]
            scaled = [x if t in kept else NEVER for t, x in enumerate(scaled)]
        if self.top_k is not None:
            least = sorted(scaled, reverse=True)[min(self.top_k, len(scaled)) - 1]
            scaled = [x if x >= least else NEVER for x in scaled]
        return scaled

    def proposal(self, row: list[float], number: float, order_number: float, place: int) -> tuple[int, float]:
        ends = [self.policy.eos_id]
        row = [NEVER if t == self.policy.mask_id or (self.suppress_eos and t in ends) else x for t, x in enumerate(row)]
        law = self.law(row)
        if self.temperature:
            running = list(itertools.accumulate(softmax(law)))
            token = next(t for t, below in enumerate(running) if below > number * running[-1])
        else:
            token = max(range(len(row)), key=lambda t: (row[t], -t))
        judged = law if self.judge_law else row
        if self.suppress_eos_confidence:
            if token in ends:
                return token, -1e6
            judged = [NEVER if t in ends else x for t, x in enumerate(judged)]
        probabilities = softmax(judged)
        best = sorted(probabilities, reverse=True)
        return token, {
            "sampled_prob": probabilities[token], "max_prob": best[0], "margin": best[0] - best[1],
            "entropy": sum(p * math.log(p + 1e-10) for p in probabilities),
            "random": order_number, "left_to_right": -place,
        }[self.position_by]

    def write(self, chosen: dict[int, int]) -> None:
        for place, token in chosen.items():
            self.canvas[place], self.order[place] = token, self.passes
        self.passes += 1


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    total = math.fsum(weights)
    return [w / total for w in weights]


def proposals(one: Naive, start: int, end: int, since_block: int, now: int) -> list[tuple[float, int, int]]:
    """(-confidence, position, token) of every masked position of the block, best first."""
    numbers, logits = one.numbers(now), one.logits(start, end, since_block)
    found = []
    for place in one.masked(start, end):
        token, sure = one.proposal(logits[place], numbers[place], numbers[one.length + place], place)
        if one.alg_temp:  # the best n of confidence / alg_temp + Gumbel noise are n draws without replacement
            sure = sure / one.alg_temp - math.log(-math.log(numbers[one.length + place]))
        found.append((-sure, place, token))
    return sorted(found)


@torch.no_grad()
def llada(one: Naive, block: int, steps: int) -> Naive:
    """`steps` denoising steps shared evenly among the blocks; the remainder of a block goes to its first steps."""
    per_block, now = steps // (one.length // block), 0
    for start in range(0, one.length, block):
        for step in range(per_block):
            best = proposals(one, start, start + block, step, now)
            take = block // per_block + (step < block % per_block)
            one.write({place: token for _, place, token in best[:take]})
            now += 1
    return one


@torch.no_grad()
def dream(one: Naive, steps: int, alg: str, eps: float = 1e-3) -> Naive:
    """The whole canvas; batch 1, so that the published mean over the batch is the row's own number."""
    rules = {"origin": "random", "maskgit_plus": "sampled_prob", "topk_margin": "margin", "entropy": "entropy"}
    one.judge_law, one.position_by = True, rules[alg]
    times = torch.linspace(1, eps, steps + 1)
    for i in range(steps):
        masked, last = one.masked(), i == steps - 1
        share = torch.tensor(1.0) if last else 1 - times[i + 1] / times[i]
        if alg == "origin":
            numbers = one.numbers(i)
            taken = {p for p in masked if numbers[one.length + p] > 1 - share.double().item()}
            best = [item for item in proposals(one, 0, one.length, one.passes, i) if item[1] in taken] if taken else []
        else:
            take = int(len(masked) * share)
            best = proposals(one, 0, one.length, one.passes, i)[:take] if take else []
        if best:
            one.write({place: token for _, place, token in best})
    return one


@torch.no_grad()
def fast_dllm(
    one: Naive, block: int, threshold: float | None = None, factor: float | None = None, most: int | None = None
) -> Naive:
    """As many tokens as are sure enough, at least one, never more than `most`."""
    now = 0
    for start in range(0, one.length, block):
        since = 0
        while one.masked(start, start + block):
            best = proposals(one, start, start + block, since, now)
            take = len(best)
            if threshold is not None:
                take = sum(-minus >= threshold for minus, _, _ in best)
            elif factor is not None:
                take = 0
                while take < len(best) and -best[take][0] >= 1 - factor / (take + 2):
                    take += 1
            take = min(max(1, take), most or len(best))
            one.write({place: token for _, place, token in best[:take]})
            now, since = now + 1, since + 1
    return one


@torch.no_grad()
def sdar(one: Naive, block: int, steps: int, threshold: float | None = None) -> Naive:
    """Blocks of prompt and completion together; those that lie in the prompt are done, the first other one holds its end.

    A step writes the share of the schedule, or all that are surer than the threshold if those are more. Two departures: the
    canvas ends with the completion (there it is filled up to a whole block), and a step writes no more than what is masked
    (there the rest of its share would overwrite the prompt).
    """
    width, now = len(one.prompt), 0
    ids = one.prompt.tolist()
    for start in range(width // block * block, width + one.length, block):
        end = min(start + block, width + one.length)
        step = 0
        while one.masked(max(start - width, 0), end - width):
            row = torch.tensor(ids + one.canvas)[:end]
            owner = torch.arange(end) // block
            seen = torch.zeros(end, end, dtype=torch.float64).masked_fill(owner[:, None] < owner[None, :], -1e30)
            logits = one.policy.network(
                input_ids=row[None], attention_mask=seen[None, None], position_ids=torch.arange(end)[None], use_cache=False
            ).logits[0, width:].tolist()
            numbers = one.numbers(now)
            found = []
            for place in one.masked(max(start - width, 0), end - width):
                token, sure = one.proposal(logits[place], numbers[place], numbers[one.length + place], place)
                found.append((-sure, place, token))
            best, take = sorted(found), block // steps + (step < block % steps)
            if threshold is not None:
                take = max(take, sum(-minus > threshold for minus, _, _ in best))
            one.write({place: token for _, place, token in best[:take]})
            now, step = now + 1, step + 1
    return one
