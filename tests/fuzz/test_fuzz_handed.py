"""Whatever weights somebody hands over, the job that opens them leaves a whole network of ours or one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import bounded, contained, fuzzed, mutated, nasty_text  # noqa: F401 (bounded: a fixture)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from tiny import Tiny
from torch import Tensor

from backdoorbench_mcl import handed
from backdoorbench_mcl.api import Classifier, Model
from backdoorbench_mcl.artefacts import read_meta
from backdoorbench_mcl.job import Job


class Small(Model):
    """A network that costs nothing to build, of any number of classes."""

    def build(self, classes: int, shape: tuple[int, int, int]) -> Classifier:
        return Tiny(classes)


WEIGHTS = {name: tensor.contiguous() for name, tensor in Tiny(5).state_dict().items()}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)
VALUES = (float("nan"), float("inf"), -0.0, 1e38, 1e-45)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("handed")


def _open(place: Path, content: bytes, **asked: Any) -> None:
    """Run the job on a file; what it leaves fits, is finite, and as large as the network."""
    shutil.rmtree(place / "out", ignore_errors=True)
    (place / "out").mkdir()
    file = place / "model.safetensors"
    file.write_bytes(content)
    model = {"target": f"{__name__}:Small", "kind": "model", "suffix": "", "params": {}, "name": "small"}
    spec = {"model": model, "file": str(file), "entry": None, "classes": None, "size": None, "seeds": {"init": 0}}
    with contained():
        handed.open_(Job(place, {**spec, **asked}, lambda done, total, units: None))
        meta, weights = read_meta(place / "out"), load_file(place / "out" / "weights.safetensors")
        assert 2 <= meta["classes"] <= handed.MOST_CLASSES
        Tiny(meta["classes"]).load_state_dict(weights)
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
        assert all(len(told) <= 200 and told.isprintable() for told in (*meta["left_out"], meta["inside"]))
        assert len(meta["left_out"]) <= handed.MOST_TOLD + 1


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Tensor]:
    """The weights of a network with some left out, renamed, added, of another shape or type, or with odd numbers."""
    tensors = dict(WEIGHTS)
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(sorted(tensors))) if tensors else ""
        tensor = tensors.get(name, torch.ones(2))
        kind = draw(st.sampled_from(("drop", "rename", "add", "shape", "class", "type", "value")))
        if kind in ("drop", "rename"):
            tensors.pop(name, None)
        if kind in ("rename", "add"):
            usual = st.sampled_from(["fc.weight", "module." + name, name + ".x"])
            tensors[draw(st.one_of(nasty_text(), usual))] = tensor
        elif kind == "shape":
            tensors[name] = torch.ones(draw(st.lists(st.integers(0, 7), max_size=4)))
        elif kind == "class" and {"fc.weight", "fc.bias"} <= tensors.keys():
            count = draw(st.integers(0, 300))
            tensors |= {"fc.weight": torch.ones(count, 6), "fc.bias": torch.ones(count)}
        elif kind == "type":
            tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)))
        elif kind == "value" and tensor.is_floating_point() and tensor.numel():
            tensors[name] = tensor.clone()
            tensors[name].view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from(VALUES))
    return tensors


@fuzzed()
@given(changed(), st.sampled_from([None, 2, 5]), st.sampled_from([None, 8]))
def test_any_weights_are_a_network_or_one_line(
    place: Path, tensors: dict[str, Tensor], classes: int | None, size: int | None
) -> None:
    safe = {name.encode("utf-8", "replace").decode(): tensor.clone() for name, tensor in tensors.items()}
    _open(place, save(safe), classes=classes, size=size)


@fuzzed()
@given(mutated([save(WEIGHTS)]), nasty_text())
def test_any_damaged_file_is_a_network_or_one_line(place: Path, content: bytes, entry: str) -> None:
    _open(place, content)
    _open(place, content, entry=entry)


def test_what_is_sound_is_opened(place: Path) -> None:
    """The fuzz targets reach their end."""
    _open(place, save(WEIGHTS))
    assert read_meta(place / "out")["classes"] == 5
