"""`parquet:PATH`: image data sets in the Parquet layout of the Hugging Face Hub.

PATH holds `train-*.parquet` (or `train.parquet`) and the same for `test`, else `val` or `validation`. Columns: `img` or
`image`, as {bytes, path} or plain bytes, and `label` or `fine_label`, integers. Class names may stand in the schema
metadata under `huggingface`; without them the classes are 0 .. highest label of both splits.

Without a split, as clean images for `bbmcl scan`, any Parquet files do, labelled or not: see `Parquet.pool`.

Paper: none. Differs: nothing to differ from. Should reach: no number, the images are yours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from backdoorbench_mcl.api import Count, Dataset, Images, Pool, Source, UserError
from backdoorbench_mcl.kit import statistics

from .decode import (
    MAX_BYTES,
    MAX_CLASSES,
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

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
MAX_ROWS = 1 << 24  # of a pool, drawn from by an index of 8 bytes each: a file of 1 kB may claim any number
_ROWS = 256  # rows turned into Python objects at a time
_IMAGES = 2  # the same of images: a file of 1 kB may say "these 20 MB" two thousand times


class Files(NamedTuple):
    """The Parquet files of a data set, each split in the order of the file names."""

    train: tuple[Path, ...]
    test: tuple[Path, ...]

    def of(self, split: Literal["train", "test"]) -> tuple[Path, ...]:
        """The files of one split."""
        return self.train if split == "train" else self.test


def split_files(folder: Path) -> Files | None:
    """The Parquet files of `folder`, or None where it holds no train or no test split.

    Raises UserError when a shard is missing: half a data set must not pass for the whole.
    """
    train = _shards(folder, "train")
    test = next((files for name in TEST_NAMES if (files := _shards(folder, name))), ())
    return Files(train, test) if train and test else None


def _shards(folder: Path, name: str) -> tuple[Path, ...]:
    files = tuple(sorted([*folder.glob(f"{name}-*.parquet"), *folder.glob(f"{name}.parquet")]))
    matches = [match for file in files if (match := _SHARD.search(file.name))]
    totals = {int(match[2]) for match in matches}
    if matches and (len(totals) > 1 or {int(match[1]) for match in matches} != set(range(max(totals)))):
        raise UserError(
            f"{folder}: {name} has the shards {', '.join(f.name for f in files)}; expected all of one numbering"
        )
    return files


def columns(path: Path) -> tuple[str, str]:
    """Names of the image and label columns of a file; UserError where they are not there."""
    image, label = image_and_label(path)
    if label is None:
        raise _foreign(path, "one of img, image and one of label, fine_label")
    return image, label


def image_and_label(path: Path) -> tuple[str, str | None]:
    """The same, None where the images have no label."""
    names = _open(path).schema_arrow.names
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise _foreign(path, "one of img, image and, where images have labels, one of label, fine_label")
    return image, next((name for name in LABEL_COLUMNS if name in names), None)


def _foreign(path: Path, expected: str) -> UserError:
    return UserError(f"{path}: has the columns {', '.join(_open(path).schema_arrow.names)}; expected {expected}")


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: is no ordinary file; expected a Parquet file")
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:  # names need not be text
        raise UserError(f"{path}: not a readable Parquet file ({_line(error)})") from error
    if len(set(names)) < len(names):
        raise UserError(f"{path}: has two columns of one name; expected one for the images and one for the labels")
    return file


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def rows(path: Path, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row, as Python objects."""
    file = _open(path)
    at_once = _IMAGES if any(name in IMAGE_COLUMNS for name in names) else _ROWS
    count = 0
    try:
        for batch in file.iter_batches(at_once, columns=list(names)):
            yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
            count += len(batch)
    except (pa.ArrowException, OSError, LookupError, ValueError, ArithmeticError) as error:
        # text that is no UTF-8, dates of no calendar: Arrow takes any bytes until Python asks for them
        raise UserError(f"{path}: cannot be read to its end ({_line(error)}); is it complete?") from error
    if count != file.metadata.num_rows:  # a damaged page may end a column without an error
        raise UserError(f"{path}: has {count} readable rows of {file.metadata.num_rows}; is it complete?")


