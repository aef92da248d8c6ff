"""A model that somebody handed over: opened in a confined child, or refused in the one line that the user gets."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backdoorbench_mcl import confine, runner
from backdoorbench_mcl.architectures import choose, described
from backdoorbench_mcl.artefacts import read_meta
from backdoorbench_mcl.engines.single import run_one
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.registry import Described, Registry
from bbmcl_models.resnet import ResNet18
from bbmcl_models.wrn import WRN, WideResNet

COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.6, 0.6, 0.1]])


@pytest.fixture(scope="module")
def known(toy_env: dict[str, str]) -> Registry:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBMCL_CACHE", toy_env["BBMCL_CACHE"])
        return runner.registry()


@pytest.fixture(scope="module")
def wrn_10(known: Registry) -> Described:
    return described(known, "wrn-10-1")


def wrn(classes: int = 10, channels: int = 3, widen: int = 1) -> WideResNet:
    torch.manual_seed(classes)
    return WRN(depth=10, widen=widen).build(classes, (channels, 32, 32))


def opened(file: Path, model: Described, **asked: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Meta and weights that the confined child leaves."""
    spec = {
        "job": "open", "model": model.spec, "file": str(file), "entry": None, "classes": None, "size": None,
        "readable": [str(file)], **asked,
    }  # fmt: skip
    with run_one(spec, timeout=120) as out:
        result = json.loads((out.parent / "result.json").read_text())
        assert result["isolation"] == ("landlock" if confine.abi_version() else "process")
        assert result["strays"] == []
        return read_meta(out), load_file(out / "weights.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# ---------------------------------------------------------------- what is opened


def test_a_public_checkpoint_opens_as_it_is(known: Registry, tmp_path: Path) -> None:
    """As backdoor benchmarks write them: weights under `state_dict`, beside counters and an optimiser."""
    model = WRN(depth=16, widen=1).build(10, (3, 32, 32))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    optimiser.step()
    content = {
        "state_dict": model.state_dict(), "epoch": 300, "best_clean_acc": np.float64(0.83),
        "optimizer": optimiser.state_dict(),
    }  # fmt: skip
    torch.save(content, file := tmp_path / "model_best.pth.tar")
    meta, weights = opened(file, described(known, "wrn-16-1"))
    assert meta == {
        "classes": 10, "sizes": [32, 64, 96, 224], "channels": 3, "layout": "torch", "inside": "state_dict",
        "left_out": ["epoch", "best_clean_acc", "optimizer"], "tensors": 82, "parameters": 175_066,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert same(weights, dict(model.state_dict()))


@pytest.mark.parametrize("how", ["module.", "model", "safetensors", "fp16", "float64", "old", "no counters", "grey"])
def test_other_ways_to_keep_the_same_weights(wrn_10: Described, tmp_path: Path, how: str) -> None:
    weights = dict(wrn(43, 1 if how == "grey" else 3).state_dict())
    file, given = tmp_path / "x", weights
    if how in ("fp16", "float64"):
        kind = torch.float16 if how == "fp16" else torch.float64
        given = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        weights = {name: tensor.to(weights[name].dtype) for name, tensor in given.items()}
    if how == "no counters":
        given = {name: tensor for name, tensor in weights.items() if "num_batches" not in name}
    content: Any = {f"module.{name}": tensor for name, tensor in given.items()} if how == "module." else given
    if how == "safetensors":
        save_file(given, file)
    else:
        torch.save({"model": content} if how == "model" else content, file, _use_new_zipfile_serialization=how != "old")
    meta, found = opened(file, wrn_10)
    assert (meta["classes"], meta["channels"]) == (43, 1 if how == "grey" else 3)
    assert same(found, weights)


def test_of_several_entries_one_is_named(wrn_10: Described, tmp_path: Path) -> None:
    torch.save({"a": wrn(4).state_dict(), "b": wrn(5).state_dict()}, file := tmp_path / "x.pt")
    assert opened(file, wrn_10, entry="b")[0]["classes"] == 5
    with pytest.raises(UserError, match="holds several state dicts: a, b; say which one is meant"):
        opened(file, wrn_10)


@pytest.mark.parametrize(("size", "sizes"), [(32, [32, 64]), (224, [96, 224])])
def test_sizes_are_those_that_the_shapes_fit(known: Registry, tmp_path: Path, size: int, sizes: list[int]) -> None:
    torch.save(ResNet18().build(10, (3, size, size)).state_dict(), file := tmp_path / "x.pt")
    model = described(known, "resnet18")
    assert opened(file, model)[0]["sizes"] == sizes
    assert opened(file, model, size=size)[0]["sizes"] == [size]
    other = 224 if size == 32 else 32
    with pytest.raises(UserError, match=r"x\.pt: the weights do not fit ResNet .*: conv1.weight is 64x3x.*, expected"):
        opened(file, model, size=other)


def test_networks_of_a_library_are_tried_at_their_own_size_first(known: Registry, tmp_path: Path) -> None:
    """Without the counts of batches, which libraries' own files from before 2018 lack."""
    import torchvision

    weights = torchvision.models.mobilenet_v3_small(num_classes=7).state_dict()
    given = {name: tensor for name, tensor in weights.items() if "num_batches" not in name}
    torch.save(given, file := tmp_path / "x.pt")
    meta, found = opened(file, described(known, "torchvision:mobilenet_v3_small"))
    assert (meta["classes"], meta["sizes"]) == (7, [224, 32, 64, 96])
    assert same(found, dict(weights))


# ---------------------------------------------------------------- functions of the user's

MODULE = """
import torch
from torch import nn
from layers import first

def build(num_classes):
    return nn.Sequential(first(), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes))

def flat():
    return nn.Sequential(first(), nn.Flatten(), nn.Linear(4 * 48 * 48, 6))

def late(num_classes):
    import lazy
    return lazy.build(num_classes)

def snoop(num_classes):
    return open("secret.txt").read()

def endless(num_classes):
    while True:
        pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a network in it, which Python's path does not name."""
    (tmp_path / "mynet.py").write_text(MODULE)
    (tmp_path / "layers.py").write_text("from torch import nn\ndef first(): return nn.Conv2d(3, 4, 3, 2, 1)\n")
    (tmp_path / "lazy.py").write_text("from mynet import build\n")
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "deep.py").write_text("from mynet import build\n")
    (tmp_path / "secret.txt").write_text("clean images of the table")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sequence(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), *layers)


