"""From what a pickle says to the tensors of a state dict: which they are, and that their numbers are really there.

A tensor in a pickle is a call: rebuild one from this storage, this offset, shape and stride. `plan` finds the state
dict in what stands around it, `check` compares what its tensors claim with the bytes of the storages, `made` makes
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pickles import Call, Name, Stored

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")  # what weights are found under
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, of torch.compile
_DEPTH = 4  # wrappers within wrappers
_REBUILD = "torch._utils"
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers of one type in a file. key: their name there; first, count: which of them (a view has its own)."""

    key: str
    dtype: torch.dtype
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Planned:
    """A tensor that was not read yet; offset, shape and stride in numbers of its dtype, not of the storage's."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def plan(value: Any, entry: str | None) -> tuple[dict[str, Planned], str, tuple[str, ...]]:
    """The tensors of the state dict in `value`, the entries that lead to it, and the names of what is no tensor."""
    inside: list[str] = []
    left_out: list[str] = []
    for _ in range(_DEPTH):
        if not isinstance(value, dict):
            raise ValueError(f"is a pickle of {kind(value)}, no state dict")
        tensors = {name: made for name, item in value.items() if (made := _tensor(item)) and isinstance(name, str)}
        name = _wrapper(value, bool(tensors), entry)
        beside = [key for key in value if isinstance(key, str) and key != name and (name or key not in tensors)]
        left_out += [".".join([*inside, key])[:200] for key in beside]
        if name is None:
            return unprefixed(_some(tensors, value)), ".".join(inside), tuple(left_out)
        inside.append(name)
        value, entry = value[name], None
    raise ValueError(f"has more than {_DEPTH} wrappers around its weights")


def _some(tensors: dict[str, Planned], value: dict[Any, Any]) -> dict[str, Planned]:
    if not tensors:
        held = ", ".join(f"{str(name)[:40]}: {kind(item)}" for name, item in list(value.items())[:5])
        raise ValueError(f"has no tensors under names, but {{{held}}}")
    return tensors


def _wrapper(value: dict[Any, Any], tensors: bool, entry: str | None) -> str | None:
    """The entry of a checkpoint that holds the weights, None where it holds them itself."""
    if entry is not None:
        if not isinstance(value.get(entry), dict):
            raise ValueError(f"has no entry {entry[:80]!r} that holds weights; it has {_names(value)}")
        return entry
    holding = [name for name, item in value.items() if isinstance(name, str) and _holds(item, 1)]
    known = [name for name in WRAPPERS if name in holding]
    if len(known) == 1 or (known and known[0] == WRAPPERS[0]):
        return known[0]
    if tensors or not holding:
        return None
    if len(holding) > 1:
        raise ValueError(f"holds several state dicts: {_names(holding)}; say which one is meant")
    return str(holding[0])


def _holds(item: Any, depth: int) -> bool:
    if not isinstance(item, dict):
        return False
    names = [name for name in item if isinstance(name, str)]
    return any(_tensor(item[name]) for name in names) or (
        depth < _DEPTH and any(_holds(item[name], depth + 1) for name in WRAPPERS if name in item)
    )


def _names(items: Any) -> str:
    names = [str(name)[:40] for name in items]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def kind(value: Any) -> str:
    """What a pickled value is, in words."""
    if isinstance(value, Call) and _tensor(value):
        return "a single tensor"
    if isinstance(value, Call):
        return f"a whole {str(value.function)[:80]} object" if isinstance(value.function, Name) else "an object"
    return "an object" if isinstance(value, Name | Stored) else f"a {type(value).__name__}"


def unprefixed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Without `module.` where all names begin so."""
    found = dict(tensors)
    while found:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name[len(prefix) :]: value for name, value in found.items()}
    return found


def _tensor(value: Any) -> Planned | None:
    """What a pickled tensor is to be made from; None for anything else, sparse and quantised tensors included."""
    for _ in range(_DEPTH):  # a parameter, or a tensor with attributes, is made from a tensor
        if not isinstance(value, Call) or not isinstance(value.function, Name):
            return None
        path, args = value.function.path, value.args
        if path in ((_REBUILD, "_rebuild_parameter"), (_REBUILD, "_rebuild_parameter_with_state")) and args:
            value = args[0]
        elif path == ("torch._tensor", "_rebuild_from_type_v2") and len(args) > 2 and isinstance(args[2], tuple):
            value = Call(args[0], args[2])
        elif path[0] == _REBUILD and path[1] in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _planned(args, own_type=path[1].endswith("v3"))
        else:
            return None
    return None


