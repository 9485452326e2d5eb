"""The gradient engine: parameter gradients of any objective while one chunk of Monte Carlo samples has a live graph.

    single pass   the objective is a sum over samples: loss of a chunk, backward, next chunk
    two pass      any objective of the log-probabilities: pass 1 evaluates them without graphs, the gradient of the loss with
                  respect to that small tensor gives each its weight, and pass 2 streams Σ weight x logp chunk by chunk
    retained      all graphs at once: the oracle of the tests and the naive bar of the memory benchmark

All three give the same gradient; the first two at memory that does not grow with the number of samples. By the chain rule
∇F(l_1..l_N) = Σ_j ∂F/∂l_j ∇l_j, two passes are exact, not an approximation. Pass 1 is skipped where its values are known: at
θ = θ_old a loss that reads only log-ratios has the same gradient whatever the values are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.likelihood import Read, Reader, token_logps
from dllm_rl.objectives.aggregation import Totals, coefficients
from dllm_rl.objectives.base import Extras, LossInputs, LossOutput, Objective, Share
from dllm_rl.scoring import Chunk, Masks, Old, Recorder, Scores, masked_forward
from dllm_rl.types import Completions

DRIVERS = ("auto", "single_pass", "two_pass", "retained")


@dataclass
class _Metrics:
    """Sums of the shares of all chunks."""

    loss: Tensor | float = 0.0
    totals: dict[str, Share] = field(default_factory=dict)

    def add(self, output: LossOutput) -> None:
        self.loss = self.loss + output.loss.detach()
        for name, (total, number) in output.metrics.items():
            before = self.totals.get(name, Share(torch.zeros_like(total), torch.zeros_like(number)))
            self.totals[name] = Share(before.total + total, before.number + number)

    def means(self) -> dict[str, float]:
        means = {name: float(total / number.clamp(min=1)) for name, (total, number) in self.totals.items()}
        return {"loss": float(self.loss), **means}


class Engine:
    """One update's worth of completions, and the ways to score them and to differentiate an objective of the scores.

    Args:
        completions: B sequences.
        masks: where their corruptions come from.
        micro_samples: pairs of sequence and corruption per forward pass. Trades speed for memory, never the result.
        read: what a network is asked at the scored positions: `token_logps` of a policy or `token_values` of a critic.
    """

    def __init__(self, completions: Completions, masks: Masks, micro_samples: int, read: Read = token_logps) -> None:
        self.completions, self.masks, self.micro_samples, self.read = completions, masks, micro_samples, read
        self.num_samples = masks.likelihood.num_samples

    def score(self, policy: Reader, *, top_k: int = 0) -> Scores:
        """Log-probabilities (or values) under all corruptions, without graphs. `top_k` > 0 also keeps that part of the
        distributions."""
        recorder = Recorder(self.completions, self.masks.likelihood, policy, read=self.read, top_k=top_k)
        with torch.no_grad():
            for chunk in self._chunks(policy):
                recorder.forward(policy, chunk)
        return recorder.scores()

    def recorded(self, policy: Reader) -> Scores:
        """What the sampler recorded while it wrote (`Completions.behaviour_logps`), in the place of `score`."""
        recorder = Recorder(self.completions, self.masks.likelihood, policy)
        self._note(policy, recorder)
        return recorder.recorded(self.completions)

    def _note(self, policy: Reader, recorder: Recorder) -> None:
        """Draws all corruptions without forward passes, which takes little memory."""
        for chunk in self._chunks(policy, size=max(self.micro_samples, 1024)):
            recorder.note(chunk)

    def backward(
        self,
        policy: Reader,
        objective: Objective,
        advantages: Tensor,
        totals: Totals,
        *,
        old: Old | None = None,
        reference: Scores | None = None,
        extras: Extras | None = None,
        keep_top_k: bool = False,
        driver: str = "auto",
        run_backward: Callable[[Tensor], None] = torch.Tensor.backward,
        at_half: Callable[[], None] | None = None,
    ) -> tuple[Scores, dict[str, float]]:
        """Adds the objective's gradient to the parameters.

        Args:
            advantages: [B], or [B, L] for objectives that take one per token.
            totals: the sizes of the whole update.
            old: the policy that sampled. None: `policy` is still that one, and sampled exactly, so that its values are the
                current ones and no pass is needed for them.
            reference: scores under the reference policy, for objectives that read it.
            extras: what else the objective reads of the whole update.
            keep_top_k: keep what later updates need for top-K divergences from this policy.
            driver: auto (single pass where possible, else two passes), single_pass, two_pass or retained.
            run_backward: `accelerator.backward` in a distributed run.
            at_half: called when every other unit of samples (`likelihood.unit`) has been differentiated.

        Returns:
            The scores of this pass (they serve as `old` of the next inner update), and the metrics with the loss.
        """
        if driver == "auto":
            alone = self.num_samples == 1 and not objective.traits.couples_sequences
            driver = "single_pass" if objective.traits.separable or alone else "two_pass"
        top_k = objective.support_size if keep_top_k else 0
        recorder = Recorder(
            self.completions, self.masks.likelihood, policy, read=self.read, top_k=top_k,
            divergence=objective.measured_divergence, old=old,
        )
        loss_of = _Loss(self, objective, advantages, totals, old, reference, extras or Extras(), recorder)
        if driver == "single_pass":
            return self._single_pass(policy, loss_of, run_backward, at_half)
        if driver == "two_pass":
            return self._two_pass(policy, loss_of, run_backward, at_half)
        if driver == "retained":
            return self._retained(policy, loss_of, run_backward)
        raise ValueError(f"driver={driver}: must be one of {', '.join(DRIVERS)}")

    def _single_pass(
        self, policy: Reader, loss_of: _Loss, run_backward: Callable[[Tensor], None], at_half: Callable[[], None] | None
    ) -> tuple[Scores, dict[str, float]]:
        metrics = _Metrics()
        for chunk in self._chunks(policy, at_half):
            output = loss_of.chunk(chunk, loss_of.recorder.forward(policy, chunk))
            metrics.add(output)
            if output.loss.requires_grad:  # a chunk that scores nothing has no graph
                run_backward(output.loss)
        return loss_of.recorder.scores(), metrics.means()

    def _two_pass(
        self, policy: Reader, loss_of: _Loss, run_backward: Callable[[Tensor], None], at_half: Callable[[], None] | None
    ) -> tuple[Scores, dict[str, float]]:
        recorder, metrics = loss_of.recorder, _Metrics()
        known = loss_of.objective.traits.ratio_only and loss_of.old is None and loss_of.reference is None
        with torch.no_grad():
            if known:
                self._note(policy, recorder)
            else:
                for chunk in self._chunks(policy):
                    recorder.forward(policy, chunk)
        first = recorder.scores()

        logps = first.logps.detach().requires_grad_()
        output = loss_of.all(first, logps)
        metrics.add(output)
        (weight,) = torch.autograd.grad(output.loss, logps)

        drift = torch.zeros((), device=logps.device)
        for chunk in self._chunks(policy, at_half):
            again = recorder.forward(policy, chunk) if known else masked_forward(policy, chunk, self.read)
            if not known and len(again):
                drift = torch.maximum(drift, (again.detach() - first.logps[chunk.rows, chunk.sample]).abs().max())
            if again.requires_grad:
                run_backward((weight[chunk.rows, chunk.sample] * again).sum())
        health = {} if known else {"engine/pass_difference": float(drift)}
        return recorder.scores() if known else first, metrics.means() | health

    def _retained(
        self, policy: Reader, loss_of: _Loss, run_backward: Callable[[Tensor], None]
    ) -> tuple[Scores, dict[str, float]]:
        recorder, metrics = loss_of.recorder, _Metrics()
        graphs, pairs = [], []
        for chunk in self._chunks(policy):
            graphs.append(recorder.forward(policy, chunk))
            pairs.append(chunk.rows * self.num_samples + chunk.sample)
        in_order = torch.cat(graphs)[torch.cat(pairs).argsort()]
        scores = recorder.scores()
        output = loss_of.all(scores, rearrange(in_order, "(b n) l -> b n l", n=self.num_samples))
        metrics.add(output)
        run_backward(output.loss)
        return scores, metrics.means()

    def _chunks(
        self, policy: Reader, at_half: Callable[[], None] | None = None, size: int | None = None
    ) -> Iterator[Chunk]:
        """`size` (`micro_samples`) pairs at a time, all sequences of sample 0 first.

        With `at_half` the even units come before the odd ones: each half is evenly spread over the strata, and draws that
        belong together (a mask and its complement) stay together.
        """
        device = self.completions.ids.device
        sample, unit = torch.arange(self.num_samples, device=device), self.masks.likelihood.unit
        halves = [sample] if at_half is None else [sample[(sample // unit) % 2 == half] for half in (0, 1)]
        for number, half in enumerate(halves):
            if number and at_half is not None:
                at_half()
            pairs = torch.cartesian_prod(half, torch.arange(len(self.completions), device=device)).view(-1, 2)
            for part in pairs.split(size or self.micro_samples) if len(pairs) else ():
                completions = self.completions.rows(part[:, 1])
                corruption = self.masks.draw(policy, completions, part[:, 0])
                yield Chunk(part[:, 1], part[:, 0], completions, corruption)


class _Loss:
    """The objective with everything that it reads, for one chunk or for all samples at once."""

    def __init__(
        self, engine: Engine, objective: Objective, advantages: Tensor, totals: Totals, old: Old | None,
        reference: Scores | None, extras: Extras, recorder: Recorder,
    ) -> None:
        self._extras = extras
        self.objective, self.old, self.reference, self.recorder = objective, old, reference, recorder
        self._num_samples, self._advantages = engine.num_samples, advantages
        self._region = recorder.scores().region
        self._coefficients = coefficients(objective.aggregation, self._region.sum(1), totals, objective.horizon)

    def chunk(self, chunk: Chunk, logps: Tensor) -> LossOutput:
        """The chunk's share: every pair of [C, L] `logps` is a sequence with one sample."""
        pairs = (chunk.rows, chunk.sample)
        old = logps.detach() if self.old is None else self.old.scores.logps[pairs]
        divergence = self.recorder.scores().divergence
        return self.objective.loss(LossInputs(
            logps=_one(logps), old_logps=_one(old), scored=_one(chunk.corruption.scored),
            weights=rearrange(chunk.corruption.weight, "c -> c 1"), advantages=self._advantages[chunk.rows],
            coefficients=self._coefficients[chunk.rows], region=self._region[chunk.rows], num_samples=self._num_samples,
            ref_logps=None if self.reference is None else _one(self.reference.logps[pairs]),
            divergence=None if divergence is None else _one(divergence[pairs]), extras=self._extras.rows(chunk.rows),
        ))

    def all(self, scores: Scores, logps: Tensor) -> LossOutput:
        """The loss of the whole update from all log-probabilities [B, N, L]."""
        return self.objective.loss(LossInputs(
            logps=logps, old_logps=logps.detach() if self.old is None else self.old.scores.logps, scored=scores.scored,
            weights=scores.weights, advantages=self._advantages, coefficients=self._coefficients, region=self._region,
            num_samples=self._num_samples, ref_logps=None if self.reference is None else self.reference.logps,
            divergence=scores.divergence, extras=self._extras,
        ))


def _one(values: Tensor) -> Tensor:
    return rearrange(values, "c l -> c 1 l")


