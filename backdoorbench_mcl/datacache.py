"""The data cache: images as memory-mapped uint8 arrays, in an order that depends on their content alone.

Every split is sorted by (SHA-256 of the pixels, label), so the same pixels give the same hash, order and clean
splits whatever file they came from (design 3.4). On disk, below the cache folder:

    arrays/<hash>/{train,test}_{x,y}.npy, manifest.json    content-addressed, never changed once published
    index/<slot>.json                                      data set key and data root -> hash, constants, sources

Both are written under a temporary name, flushed and renamed: a reader sees all or nothing, and two processes that
prepare the same data at once both end well. The folder may be deleted at any time. Free of torch.

A split need not fit into memory: a loader may return a map of a temporary file (`tempfile` puts it on the cache's
disk while data are prepared, so twice the size of a split is needed there for a while), and all else is done in chunks.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .artefacts import sync
from .errors import PluginError, UserError

if TYPE_CHECKING:
    from .api import Dataset

Split = Literal["train", "test"]
Part = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # digests (N, 32), labels (N,), in sorted order
SPLITS: tuple[Split, Split] = ("train", "test")
FILES = ("manifest.json", *(f"{split}_{part}.npy" for split in SPLITS for part in "xy"))  # of a folder of arrays
FORMAT = 1
MAX_CLASSES = 1 << 16  # predictions are stored as 16 bits
_CHUNK = 32 << 20  # bytes gathered, hashed or written at a time: small beside any data set, large beside a seek
_STALE = 24 * 3600.0  # seconds after which a temporary folder belongs to a process that died


@dataclass(frozen=True)
class DataInfo:
    """A data set in the cache, as it was really loaded.

    hash: SHA-256 (hex) over shape, classes and the sorted (pixel digest, label) pairs of train, then test;
    hash_train and hash_test cover one split each. mean, std: per channel, pixels in [0, 1]. note: "lossless", "JPEG",
    "procedural" ... and the counts. class_counts_train: images per label. folder: where the arrays lie.
    """

    key: str
    hash: str
    hash_train: str
    hash_test: str
    n_train: int
    n_test: int
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip_ok: bool
    toy: bool
    budget: Literal["full", "mid", "quick"]
    note: str
    class_counts_train: tuple[int, ...]
    folder: Path

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready dict of every field."""
        out = asdict(self)
        out.update({name: list(value) for name, value in out.items() if isinstance(value, tuple)})
        return out | {"folder": str(self.folder)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataInfo:
        """The record behind `as_dict`; raises KeyError for an absent field, drops unknown ones."""
        given = {f.name: data[f.name] for f in fields(cls)}
        for name in ("shape", "mean", "std", "class_counts_train"):
            given[name] = tuple(given[name])
        return cls(**given | {"folder": Path(given["folder"])})


# ---------------------------------------------------------------- order and identity, pure


def digests(x: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 images (N, C, H, W) -> SHA-256 of each image's bytes in C, H, W order, uint8 (N, 32)."""
    out = np.empty((len(x), 32), np.uint8)
    for i, image in enumerate(x):
        out[i] = np.frombuffer(hashlib.sha256(np.ascontiguousarray(image).data).digest(), np.uint8)
    return out


def order(pixels: npt.NDArray[np.uint8], y: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Digests (N, 32) and labels (N,) -> the permutation that sorts by digest (as a big-endian number), then label."""
    words = np.ascontiguousarray(pixels).view(">u8")  # (N, 4)
    return np.lexsort((y, words[:, 3], words[:, 2], words[:, 1], words[:, 0]))


def content(x: npt.NDArray[np.uint8], y: npt.NDArray[np.int64]) -> tuple[str, npt.NDArray[np.intp]]:
    """SHA-256 (hex) over images (N, C, H, W) and labels (N,) that have no split, whatever their order; and the
    permutation that sorts them as a cache does.
    """
    pixels = digests(x)
    sort = order(pixels, y)
    return content_hash(0, x.shape[1:], {"train": (pixels[sort], y[sort])}), sort


def content_hash(classes: int, shape: Sequence[int], parts: Mapping[Split, Part]) -> str:
    """SHA-256 (hex) of a data set: classes, shape (C, H, W) and, per split, sorted digests (N, 32) and labels (N,)."""
    head = {"classes": classes, "shape": list(shape), "splits": {name: len(y) for name, (_, y) in parts.items()}}
    digest = hashlib.sha256(json.dumps(head, separators=(",", ":")).encode())
    for pixels, y in parts.values():
        digest.update(np.ascontiguousarray(pixels).data)
        digest.update(np.ascontiguousarray(y, "<i8").data)
    return digest.hexdigest()


# ---------------------------------------------------------------- what others call


def prepare(dataset: Dataset, root: Path | None, cache: Path, key: str) -> DataInfo:
    """Find, load, sort and store a data set; needs torch, so it runs in a child process.

    root: the data root, or None. key: the identity of the configured data set, under which `lookup` finds it again.
    Raises UserError when the data are missing, corrupt or changed while being read, or when the cache cannot be
    written (nothing half-written is ever read); PluginError when what was loaded breaks the data set's own contract.
    """
    root = None if root is None else root.absolute()
    source = dataset.find(root)
    sources = _stamps(source.files)
    arrays, index = cache.absolute() / "arrays", cache.absolute() / "index"
    with _writing(cache):
        arrays.mkdir(parents=True, exist_ok=True)
        index.mkdir(exist_ok=True)
        _sweep(arrays)
        temp = Path(tempfile.mkdtemp(prefix=".tmp-", dir=arrays))
    try:
        parts = {split: _store(dataset, split, root, temp, cache) for split in SPLITS}
        if _stamps(source.files) != sources:
            raise UserError(
                f"{dataset.name}: a file under {source.files[0].parent} changed while it was read; run again"
            )
        info = _describe(dataset, source.note, key, parts, arrays)
        with _writing(cache):
            _write_json(temp / "manifest.json", {"hash": info.hash, "files": _fingerprints(temp)})
            sync(temp)
            _publish(temp, info.folder)
            place = _place(dataset, root, source.files)
            stored = {k: v for k, v in info.as_dict().items() if k != "folder"}  # the cache may be moved
            _write_json(index / _slot(key, place), {"info": stored, "place": place, "sources": sources})
            sync(index)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return info


def lookup(cache: Path, key: str, root: Path | None) -> DataInfo | None:
    """The cached data set, without torch and without reading pixels; None when `prepare` has to run (again):
    absent, a source file is gone or differs in size or modification time, or a cache file is damaged or truncated.
    """
    for place in _places(None if root is None else root.absolute()):
        entry = _read_json(cache.absolute() / "index" / _slot(key, place))
        info = None if entry is None else _info(entry, cache)
        if entry is None or info is None or info.key != key or entry.get("place") != place:
            continue
        if all(_stamp(path) == [path, *rest] for path, *rest in entry["sources"]) and not _problems(info, deep=False):
            return info
    return None


def entries(cache: Path) -> list[DataInfo]:
    """Every readable record of the cache, sorted by hash and key; `check` tells whether the arrays are sound."""
    found = (_read_json(path) for path in sorted((cache.absolute() / "index").glob("*.json")))
    infos = (None if entry is None else _info(entry, cache) for entry in found)
    return sorted((info for info in infos if info is not None), key=lambda info: (info.hash, info.key))


def open_split(
    info: DataInfo, split: Split, mode: Literal["r", "c"] = "r"
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Memory maps of a split: uint8 (N, C, H, W) and int64 (N,). mode "r": read-only; "c": private copy-on-write.

    Raises UserError when the files are missing or do not fit `info`.
    """
    count = info.n_train if split == "train" else info.n_test
    try:
        x = np.load(info.folder / f"{split}_x.npy", mmap_mode=mode, allow_pickle=False)
        y = np.load(info.folder / f"{split}_y.npy", mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"data cache {info.folder}: cannot read {split}: {error}; delete that folder and run again"
        ) from error
    if (x.dtype, x.shape, y.dtype, y.shape) != (np.uint8, (count, *info.shape), np.int64, (count,)):
        raise UserError(f"data cache {info.folder}: {split} is not what was stored; delete that folder and run again")
    return x, y


def check(info: DataInfo) -> list[str]:
    """Read everything back and compare with the stored SHA-256: one line per problem, none when all is well."""
    return _problems(info, deep=True)


def intact(folder: Path, name: str) -> bool:
    """Whether `folder` has the arrays called `name`, by their sizes."""
    return not _damage(folder, name, deep=False)


def receive(cache: Path, name: str, files: Mapping[str, Iterable[bytes]]) -> Path:
    """Store the arrays called `name` that another machine's cache has; every byte is checked. files: all of its folder,
    in pieces. Returns the folder here. Raises UserError where they are damaged, or the cache cannot be written.
    """
    arrays = cache.absolute() / "arrays"
    with _writing(cache):
        arrays.mkdir(parents=True, exist_ok=True)
        _sweep(arrays)
        temp = Path(tempfile.mkdtemp(prefix=".tmp-", dir=arrays))
    try:
        with _writing(cache):
            for file in FILES:
                with (temp / file).open("wb") as handle:
                    handle.writelines(files.get(file, ()))
                sync(temp / file)
        if problems := _damage(temp, name, deep=True):
            raise UserError(f"a data set did not arrive as it was sent: {Path(problems[0]).name}; run again")
        with _writing(cache):
            sync(temp)
            _publish(temp, arrays / name)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return arrays / name


# ---------------------------------------------------------------- parts of prepare


def _store(dataset: Dataset, split: Split, root: Path | None, folder: Path, cache: Path) -> Part:
    """Load one split and write it in sorted order; returns sorted digests (N, 32) and labels (N,)."""
    with scratch(folder):
        images = dataset.load(split, root)
    x: npt.NDArray[np.uint8] = np.asarray(images.x)
    y: npt.NDArray[np.int64] = np.asarray(images.y)
    if len(x) == 0:
        raise UserError(f"{dataset.name}: the {split} split has no images")
    if x.dtype != np.uint8 or x.shape[1:] != tuple(dataset.shape):
        raise PluginError(
            f"{dataset.name}: {split} is {x.dtype} {x.shape}, but shape says uint8 {tuple(dataset.shape)}"
        )
    if not 1 <= dataset.classes <= MAX_CLASSES:
        raise PluginError(f"{dataset.name}: has {dataset.classes:,} classes, expected at most {MAX_CLASSES:,}")
    if y.dtype != np.int64 or y.min() < 0 or y.max() >= dataset.classes:
        raise PluginError(
            f"{dataset.name}: {split} has {y.dtype} labels {y.min()}-{y.max()}, expected int64 0-{dataset.classes - 1}"
        )
    pixels = digests(x)
    sort = order(pixels, y)
    with _writing(cache):
        _write_array(folder / f"{split}_x.npy", x, sort)
        _write_array(folder / f"{split}_y.npy", y, sort)
    return pixels[sort], y[sort]


def _describe(
    dataset: Dataset,
    note: str,
    key: str,
    parts: Mapping[Split, Part],
    arrays: Path,
) -> DataInfo:
    classes, shape = int(dataset.classes), tuple(int(n) for n in dataset.shape)
    if len(dataset.mean) != shape[0] or len(dataset.std) != shape[0] or min(dataset.std) <= 0:
        raise PluginError(f"{dataset.name}: expected {shape[0]} values each for mean and std, std above 0")
    (_, y_train), (_, y_test) = parts["train"], parts["test"]
    whole = content_hash(classes, shape, parts)
    return DataInfo(
        key=key,
        hash=whole,
        hash_train=content_hash(classes, shape, {"train": parts["train"]}),
        hash_test=content_hash(classes, shape, {"test": parts["test"]}),
        n_train=len(y_train),
        n_test=len(y_test),
        classes=classes,
        shape=(shape[0], shape[1], shape[2]),
        mean=tuple(float(v) for v in dataset.mean),
        std=tuple(float(v) for v in dataset.std),
        flip_ok=bool(dataset.flip_ok),
        toy=bool(dataset.toy),
        budget=dataset.budget,
        note=f"{note}; {len(y_train)} train + {len(y_test)} test images",
        class_counts_train=tuple(int(n) for n in np.bincount(y_train, minlength=classes)),
        folder=arrays / whole,
    )


def _write_array(path: Path, values: npt.NDArray[Any], index: npt.NDArray[np.intp]) -> None:
    """`values[index]` as .npy, gathered in chunks. Plain writes: a full disk is an OSError here, but kills the
    process with SIGBUS when pages of a memory map cannot be stored."""
    rows = max(1, _CHUNK // max(1, values[:1].nbytes))
    head = {"descr": np.lib.format.dtype_to_descr(values.dtype), "fortran_order": False, "shape": values.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        for start in range(0, len(index), rows):
            file.write(np.ascontiguousarray(values[index[start : start + rows]]).data)
        file.flush()
        os.fsync(file.fileno())


def _publish(temp: Path, final: Path) -> None:
    """Give the finished folder its name; where intact arrays have it already, they stay, damaged ones make way."""
    for attempt in range(3):
        try:
            os.rename(temp, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 2:
                raise
            if not _damage(final, final.name, deep=True):
                return
            aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=final.parent))
            with contextlib.suppress(FileNotFoundError):  # another process has moved it away
                os.rename(final, aside / "damaged")
            shutil.rmtree(aside, ignore_errors=True)
        else:
            sync(final.parent)
            return


def _sweep(arrays: Path) -> None:
    """Remove what killed processes left behind long ago."""
    for path in arrays.glob(".tmp-*"):
        stamp = _stamp(str(path))
        if stamp is not None and time.time() - stamp[2] / 1e9 > _STALE:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[None]:
    """Temporary files go to `folder`: decoded images may take as much room as the arrays, and /tmp may be memory."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"cannot write the data cache {cache}: {why}; make room there, or choose a folder that can be written"
        ) from error


# ---------------------------------------------------------------- places: which record serves which data root


def _place(dataset: Dataset, root: Path | None, files: Sequence[Path]) -> list[str | None]:
    """What the data depend on besides the key: nothing without files, the data root with files, and the working
    directory too where a parameter is a path relative to it."""
    if not files:
        return ["anywhere"]
    here = Path.cwd()
    relative = [
        here / v for v in dataset.params.values() if isinstance(v, str) and v and not Path(v).expanduser().is_absolute()
    ]
    near = any(file.is_relative_to(folder) for folder in relative for file in files)
    return ["root", None if root is None else str(root), *([str(here)] if near else [])]


def _places(root: Path | None) -> list[list[str | None]]:
    base = ["root", None if root is None else str(root)]
    return [["anywhere"], base, [*base, str(Path.cwd())]]


def _slot(key: str, place: Sequence[str | None]) -> str:
    return hashlib.sha256(json.dumps([key, *place]).encode()).hexdigest()[:32] + ".json"


def _stamps(files: Sequence[Path]) -> list[list[Any]]:
    stamps = [(path, _stamp(str(path.absolute()))) for path in files]
    for path, stamp in stamps:
        if stamp is None:
            raise UserError(f"{path} is gone or cannot be read")
    return [stamp for _, stamp in stamps if stamp is not None]


def _stamp(path: str) -> list[Any] | None:
    """[path, size in bytes, mtime in ns]; a folder counts with its mtime, which moves when an entry comes or goes."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [path, stat.st_size, stat.st_mtime_ns]


# ---------------------------------------------------------------- records on disk


def _info(entry: Mapping[str, Any], cache: Path) -> DataInfo | None:
    try:
        given = entry["info"]
        return DataInfo.from_dict({**given, "folder": cache.absolute() / "arrays" / given["hash"]})
    except (KeyError, TypeError):
        return None


def _problems(info: DataInfo, deep: bool) -> list[str]:
    return _damage(info.folder, info.hash, deep)


def _damage(folder: Path, expected: str, deep: bool) -> list[str]:
    """What is wrong with a folder of arrays: sizes only, or with `deep` every byte."""
    manifest = _read_json(folder / "manifest.json")
    if manifest is None:
        return [f"{folder / 'manifest.json'}: missing or damaged"]
    if manifest["hash"] != expected or set(manifest["files"]) != {
        f"{split}_{part}.npy" for split in SPLITS for part in "xy"
    }:
        return [f"{folder / 'manifest.json'}: describes other data than {expected}"]
    problems = []
    for name, (size, checksum) in manifest["files"].items():
        stamp = _stamp(str(folder / name))
        if stamp is None:
            problems.append(f"{folder / name}: missing")
        elif stamp[1] != size:
            problems.append(f"{folder / name}: {stamp[1]} bytes, expected {size}")
        elif deep and _checksum(folder / name) != checksum:
            problems.append(f"{folder / name}: SHA-256 differs from what was written, or it cannot be read")
    return problems


def _fingerprints(folder: Path) -> dict[str, list[Any]]:
    return {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(folder.glob("*.npy"))}


def _checksum(path: Path) -> str:
    """SHA-256 (hex) of a file, or "" where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Atomically, with a checksum over itself: a flipped bit in a record must not change a constant unseen."""
    handle, temp = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "seal": _seal(body), "body": body}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise


def _read_json(path: Path) -> dict[str, Any] | None:
    """The body of a record; None when it is absent, damaged or of another format."""
    try:
        outer = json.loads(path.read_bytes())
        body = outer["body"]
        return body if outer["format"] == FORMAT and outer["seal"] == _seal(body) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


__all__ = [
    "FILES", "SPLITS", "DataInfo", "Split", "check", "content", "content_hash", "digests", "entries", "intact",
    "lookup", "open_split", "order", "prepare", "receive", "scratch",
]  # fmt: skip
