"""A critic for partly masked canvases: one value per position, from the hidden states that the output head would read.

    value of position t = w · h_t + b,   h_t the last hidden state at t given the prompt and what is on the canvas

The trunk is a network of its own, started from the policy's weights, or the policy's. The head starts at zero, so that the
first advantages are the returns. TraceRL (arXiv 2509.06949) has token values of this kind for block models.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy
from dllm_rl.types import PromptBatch

TRUNKS = ("separate", "shared")
FILE = "critic.safetensors"


class ValueModel:
    """A value head on a denoiser.

    Args:
        policy: gives the trunk: a copy of it for trunk=separate, itself for trunk=shared.
        trunk: separate | shared.
    """

    def __init__(self, policy: Policy, trunk: str) -> None:
        self.mask_id, self.eos_id = policy.mask_id, policy.eos_id
        self.separate = trunk == "separate"
        self.trunk = policy.twin() if self.separate else policy
        vocabulary = self.trunk.network.get_output_embeddings()
        first = next(policy.network.parameters())
        precision = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.head = nn.Linear(vocabulary.weight.shape[1], 1, device=first.device, dtype=precision)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if self.separate:
            for parameter in self.trunk.network.parameters():
                parameter.grad = None
            # The copy never predicts a token: its vocabulary head keeps no rows. (A tied embedding keeps its own tensor.)
            vocabulary.weight = nn.Parameter(vocabulary.weight.detach()[:0].clone(), requires_grad=False)
            vocabulary.bias = None

    def values(self, prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """[K] values, float32 or wider, at the K True entries of `positions` [B, L]; see `Policy.logits`."""
        hidden = self.trunk.hidden(prompts, canvas, positions)
        with torch.autocast(hidden.device.type, enabled=False):  # half precision would round values near 1 to 1/256
            values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values

    def parameters(self) -> Iterator[nn.Parameter]:
        """The critic's own parameters: the head, and a separate trunk."""
        yield from self.head.parameters()
        if self.separate:
            yield from (parameter for parameter in self.trunk.network.parameters() if parameter.requires_grad)

    def save(self, folder: Path) -> None:
        """Writes the critic's own parameters into a checkpoint folder."""
        save_file(self._tensors(), folder / FILE)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote.

        Raises:
            UserError: the checkpoint has no critic, or one of another shape.
        """
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: has no {FILE}; this run was started without a critic (critic.mdp=none)")
        saved, own = load_file(folder / FILE), self._tensors()
        if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in own.items()}:
            raise UserError(f"{folder / FILE}: holds a critic of another shape; critic.trunk must be as the run started")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, once: safetensors refuses two names for one memory (tied weights)."""
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        seen: set[int] = set()
        fixed = {name for name, parameter in self.trunk.network.named_parameters() if not parameter.requires_grad}
        for name, tensor in self.trunk.network.state_dict().items() if self.separate else ():
            if name not in fixed and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                tensors[f"trunk.{name}"] = tensor
        return tensors
