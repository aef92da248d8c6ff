"""Weights that a stranger saved: `read` gives the state dict of a file, `fit` puts it into a network, or says why not.

Read are safetensors and what `torch.save` writes, today's zip archives and the older stream. `torch.load` is not asked,
not even with `weights_only=True`: it has run code of such files before (CVE-2025-32434, all versions below 2.6, which
this package allows), it makes room for whatever sizes a file claims, and it refuses a whole file for one object beside
the weights that it does not know. Here the pickle is followed on paper (`pickles`), every storage is checked against
the bytes that are really there, and only then are those bytes read. No memory is taken for more than the file holds.

A stranger's checkpoint has things around its weights: `{"state_dict": ..., "epoch": 300, "optimizer": ...}`, names with
`module.` in front. Both are taken off; what is no tensor is left out.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import pickles, statedicts, tensorfiles
from .errors import UserError
from .plainfiles import PlainFile
from .statedicts import DTYPES, check, made, plan, shown, unprefixed, within
from .text import one_line
from .traced import Traced

LIMIT = 4 << 30  # bytes of tensors: the largest networks for images have about 3 GB
MAX_PICKLE = 64 << 20  # bytes of what is no tensor
MOST_LINES = 10  # of an explanation
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of an older torch file

_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_FOREIGN = (  # how files begin that are taken for checkpoints, and what they are
    (b"\x93NUMPY", "a numpy array"), (b"\x89HDF", "an HDF5 file, as Keras writes it"), (b"GGUF", "a GGUF model"),
    (b"\x1f\x8b", "compressed with gzip"), (b"BZh", "compressed with bzip2"), (b"\xfd7zXZ", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"), (b"version https://git-lfs", "a pointer of Git LFS, not the file"),
    (b"<", "a page of HTML or XML: was it downloaded by its link?"),
)  # fmt: skip
_EXPECTED = (
    "expected the weights alone, as safetensors or as torch.save(model.state_dict(), FILE) writes them; load it where "
    "its code runs and save them so"
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file. tensors: on the CPU, by name; layout: "safetensors", "torch" or "torch, old".

    inside: the entry that they were found under, as in "state_dict", "" for the file itself; left_out: what lay beside
    them or among them and is no tensor; nonfinite: names of tensors with NaN or infinities in them.
    """

    tensors: Mapping[str, Tensor]
    layout: str
    inside: str = ""
    left_out: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()


def read(file: Path, *, limit_bytes: int = LIMIT, entry: str | None = None) -> Checkpoint:
    """The weights in `file`, which need not be trusted. Nothing of it is executed, and no more is allocated than it
    holds; limit_bytes: the most that its tensors may take; entry: where a file holds several state dicts, which.

    Raises UserError, one line, for anything else: TorchScript, ONNX, whole pickled networks, numpy files, folders,
    pipes, damaged and truncated files, sizes that do not fit, a name given twice.

    Example: `fit(model, read(Path("model_best.pth.tar")).tensors)`
    """
    try:
        with PlainFile(file, most=max(MAX_PICKLE, tensorfiles.MAX_HEADER)) as stream:
            found = _read(stream, limit_bytes, entry)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; expected a file of weights") from error
    except (ValueError, OverflowError, zipfile.BadZipFile, RuntimeError, EOFError, struct.error) as error:
        raise UserError(one_line(f"{file}: {_reason(error)}; {_EXPECTED}", 600)) from error
    names = [name for name, tensor in found.tensors.items() if _not_finite(tensor)]
    return replace(found, nonfinite=tuple(names))


def _reason(error: Exception) -> str:
    text = one_line(str(error), 300)
    return (
        f"is damaged ({text})"
        if isinstance(error, zipfile.BadZipFile | EOFError | OverflowError | struct.error)
        else text
    )


def _not_finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return bool((tensor.is_floating_point() or tensor.is_complex()) and not wide.isfinite().all())