def _bytes(value: Any, path: Path, row: int) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise UserError(f"{path}, row {row}: holds no image bytes; expected an encoded image in the file itself")
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}, row {row}: {len(data):,} bytes, more than the {MAX_BYTES:,} that are accepted")
    return data


def blobs(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Every encoded image, with "file, row N" (from 0) for messages."""
    for path in files:
        for row, (value,) in enumerate(rows(path, columns(path)[:1])):
            yield f"{path}, row {row}", _bytes(value, path, row)


def labels(files: Sequence[Path]) -> npt.NDArray[np.int64]:
    """The labels of a split, int64 (N,); UserError naming file and row where one is no integer from 0."""
    out: list[int] = []
    for path in files:
        for row, (value,) in enumerate(rows(path, columns(path)[1:])):
            if not isinstance(value, int) or not 0 <= value < MAX_CLASSES:
                raise UserError(f"{path}, row {row}: label {value!r}, expected an integer from 0 to {MAX_CLASSES - 1}")
            out.append(value)
    return np.array(out, np.int64)


def class_names(path: Path) -> list[str] | None:
    """The class names in a file's schema metadata, if it has any."""
    label = columns(path)[1]
    try:
        found = json.loads(_open(path).schema_arrow.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if isinstance(found, list) and len(found) > MAX_CLASSES:
        raise UserError(f"{path}: names {len(found):,} classes, expected at most {MAX_CLASSES:,}")
    return [str(name) for name in found] if isinstance(found, list) else None


def source(files: Files, folder: Path) -> Source:
    """What the data depend on: the files, and the folder, whose mtime moves when a shard is added."""
    every = (*files.train, *files.test)
    return Source((folder, *every), note(data[:3] for _, data in blobs(every)))


def pool_files(path: Path) -> tuple[Path, ...]:
    """A Parquet file, or all that a folder holds, whatever their names, by name.

    Raises UserError where there are none, their columns differ, or one is a link that leads out of the folder.
    """
    if not path.is_dir():
        return (path,)
    try:
        found = [p for p in path.iterdir() if p.suffix.lower() == ".parquet" and not p.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    files = tuple(sorted(found))
    if not files:
        raise UserError(f"{path}: no Parquet file in it; expected files ending in .parquet")
    stay_inside(path, files)
    first = image_and_label(files[0])
    for file in files[1:]:
        if (own := image_and_label(file)) != first:
            raise UserError(
                f"{path}: {files[0].name} has the columns {_spelt(first)}, {file.name} has {_spelt(own)}; expected the "
                "same in all, or name one file"
            )
    return files


def _spelt(found: tuple[str, str | None]) -> str:
    return f"{found[0]} and {found[1] or 'no label'}"


def pool_labels(files: Sequence[Path]) -> npt.NDArray[np.int64] | None:
    """The labels of some files, int64 (N,); None where they have none, or nothing or -1 in every row, as the unlabelled
    test sets of the Hub do. Raises UserError as `labels`.
    """
    column = image_and_label(files[0])[1]
    if column is None or all(v is None or v == -1 for path in files for (v,) in rows(path, [column])):
        return None
    return labels(files)


def _picked(files: Sequence[Path], wanted: Collection[int]) -> Iterator[tuple[str, bytes]]:
    """The encoded images in some rows, counted through all files, in the order of the rows; the last ends it."""
    start, left = 0, len(wanted)
    for path in files:
        for row, (value,) in enumerate(rows(path, image_and_label(path)[:1])):
            if start + row in wanted:
                yield f"{path}, row {row}", _bytes(value, path, row)
                left -= 1
                if not left:
                    return
        start += _open(path).metadata.num_rows


def load_split(files: Sequence[Path], size: int | None) -> Images:
    """One split: uint8 (N, 3, H, W) and int64 (N,)."""
    y = labels(files)
    if len(y) == 0:
        raise UserError(f"{files[0]}: holds no rows")
    x, _ = stack(blobs(files), whole_if(size))
    return Images(torch.from_numpy(x), torch.from_numpy(y))


class Parquet(Dataset):
    """`parquet:PATH`. `classes` and `shape` are known after `load`, `mean` and `std` (over all training pixels, 4
    decimals) after `load("train")`.

    path: a folder, absolute or relative to the data root or the working directory. size: resize every image to
    size x size (PIL bilinear, whole image). flip: whether a mirrored image keeps its label.
    """

    name = "parquet"

    def __init__(self, *, path: str, size: Count | None = None, flip: bool = True) -> None:
        self.path = path
        self.size = size
        self.flip_ok = flip

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        return argument(cls.name, text)

    def _files(self, root: Path | None) -> tuple[Files, Path]:
        folder = locate(self.name, self.path, root)
        files = split_files(folder)
        if files is None:
            raise UserError(
                f"parquet:{self.path}: {folder} needs train-*.parquet and test-*.parquet (or val-*, validation-*); "
                f"found {', '.join(sorted(p.name for p in folder.glob('*.parquet'))) or 'no Parquet file'}"
            )
        return files, folder

    def find(self, root: Path | None) -> Source:
        found = source(*self._files(root))
        return found if self.size is None else found._replace(note=f"{found.note}, resized to {self.size}x{self.size}")

    def load(self, split: Literal["train", "test"], root: Path | None) -> Images:
        files, _ = self._files(root)
        names = class_names(files.train[0])
        highest = max(int(labels(part).max(initial=-1)) for part in files)
        if names is not None and highest >= len(names):
            raise UserError(f"{files.train[0]}: names {len(names)} classes, but there is a label {highest}")
        images = load_split(files.of(split), self.size)
        self.classes = highest + 1 if names is None else len(names)
        channels, height, width = images.x.shape[1:]
        self.shape = (channels, height, width)
        if split == "train":
            self.mean, self.std = statistics(images.x.numpy())
        else:
            self._same_size(files.train[0], images)
        return images

    def _same_size(self, train: Path, images: Images) -> None:
        first = decode(next(blobs([train]))[1], f"{train}, row 0", whole_if(self.size))
        if first.shape != tuple(images.x.shape[1:]):
            raise UserError(
                f"{self.name}:{self.path}: training images have {first.shape[2]}x{first.shape[1]} pixels, test images "
                f"{images.x.shape[3]}x{images.x.shape[2]}; give size=N to resize all images to NxN"
            )

    def pool(self, root: Path | None, draw: Callable[[int], torch.Tensor] | None = None) -> Pool:
        """PATH is a Parquet file, or a folder whose Parquet files are read together; the label column may be absent. No
        link is followed that leads out of the folder.
        """
        files = pool_files(locate(self.name, self.path, root, file=True))
        count = sum(_open(path).metadata.num_rows for path in files)
        if not 0 < count <= MAX_ROWS:
            raise UserError(f"{files[0]}: {count:,} rows in all, expected at least 1 and at most {MAX_ROWS:,}")
        y = pool_labels(files)
        names = None if y is None else class_names(files[0])
        if y is not None and names is not None and y.max() >= len(names):
            raise UserError(f"{files[0]}: names {len(names)} classes, but there is a label {y.max()}")
        chosen = np.arange(count) if draw is None else np.sort(draw(count).numpy())
        x, about, native = pooled(_picked(files, set(chosen.tolist())), self.size)
        labelled = np.full(len(chosen), -1, np.int64) if y is None else y[chosen]
        images = Images(torch.from_numpy(x), torch.from_numpy(labelled))
        return Pool(images, None if names is None else tuple(names), about, native)
