"""Checkpoints of strangers: read to the bit as torch reads them, or refused in one line before memory is taken."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from backdoorbench_mcl import checkpoints, pickles
from backdoorbench_mcl.checkpoints import fit, mismatches, read
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.traced import Traced
from bbmcl_models.wrn import WRN, WideResNet

LAYOUTS = ("torch", "torch, old", "safetensors")


def save(content: Any, file: Path, layout: str = "torch") -> Path:
    if layout == "safetensors":
        save_file(content, file)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=layout == "torch")
    return file


def wrn(widen: int = 1, classes: int = 10) -> WideResNet:
    return WRN(depth=10, widen=widen).build(classes, (3, 32, 32))


def same(given: Any, expected: Any) -> bool:
    """Equal names, types, shapes and, to the last bit, numbers."""

    def told(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist()

    return given.keys() == expected.keys() and all(told(given[name]) == told(expected[name]) for name in expected)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_public_checkpoint_loads_as_it_is(tmp_path: Path, layout: str) -> None:
    """As backdoor benchmarks write them: weights under `state_dict`, beside counters and an optimiser."""
    model = WRN(depth=16, widen=1).build(10, (3, 32, 32))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    optimiser.step()
    beside = {"epoch": 300, "best_clean_acc": np.float64(0.83), "best_bad_acc": torch.tensor(99.0)}
    content = {"state_dict": model.state_dict(), **beside, "optimizer": optimiser.state_dict()}
    found = read(save(content, tmp_path / "wrn.pth.tar", layout))
    assert (found.layout, found.inside, found.nonfinite) == (layout, "state_dict", ())
    assert found.left_out == ("epoch", "best_clean_acc", "best_bad_acc", "optimizer")
    assert same(found.tensors, model.state_dict())
    other = WRN(depth=16, widen=1).build(10, (3, 32, 32))
    fit(other, found.tensors)
    assert same(other.state_dict(), model.state_dict())


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights, "state_dict_ema": weights, "epoch": 1},
    "model": lambda weights: {"model": weights, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    "net": lambda weights: {"net": OrderedDict(weights), "acc": 93.1, "epoch": 9},
    "model.state_dict": lambda weights: {"model": {"state_dict": weights}},
    "netC": lambda weights: {"netC": weights, "schedulerC": {"last_epoch": 1}},
}


@pytest.mark.parametrize("inside", WRAPPED)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_what_stands_around_weights_is_taken_off(tmp_path: Path, inside: str, prefix: str) -> None:
    weights = wrn().state_dict()
    wrapped = WRAPPED[inside]({prefix + name: tensor for name, tensor in weights.items()})
    found = read(save(wrapped, tmp_path / "x.pt"))
    assert found.inside == inside
    assert same(found.tensors, weights)


def test_of_several_state_dicts_one_has_to_be_named(tmp_path: Path) -> None:
    file = save({"net": {"a": torch.ones(1)}, "model": {"a": torch.zeros(1)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds several state dicts: net, model"):
        read(file)
    assert float(read(file, entry="net").tensors["a"]) == 1
    with pytest.raises(UserError, match="no entry 'ema' that holds weights; it has net, model"):
        read(file, entry="ema")


KINDS = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of every type and shape, views of each other among them, transposed, tied, expanded, parameters."""
    out: dict[str, Tensor] = {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        numbers = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        tensor = numbers.to(draw(st.sampled_from(KINDS)))
        how = draw(st.sampled_from(("", "view", "transposed", "tied", "expanded", "parameter")))
        if how == "view" and shape and shape[0] > 1:
            tensor = tensor[1:]
        elif how == "transposed" and len(shape) > 1:
            tensor = tensor.transpose(0, 1)
        elif how == "tied":
            out[f"tied {i}"] = tensor
        elif how == "expanded":
            tensor = torch.ones(1, dtype=tensor.dtype).expand(7)
        elif how == "parameter" and tensor.is_floating_point():
            tensor = nn.Parameter(tensor)
        out[f"tensor {i}"] = tensor
    return out


@settings(max_examples=60, deadline=None)
@given(weights=state_dicts(), layout=st.sampled_from(LAYOUTS[:2]))
def test_files_are_read_to_the_bit_as_torch_reads_them(
    tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor], layout: str
) -> None:
    if layout == "torch, old":  # which torch writes for 8-bit fractions, and cannot read itself
        weights = {name: tensor for name, tensor in weights.items() if tensor.dtype != torch.float8_e4m3fn}
    if not weights:
        return
    file = save(weights, tmp_path_factory.getbasetemp() / "x.pt", layout)
    found = read(file).tensors
    assert same(found, torch.load(file, weights_only=True))
    for name, tensor in found.items():
        if name.startswith("tied"):
            assert tensor.data_ptr() == found[name.replace("tied", "tensor")].data_ptr()


