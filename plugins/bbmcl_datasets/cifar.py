"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), found under the data root in either of two layouts, or downloaded.

torchvision's (`cifar-10-batches-py/`, `cifar-100-python/`: pickles, of which nothing is called) or Parquet
(`cifar10/train-*.parquet`, ...). CIFAR-10's mean and std are those of spec 2: the std triple is the average of
per-image standard deviations, not the deviation over all pixels (.247 .243 .261). CIFAR-100's are the widely used ones,
deviations over all training pixels.

Paper: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
Differs: the published order of the images is not kept, the cache sorts them by their pixels.
Should reach: 50,000 + 10,000 lossless images, on whose test set the MCLDef authors' BadNets victim scores BA 82.40,
without the target class 83.01, and ASR 99.64 (spec 1.2); JPEG copies cost models of lossless images 7.6-9 points (spec
2.1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from backdoorbench_mcl.api import Dataset, Images, Source, UserError
from backdoorbench_mcl.kit import read_pickle

from . import parquet

MAX_BATCH = 1 << 30  # bytes of a file; CIFAR-100's training file has 155 million

# ---------------------------------------------------------------- pickles that run nothing

_RECONSTRUCTED = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")  # since protocol 5


def _array(value: Any) -> npt.NDArray[np.uint8]:
    """The bytes that a pickle has for one of numpy's arrays; numpy's own reader would trust its sizes and types."""
    if _made_by(value) in _RECONSTRUCTED:
        _, shape, kind, fortran, raw = value.state
    elif _made_by(value) in _FROM_BUFFER:
        raw, kind, shape, order = value.args
        fortran = order == "F"
    else:
        raise ValueError("holds something that is no array")
    if _made_by(kind) != "numpy.dtype" or kind.args[0] not in ("u1", "|u1"):
        raise ValueError("holds an array of another type than uint8")
    if _made_by(raw) == "_codecs.encode":  # how Python 3 spells bytes in old protocols
        raw = raw.args[0]
    if isinstance(raw, str):  # a string of Python 2
        raw = raw.encode("latin1")
    if not isinstance(raw, bytes | bytearray):
        raise ValueError("holds an array without bytes")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _made_by(value: Any) -> str:
    """What a pickle would call for a value. Example: `numpy.dtype`"""
    return str(getattr(value, "function", ""))


def read_batch(path: Path, label: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """One pickled batch -> uint8 (N, 3, 32, 32) and the labels under the key `label`, int64 (N,).

    Raises UserError naming the file when it cannot be read, is no such batch, or holds anything but arrays.
    """
    batch = read_pickle(path, MAX_BATCH)
    try:
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        x = _array(named["data"]).reshape(-1, 3, 32, 32)
        numbers = named[label]
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f"no list of whole numbers under {label!r}")
        if not numbers or len(numbers) != len(x):
            raise ValueError(f"{len(numbers)} labels for {len(x)} images")
        y = np.array(numbers, np.int64)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable CIFAR batch ({type(error).__name__}: {error}); fetch it again"
        ) from error
    return x, y


# ---------------------------------------------------------------- data sets


class Cifar(Dataset):
    """What CIFAR-10 and CIFAR-100 share. download: fetch the set through torchvision when it is not found."""

    shape = (3, 32, 32)
    folder: ClassVar[str]  # torchvision's folder
    batches: ClassVar[dict[str, tuple[str, ...]]]  # split -> its files
    label: ClassVar[str]  # key of the labels in them
    parquet_folders: ClassVar[tuple[str, ...]]  # relative to the data root

    def __init__(self, *, download: bool = False) -> None:
        self.download = download

    def _locate(self, root: Path) -> tuple[Path, parquet.Files | None] | None:
        """The folder that holds the set, with its Parquet files or, where it holds pickles, None."""
        names = [name for files in self.batches.values() for name in files]
        for folder in (root / self.folder, root):
            if all((folder / name).is_file() for name in names):
                return folder, None
        for folder in (*(root / name for name in self.parquet_folders), root):
            files = parquet.split_files(folder)
            if files is not None:
                return folder, files
        return None

    def _missing(self, root: Path | None) -> UserError:
        first = self.parquet_folders[0]
        where = "anywhere, as no data root was given" if root is None else f"in {root}"
        return UserError(
            f"{self.name} not found: looked for {self.folder}/ (torchvision) and {first}/train-*.parquet {where}; "
            f"three ways to get it: point --data-root (BBMCL_DATA) at a folder that holds torchvision's "
            f"{self.folder}/, or at one that holds {first}/ with train-*.parquet and test-*.parquet, or fetch it "
            f"with --data-root FOLDER --dataset '{self.name}(download=true)'"
        )

    def _fetch(self, root: Path) -> None:
        from torchvision import datasets  # here alone: it costs a second to import

        kind = datasets.CIFAR10 if self.classes == 10 else datasets.CIFAR100
        try:
            kind(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.name}: the download to {root} failed ({error}); is there a network?") from error

    def find(self, root: Path | None) -> Source:
        if root is None:
            raise self._missing(root)
        found = self._locate(root)
        if found is None and self.download:
            self._fetch(root)
            found = self._locate(root)
        if found is None:
            raise self._missing(root)
        folder, files = found
        if files is not None:
            return parquet.source(files, folder)
        return Source(tuple(folder / name for names in self.batches.values() for name in names), "lossless")

    def load(self, split: Literal["train", "test"], root: Path | None) -> Images:
        found = None if root is None else self._locate(root)
        if found is None:
            raise self._missing(root)
        folder, files = found
        if files is None:
            parts = [read_batch(folder / name, self.label) for name in self.batches[split]]
            x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
            images = Images(torch.from_numpy(x), torch.from_numpy(y))
        else:
            images = parquet.load_split(files.of(split), None)
        self._check(images, split, folder)
        return images

    def _check(self, images: Images, split: str, folder: Path) -> None:
        """Whether this is the set at all: the data root may be a folder of Parquet files of something else."""
        present: list[int] = np.unique(images.y.numpy()).tolist()
        fits = present == list(range(self.classes)) if split == "train" else set(present) <= set(range(self.classes))
        if tuple(images.x.shape[1:]) != self.shape or not fits:
            raise UserError(
                f"{folder}: {split} has {len(present)} classes of images {tuple(images.x.shape[1:])}, expected "
                f"{self.name}: labels 0-{self.classes - 1}, images {self.shape}; is this another data set?"
            )


class Cifar10(Cifar):
    """CIFAR-10: 50,000 + 10,000 images of 10 classes. Constants: spec 2."""

    name = "cifar10"
    paper = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"
    classes = 10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)
    folder = "cifar-10-batches-py"
    batches: ClassVar = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
    label = "labels"
    parquet_folders = ("cifar10", "cifar10/plain_text", "cifar10/data")


class Cifar100(Cifar):
    """CIFAR-100 with its fine labels: 50,000 + 10,000 images of 100 classes. Constants: per-channel mean and standard
    deviation over all training pixels, as public CIFAR-100 training code has them; spec 2 is silent."""

    name = "cifar100"
    paper = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"
    classes = 100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    folder = "cifar-100-python"
    batches: ClassVar = {"train": ("train",), "test": ("test",)}
    label = "fine_labels"
    parquet_folders = ("cifar100", "cifar100/cifar100", "cifar100/data")
