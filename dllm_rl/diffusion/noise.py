"""Random numbers that are a pure function of a key.

Every draw is keyed by (run seed, purpose, step, sample id, ...), so results depend neither on batch size, row order or
number of processes nor on what was drawn before, and resuming a run needs no generator state. The global generators of
torch, numpy and Python are never touched. The hash is splitmix64 (Steele, Lea and Flood, OOPSLA 2014), vectorised.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """First part of a key, so that draws for different ends never share numbers."""

    PROMPT_ORDER = 1
    SAMPLE = 2
    CORRUPT = 3


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` (torch has no arithmetic on uint64)."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: `>>` on int64 would copy the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def fold(key: Tensor, part: int | Tensor) -> Tensor:
    """A new key for each key and part. Shapes broadcast; int64 in, int64 out."""
    value = part if isinstance(part, Tensor) else torch.tensor(_signed(part), dtype=torch.int64, device=key.device)
    return _mix(key * _signed(_GOLDEN) + _mix(value + _signed(_GOLDEN)))


def make_key(seed: int, purpose: Purpose, *parts: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The key of (seed, purpose, *parts). Tensor parts broadcast: one [B] part gives [B] keys."""
    key = torch.tensor(_signed(seed), dtype=torch.int64, device=device)
    for part in (int(purpose), *parts):
        key = fold(key, part)
    return key


def uniform(key: Tensor, count: int) -> Tensor:
    """`count` numbers in the open interval (0, 1) for each key: [...] int64 -> [..., count] float64."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=key.device)
    bits = _shift_right(_mix(key.unsqueeze(-1) + counter * _signed(_GOLDEN)), 12)
    return (bits.double() + 0.5) * 2.0**-52
