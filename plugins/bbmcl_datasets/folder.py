"""`folder:PATH`: an image folder, one sub-folder per class.

Either `PATH/train/CLASS/*` with `PATH/test/CLASS/*` (else `val` or `validation`), or `PATH/CLASS/*` alone. In the
latter case an image goes to the test set when its pixel digest, read as a fraction of the largest digest, lies below
`test_fraction`: no seed, no file name enters, copies of an image never straddle the split, and images that are added
later move no other one. Labels count the class folders of `train` in order of their names, in order of their value
when all names are numbers. Not read: sub-folders of a class, hidden files, files without an image suffix.

Without a split, as clean images for `bbmcl scan`, `PATH/CLASS/*` and plain `PATH/*` do: see `Folder.pool`.

Paper: none. Differs: nothing to differ from. Should reach: no number, the images are yours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from backdoorbench_mcl.api import Count, Dataset, Images, Interval, Pool, Source, UserError
from backdoorbench_mcl.kit import read_file, statistics

from .decode import (
    MAX_BYTES,
    MAX_CLASSES,
    SUFFIXES,
    TEST_NAMES,
    argument,
    decode,
    locate,
    note,
    pooled,
    stack,
    stay_inside,
    whole_if,
)


class Listing(NamedTuple):
    """Files with their labels, and every folder that was read to find them."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    folders: tuple[Path, ...]


def class_folders(folder: Path) -> list[Path]:
    """The class folders below `folder`, in the order of their labels."""
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    numbers = all(path.name.isdecimal() for path in found)
    return sorted(found, key=lambda path: (int(path.name) if numbers else 0, path.name))


def images_of(folder: Path) -> list[Path]:
    """The image files of a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """The image files of a class folder, by name; UserError where there are none."""
    found = images_of(folder)
    if not found:
        raise UserError(f"{folder}: no image in it; expected files ending in {', '.join(sorted(SUFFIXES))}")
    return found


def listing(folder: Path, names: Sequence[str]) -> Listing:
    """The images below `folder`, whose class folders must be among `names`.

    Raises UserError for a class that training does not know and for a class folder without images.
    """
    files: list[Path] = []
    labels: list[int] = []
    folders = class_folders(folder)
    label_of = {name: label for label, name in enumerate(names)}
    for path in folders:
        if path.name not in label_of:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            raise UserError(f"{path}: no such class in the training images; expected {', '.join(names[:20])}{more}")
        inside = images_in(path)
        files.extend(inside)
        labels.extend([label_of[path.name]] * len(inside))
    return Listing(tuple(files), tuple(labels), (folder, *folders))


def loose(folder: Path) -> tuple[Listing, tuple[str, ...] | None]:
    """The images of a folder without splits, labels -1 where they lie in it and not in class folders; and the names of
    the classes, None where there are none or where all are numbers, which are then the labels themselves.

    Raises UserError for a folder that holds both, splits, nothing, or a link that leads out of it.
    """
    inside = class_folders(folder)
    names = [path.name for path in inside]
    files = [path for path in images_of(folder) if path.name not in names]  # a folder may be called x.png
    splits = [name for name in ("train", *TEST_NAMES) if name in names]
    if splits and ((splits[0] == "train" and len(splits) > 1) or len(splits) == len(names)):
        raise UserError(f"{folder}: is split into {', '.join(splits)}; name one of them, as in {folder / splits[0]}")
    if files and inside:
        raise UserError(
            f"{folder}: holds images and folders ({files[0].name}, {names[0]}/); expected images alone, which have no "
            "label, or a folder for each class; move one or the other"
        )
    if len(inside) > MAX_CLASSES:
        raise UserError(f"{folder}: holds {len(inside):,} class folders, expected at most {MAX_CLASSES:,}")
    stay_inside(folder, [*inside, *files])
    if not inside:
        files = images_in(folder)
        return Listing(tuple(files), (-1,) * len(files), (folder,)), None
    found = listing(folder, names)
    stay_inside(folder, found.files)
    if not all(name.isdecimal() for name in names):
        return found, tuple(names)
    numbers = [int(name) for name in names]
    if len(set(numbers)) < len(numbers) or max(numbers) >= MAX_CLASSES:
        raise UserError(
            f"{folder}: its class folders are numbers up to {names[-1]}, that is labels; expected each once, from 0 to "
            f"{MAX_CLASSES - 1}"
        )
    return found._replace(labels=tuple(numbers[label] for label in found.labels)), None


def read(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Every file's bytes, with its name for messages."""
    for path in files:
        yield str(path), read_file(path, MAX_BYTES)


