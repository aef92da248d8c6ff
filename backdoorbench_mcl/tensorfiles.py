"""The header of a safetensors file, read by the book: what it says fits the file before anything is allocated.

Eight bytes, the length of a JSON object: name -> dtype, shape, data_offsets (from the end of the header). Free of
torch.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_HEADER = 100_000_000  # the limit of the format itself
SIZES: Mapping[str, int] = {  # bytes of a number
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of a file. start, end: its bytes, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_length(first: bytes, size: int) -> int:
    """The length of the header, from the first eight bytes of a file of `size` bytes. Raises ValueError."""
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"header of {length} bytes in a file of {size}")
    return length


def entries(header: bytes, room: int) -> list[Entry]:
    """The tensors of a header, sorted by name. room: bytes behind the header.

    Raises ValueError for a name given twice, a shape that does not fit its bytes, bytes outside the file or of two
    tensors.
    """
    try:
        found = json.loads(header, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("a header of lists within lists") from error
    if not isinstance(found, dict):
        raise ValueError("a header that is no object")
    out = [_entry(name, told, room) for name, told in sorted(found.items()) if name != "__metadata__"]
    by_place = sorted((entry for entry in out if entry.end > entry.start), key=lambda entry: entry.start)
    for before, after in itertools.pairwise(by_place):
        if after.start < before.end:
            raise ValueError(f"tensors {before.name[:80]!r} and {after.name[:80]!r} share bytes")
    return out


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"the name {name[:80]!r} twice")
        out[name] = value
    return out


def _entry(name: str, told: Any, room: int) -> Entry:
    shown = f"tensor {name[:80]!r}"
    if not isinstance(told, dict) or not isinstance(told.get("dtype"), str) or told["dtype"] not in SIZES:
        raise ValueError(f"{shown} of an unknown type")
    shape: Any = told.get("shape")
    place: Any = told.get("data_offsets")
    for numbers in (shape, place):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{shown}: shape or offsets are no counts")
    if len(shape) > 64 or len(place) != 2 or not place[0] <= place[1] <= room:
        raise ValueError(f"{shown} lies outside the file")
    if math.prod(shape) * SIZES[told["dtype"]] != place[1] - place[0]:
        raise ValueError(f"{shown}: {place[1] - place[0]} bytes for {told['dtype']} {shape}"[:200])
    return Entry(name, told["dtype"], tuple(shape), place[0], place[1])


__all__ = ["MAX_HEADER", "SIZES", "Entry", "entries", "header_length"]
