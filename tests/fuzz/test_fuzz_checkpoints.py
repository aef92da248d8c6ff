"""Whatever stands in a file, reading it as a checkpoint gives tensors of that file's size or one line."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import bounded, contained, fuzzed, mutated, nasty_json, nasty_text  # noqa: F401 (bounded: a fixture)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from backdoorbench_mcl import checkpoints, pickles
from backdoorbench_mcl.errors import UserError
from bbmcl_models.wrn import WRN

LIMIT = 1 << 20


def _saved(content: Any, **more: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **more)
    return buffer.getvalue()


def valid() -> list[bytes]:
    """Small files of all layouts, with things around the weights."""
    weights = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2), "n": torch.tensor(7)}
    view = torch.arange(12.0)
    ordered = OrderedDict(
        weights, tied=view, part=view[3:7], turned=view.view(3, 4).t(), spread=torch.ones(1).expand(9)
    )
    content = {
        "state_dict": ordered,
        "epoch": 3,
        "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [1]},
    }
    old: dict[str, Any] = {"_use_new_zipfile_serialization": False}
    return [
        _saved(content), _saved(content, **old), _saved(weights), _saved(weights, **old), save(weights),
        _saved(torch.nn.Linear(2, 2)), pickle.dumps({"a": [1, (2,), {"b"}]}),
    ]  # fmt: skip


VALID = valid()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints") / "x.pt"


def _read(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    with contained():
        found = checkpoints.read(place, limit_bytes=LIMIT)
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found.tensors.values()
        }
        assert sum(held.values()) <= 2 * max(len(content), 1 << 20)
        for tensor in found.tensors.values():
            tensor.clone()  # within its storage, or this would be a crash
        with contained():
            checkpoints.fit(torch.nn.Linear(3, 2), found.tensors)


@fuzzed()
@given(mutated(VALID))
def test_any_damaged_checkpoint_is_read_or_refused(place: Path, content: bytes) -> None:
    _read(place, content)


@fuzzed()
@given(
    st.binary(max_size=400),
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x89HDF", struct.pack("<Q", 100) + b"{"]),
)
def test_any_bytes_are_read_or_refused(place: Path, content: bytes, start: bytes) -> None:
    _read(place, start + content)


OPCODES = [bytes([opcode]) for opcode in range(256)]
PIECES = [
    b"(", b"]", b"}", b")", b"K\x07", b"X\x01\x00\x00\x00a", b"q\x00", b"h\x00", b"s", b"u", b"t", b"\x85",
    b"\x86", b"\x87", b"R", b"b", b"\x81", b"Q", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n", b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"cos\nsystem\n", b"a",
    b"e", b"0", b"1", b"2", b"\x8f", b"\x90", b"\x91",
]  # fmt: skip


@fuzzed()
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from(OPCODES), st.binary(max_size=6)), max_size=40))
def test_any_program_is_followed_or_malformed(parts: list[bytes]) -> None:
    with contained():
        try:
            pickles.read(io.BytesIO(b"\x80\x02" + b"".join(parts) + b"."))
        except pickles.Malformed as error:
            raise UserError(str(error)) from error


@fuzzed()
@given(st.one_of(
    nasty_json(),
    st.dictionaries(nasty_text(), st.fixed_dictionaries({
        "dtype": st.one_of(st.sampled_from(["F32", "BOOL", "F8_E4M3", "I64", "X"]), nasty_json()),
        "shape": st.one_of(st.lists(st.integers(-1, 2**64), max_size=4), nasty_json()),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 100), min_size=2, max_size=2), nasty_json()),
    }), max_size=3),
))  # fmt: skip
def test_any_header_is_read_or_refused(place: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    _read(place, struct.pack("<Q", len(text)) + text + bytes(64))


@fuzzed(0.5)
@given(st.dictionaries(nasty_text(), st.lists(st.integers(0, 3), max_size=3), max_size=4))
def test_any_names_and_shapes_are_explained_in_ten_short_lines(given_: dict[str, list[int]]) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in given_.items()}
    lines = checkpoints.mismatches(WRN(depth=10, widen=1).build(2, (3, 8, 8)).state_dict(), tensors)
    assert len(lines) <= checkpoints.MOST_LINES
    assert all(line.isprintable() and len(line) <= 160 for line in lines)