def head(path: Path) -> bytes:
    """The first bytes of a file, which tell its format."""
    if not path.is_file():
        raise UserError(f"{path}: is no ordinary file; remove it, or what it is linked to")
    try:
        with path.open("rb") as file:
            return file.read(3)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def fraction(image: npt.NDArray[np.uint8]) -> float:
    """uint8 (3, H, W) -> a number in [0, 1) from the last 8 bytes of its SHA-256 (the first set the cache's order)."""
    return int.from_bytes(hashlib.sha256(np.ascontiguousarray(image).data).digest()[-8:], "big") / 2**64


class Folder(Dataset):
    """`folder:PATH`. `classes` and `shape` are known after `load`, `mean` and `std` (over all training pixels, 4
    decimals) after `load("train")`.

    path: a folder, absolute or relative to the data root or the working directory. size: resize every image to
    size x size (PIL bilinear, whole image). test_fraction: the expected share of test images where PATH has no
    split folders. flip: whether a mirrored image keeps its label.
    """

    name = "folder"

    def __init__(
        self,
        *,
        path: str,
        size: Count | None = None,
        test_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.2,
        flip: bool = True,
    ) -> None:
        self.path = path
        self.size = size
        self.test_fraction = test_fraction
        self.flip_ok = flip

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        return argument(cls.name, text)

    def _listings(self, root: Path | None) -> tuple[Path, list[str], Listing, Listing | None]:
        """PATH, class names, training images and test images (None: all images are in one listing, still unsplit)."""
        folder = locate(self.name, self.path, root)
        try:
            train = folder / "train" if (folder / "train").is_dir() else folder
            names = [path.name for path in class_folders(train)]
            if not 2 <= len(names) <= MAX_CLASSES:
                raise UserError(
                    f"{train}: holds {len(names)} class folders, expected at least 2 and at most {MAX_CLASSES:,}: "
                    f"{self.name}:PATH/CLASS/IMAGE"
                )
            if train is folder:
                return folder, names, listing(folder, names), None
            test = next((folder / name for name in TEST_NAMES if (folder / name).is_dir()), None)
            if test is None:
                raise UserError(f"{folder}: has train/ but neither test/ nor val/; add one of them")
            return folder, names, listing(train, names), listing(test, names)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error

    def find(self, root: Path | None) -> Source:
        folder, _, train, test = self._listings(root)
        parts = [train] if test is None else [train, test]
        files = [path for part in parts for path in part.files]
        about = note(head(path) for path in files)
        if test is None:
            about += f", split by pixel hash ({self.test_fraction:g} for test)"
        if self.size is not None:
            about += f", resized to {self.size}x{self.size}"
        return Source((folder, *(path for part in parts for path in part.folders), *files), about)

    def load(self, split: Literal["train", "test"], root: Path | None) -> Images:
        folder, names, train, test = self._listings(root)
        part = test if split == "test" and test is not None else train
        keep = None if test is not None else lambda image: (fraction(image) < self.test_fraction) == (split == "test")
        x, kept = stack(read(part.files), whole_if(self.size), keep)
        y = np.array(part.labels, np.int64)[kept]
        if len(y) == 0:
            raise UserError(
                f"{folder}: none of its {len(kept)} images falls into {split}; change test_fraction or add images"
            )
        self.classes = len(names)
        self.shape = (x.shape[1], x.shape[2], x.shape[3])
        if split == "train":
            self.mean, self.std = statistics(x)
        elif test is not None:
            first = decode(next(read(train.files))[1], str(train.files[0]), whole_if(self.size))
            if first.shape != self.shape:
                raise UserError(
                    f"{test.files[0]}: {x.shape[3]}x{x.shape[2]} pixels, but training images have "
                    f"{first.shape[2]}x{first.shape[1]}; give size=N to resize all images to NxN"
                )
        return Images(torch.from_numpy(x), torch.from_numpy(y))

    def pool(self, root: Path | None, draw: Callable[[int], torch.Tensor] | None = None) -> Pool:
        """`PATH/IMAGE`, without labels, or `PATH/CLASS/IMAGE`; class folders that are all numbers are the labels, as 3
        and 7. No link is followed that leads out of PATH.
        """
        folder = locate(self.name, self.path, root)
        try:
            found, names = loose(folder)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error
        count = len(found.files)
        chosen = range(count) if draw is None else draw(count).tolist()
        x, about, native = pooled(read([found.files[i] for i in chosen]), self.size)
        y = torch.tensor([found.labels[i] for i in chosen], dtype=torch.int64)
        return Pool(Images(torch.from_numpy(x), y), names, about, native)
