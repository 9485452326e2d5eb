"""A masked-diffusion model as lm-eval sees one: `--model dllm_rl` (EleutherAI's lm-evaluation-harness).

    python -m dllm_rl.harness --model dllm_rl --model_args path=RUN,num_samples=32 --tasks arc_easy

loglikelihood          ELBO of the continuation given the context, in nats: the canvas is exactly the continuation's tokens,
                       without an EOS. Exact (every mask once) if it has L tokens and 2^L - 1 <= num_samples, else Monte
                       Carlo.
is_greedy              whether greedy decoding of a canvas of exactly that length gives the continuation: one block, one
                       token per step, the most confident first, as in LLaDA's evaluation.
loglikelihood_rolling  ELBO of the whole text without a context, in windows of at most `max_length` tokens.
generate_until         the sampler of training and `dllm-rl evaluate`, cut at the first EOS or stop string.

Noise is keyed by the seed and the request's own text, so that no answer depends on the batch size, the order or the other
requests. Continuations of one context share their noise: the answers to a question are compared under the same masks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from inspect import signature
from itertools import groupby
from typing import Any, NamedTuple

import lm_eval.models  # noqa: F401 (lm-eval registers its own models only while there is no other)
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.enumeration import Enumeration
from dllm_rl.diffusion.estimators import Bernoulli, Coupled, Quadrature, StratifiedCounts, elbo_of
from dllm_rl.diffusion.sampler import LowConfidence, reproduces
from dllm_rl.errors import UserError, bad_value, check
from dllm_rl.models.policy import Policy, load_policy
from dllm_rl.run_folder import resolve_model_path
from dllm_rl.scoring import Masks
from dllm_rl.types import Completions

ESTIMATORS: dict[str, type[Likelihood]] = {
    "elbo": StratifiedCounts, "bernoulli": Bernoulli, "quadrature": Quadrature, "coupled": Coupled,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the length of a generation, in lm-eval's order of precedence."""
KNOWN = {"until", "do_sample", "temperature", *LENGTHS}
"""The generation settings that mean something here."""
log = logging.getLogger(__name__)


class Text(NamedTuple):
    """Tokens to score after a prompt."""

    prompt: list[int]
    target: list[int]
    sample_id: int
    lost: int = 0
    """Tokens that the prompt lost at its beginning, because the model's length is limited."""


class Job(NamedTuple):
    """A prompt to continue."""

    prompt: list[int]
    sample_id: int
    canvas: int
    """Length of the canvas: `max_tokens`, rounded up to whole blocks."""
    max_tokens: int
    temperature: float
    until: list[str]
    lost: int