def _planned(args: tuple[Any, ...], own_type: bool) -> Planned | None:
    source = storage(args[0]) if len(args) > (6 if own_type else 3) else None
    if source is None:
        return None
    offset, shape, stride = args[1:4]
    dtype = source.dtype
    if own_type:
        named = args[6]
        if not isinstance(named, Name) or named.module != "torch" or named.name not in DTYPES:
            return None
        dtype = DTYPES[named.name]
    for numbers in (shape, stride, (offset,)):
        if not isinstance(numbers, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("has a tensor with a shape, stride or offset that is no count")
    if len(shape) != len(stride) or len(shape) > 64:
        raise ValueError(f"has a tensor with a shape of {len(shape)} and a stride of {len(stride)} numbers")
    return Planned(source, dtype, offset, shape, stride)


def storage(value: Any) -> Storage | None:
    """`("storage", type, key, device, count[, view])`, by which a pickle names numbers outside of it."""
    told = value.what if isinstance(value, Stored) else None
    if not isinstance(told, tuple) or len(told) < 5 or told[0] != "storage":
        return None
    named, key, _, count = told[1:5]
    if not isinstance(named, Name) or named.name not in STORAGES or not isinstance(key, str) or type(count) is not int:
        return None
    first = 0
    if len(told) > 5 and told[5] is not None:  # a part of another storage: its name, the first number, how many
        view = told[5]
        if not isinstance(view, tuple) or len(view) != 3 or not all(type(n) is int for n in view[1:]):
            return None
        first, count = view[1:]
    return Storage(key, STORAGES[named.name], first, count) if first >= 0 and count >= 0 else None


# ---------------------------------------------------------------- from bytes to tensors


def within(total: int, limit: int) -> None:
    if total > limit:
        raise ValueError(f"holds {total:,} bytes of tensors, more than the {limit:,} that are accepted")


def check(planned: Mapping[str, Planned], there: Mapping[str, int], limit: int) -> None:
    """Raise ValueError where a tensor would reach beyond the bytes of its storage, or all take too much room.

    there: bytes of each storage in the file, -1 for one that is missing.
    """
    within(sum(there.values()), limit)
    spread = 0
    types: dict[str, torch.dtype] = {}
    for name, one in planned.items():
        about, bytes_there = f"tensor {name[:80]!r}", there[one.storage.key]
        if (one.storage.first + one.storage.count) * one.storage.dtype.itemsize > bytes_there:
            raise ValueError(
                f"{about} needs {one.storage.count:,} numbers, but the file has {max(0, bytes_there):,} bytes of them"
            )
        room = one.storage.count * one.storage.dtype.itemsize // one.dtype.itemsize
        numbers, last = math.prod(one.shape), one.offset + _reach(one)
        if (numbers and last >= room) or max(one.shape, default=0) > max(room, 2**31):
            raise ValueError(f"{about} of shape {shown(one.shape)} reaches beyond its {room:,} numbers")
        if one.storage.first * one.storage.dtype.itemsize % one.dtype.itemsize:
            raise ValueError(f"{about} begins in the middle of a number")
        if types.setdefault(one.storage.key, one.dtype) != one.dtype and torch.bool in (
            one.dtype,
            types[one.storage.key],
        ):
            raise ValueError(f"{about} reads truth values as numbers, or numbers as truth values")
        spread += numbers * one.dtype.itemsize if _spreads(one) else 0
    if spread > max(sum(there.values()), 1 << 20):  # a little of it is usual, as in a buffer that was expanded
        raise ValueError("has tensors that spread a few numbers over more bytes than the file holds")


def _reach(one: Planned) -> int:
    """The distance from the first to the last number of a tensor."""
    return sum((size - 1) * step for size, step in zip(one.shape, one.stride, strict=True) if size)


def _spreads(one: Planned) -> bool:
    """Whether a tensor has more numbers than its storage gives it: some are used several times."""
    return math.prod(one.shape) > _reach(one) + 1


def shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[:8])) + ("x..." if len(shape) > 8 else "") or "()"


def made(planned: Mapping[str, Planned], loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, from the bytes (uint8) of their storages: one memory for names that share a storage, but where a
    few numbers are spread out.
    """
    for key in {one.storage.key for one in planned.values() if one.dtype == torch.bool}:
        loaded[key].clamp_(max=1)  # a truth value of a stranger may be any byte
    out = {}
    for name, one in planned.items():
        width = one.storage.dtype.itemsize
        start, length = one.storage.first * width, one.storage.count * width
        numbers = loaded[one.storage.key][start : start + length - length % one.dtype.itemsize].view(one.dtype)
        if math.prod(one.shape) == 0:
            out[name] = torch.empty(one.shape, dtype=one.dtype)
            continue
        view = numbers.as_strided(one.shape, one.stride, one.offset)
        out[name] = view.contiguous() if _spreads(one) else view
    return out


__all__ = [
    "DTYPES", "PREFIXES", "STORAGES", "WRAPPERS", "Planned", "Storage", "check", "kind", "made", "plan", "shown",
    "storage", "unprefixed", "within",
]  # fmt: skip