def test_safetensors_are_read_to_the_bit(tmp_path: Path) -> None:
    weights = {str(kind): torch.randint(0, 2, (2, 3)).to(kind) for kind in KINDS} | {"empty": torch.ones(0, 3)}
    found = read(save(weights, tmp_path / "x.safetensors", "safetensors"))
    assert found.layout == "safetensors"
    assert same(found.tensors, weights)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_followed(tmp_path: Path, protocol: int) -> None:
    weights = wrn().state_dict()
    torch.save({"state_dict": weights, "args": {"a": {1, 2}, "b": frozenset("c"), "d": b"e"}}, tmp_path / "x.pt",
               pickle_protocol=protocol)  # fmt: skip
    assert same(read(tmp_path / "x.pt").tensors, weights)


class Settings:
    """What a stranger's code left beside the weights; nothing of it is imported here."""

    lr = 0.1


def test_objects_beside_the_weights_are_left_out_and_not_made(tmp_path: Path) -> None:
    """`torch.load(weights_only=True)` refuses the whole file for them."""
    file = save({"args": Settings(), "model": {"a": torch.ones(2)}, "fn": os.system}, tmp_path / "x.pt")
    assert read(file).left_out == ("args", "fn")


def test_nan_is_read_and_told(tmp_path: Path) -> None:
    weights = {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(1), "c": torch.tensor(float("inf")).half()}
    for layout in LAYOUTS:
        assert read(save(weights, tmp_path / "x", layout)).nonfinite == ("a", "c")


# ---------------------------------------------------------------- what is refused


def other(file: Path, kind: str) -> Path:
    """A file, or what is none, of a kind that is often taken for a checkpoint."""
    write: dict[str, Callable[[], Any]] = {
        "a whole torch.nn.modules.linear.Linear object": lambda: torch.save(nn.Linear(2, 2), file),
        "a single tensor": lambda: torch.save(torch.ones(2), file),
        "no tensors under names": lambda: torch.save({"a": 1, "b": nn.Linear(1, 1)}, file),
        "a pickle of a dict, not written by torch.save": lambda: file.write_bytes(pickle.dumps({"a": np.ones(2)})),
        "a numpy array": lambda: np.save(file.open("wb"), np.ones(2)),
        "an archive of numpy arrays": lambda: np.savez(file.open("wb"), np.ones(2)),
        "a TorchScript archive": lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(file)),
        "an ONNX model": lambda: file.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\xff"),
        "an HDF5 file": lambda: file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)),
        "compressed with gzip": lambda: file.write_bytes(b"\x1f\x8b" + bytes(99)),
        "a page of HTML": lambda: file.write_bytes(b"<!DOCTYPE html>"),
        "a pointer of Git LFS": lambda: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "a tar archive": lambda: file.write_bytes(bytes(257) + b"ustar" + bytes(999)),
        "is empty": lambda: file.write_bytes(b""),
        "neither safetensors nor": lambda: file.write_bytes(b"hello"),
        "a folder": file.mkdir,
        "a pipe": lambda: os.mkfifo(file),
        "a device": lambda: file.symlink_to("/dev/zero"),
        "No such file": lambda: None,
    }
    write[kind]()
    return file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [
    "a whole torch.nn.modules.linear.Linear object", "a single tensor", "no tensors under names",
    "a pickle of a dict, not written by torch.save", "a numpy array", "an archive of numpy arrays",
    "a TorchScript archive", "an ONNX model", "an HDF5 file", "compressed with gzip", "a page of HTML",
    "a pointer of Git LFS", "a tar archive", "is empty", "neither safetensors nor", "a folder", "a pipe", "a device",
    "No such file",
])  # fmt: skip
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=kind) as caught:
        read(other(tmp_path / "x.pt", kind))
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_checkpoint_runs_nothing(tmp_path: Path, layout: str) -> None:
    mark = tmp_path / "mark"
    file = save({"state_dict": {"a": torch.ones(2)}, "x": Evil(mark)}, tmp_path / "x.pt", layout)
    assert read(file).left_out == ("x",)
    with pytest.raises(UserError, match=r"a whole (posix|nt)\.mkdir object"):
        read(save(Evil(mark), file, layout))
    assert not mark.exists()


