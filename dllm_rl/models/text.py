"""How text becomes tokens and tokens become text again: special tokens, chat template, padding, the end of a completion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

import torch
from einops import rearrange
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm_rl.errors import UserError
from dllm_rl.models.families import Rules
from dllm_rl.task import Prompt
from dllm_rl.types import PromptBatch

END_OF_TURN = ("<|eot_id|>", "<|im_end|>")


class TextFormat(ABC):
    """The half of a policy that knows about text.

    Args:
        tokenizer: must have a mask, an EOS and a padding token.
        rules: of the model's family.

    Raises:
        UserError: a special token is missing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> None:
        for name in ("mask_token", "eos_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise UserError(f"the tokenizer has no {name}; a masked-diffusion model needs mask, EOS and padding tokens")
        self.tokenizer, self.rules = tokenizer, rules
        self.mask_id: int = tokenizer.mask_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        self.turn_end_id: int | None = tokenizer.get_vocab().get(rules.turn_end) if rules.turn_end else None
        """The token that ends a turn in a chat, where the family and the tokenizer have one."""
        self.chat = tokenizer.chat_template is not None
        """Whether prompts are laid out by the tokenizer's chat template."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where token tensors go."""

    @property
    def end_ids(self) -> list[int]:
        """EOS, and the ends of a turn that the tokenizer knows."""
        known, names = self.tokenizer.get_vocab(), (self.rules.turn_end, *END_OF_TURN)
        return list(dict.fromkeys([self.eos_id, *(known[name] for name in names if name in known)]))

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a text: EOS, and the family's end of a turn."""
        return [self.eos_id] if self.turn_end_id is None else [self.eos_id, self.turn_end_id]

    def encode_prompts(self, prompts: Sequence[str | Prompt], sample_ids: Tensor) -> PromptBatch:
        """Renders, tokenizes and left-pads B prompts onto the policy's device. `sample_ids` is [B].

        Raises:
            UserError: a prompt has the mask token in its text.
        """
        # A chat template writes the special tokens itself.
        options = {"add_special_tokens": False} if self.chat else {}
        for prompt in prompts:
            self.check_prompt(prompt)
        rows = [self.tokenizer.encode(self.render(prompt), **options) for prompt in prompts]
        return self.pad_prompts(rows if self.chat else [self.begun(row) for row in rows], sample_ids)

    def begun(self, row: list[int]) -> list[int]:
        """The tokens of a plain text, with the BOS token in front where the family wants one."""
        bos = self.tokenizer.bos_token_id
        return row if not self.rules.bos or bos is None or row[:1] == [bos] else [bos, *row]

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
        try:
            rendered = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:  # a template may refuse shots, and be in error as any program
            raise UserError(f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'} cannot lay a prompt out "
                            f"({' '.join(str(error).split())}); model.chat_template=false does without it") from None
        return str(rendered) + prompt.prefill

    def pad_prompts(self, rows: Sequence[Sequence[int]], sample_ids: Tensor) -> PromptBatch:
        """Left-pads B token rows onto the policy's device. `sample_ids` is [B].

        Raises:
            UserError: a row is empty although the first token of a completion is read from the last one of its prompt.
        """
        if self.rules.logit_shift and not all(rows):
            raise UserError(f"a prompt is empty: models of the family {self.rules.family} predict a completion's first "
                            "token at the last token of the prompt, which must have one")
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        for number, row in enumerate(rows):
            ids[number, width - len(row):] = torch.tensor(row, dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(width) >= rearrange(width - lengths, "b -> b 1")
        return PromptBatch(ids, mask, sample_ids).to(self.device)

    def encode_completions(self, texts: Sequence[str], length: int) -> Tensor:
        """[B, L] int64: each text, in a chat the end of the turn, and EOS up to `length`; longer texts lose their end.

        Raises:
            UserError: a text has the mask token in it.
        """
        ids = torch.full((len(texts), length), self.eos_id)
        for number, text in enumerate(texts):
            self._refuse_mask(f"completion {text!r}", text)
            row = self.tokenizer.encode(text, add_special_tokens=False)
            row = ([*row, self.turn_end_id] if self.chat and self.turn_end_id is not None else row)[:length]
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return ids.to(self.device)

    def check_prompt(self, prompt: str | Prompt) -> None:
        """Raises:
            UserError: the prompt spells the mask token.
        """
        if isinstance(prompt, str):
            self._refuse_mask(f"prompt {prompt!r}", prompt)
        else:
            self._refuse_mask(f"prompt {prompt.id}", prompt.text, prompt.prefill, *chain.from_iterable(prompt.shots))

    def _refuse_mask(self, what: str, *texts: str) -> None:
        """A mask that came from text would be a token to predict, whose log-probability is -inf."""
        if any(str(self.tokenizer.mask_token) in text for text in texts):
            shown = what if len(what) <= 120 else f"{what[:90]} ... {what[-25:]}"
            raise UserError(f"{shown}: has the text {self.tokenizer.mask_token}, which is this model's mask token; leave it "
                            "out of the data, or spell it differently")

    def decode(self, ids: Tensor) -> list[str]:
        """The texts of [B, L] completions, each cut at its first EOS or end of a turn."""
        texts, ends = [], self.stop_ids
        for row in ids.tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(str(self.tokenizer.decode(row[:end], skip_special_tokens=True)))
        return texts

    def introduction(self, prompt: str | Prompt) -> str:
        """Two lines on how text becomes tokens: the special tokens, and a prompt as the model reads it."""
        named = [("mask", self.mask_id), ("EOS", self.eos_id), ("padding", self.pad_id),
                 ("BOS", self.tokenizer.bos_token_id), ("end of turn", self.turn_end_id)]
        tokens = [f"{name} {self.tokenizer.convert_ids_to_tokens(number)} {number}" for name, number in named
                  if number is not None]
        ids = self.encode_prompts([prompt], torch.zeros(1, dtype=torch.int64)).ids[0]
        text = repr(self.tokenizer.decode(ids))
        shown = text if len(text) <= 200 else f"{text[:120]} ... {text[-75:]}"
        layout = "chat template" if self.chat else "plain text"
        return f"tokens: {', '.join(tokens)}\nfirst prompt ({layout}, {len(ids)} tokens): {shown}"

    def ending(self, completion: str, length: int) -> str:
        """One line on how a completion to learn ends, as the model sees it."""
        row = self.encode_completions([completion], length)[0].tolist()
        end = row.index(self.eos_id) + 1 if self.eos_id in row else length
        rest = f"then EOS up to {length}" if end < length else "the whole canvas"
        return f"first completion ({end} tokens, {rest}) ends: {self.tokenizer.decode(row[:end])[-75:]!r}"