def _read(stream: PlainFile, limit: int, entry: str | None) -> Checkpoint:
    """By what the file begins with; its name may be anything."""
    first = stream.read(512)
    if not first:
        raise ValueError("is empty")
    if first.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip(stream, limit, entry)
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= tensorfiles.MAX_HEADER:
        return _safetensors(stream, limit, entry)
    if first[257:262] == b"ustar":
        raise ValueError("is a tar archive (perhaps of torch before 0.2)")
    if first[:1] == b"\x80":
        return _stream(stream, limit, entry)
    kind = next((kind for begins, kind in _FOREIGN if first.startswith(begins)), "")
    if not kind and first[:1] == b"\x08" and (b"onnx" in first.lower() or b"pytorch" in first):
        kind = "an ONNX model"
    raise ValueError(f"is {kind}" if kind else "is neither safetensors nor a file of torch.save")


# ---------------------------------------------------------------- safetensors


def _safetensors(stream: PlainFile, limit: int, entry: str | None) -> Checkpoint:
    stream.seek(0)
    length = tensorfiles.header_length(stream.read(8), stream.size)
    told = tensorfiles.entries(stream.read(length), stream.size - 8 - length)
    within(sum(one.end - one.start for one in told), limit)
    tensors = {}
    for one in told:
        if one.dtype not in _SAFETENSORS:
            raise ValueError(f"tensor {one.name[:80]!r} has numbers of type {one.dtype}, which are not read")
        stream.seek(8 + length + one.start)
        numbers = _numbers(stream.readinto, one.end - one.start)
        numbers = numbers.clamp_(max=1) if one.dtype == "BOOL" else numbers  # any byte may stand for a truth value
        tensors[one.name] = numbers.view(DTYPES[_SAFETENSORS[one.dtype]]).reshape(one.shape)
    if entry is not None:
        raise ValueError(f"has no entry {entry[:80]!r}: a safetensors file holds tensors only")
    return Checkpoint(unprefixed(tensors), "safetensors")


# ---------------------------------------------------------------- torch.save, zip


def _zip(stream: PlainFile, limit: int, entry: str | None) -> Checkpoint:
    with zipfile.ZipFile(stream) as archive:
        members = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
        if any("/code/" in name or name.endswith("/constants.pkl") for name in members):
            raise ValueError("is a TorchScript archive, a program")
        if any(name.endswith(".npy") for name in members):
            raise ValueError("is an archive of numpy arrays")
        if len(roots) != 1:
            raise ValueError("is a zip archive, but not one of torch.save")
        _check_members(archive.infolist(), stream.size)
        order = members.get(f"{roots[0]}byteorder")
        if order is not None and archive.read(order) != sys.byteorder.encode():
            raise ValueError("was saved on a machine with another order of bytes")
        pickle = members[f"{roots[0]}data.pkl"]
        if pickle.file_size > MAX_PICKLE:
            raise ValueError(f"has {pickle.file_size:,} bytes beside its tensors, more than {MAX_PICKLE:,}")
        value, _ = pickles.read(io.BytesIO(archive.read(pickle)))
        planned, inside, left_out = plan(value, entry)
        sizes = {name: info.file_size for name, info in members.items()}
        there = {one.storage.key: sizes.get(f"{roots[0]}data/{one.storage.key}", -1) for one in planned.values()}
        check(planned, there, limit)
        loaded = {}
        for key in there:
            with cast(io.BufferedIOBase, archive.open(members[f"{roots[0]}data/{key}"])) as member:
                loaded[key] = _numbers(member.readinto, there[key])
                member.read(1)  # at its end the checksum is looked at
    return Checkpoint(made(planned, loaded), "torch", inside, left_out)


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """torch.save compresses nothing: what is compressed, or lies in the file twice, is there to be larger than it."""
    names = [info.filename for info in members]
    if len(set(names)) < len(names):
        raise ValueError("is a zip archive with one name given twice")
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in members):
        raise ValueError("has compressed entries, which torch.save never writes")
    if sum(info.file_size for info in members) > size:
        raise ValueError("has entries that overlap")


# ---------------------------------------------------------------- torch.save, the older stream


