"""Plain data as JSON, keeping what JSON would lose, and frames to send it in. Shared by all processes of the sandbox.

Nothing that arrives can be more than plain data or the number of an object that stays where it is: no pickle, no
classes, no code. Subclasses are taken as their base class by the base class's own methods, so that an `__iter__` or
`__eq__` of the program has no say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

FRAME_HEADER = 4  # bytes that hold the length of what follows

_SMALL = 1 << 63  # longer integers travel as hexadecimal digits: Python limits the decimal ones
_SEQUENCES: tuple[Any, ...] = (tuple, set, frozenset)
_BYTES: tuple[Any, ...] = (bytes, bytearray)


def encode(value: Any, handle: Callable[[Any], int] | None = None) -> Any:
    """The JSON form of a value; `handle` gives numbers to objects that are no plain data.

    Example: `encode((1, {2}))` is `{"tuple": [1, {"set": [2]}]}`.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_SMALL <= number < _SMALL else {"int": hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, handle) for item in list.__iter__(value)]
    if isinstance(value, dict):
        return {"dict": [[encode(key, handle), encode(item, handle)] for key, item in dict.items(value)]}
    return _encode_other(value, handle)


def _encode_other(value: Any, handle: Callable[[Any], int] | None) -> Any:
    for kind in _SEQUENCES:
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, handle) for item in kind.__iter__(value)]}
    for kind in _BYTES:
        if isinstance(value, kind):
            return {kind.__name__: kind.hex(value)}
    if isinstance(value, complex):
        return {"complex": [complex.real.__get__(value), complex.imag.__get__(value)]}
    if type(value) is range:
        return {"range": [encode(bound) for bound in (value.start, value.stop, value.step)]}
    if handle:
        return {"handle": handle(value)}
    raise TypeError(f"the value is no plain data but of type {type(value).__name__}")


_DECODERS: Mapping[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda items, handle: tuple(decode(item, handle) for item in items),
    "set": lambda items, handle: {decode(item, handle) for item in items},
    "frozenset": lambda items, handle: frozenset(decode(item, handle) for item in items),
    "dict": lambda pairs, handle: {decode(key, handle): decode(item, handle) for key, item in pairs},
    "bytes": lambda digits, _: bytes.fromhex(digits),
    "bytearray": lambda digits, _: bytearray.fromhex(digits),
    "complex": lambda parts, _: complex(*parts),
    "range": lambda bounds, _: range(*(decode(bound) for bound in bounds)),
    "int": lambda digits, _: int(digits, 16),
    "handle": lambda number, handle: handle(number),
}


def decode(value: Any, handle: Callable[[int], Any] | None = None) -> Any:
    """The value of a JSON form; `handle` makes the stand-ins of objects that stayed where they are.

    Raises ValueError, TypeError, KeyError or RecursionError for anything that `encode` does not make.
    """
    if isinstance(value, list):
        return [decode(item, handle) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return _DECODERS[kind](content, handle)


def frame(message: Any) -> bytes:
    """A message with its length in front."""
    data = json.dumps(message).encode()
    return len(data).to_bytes(FRAME_HEADER, "big") + data


def read_frame(read: Callable[[int], bytes], most: int | None = None) -> Any:
    """The next message; `read(n)` returns 1 to n bytes, or none at the end.

    Raises EOFError at the end and OverflowError for a message of more than `most` bytes.
    """
    size = int.from_bytes(_read_exactly(read, FRAME_HEADER), "big")
    if most is not None and size > most:
        raise OverflowError(f"{size} bytes")
    return json.loads(_read_exactly(read, size))


def _read_exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = read(min(size - len(data), 65536))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)
