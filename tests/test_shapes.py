"""The embedded default data set: its bytes, its balance, its noise, and that it is no linear problem."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from bbmcl_datasets import shapes
from bbmcl_datasets.shapes import CENTRE, CLASSES, CORNER, NOISE, Shapes, generate

Arrays = dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]

GOLDEN = {
    "train": "11ef287304fa047e891722c6d5398ea93302434884895a432b90fe39e1baae59",
    "test": "cd0a3c56ba6247e4743f0babcdf6a99d8f92d6e7c44f3ff4782b4cf582dc9655",
}


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return {"train": generate("train"), "test": generate("test")}


@pytest.mark.parametrize("split, count", [("train", 5000), ("test", 1000)])
def test_shapes_dtypes_and_balance(arrays: Arrays, split: str, count: int) -> None:
    x, y = arrays[split]
    assert x.shape == (count, 3, 32, 32) and x.dtype == np.uint8
    assert y.shape == (count,) and y.dtype == np.int64
    assert np.bincount(y).tolist() == [count // 10] * 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_bytes_are_golden(arrays: Arrays, split: str) -> None:
    """Every number measured on shapes stands on these bytes; a change needs an ADR and a new `version`."""
    x, y = arrays[split]
    assert hashlib.sha256(x.tobytes() + y.astype("<i8").tobytes()).hexdigest() == GOLDEN[split]


def test_generation_reads_and_writes_no_global_state(arrays: Arrays) -> None:
    before = [str(state) for state in (np.random.get_state(), torch.get_rng_state().tolist())]
    x, y = generate("test")
    assert np.array_equal(x, arrays["test"][0]) and np.array_equal(y, arrays["test"][1])
    assert [str(state) for state in (np.random.get_state(), torch.get_rng_state().tolist())] == before


def test_only_integers_make_pixels() -> None:
    """A float could round differently elsewhere; the only division is `//`, the only source PCG64's raw words."""
    source = re.sub(r'""".*?"""|#[^\n]*', "", Path(shapes.__file__).read_text(encoding="utf-8"), flags=re.S)
    assert not re.search(r"(?<!/)/(?!/)|np\.(sin|cos|sqrt|exp|float)|default_rng|np\.random\.(?!PCG64)", source)


def test_no_image_twice(arrays: Arrays) -> None:
    digests = [hashlib.sha256(image.tobytes()).digest() for x, _ in arrays.values() for image in x]
    assert len(set(digests)) == len(digests) == 6000


def test_normalisation_constants(arrays: Arrays) -> None:
    pixels = arrays["train"][0].astype(np.float64) / 255
    assert Shapes.mean == tuple(pixels.mean(axis=(0, 2, 3)).round(4).tolist())
    assert Shapes.std == tuple(pixels.std(axis=(0, 2, 3)).round(4).tolist())


def test_noise_is_everywhere(arrays: Arrays) -> None:
    """Neighbouring pixels differ by two independent draws of the noise at least: their variances add up."""
    x = arrays["train"][0].astype(np.int64)
    step = x[..., 1:] - x[..., :-1]  # (N, 3, 32, 31)
    floor = 2 * NOISE * (NOISE + 1) / 3  # the variance of a uniform integer in -k .. k is k (k + 1) / 3
    assert NOISE >= 8
    assert (step.var(axis=0) > floor).all()
    assert np.quantile(step.var(axis=(1, 2, 3)), 0.001) > 0.9 * floor
    assert (x[:, 0] - x[:, 1]).var(axis=0).min() > floor  # and independent over channels


@pytest.mark.parametrize("spot", [CORNER, CENTRE])
def test_clutter_in_corner_and_centre(arrays: Arrays, spot: slice) -> None:
    """Contrast beyond a shape's edge (80 levels and texture) occurs where the patches go, up to 0 and 255."""
    x = arrays["train"][0].astype(np.int64)
    patch = x[:, :, spot, spot].reshape(len(x), 3, 9)
    low, high = patch.min(axis=2), patch.max(axis=2)
    assert (high - low > 120).any(axis=1).mean() > 0.05
    assert ((low <= NOISE) | (high >= 255 - NOISE)).any(axis=1).mean() > 0.02


@pytest.mark.parametrize("label", range(10))
def test_a_mirrored_shape_is_the_same_shape(label: int) -> None:
    """Each has an axis of symmetry, and all angles occur: hence `flip_ok`."""
    v, u = np.meshgrid(np.arange(-1201, 1202, 7), np.arange(-1201, 1202, 7), indexing="ij")
    inside = shapes._INSIDE[label](u, v)
    assert np.array_equal(inside, shapes._INSIDE[label](u, -v)) or np.array_equal(inside, shapes._INSIDE[label](-u, v))
    assert 0.1 < inside.mean() * (2402 / 1024) ** 2 / np.pi < 0.8  # of the circle of one radius


@pytest.mark.slow  # a property of the images, whose hashes are pinned above
def test_a_linear_probe_fails(arrays: Arrays) -> None:
    """Multinomial logistic regression on standardised raw pixels, at the better of two weight decays."""
    (x, y), (tx, ty) = ((torch.from_numpy(x).flatten(1).float(), torch.from_numpy(y)) for x, y in arrays.values())
    mean, std = x.mean(0), x.std(0)
    x, tx = (x - mean) / std, (tx - mean) / std
    fitted, best = 0.0, 0.0
    for decay in (1e-1, 1.0):
        weight = torch.zeros(3072, 10, requires_grad=True)
        solver = torch.optim.LBFGS([weight], max_iter=30, line_search_fn="strong_wolfe")

        def closure(
            solver: torch.optim.Optimizer = solver, weight: torch.Tensor = weight, decay: float = decay
        ) -> torch.Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(x @ weight, y) + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        fitted = max(fitted, float(((x @ weight).argmax(1) == y).float().mean()))
        best = max(best, float(((tx @ weight).argmax(1) == ty).float().mean()))
    assert fitted > 0.6  # 67.6 % of the training images when converged at the smaller decay
    assert best < 0.6


def test_the_class_keeps_its_contract(arrays: Arrays) -> None:
    data = Shapes()
    assert (data.name, data.classes, data.shape, data.toy, data.budget) == ("shapes", 10, (3, 32, 32), True, "quick")
    assert data.flip_ok and len(CLASSES) == 10
    assert data.find(None) == ((), "procedural")
    images = data.load("test", None)
    assert np.array_equal(images.x.numpy(), arrays["test"][0]) and np.array_equal(images.y.numpy(), arrays["test"][1])