def _stream(stream: PlainFile, limit: int, entry: str | None) -> Checkpoint:
    stream.seek(0)
    head = io.BytesIO(stream.read(min(MAX_PICKLE, stream.size)))
    magic, _ = pickles.read(head)
    if magic != _MAGIC:
        raise ValueError(f"is a pickle of {statedicts.kind(magic)}, not written by torch.save")
    _, _ = pickles.read(head)  # the version of the format
    system, _ = pickles.read(head)
    if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError("was saved on a machine with another order of bytes")
    value, stored = pickles.read(head)
    keys, _ = pickles.read(head)
    known = {one.key: one for found in stored if (one := statedicts.storage(found)) is not None}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("is damaged (no list of its storages)")
    places: dict[str, tuple[int, int]] = {}
    place = head.tell()
    for key in keys:
        stream.seek(place)
        count = int.from_bytes(stream.read(8), "little", signed=True)
        length = count * (known[key].dtype.itemsize if key in known else 0)
        if key not in known or not 0 <= length <= stream.size - place - 8:
            raise ValueError(f"is damaged or truncated (storage {key[:80]!r})")
        places[key] = (place + 8, length)
        place += 8 + length
    planned, inside, left_out = plan(value, entry)
    there = {one.storage.key: places.get(one.storage.key, (0, -1))[1] for one in planned.values()}
    check(planned, there, limit)
    loaded = {}
    for key, length in there.items():
        stream.seek(places[key][0])
        loaded[key] = _numbers(stream.readinto, length)
    return Checkpoint(made(planned, loaded), "torch, old", inside, left_out)


# ---------------------------------------------------------------- bytes


def _numbers(readinto: Callable[[memoryview], int | None], length: int) -> Tensor:
    """The next `length` bytes of a file, uint8 (length,). Raises EOFError where it has fewer."""
    out = torch.empty(length, dtype=torch.uint8)
    view = memoryview(cast(Any, out.numpy()))
    done = 0
    while done < length:
        count = readinto(view[done : done + (16 << 20)])
        if not count:
            raise EOFError(f"ends {length - done:,} bytes early")
        done += count
    return out


# ---------------------------------------------------------------- into a network


def mismatches(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Why `given` does not fit a network whose state dict is `expected`: a line per name, at most `MOST_LINES`, none
    where it fits. Numbers of another width fit, whole numbers for fractions do not. A count of batches that older
    versions of torch did not keep may be missing.
    """
    missing = [name for name in expected if name not in given and not name.endswith(".num_batches_tracked")]
    lines = [f"{name} is missing" for name in missing]
    for name, tensor in given.items():
        if name not in expected:
            lines.append(f"{name} is unexpected")
        elif tensor.shape != expected[name].shape:
            lines.append(f"{name} is {shown(tuple(tensor.shape))}, expected {shown(tuple(expected[name].shape))}")
        elif tensor.is_floating_point() != expected[name].is_floating_point() or tensor.is_complex():
            lines.append(f"{name} is {_number(tensor)}, expected {_number(expected[name])}")
    lines = [one_line(line, 160) for line in lines]
    more = len(lines) - MOST_LINES
    return lines if more <= 0 else [*lines[: MOST_LINES - 1], f"and {more + 1} more"]


def _number(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def fit(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into a network. Raises UserError that names what does not fit, key by key, before any is copied.

    Example: `fit(WRN(depth=16, widen=1).build(10, (3, 32, 32)), read(Path("wrn.pth")).tensors)`
    """
    expected = model.state_dict()
    lines = mismatches(expected, tensors)
    if lines:
        name = model.label if isinstance(model, Traced) else type(model).__name__
        raise UserError(
            f"the weights do not fit {name} ({len(tensors)} tensors were given, {len(expected)} "
            f"expected): {'; '.join(lines)}; choose the model, its number of classes and its image size accordingly"
        )
    counters = {name: tensor for name, tensor in expected.items() if name not in tensors}
    model.load_state_dict({**counters, **tensors})


__all__ = ["LIMIT", "Checkpoint", "fit", "mismatches", "read"]