@pytest.mark.parametrize("name", ["mynet:build", "mynet:late", "nets.deep:build"])
def test_a_function_in_the_working_directory_builds_the_network(known: Registry, folder: Path, name: str) -> None:
    net = sequence(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    torch.save(net.state_dict(), folder / "x.pt")
    meta, weights = opened(Path("x.pt"), described(known, name))
    assert (meta["classes"], meta["sizes"], meta["parameters"]) == (5, [32, 64, 96, 224], 197)
    assert same(weights, dict(net.state_dict()))
    with pytest.raises(UserError, match=r"^x\.pt: the file has 5 classes, --classes 6 was given"):
        opened(Path("x.pt"), described(known, name), classes=6)


def test_a_function_with_its_own_size_and_classes(known: Registry, folder: Path) -> None:
    torch.save(sequence(nn.Flatten(), nn.Linear(4 * 48 * 48, 6)).state_dict(), folder / "x.pt")
    model = described(known, "mynet:flat")
    meta, _ = opened(Path("x.pt"), model)
    assert (meta["classes"], meta["sizes"]) == (6, [96])
    with pytest.raises(UserError, match="mynet:flat: no forward pass with images of 3x32x32, which may not be its"):
        opened(Path("x.pt"), model, size=32)


@pytest.mark.skipif(confine.abi_version() == 0, reason="this kernel has no Landlock")
def test_a_function_reads_no_other_file_of_the_working_directory(known: Registry, folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder / "x.pt")
    with pytest.raises(UserError, match="snoop raised PermissionError"):
        opened(Path("x.pt"), described(known, "mynet:snoop"))


# ---------------------------------------------------------------- what is refused


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def with_value(name: str, value: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    weights = wrn().state_dict()
    weights[name] = weights[name].to(dtype)
    weights[name].view(-1)[0] = value
    return dict(weights)


def repacked(file: Path, **how: Any) -> None:
    """A file of torch.save, its entries written again."""
    torch.save(wrn().state_dict(), file)
    with zipfile.ZipFile(file) as old:
        entries = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(file, "w", **how) as new:
        for name, content in entries:
            new.writestr(name, content)


def overlapping(file: Path) -> None:
    """Entries that are all the same bytes, so that a small file holds much."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": 1}))
        archive.writestr("x/data/0", bytes(1 << 16))
        first = archive.getinfo("x/data/0")
        for i in range(1, 50):
            again = zipfile.ZipInfo(f"x/data/{i}")
            again.file_size = again.compress_size = first.file_size
            again.CRC, again.header_offset = first.CRC, first.header_offset
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again


def header(file: Path, told: dict[str, Any], size: int) -> None:
    text = json.dumps(told).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def cut(file: Path, write: Callable[[Path], object]) -> None:
    write(file)
    os.truncate(file, file.stat().st_size - 5000)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "TorchScript": (
        lambda file: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(file)),
        "is a TorchScript archive, a program; expected the weights alone",
    ),
    "ONNX": (
        lambda file: file.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:" + bytes(99)),
        "is an ONNX model; expected the weights alone",
    ),
    "a whole network": (
        lambda file: torch.save(wrn(), file),
        r"is a pickle of a whole bbmcl_models\.wrn\.WideResNet object, no state dict; expected the weights alone",
    ),
    "code": (lambda file: torch.save(Evil(file.with_name("mark")), file), r"of a whole posix\.mkdir object, no state"),
    "code among weights": (
        lambda file: torch.save({"fc.weight": Evil(file.with_name("mark")), "fc.bias": torch.ones(10)}, file),
        r"do not fit WideResNet \(1 tensors were given, 46 expected\): conv1.weight is missing",
    ),
    "safetensors, cut": (
        lambda file: cut(file, lambda f: save_file(dict(wrn().state_dict()), f)),
        "tensor '[^']*' lies outside the file; expected the weights alone",
    ),
    "zip, cut": (
        lambda file: cut(file, lambda f: torch.save(wrn().state_dict(), f)),
        r"is damaged \(File is not a zip file\)",
    ),
    "empty": (lambda file: file.write_bytes(b""), "is empty; expected the weights alone"),
    "a folder": (lambda file: file.mkdir(), "is a folder, no ordinary file; expected a file of weights"),
    "a page": (lambda file: file.write_text("<!DOCTYPE html><title>404</title>"), "is a page of HTML or XML: was it"),
    "text": (lambda file: file.write_text("weights\n" * 99), "is neither safetensors nor a file of torch.save"),
    "numpy": (lambda file: np.save(file.open("wb"), np.ones(3)), "is a numpy array"),
    "another architecture": (
        lambda file: torch.save(ResNet18().build(10, (3, 32, 32)).state_dict(), file),
        r"do not fit WideResNet \(122 tensors were given, 46 expected\): block1.layer.0.bn1.weight is missing; .*"
        "and [0-9]+ more; choose the model",
    ),
    "another width": (
        lambda file: torch.save(wrn(widen=2).state_dict(), file),
        "do not fit WideResNet .*block1.layer.0.conv1.weight is 32x16x3x3, expected 16x16x3x3",
    ),
    "NaN": (
        lambda file: torch.save(with_value("bn1.weight", float("nan")), file),
        r"has NaN or infinities in bn1\.weight, so that it predicts nothing; expected weights of a training that did",
    ),
    "infinity": (
        lambda file: torch.save(with_value("fc.weight", 1e300, torch.float64), file),
        r"has NaN or infinities in fc\.weight, so that it predicts nothing",
    ),
    "a zip bomb": (
        lambda file: repacked(file, compression=zipfile.ZIP_DEFLATED),
        "has compressed entries, which torch.save never writes",
    ),
    "entries that overlap": (overlapping, "has entries that overlap"),
    "absurd shapes": (
        lambda file: header(file, {"fc.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}}, 4),
        r"tensor 'fc.weight': 4 bytes for F32 \[1000000, 1000000\]",
    ),
    "shapes of nothing": (
        lambda file: torch.save({"fc.weight": torch.empty(1 << 30, 0), "fc.bias": torch.ones(0)}, file),
        "do not fit WideResNet .*2 tensors were given.*conv1.weight is missing",
    ),
    "too many classes": (
        lambda file: torch.save({**wrn().state_dict(), "fc.bias": torch.ones(100_001), "fc.weight": 0}, file),
        r"its number of classes is 100,001, expected 2 to 100,000",
    ),
    "one class": (lambda file: torch.save(wrn(1).state_dict(), file), "its number of classes is 1, expected 2 to"),
    "two minds": (
        lambda file: torch.save({**wrn().state_dict(), "fc.bias": torch.ones(11)}, file),
        r"its tensors disagree on the number of classes: fc\.weight has 10, fc\.bias has 11",
    ),
    "a link to nothing": (lambda file: file.symlink_to(file.with_name("gone")), "there is no such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_such_model_is_one_line(wrn_10: Described, tmp_path: Path, kind: str) -> None:
    make, said = BROKEN[kind]
    make(file := tmp_path / "x.pt")
    with pytest.raises(UserError, match=said) as caught:
        opened(file, wrn_10)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2500
    assert not (tmp_path / "mark").exists()


def test_what_lay_beside_is_told_in_part(wrn_10: Described, tmp_path: Path) -> None:
    beside = {f"\x1b[31m{i}" + "x" * 300: i for i in range(1000)}
    torch.save({"state_dict": wrn().state_dict(), **beside}, file := tmp_path / "x.pt")
    told = opened(file, wrn_10)[0]["left_out"]
    assert len(told) == 51
    assert told[-1] == "and 950 more"
    assert all(len(name) <= 80 and "\x1b" not in name for name in told)


# ---------------------------------------------------------------- normalisation

MEAN, STD = (0.45, 0.4, 0.35), (0.2, 0.25, 0.3)
CANDIDATES = [
    {"name": "data", "mean": MEAN, "std": STD}, {"name": "none", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    {"name": "far", "mean": (0.9, 0.9, 0.9), "std": (0.02, 0.02, 0.02)},
]  # fmt: skip


def trained(candidate: dict[str, Any], x: Tensor, y: Tensor) -> nn.Module:
    """One linear layer on the mean colour, normalised by the candidate's constants."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    mean, std = (torch.tensor(candidate[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net((x.float() / 255 - mean) / std), y).backward()
        optimiser.step()
    return net


@pytest.mark.parametrize("right", range(3))
def test_the_right_normalisation_is_seen(known: Registry, folder: Path, right: int) -> None:
    (folder / "linear.py").write_text(
        "from torch import nn\n"
        "def build(): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))\n"
    )
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1200) % 4
    noise = 0.15 * torch.randn(1200, 3, 1, 1, generator=generator)
    x = ((COLOURS[y][:, :, None, None] + noise).clamp(0, 1) * 255).to(torch.uint8).expand(-1, -1, 4, 4).contiguous()
    net = trained(CANDIDATES[right], x, y)

    def fill(into: Path) -> None:
        save_file(dict(net.state_dict()), into / "weights.safetensors")
        save_file({"x": x, "y": y}, into / "clean.safetensors")

    spec = {
        "job": "look", "model": described(known, "linear:build").spec, "candidates": CANDIDATES,
        "data": {"classes": 4, "shape": (3, 4, 4), "mean": MEAN, "std": STD},
    }  # fmt: skip
    with run_one(spec, fill, timeout=120) as out:
        meta = read_meta(out)
    assert meta["images"] == 1000
    assert choose(meta["accuracy"]) == CANDIDATES[right]["name"]
    assert meta["accuracy"][CANDIDATES[right]["name"]] > 90


# ---------------------------------------------------------------- one job


def test_a_job_that_ends_in_no_result_is_an_error(known: Registry, folder: Path) -> None:
    torch.save(wrn().state_dict(), folder / "x.pt")
    spec = {
        "job": "open", "model": described(known, "mynet:endless").spec, "file": "x.pt", "entry": None, "classes": None,
        "size": None, "readable": ["x.pt"],
    }  # fmt: skip
    with (
        pytest.raises(UserError, match=r"^model x: took longer than --timeout 0.5 s"),
        run_one(spec, timeout=0.5, about="model x: "),
    ):
        raise AssertionError