def rewritten(file: Path, change: Callable[[str, bytes], bytes], **more: Any) -> Path:
    """A file of torch.save with other content in its entries."""
    with zipfile.ZipFile(file) as old:
        entries = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(file, "w", **more) as new:
        for name, content in entries:
            new.writestr(name, change(name, content))
    return file


class Tensors:
    """Pickles as a tensor, of any storage, offset, shape and stride."""

    def __init__(self, *args: Any, count: int = 4) -> None:
        self.args = args
        self.count = count


def claimed(file: Path, *tensors: Tensors) -> Path:
    """A file of 4 numbers whose tensors claim what they like."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", item.count) if isinstance(item, Tensors) else None

    buffer = io.BytesIO()
    content = {f"t{i}": Rebuilt(one) for i, one in enumerate(tensors)}
    Pickler(buffer, 2).dump(content)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", buffer.getvalue())
        archive.writestr("x/data/0", bytes(16))
    return file


class Rebuilt:
    def __init__(self, tensor: Tensors) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (self.tensor, *self.tensor.args, False, OrderedDict())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([Tensors(0, (10**12,), (1,))], "reaches beyond its 4 numbers"),
        ([Tensors(0, (10**12,), (1,), count=10**12)], "needs 1,000,000,000,000 numbers, but the file has 16 bytes"),
        ([Tensors(0, (10**12,), (0,))], "reaches beyond its|spread a few numbers"),
        ([Tensors(0, (2**20, 2**10), (0, 0))], "spread a few numbers"),
        ([Tensors(0, (1000, 100), (0, 0))] * 100, "spread a few numbers"),
        ([Tensors(4, (1,), (1,))], "reaches beyond"),
        ([Tensors(2**62, (1,), (1,))], "reaches beyond"),
        ([Tensors(0, (2,), (2**62,))], "reaches beyond"),
        ([Tensors(0, (-1,), (1,))], "is no count"),
        ([Tensors(0, (2,), (-1,))], "is no count"),
        ([Tensors(-1, (2,), (1,))], "is no count"),
        ([Tensors(0, (2.0,), (1,))], "is no count"),
        ([Tensors(0, (2**64,), (1,))], "is no count"),
        ([Tensors(0, (0, 2**62), (1, 1))], "reaches beyond"),
        ([Tensors(0, (1,) * 100, (1,) * 100)], "a shape of 100"),
        ([Tensors(0, (2, 2), (1,))], "a shape of 2 and a stride of 1"),
    ],
)
def test_sizes_that_the_file_does_not_hold_are_refused(tmp_path: Path, tensors: list[Tensors], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(claimed(tmp_path / "x.pt", *tensors))
    assert torch.equal(read(claimed(tmp_path / "y.pt", Tensors(1, (3,), (1,)))).tensors["t0"], torch.zeros(3))


def test_a_zip_may_neither_compress_nor_repeat_nor_be_damaged(tmp_path: Path) -> None:
    file = save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    content = file.read_bytes()
    with pytest.raises(UserError, match="compressed entries"):
        read(rewritten(file, lambda name, data: data, compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", b"x")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x/data.pkl", b"x")
    with pytest.raises(UserError, match="one name given twice"):
        read(file)
    file.write_bytes(content.replace(bytes(4000), bytes(3999) + b"\1"))
    with pytest.raises(UserError, match="damaged"):
        read(file)
    file.write_bytes(content[:-100])
    with pytest.raises(UserError, match="damaged"):
        read(file)
    file.write_bytes(content)
    with pytest.raises(UserError, match="another order of bytes"):
        read(rewritten(file, lambda name, data: b"big" if name.endswith("byteorder") else data))


def test_an_entry_beyond_all_files_is_damage(tmp_path: Path) -> None:
    """Its place is a number of 64 bits, which no seek takes."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"x")
        archive.getinfo("x/data.pkl").header_offset = 2**64 - 2
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path / "x.pt")


