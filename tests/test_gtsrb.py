"""GTSRB: torchvision's layout and the archives as they unpack, the reconstructed split, and what a user is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import encode, pixels, write_final_test, write_signs
from PIL import Image
from torchvision import datasets

from backdoorbench_mcl import datacache
from backdoorbench_mcl.errors import UserError
from bbmcl_datasets.gtsrb import Gtsrb, in_training

# frames of each class in Final_Training, 39,209 in all: 30 a track, but for one of class 33 with 29 (spec 2.2)
FINAL = (
    210, 2220, 2250, 1410, 1980, 1860, 420, 1440, 1410, 1470, 2010, 1320, 2100, 2160, 780, 630, 420, 1110, 1200, 210,
    360, 330, 390, 510, 270, 1500, 600, 240, 540, 270, 450, 780, 240, 689, 420, 1200, 390, 210, 2070, 300, 360, 240,
    240,
)  # fmt: skip
TRAIN = (
    150, 1500, 1500, 960, 1320, 1260, 300, 960, 960, 990, 1350, 900, 1410, 1440, 540, 420, 300, 750, 810, 150, 240,
    240, 270, 360, 180, 1020, 420, 180, 360, 180, 300, 540, 180, 480, 300, 810, 270, 150, 1380, 210, 240, 180, 180,
)  # fmt: skip


# ---------------------------------------------------------------- the reconstructed split


def test_the_reconstructed_split_has_the_counts_of_the_paper() -> None:
    tracks, images, per_class = [0, 0], [0, 0], []
    for label, frames in enumerate(FINAL):
        names = [f"{i // 30:05d}_{i % 30:05d}.ppm" for i in range(-(-frames // 30) * 30)]
        if label == 33:
            names.remove("00019_00029.ppm")
        assert len(names) == frames
        chosen = in_training(names)
        per_class.append(sum(chosen))
        for side, wanted in enumerate((True, False)):
            mine = [name for name, first in zip(names, chosen, strict=True) if first == wanted]
            images[side] += len(mine)
            tracks[side] += len({name[:5] for name in mine})
        if label == 5:
            assert frames - sum(chosen) == 600
    assert tracks == [888, 419]
    assert images == [26640, 12569]
    assert tuple(per_class) == TRAIN


def test_whole_tracks_are_taken_lowest_first_by_number() -> None:
    names = ["00010_00000.ppm", "00002_00001.ppm", "00002_00000.ppm", "00009_00000.ppm", "00010_00001.ppm"]
    assert in_training(names) == [False, True, True, True, False]
    assert in_training(["100000_00000.ppm", "00002_00001.ppm", "99999_00000.ppm"]) == [False, True, True]
    with pytest.raises(ValueError, match=r"sign7\.ppm: expected a name like 00012_00029"):
        in_training(["00000_00000.ppm", "sign7.ppm"])


# ---------------------------------------------------------------- layouts


def torchvisions(root: Path) -> None:
    write_signs(root / "gtsrb" / "GTSRB" / "Training")
    write_final_test(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images", root / "gtsrb" / "GT-final_test.csv")


def online(folder: Path) -> None:
    """The two archives of the online competition, unpacked in `folder`."""
    write_signs(folder / "GTSRB" / "Training")
    write_signs(folder / "GTSRB" / "Online-Test-sort", 1, 3, seed=1)
    (folder / "GTSRB" / "Online-Test-sort" / "Images").mkdir()
    for path in (folder / "GTSRB" / "Online-Test-sort" / "00000").glob("*.ppm"):
        shutil.copy(path, folder / "GTSRB" / "Online-Test-sort" / "Images" / path.name)


def final(folder: Path) -> None:
    """The archives of the final data set, unpacked in `folder`."""
    write_signs(folder / "GTSRB" / "Final_Training" / "Images", tracks=4, seed=2)
    write_final_test(folder / "GTSRB" / "Final_Test" / "Images", folder / "GT-final_test.csv")


@pytest.mark.parametrize("where", ["", "gtsrb", "GTSRB"])
@pytest.mark.parametrize("inside", [False, True])
def test_the_online_split_is_found_wherever_it_was_unpacked(tmp_path: Path, where: str, inside: bool) -> None:
    online(tmp_path / where)
    data = Gtsrb()
    root = tmp_path / where / "GTSRB" if inside else tmp_path
    assert data.find(root).note == (
        "lossless, online split, train has 258 of 26,640 images, test has 129 of 12,569 images, resized to 32x32"
    )
    train, test = data.load("train", root), data.load("test", root)
    assert train.x.shape == (258, 3, 32, 32)
    assert torch.bincount(train.y).tolist() == [6] * 43
    assert torch.bincount(test.y).tolist() == [3] * 43  # none from `Images`


def test_archives_unpacked_each_into_a_folder_of_its_name_are_found(tmp_path: Path) -> None:
    online(tmp_path / "x")
    for piece, archive in (
        ("Training", "GTSRB-Training_fixed"),
        ("Online-Test-sort", "GTSRB_Online-Test-Images-Sorted"),
    ):
        (tmp_path / archive / "GTSRB").mkdir(parents=True)
        (tmp_path / "x" / "GTSRB" / piece).rename(tmp_path / archive / "GTSRB" / piece)
    assert len(Gtsrb().load("test", tmp_path)) == 129


@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvisions_folder_gives_torchvisions_images(tmp_path: Path, split: Any) -> None:
    torchvisions(tmp_path)
    data = Gtsrb(split="final")
    assert data.find(tmp_path).note.startswith("lossless, final split with Training, train has 258 of 26,640 images, ")
    images = data.load(split, tmp_path)
    theirs = datasets.GTSRB(str(tmp_path), split=split)
    assert len(images) == len(theirs) == {"train": 258, "test": 50}[split]
    for i, (image, label) in enumerate(theirs):
        small = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.array_equal(images.x[i].numpy(), small)
        assert int(images.y[i]) == label


@pytest.mark.parametrize("place", ["", "GTSRB", "GTSRB/Final_Test", "GTSRB/Final_Test/Images"])
def test_the_final_archives_and_their_labels_are_found(tmp_path: Path, place: str) -> None:
    final(tmp_path)
    (tmp_path / "GT-final_test.csv").rename(tmp_path / place / "GT-final_test.csv")
    data = Gtsrb(split="final")
    assert "final split with Final_Training, " in data.find(tmp_path).note
    assert len(data.load("train", tmp_path)) == 344
    assert data.load("test", tmp_path).y.tolist() == [i * 7 % 43 for i in range(50)]


def test_final_training_alone_is_divided_by_tracks_and_says_so(tmp_path: Path) -> None:
    final(tmp_path)
    for data in (Gtsrb(), Gtsrb(split="reconstructed")):
        assert data.find(tmp_path).note.startswith("lossless, reconstructed split, train has 258 of 26,640")
        train, test = data.load("train", tmp_path), data.load("test", tmp_path)
        assert torch.bincount(train.y).tolist() == [6] * 43  # 3 tracks of 4, 2 frames each
        assert torch.bincount(test.y).tolist() == [2] * 43
    online(tmp_path)
    assert "online split" in Gtsrb().find(tmp_path).note
    assert "reconstructed split" in Gtsrb(split="reconstructed").find(tmp_path).note


def test_an_archive_that_arrives_later_is_seen(tmp_path: Path) -> None:
    final(tmp_path)
    cache, data = tmp_path / "cache", Gtsrb()
    info = datacache.prepare(data, tmp_path, cache, "k")
    assert "reconstructed" in info.note and info.n_train == 258
    assert (info.shape, info.classes, info.mean, info.std) == (
        (3, 32, 32), 43, (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669),
    )  # fmt: skip
    assert datacache.lookup(cache, "k", tmp_path) == info
    online(tmp_path)
    assert datacache.lookup(cache, "k", tmp_path) is None


# ---------------------------------------------------------------- parameters


def test_bgr_swaps_red_and_blue_and_nothing_else(tmp_path: Path) -> None:
    online(tmp_path)
    rgb, bgr = Gtsrb(), Gtsrb(colour="bgr")
    assert bgr.find(tmp_path).note == rgb.find(tmp_path).note + ", BGR"
    for split in ("train", "test"):
        one, two = rgb.load(split, tmp_path), bgr.load(split, tmp_path)
        assert torch.equal(one.x[:, [2, 1, 0]], two.x)
        assert not torch.equal(one.x, two.x)
        assert torch.equal(one.y, two.y)
    assert (rgb.mean, rgb.std) == (bgr.mean, bgr.std)


def test_size_and_flip_are_the_users(tmp_path: Path) -> None:
    online(tmp_path)
    data = Gtsrb(size=8, flip=False)
    assert data.load("test", tmp_path).x.shape == (129, *data.shape) == (129, 3, 8, 8)
    assert (data.flip_ok, Gtsrb().flip_ok) == (False, True)
    with pytest.raises(UserError, match="split='other'"):
        Gtsrb(split="other")  # type: ignore[arg-type]


# ---------------------------------------------------------------- what a user is told


def _unpacked_not(root: Path) -> None:
    (root / "gtsrb").mkdir()
    for name in ("GTSRB-Training_fixed", "GTSRB_Online-Test-Images-Sorted"):
        (root / "gtsrb" / f"{name}.zip").write_bytes(b"PK")


def _without(build: Callable[[Path], None], name: str) -> Callable[[Path], Any]:
    def spoil(root: Path) -> None:
        build(root)
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def _with(build: Callable[[Path], None], name: str, data: bytes) -> Callable[[Path], Any]:
    def spoil(root: Path) -> None:
        build(root)
        (root / name).write_bytes(data)

    return spoil


@pytest.mark.parametrize(
    ("build", "split", "message"),
    [
        (lambda root: None, "online", r"looked for GTSRB/Training with GTSRB/Online-Test-sort, or GTSRB/Final_Training/"
         r"Images; in .*; found none of them; get the archives GTSRB-Training_fixed\.zip.*benchmark\.ini\.rub\.de"),
        (lambda root: None, "final", r"looked for .* with GTSRB/Final_Test/Images and GT-final_test\.csv"),
        (_unpacked_not, "online", r"none of them; unpack .*gtsrb/GTSRB-Training_fixed\.zip, .*-Sorted\.zip where"),
        (torchvisions, "online", r"found only Final_Test, GT-final_test\.csv, Training; get"),
        (_without(final, "GT-final_test.csv"), "final", "found only Final_Test, Final_Training; get"),
        (online, "reconstructed", "looked for GTSRB/Final_Training/Images; .* found only Online-Test-sort, Training"),
        (lambda root: write_signs(root / "GTSRB" / "Final_Training" / "Images", 1), "online", "one track in each"),
        (_without(online, "GTSRB/Training/00017"), "online", "Training: no class folder 00017; expected 00000"),
        (_with(final, "GTSRB/Final_Training/Images/00003/a.ppm", b""), "online", r"00003/a\.ppm: expected a name like"),
        (_with(final, "GT-final_test.csv", b"Filename;Width\r\n00000.ppm;5\r\n"), "final", "image 0: .*ClassId ''"),
        (_with(final, "GT-final_test.csv", b"Filename;ClassId\n00000.ppm;43\n"), "final", "ClassId '43'; expect"),
        (_with(final, "GT-final_test.csv", b"Filename;ClassId\n../0.ppm;4\n"), "final", r"Filename '\.\./0\.ppm'"),
        (_with(final, "GT-final_test.csv", b"Filename;ClassId\n99999.ppm;4\n"), "final", "99999.ppm is missing, but"),
        (_with(final, "GT-final_test.csv", b"Filename;ClassId\n"), "final", "lists no image"),
        (_with(final, "GT-final_test.csv", b"Filename;ClassId\n\xff\xfe;4\n"), "final", "no readable table"),
        (_with(online, "GTSRB/Training/00000/00000_00000.ppm", b"P6"), "online", r"00000_00000\.ppm: not a readable"),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_named_in_one_line(
    tmp_path: Path, build: Callable[[Path], Any], split: Any, message: str
) -> None:
    build(tmp_path)
    data = Gtsrb(split=split)
    with pytest.raises(UserError, match=message) as caught:
        (data.find(tmp_path), data.load("train", tmp_path))
    assert "\n" not in str(caught.value)


def test_without_a_data_root_it_says_so() -> None:
    with pytest.raises(UserError, match="no data root was given"):
        Gtsrb().find(None)


def test_pictures_of_another_format_are_read_too(tmp_path: Path) -> None:
    """Some copies hold PNG files in place of PPM; JPEG would be noted."""
    online(tmp_path)
    first = tmp_path / "GTSRB" / "Training" / "00000" / "00000_00000.ppm"
    first.unlink()
    first.with_suffix(".jpg").write_bytes(encode(pixels(1, 1, (3, 8, 8))[0][0], "JPEG"))
    assert Gtsrb().find(tmp_path).note.startswith("mixed (386 lossless, 1 JPEG), online split")
