"""A masked-diffusion model behind one forward method, used alike by rollout, likelihood and evaluation.

The network is transformers' own class with `is_causal=False`; the logits come only from the positions asked for. A
pre-hook on the output head keeps those rows, so the head module itself is still called and wrappers around it (peft,
FSDP2, ZeRO) keep working.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dllm_rl.errors import UserError
from dllm_rl.models.kv_cache import KeyValueCache
from dllm_rl.task import Prompt
from dllm_rl.types import PromptBatch

END_OF_TURN = ("<|eot_id|>", "<|im_end|>")
CHECKPOINT_FILES = "config.json, model.safetensors and the tokenizer's files"


class Policy:
    """Network, tokenizer and special ids.

    Args:
        network: a causal-LM class of transformers with `config.is_causal = False`.
        tokenizer: must have a mask, an EOS and a padding token.

    Raises:
        UserError: a special token is missing, or the network turns out to be causal or to read padding.
    """

    attention_block: int | None = None
    """Positions per block where attention is causal between blocks. None: everyone sees everyone."""
    shift: int = 0
    """How many positions further left the network predicts a token: 1 for models made from autoregressive ones."""

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        for name in ("mask_token", "eos_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise UserError(f"the tokenizer has no {name}; a masked-diffusion model needs mask, EOS and padding tokens")
        self.network: Any = network
        self.tokenizer = tokenizer
        self.mask_id: int = tokenizer.mask_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        self.chat = tokenizer.chat_template is not None
        """Whether prompts are laid out by the tokenizer's chat template."""
        self._head_rows: Tensor | None = None
        self._hidden: list[Tensor] | None = None
        network.eval()  # no dropout: the log-probabilities of a corruption are a function of the weights alone
        network.get_output_embeddings().register_forward_pre_hook(self._keep_rows)
        self._probe()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def end_ids(self) -> list[int]:
        """EOS, and the ends of a turn that the tokenizer knows."""
        known = self.tokenizer.get_vocab()
        return list(dict.fromkeys([self.eos_id, *(known[name] for name in END_OF_TURN if name in known)]))

    def logits(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """The one forward pass.

        The mask token gets -inf: the model predicts data, never the mask (MDLM, arXiv 2406.07524, section 3.2.3).

        Args:
            prompts: B left-padded prompts.
            canvas: [B, L] int64, the completion with some tokens masked.
            positions: [B, L] bool, K of them True.

        Returns:
            [K, V] logits in the network's precision, rows in row-major order of `positions`.
        """
        return self.without_mask(self._forward(prompts, canvas, positions))

    def without_mask(self, logits: Tensor) -> Tensor:
        """The logits [K, V] with -inf for the mask token."""
        return logits.index_fill(-1, torch.tensor([self.mask_id], device=logits.device), -torch.inf)

    def hidden(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """What the output head would read, [K, H], for the arguments of `logits`; the head itself is given no rows."""
        self._hidden = []
        try:
            self._forward(prompts, canvas, positions)
            (rows,) = self._hidden
        finally:
            self._hidden = None
        return rows

    def _forward(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        ids = torch.cat([prompts.ids, canvas], dim=1)
        # Without padding no mask is passed, so that the attention kernel without a bias is used.
        padding: dict[str, Tensor] = {}
        if not prompts.mask.all():
            attended = torch.cat([prompts.mask, torch.ones_like(positions)], dim=1)
            padding = {"attention_mask": attended.long(), "position_ids": (attended.cumsum(1) - 1).clamp(min=0)}
        head_rows = torch.cat([torch.zeros_like(prompts.mask), positions], dim=1)
        return self.run(head_rows, input_ids=ids, use_cache=False, **padding)

    def run(self, head_rows: Tensor, **inputs: Any) -> Tensor:
        """[K, V]: the network's own output for the K True entries of `head_rows`, a bool of the shape of its input ids."""
        self._head_rows = head_rows
        try:
            logits: Tensor = self.network(**inputs).logits
        finally:
            self._head_rows = None
        return logits

    def cache(self, prompts: PromptBatch, length: int, *, exact: bool) -> KeyValueCache:
        """An empty cache for completions of `length` tokens, for samplers (`sampler.cache`)."""
        return KeyValueCache(self, prompts, length, exact=exact, attention_block=self.attention_block, shift=self.shift)

    def _keep_rows(self, _head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._head_rows is None:
            return None
        rows = inputs[0][self._head_rows]
        if self._hidden is not None:
            self._hidden.append(rows)
            rows = rows[:0]
        return (rows, *inputs[1:])

    def encode_prompts(self, prompts: Sequence[str | Prompt], sample_ids: Tensor) -> PromptBatch:
        """Renders, tokenizes and left-pads B prompts onto the policy's device. `sample_ids` is [B]."""
        # A chat template writes the special tokens itself.
        options = {"add_special_tokens": False} if self.chat else {}
        rows = [self.tokenizer.encode(self.render(prompt), **options) for prompt in prompts]
        return self.pad_prompts(rows, sample_ids)

    def render(self, prompt: str | Prompt) -> str:
        """The text that the model reads: a chat where the tokenizer has a template for one, else the parts in a row.

        A string is one turn of the user. Example: `policy.render(Prompt("1", "2+2=", shots=(("1+1=", "2"),)))` is
        `1+1=2\n\n2+2=` without a template.
        """
        if isinstance(prompt, str):
            prompt = Prompt("", prompt)
        if not self.chat:
            return "".join(f"{question}{answer}\n\n" for question, answer in prompt.shots) + prompt.text + prompt.prefill
        turns = [turn for question, answer in prompt.shots for turn in (("user", question), ("assistant", answer))]
        chat = [{"role": role, "content": content} for role, content in [*turns, ("user", prompt.text)]]
        rendered = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return str(rendered) + prompt.prefill

    def pad_prompts(self, rows: Sequence[Sequence[int]], sample_ids: Tensor) -> PromptBatch:
        """Left-pads B token rows onto the policy's device. `sample_ids` is [B]."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        for number, row in enumerate(rows):
            ids[number, width - len(row):] = torch.tensor(row, dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(width) >= rearrange(width - lengths, "b -> b 1")
        return PromptBatch(ids, mask, sample_ids).to(self.device)

    def encode_completions(self, texts: Sequence[str], length: int) -> Tensor:
        """[B, L] int64: each text followed by EOS up to `length`; longer texts lose their end."""
        ids = torch.full((len(texts), length), self.eos_id)
        for number, text in enumerate(texts):
            row = self.tokenizer.encode(text, add_special_tokens=False)[:length]
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return ids.to(self.device)

    def decode(self, ids: Tensor) -> list[str]:
        """The texts of [B, L] completions, each cut at its first EOS."""
        texts = []
        for row in ids.tolist():
            end = row.index(self.eos_id) if self.eos_id in row else len(row)
            texts.append(str(self.tokenizer.decode(row[:end], skip_special_tokens=True)))
        return texts

    def frozen_copy(self) -> Policy:
        """The policy as it is now, in memory of its own; its parameters take no gradient."""
        return copy.deepcopy(self).freeze()

    def in_dtype(self, dtype: torch.dtype) -> Policy:
        """A frozen copy whose parameters are in another precision; rotary tables and other buffers keep theirs."""
        parameters: dict[int, Any] = {
            id(parameter): torch.nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
            for parameter in self.network.parameters()
        }
        return copy.deepcopy(self, parameters)  # deepcopy takes what it is given in place of a copy of its own

    def freeze(self) -> Policy:
        """The policy itself, its parameters without gradients."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        return self

    def save(self, folder: Path) -> None:
        """Writes config.json, model.safetensors and the tokenizer: plain transformers classes load them again."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def _probe(self) -> None:
        """One shot at start: the first position must see the last one, and nobody may see padding.

        An older transformers ignores `is_causal=False` without a word, and some modelling code ignores the attention
        mask; either would train a different model from the one that samples.
        """
        plain = [i for i in range(len(self.tokenizer)) if i not in set(self.tokenizer.all_special_ids)]
        first, other = plain[0], plain[-1]
        prompt = torch.tensor([[self.pad_id, first, first]], device=self.device)
        canvas = torch.tensor([[first, self.mask_id, first]], device=self.device)
        changed_end = torch.tensor([[first, self.mask_id, other]], device=self.device)
        changed_padding = torch.tensor([[other, first, first]], device=self.device)
        mask = torch.tensor([[False, True, True]], device=self.device)
        asked = torch.tensor([[True, False, False]], device=self.device)

        def look(ids: Tensor, tail: Tensor) -> Tensor:
            return self.logits(PromptBatch(ids, mask, torch.zeros(1, dtype=torch.int64)), tail, asked)

        base = look(prompt, canvas)
        name = type(self.network).__name__
        if torch.equal(base, look(prompt, changed_end)):
            raise UserError(f"{name} attends causally although masked diffusion needs both directions; set is_causal=false "
                            "in its config.json and use a transformers release that honours it")
        if not torch.equal(base, look(changed_padding, canvas)):
            raise UserError(f"{name} ignores the attention mask: padding changes its logits")


def load_policy(path: str) -> Policy:
    """A policy from a checkpoint folder or a hub name.

    Raises:
        UserError: the folder lacks the configuration, weights or tokenizer, or the hub has no such model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    elif _looks_local(path):
        raise UserError(f"model.path={path}: no such folder; must be a folder with {CHECKPOINT_FILES}, or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"model.path={path}: cannot be loaded, must be a folder with {CHECKPOINT_FILES}, "
                        f"or a hub name ({reason})") from None
    return Policy(network, tokenizer)


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant as a folder: a hub name is `name` or `owner/name`, and asking the hub for
    anything else only makes the user wait."""
    parent = Path(path).parent
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or (parent != Path(".") and parent.is_dir())


def _check_folder(folder: Path) -> None:
    has_weights = any(folder.glob("*.safetensors"))
    missing = [name for name, there in (
        ("config.json", (folder / "config.json").is_file()),
        ("model.safetensors", has_weights),
        ("tokenizer.json", (folder / "tokenizer.json").is_file()),
    ) if not there]
    if missing:
        raise UserError(f"model.path={folder}: has no {' and no '.join(missing)}; must hold {CHECKPOINT_FILES}")