def test_limits_hold_before_anything_is_read(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    for layout in LAYOUTS:
        file = save(weights, tmp_path / "x", layout)
        assert len(read(file, limit_bytes=8000).tensors) == 2
        with pytest.raises(UserError, match="holds 8,000 bytes of tensors, more than the 7,999"):
            read(file, limit_bytes=7999)


def test_a_header_that_claims_much_is_refused(tmp_path: Path) -> None:
    headers = {
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}': "outside the file",
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}': "twice",
        b'{"a": ' + b"[" * 100_000: "lists within lists",
        b"{" * 5000: "Expecting",
    }
    for text, said in headers.items():
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(UserError, match=said):
            read(tmp_path / "x")
    (tmp_path / "x").write_bytes(struct.pack("<Q", 90_000_000) + b"{" + bytes(99))
    with pytest.raises(UserError, match="header of 90000000 bytes in a file of"):
        read(tmp_path / "x")


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02(((((((((.", b"\x80\x02.", b"\x80\x020.", b"\x80\x02h\x07.", b"\x80\x02\x82\x01.", b"\x80\x05\x97.",
        b"\x80\x02K\x01\x85" + b"\x86" * 9 + b".", b"\x80\x02]K\x01u.", b"cos\nsystem\n", b"\x80\x02B\xff\xff\xff\xff.",
        b"\x80\x04\x8d" + b"\xff" * 8 + b".", b"\x80\x02}X\x01\x00\x00\x00aK\x01sX\x01\x00\x00\x00aK\x02s.", b"",
    ],
)  # fmt: skip
def test_what_is_no_whole_pickle_is_malformed(program: bytes) -> None:
    with pytest.raises(pickles.Malformed):
        pickles.read(io.BytesIO(program))


def test_a_pickle_that_would_take_for_ever_is_followed_in_a_moment() -> None:
    """A key of tuples of tuples, 2^50 of them, which nobody can hash; a memo of 2^31 places; a million steps."""
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 50
    found, _ = pickles.read(io.BytesIO(b"\x80\x02}" + doubled[2:] + b"K\x01s."))
    assert found == {}
    assert pickles.read(io.BytesIO(b"\x80\x02K\x07r\xff\xff\xff\x7f."))[0] == 7
    with pytest.raises(pickles.Malformed, match="more than 1,000,000 steps"):
        pickles.read(io.BytesIO(b"\x80\x02" + b"N0" * 500_001 + b"N."))


# ---------------------------------------------------------------- into a network


def test_every_mismatch_is_told_before_anything_is_copied(tmp_path: Path) -> None:
    model, before = wrn(), wrn().state_dict()
    model.load_state_dict(before)
    given = dict(wrn(classes=43).state_dict())
    given["head.weight"] = given.pop("conv1.weight")
    given["bn1.weight"] = given["bn1.weight"].long()
    with pytest.raises(UserError) as caught:
        fit(model, given)
    told = str(caught.value)
    assert "\n" not in told
    for part in ("do not fit WideResNet", "conv1.weight is missing", "head.weight is unexpected",
                 "fc.weight is 43x64, expected 10x64", "bn1.weight is int64, expected float32"):  # fmt: skip
        assert part in told
    assert same(model.state_dict(), before)


def test_an_explanation_has_ten_lines_at_most() -> None:
    lines = mismatches(wrn().state_dict(), wrn(widen=2).state_dict())
    assert len(lines) == checkpoints.MOST_LINES
    assert lines[-1].startswith("and ")
    nasty = mismatches({}, {"\x1b[31m" + "x" * 1000: torch.ones(1)})
    assert len(nasty[0]) <= 160
    assert "\x1b" not in nasty[0]


def test_half_precision_and_missing_counters_fit() -> None:
    """Counters of batches are younger than many a checkpoint."""
    model, weights = wrn(), wrn().state_dict()
    given = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()
             if not name.endswith("num_batches_tracked")}  # fmt: skip
    fit(model, given)
    assert torch.allclose(model.fc.weight, weights["fc.weight"], atol=1e-2)
    assert model.fc.weight.dtype == torch.float32


def test_counters_may_be_missing_from_a_network_that_is_traced_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = Traced(net, (3, 8, 8), "mine")
    given = {name: tensor + 1 for name, tensor in model.state_dict().items() if "num_batches" not in name}
    fit(model, given)
    assert same({name: tensor for name, tensor in model.state_dict().items() if name in given}, given)
    with pytest.raises(UserError, match=r"the weights do not fit mine \(0 tensors"):
        fit(model, {})