@register_model("dllm_rl")
class MaskedDiffusionLM(LM):
    """The policy at `path` behind lm-eval's questions. The arguments are lm-eval's `model_args`.

    Args:
        path: a run folder, a checkpoint folder, a folder with a LoRA adapter, or a hub name.
        num_samples: N, forward passes per log-likelihood.
        likelihood: elbo, bernoulli, quadrature or coupled: the estimator of the ELBO.
        seed: of all noise. (lm-eval's `--seed` concerns its own choices, such as few-shot examples.)
        batch_size: sequences per forward pass.
        max_gen_toks: tokens to generate where the task does not say.
        block_length: the sampler's block (None: 32, or that of the model's attention); lengths are rounded up to whole
            blocks, and the surplus is cut off.
        denoising_steps: forward passes per generation. None: two tokens per step.
        temperature: where the task does not say; 0 is greedy.
        max_length: of prompt and canvas together. None: what the model's configuration says.
        device: None: a CUDA device if there is one, else the CPU.
        dtype: float32, bfloat16, float16 or float64.

    Raises:
        UserError: an argument is unknown or bad, or there is no model at `path`.
    """

    def __init__(
        self, path: str | None = None, *, num_samples: int = 16, likelihood: str = "elbo", seed: int = 0,
        batch_size: int | str = 32, max_gen_toks: int = 256, block_length: int | None = None,
        denoising_steps: int | None = None, temperature: float = 0.0, max_length: int | None = None,
        device: str | None = None, dtype: str = "float32", **unknown: object,
    ) -> None:
        super().__init__()
        for name in unknown:
            valid = [parameter for parameter in signature(type(self)).parameters if parameter != "unknown"]
            raise UserError(f"{name}: no such model argument; must be one of {', '.join(valid)}")
        if not path:
            raise bad_value("path", path, "a run folder, a checkpoint folder, an adapter folder or a hub name")
        check(str(batch_size).isdigit() and int(batch_size) >= 1, "batch_size", batch_size, "an integer >= 1")
        for name, value, least in (("num_samples", num_samples, 1), ("seed", seed, 0), ("max_gen_toks", max_gen_toks, 1),
                                   ("block_length", 1 if block_length is None else block_length, 1),
                                   ("denoising_steps", denoising_steps or 1, 1), ("max_length", max_length or 2, 2)):
            check(isinstance(value, int) and value >= least, name, value, f"an integer >= {least}")
        check(isinstance(temperature, (int, float)) and temperature >= 0, "temperature", temperature, "a number >= 0")
        check(likelihood in ESTIMATORS, "likelihood", likelihood, " or ".join(ESTIMATORS))
        check(dtype in DTYPES, "dtype", dtype, " or ".join(DTYPES))
        check(str(device or "cpu").split(":")[0] in ("cpu", "cuda"), "device", device, "cpu or cuda")
        self.batch_size, self.seed, self.max_gen_toks = int(batch_size), seed, max_gen_toks
        self.sampler = LowConfidence(block_length, denoising_steps, temperature, batch_size=self.batch_size)
        self.path = resolve_model_path(str(path), "path")
        self.policy: Policy = load_policy(self.path, "path")
        self.policy.network.to(_device(device))
        for parameter in self.policy.network.parameters():  # not the buffers: rotary frequencies need their precision
            parameter.data = parameter.data.to(DTYPES[dtype])
        self._device = self.policy.device
        block = self.policy.rules.block_length
        fits = f"elbo: the model's attention is causal between blocks of {block} tokens"
        check(block is None or likelihood == "elbo", "likelihood", likelihood, fits)
        whole = likelihood == "elbo"
        self.estimator = elbo_of(block, num_samples) if whole else ESTIMATORS[likelihood](num_samples=num_samples)
        self.tokenizer: Any = self.policy.tokenizer
        self._chat = False
        self.max_length = int(max_length or getattr(self.policy.network.config, "max_position_embeddings", None) or 2048)

    # Questions ----------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ELBO of the continuation, is_greedy) for each (context, continuation). An empty continuation is certain."""
        texts = [self._text(*request.args) for request in requests]
        _warn_of_lost([text.lost for text in texts], self.max_length)
        answers = [(0.0, True)] * len(texts)
        for batch in self._batches([(len(text.target), len(text.prompt)) for text in texts], disable_tqdm):
            completions = self._completions([texts[index] for index in batch])
            greedy = reproduces(self.policy, completions.prompts, completions.ids).tolist()
            for index, value, flag in zip(batch, self._elbos(completions), greedy, strict=True):
                answers[index] = (value, flag)
                self.cache_hook.add_partial("loglikelihood", requests[index].args, answers[index])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The ELBO of each text. Windows are disjoint; the last one, which is shorter, sees the text before it."""
        texts = [(number, text) for number, request in enumerate(requests) for text in self._windows(*request.args)]
        totals = [0.0] * len(requests)
        for batch in self._batches([(len(text.target), len(text.prompt)) for _, text in texts], disable_tqdm):
            completions = self._completions([texts[index][1] for index in batch])
            for index, value in zip(batch, self._elbos(completions), strict=True):
                totals[texts[index][0]] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A completion of each (context, generation settings). Equal requests are numbered, and so sampled differently."""
        seen: Counter[str] = Counter()
        jobs = []
        for request in requests:
            context, settings = request.args
            name = json.dumps(request.args, sort_keys=True)
            jobs.append(self._job(context, settings, seen[name]))
            seen[name] += 1
        if ignored := {name for request in requests for name in request.args[1]} - KNOWN:
            log.warning("the sampler knows nothing of %s", ", ".join(sorted(ignored)))
        _warn_of_lost([job.lost for job in jobs], self.max_length)
        texts = [""] * len(jobs)
        keys = [((job.canvas, job.temperature), len(job.prompt)) for job in jobs]
        for batch in self._batches(keys, disable_tqdm):
            for index, text in zip(batch, self._sample([jobs[index] for index in batch]), strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    # Chat templates and what lm-eval writes down -------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the tokenizer's template lays it out; without a generation prompt the last message stays open."""
        if self.tokenizer.chat_template is None:
            raise UserError(f"apply_chat_template: the tokenizer of path={self.path} has no chat template")
        self._chat = True
        return str(self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        ))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, for the record."""
        if not chat_template or self.tokenizer.chat_template is None:
            return None
        return str(self.tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None))

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, object]:
        """Goes into lm-eval's results, under `config`."""
        return {
            "model_path": self.path, "model_num_parameters": sum(p.numel() for p in self.policy.network.parameters()),
            "model_dtype": str(self.policy.network.dtype), "likelihood": type(self.estimator).__name__,
            "num_samples": self.estimator.num_samples, "model_seed": self.seed,
        }

    # From text to tokens -------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        """A chat template has already written the BOS token, where there is one; a plain text begins as in training."""
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=not begun)
        return tokens if self._chat else self.policy.begun(tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both together, split where the context ends; its trailing white space goes with the continuation.

        That is lm-eval's rule. Where a token reaches over the border, the two are encoded apart.
        """
        kept = context.rstrip()
        continuation = context[len(kept):] + continuation
        head, whole = self._encode(kept), self._encode(kept + continuation)
        if whole[: len(head)] == head:
            return head, whole[len(head):]
        return head, self.tokenizer.encode(continuation, add_special_tokens=False)

    def _text(self, context: str, continuation: str) -> Text:
        prompt, target = self._encode_pair(context, continuation)
        lost = self._surplus(len(prompt), len(target), "a continuation")
        return Text(prompt[lost:], target, sample_id(context or continuation), lost)

    def _windows(self, text: str) -> Iterator[Text]:
        head, tokens = self._encode_pair("", text)
        whole, room = head + tokens, self.max_length - len(head)
        for start in range(len(head), len(whole), room):
            end = min(start + room, len(whole))
            yield Text(whole[max(0, end - self.max_length) : start], whole[start:end], sample_id(text, start))

    def _job(self, context: str, settings: dict[str, Any], number: int) -> Job:
        """What a request asks for. `number` counts the equal requests before it."""
        max_tokens = int(next((settings[name] for name in LENGTHS if settings.get(name) is not None), self.max_gen_toks))
        check(max_tokens >= 1, "max_gen_toks", max_tokens, "an integer >= 1")
        own = self.policy.rules.block_length
        block = self.sampler.block(max_tokens, own)
        canvas = -(-max_tokens // block) * block
        self.sampler.plan(canvas, own)  # refuses numbers of steps that do not fit, before anything is computed
        temperature = settings.get("temperature")
        temperature = self.sampler.temperature if temperature is None else float(temperature)
        greedy = settings.get("do_sample") is False
        until = settings.get("until") or []
        prompt = self._encode(context)
        lost = self._surplus(len(prompt), canvas, "a generation")
        return Job(prompt[lost:], sample_id(context, number), canvas, max_tokens, 0.0 if greedy else temperature,
                   [until] if isinstance(until, str) else list(until), lost)

    def _surplus(self, prompt: int, canvas: int, what: str) -> int:
        """Tokens that a prompt must lose."""
        if canvas > self.max_length:
            raise UserError(f"max_length={self.max_length}: {what} of {canvas} tokens does not fit")
        return max(0, prompt + canvas - self.max_length)

    # Forward passes ------------------------------------------------------------------------------------------------

    def _batches(self, keys: Sequence[tuple[Any, int]], disable_tqdm: bool) -> Iterator[list[int]]:
        """Indices of the requests with equal first entries (there is no padding on a canvas), the longest prompts first.

        Requests with first entry 0 (nothing to score) are in no batch.
        """
        with tqdm(total=len(keys), disable=disable_tqdm) as bar:
            order = sorted((index for index, key in enumerate(keys) if key[0]), key=keys.__getitem__, reverse=True)
            for _, group in groupby(order, key=lambda index: keys[index][0]):
                members = list(group)
                for start in range(0, len(members), self.batch_size):
                    yield members[start : start + self.batch_size]
                    bar.update(len(members[start : start + self.batch_size]))

    def _completions(self, texts: Sequence[Text]) -> Completions:
        """Texts of one length on canvases of that length."""
        numbers = torch.tensor([text.sample_id for text in texts])
        prompts = self.policy.pad_prompts([text.prompt for text in texts], numbers)
        ids = torch.tensor([text.target for text in texts], device=self._device)
        return Completions(prompts.ids, prompts.mask, prompts.sample_ids, ids, torch.full_like(ids, -1))

    def _elbos(self, completions: Completions) -> list[float]:
        likelihood, masks = self.estimator, 2 ** completions.ids.shape[1] - 1
        if isinstance(likelihood, StratifiedCounts) and masks <= likelihood.num_samples:
            likelihood = Enumeration(num_samples=masks)
        engine = Engine(completions, Masks(likelihood, self.seed, step=0), self.batch_size)
        values: list[float] = engine.score(self.policy).terms.mean(1).tolist()
        return values

    def _sample(self, jobs: Sequence[Job]) -> list[str]:
        """Completions for jobs of one canvas length and temperature."""
        numbers = torch.tensor([job.sample_id for job in jobs])
        prompts = self.policy.pad_prompts([job.prompt for job in jobs], numbers)
        sampler = LowConfidence(
            self.sampler.block_length, self.sampler.denoising_steps, jobs[0].temperature, batch_size=self.batch_size
        )
        ids = sampler.sample(self.policy, prompts, jobs[0].canvas, seed=self.seed, step=0).ids.tolist()
        return [self._read(row[: job.max_tokens], job.until) for row, job in zip(ids, jobs, strict=True)]

    def _read(self, row: list[int], until: Sequence[str]) -> str:
        """The text before the first EOS, end of a turn or stop string. Stop strings may name special tokens, which no text
        shows."""
        special = self.tokenizer.get_added_vocab()
        ends = {self.policy.eos_id, self.policy.turn_end_id, *(special[stop] for stop in until if stop in special)}
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        text = str(self.tokenizer.decode(row[:end], skip_special_tokens=True))
        return text[: min((text.index(stop) for stop in until if stop and stop in text), default=len(text))]


def sample_id(*parts: object) -> int:
    """A number from 0 to 2^63 - 1 that stands for a request, whatever else is asked."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _device(name: str | None) -> str:
    """The CPU where there is no CUDA: lm-eval's command line asks for cuda:0 whatever the machine has."""
    return (name or "cuda") if torch.cuda.is_available() else "cpu"


def _warn_of_lost(lost: Sequence[int], max_length: int) -> None:
    if any(lost):
        count = sum(number > 0 for number in lost)
        log.warning("%d of %d contexts lost their beginning (up to %d tokens): max_length=%d", count, len(lost), max(lost),
                    max_length)
