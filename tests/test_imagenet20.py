"""ImageNet-20: its 20 classes out of an image folder, and torchvision's two resizings."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import encode, pixels, sign
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from backdoorbench_mcl import datacache
from backdoorbench_mcl.errors import UserError
from bbmcl_datasets.decode import MAX_PIXELS, centre, decode, whole
from bbmcl_datasets.imagenet20 import SYNSETS, ImageNet20


def write(folder: Path, others: tuple[str, ...] = (), seed: int = 0) -> None:
    """Two images of each class below train/ and one below val/."""
    rng = np.random.default_rng(seed)
    for name, count in (("train", 2), ("val", 1)):
        for synset in (*SYNSETS, *others):
            (folder / name / synset).mkdir(parents=True)
            for i in range(count):
                (folder / name / synset / f"{synset}_{i}.JPEG").write_bytes(encode(sign(rng), "JPEG"))


def test_the_classes_are_the_first_of_imagenet_in_order() -> None:
    assert len(SYNSETS) == ImageNet20.classes == len(set(SYNSETS)) == 20
    assert list(SYNSETS) == sorted(SYNSETS)
    assert (SYNSETS[0], SYNSETS[4], SYNSETS[-1]) == ("n01440764", "n01494475", "n01592084")
    assert sum(int(name[1:]) for name in SYNSETS) == 30438116


@pytest.mark.parametrize("home", ["", "imagenet20", "imagenet"])
def test_only_the_twenty_classes_are_read(tmp_path: Path, home: str) -> None:
    write(tmp_path / home, others=("n01443000", "n02084071"))  # one of them would lie between the first two
    data = ImageNet20(size=8)
    assert data.find(tmp_path).note == (
        "JPEG, train resized to 8x8, test centre-cropped, train has 40 of 26,000 images, val has 20 of 1,000 images"
    )
    info = datacache.prepare(data, tmp_path, tmp_path / "cache", "k")
    assert (info.n_train, info.n_test, info.classes, info.shape) == (40, 20, 20, (3, 8, 8))
    assert (info.mean, info.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert info.class_counts_train == (2,) * 20
    train = data.load("train", tmp_path)
    path = tmp_path / home / "train" / SYNSETS[7] / f"{SYNSETS[7]}_1.JPEG"
    assert int(train.y[15]) == 7
    assert np.array_equal(train.x[15].numpy(), decode(path.read_bytes(), "x", whole(8)))


def test_the_standard_size_is_224() -> None:
    assert ImageNet20().shape == (3, 224, 224)


# ---------------------------------------------------------------- the two resizings


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("height", "width"), [(300, 500), (501, 333), (256, 256), (100, 90), (37, 331)])
def test_shapings_are_those_of_torchvision(height: int, width: int) -> None:
    image = Image.fromarray(pixels(1, 1, (3, height, width), seed=height)[0][0].transpose(1, 2, 0))
    test = transforms.Compose([transforms.Resize(256, InterpolationMode.BILINEAR), transforms.CenterCrop(224)])
    train = transforms.Resize((224, 224), InterpolationMode.BILINEAR)
    for theirs, ours in ((test, centre(224)), (train, whole(224))):
        expected = np.asarray(theirs(image)).transpose(2, 0, 1)
        assert np.array_equal(decode(_png(image), "x", ours), expected)


@pytest.mark.parametrize("size", [1, 2, 7, 32, 64, 225])
def test_the_middle_scales_with_the_size(size: int) -> None:
    shaped = centre(size)(Image.new("RGB", (50, 80)))
    assert shaped.size == (size, size)
    gradient = Image.fromarray(np.broadcast_to(np.arange(224, dtype=np.uint8), (224, 224)).copy()).convert("RGB")
    row = np.asarray(centre(64)(gradient))[0, :, 0]
    assert (int(row[0]), int(row[-1])) == pytest.approx((224 / 16, 224 - 224 / 16), abs=3)  # 224/256 of it, centred


def test_a_hair_is_refused_and_not_blown_up() -> None:
    hair = _png(Image.new("RGB", (MAX_PIXELS // 100, 1)))
    with pytest.raises(UserError, match=r"hair\.png: .*too elongated"):
        decode(hair, "hair.png", centre(224))


# ---------------------------------------------------------------- what a user is told


def _move(old: str, new: str) -> Callable[[Path], Any]:
    return lambda root: (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_move("train", "training"), r"imagenet20 not found: looked for train/n01440764/ .*/imagenet20, .*image-net"),
        (_move("val", "test"), r"val: no class folder n01440764, n01443537, n01484850, \.\.\. \(20 of 20 missing\)"),
        (_move("train/n01496331", "train/ray"), r"train: no class folder n01496331 \(1 of 20 missing\)"),
        (lambda root: (root / "val" / SYNSETS[2] / f"{SYNSETS[2]}_0.JPEG").unlink(), f"{SYNSETS[2]}: no image in it"),
        (lambda root: (root / "train" / SYNSETS[2] / "x.JPEG").write_bytes(b"\xff\xd8\xff"), r"x\.JPEG: not a readab"),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path)
    spoil(tmp_path)
    data = ImageNet20(size=8)
    with pytest.raises(UserError, match=message) as caught:
        (data.find(tmp_path), data.load("train", tmp_path))
    assert "\n" not in str(caught.value)


def test_without_a_data_root_it_says_so() -> None:
    with pytest.raises(UserError, match="anywhere, as no data root was given"):
        ImageNet20().find(None)
