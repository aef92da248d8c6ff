"""Whatever lies where images are looked for, a data set is loaded or refused in one line, within bounds."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile import bounded, contained, fuzzed, listing, mutated, nasty_json, nasty_text  # noqa: F401 (bounded: a fixture)
from hypothesis import given
from hypothesis import strategies as st
from layouts import encode, pixels, write_folder, write_parquet, write_pickles, write_signs
from PIL import Image

from backdoorbench_mcl.api import Dataset
from bbmcl_datasets import cifar, decode, gtsrb
from bbmcl_datasets.folder import Folder
from bbmcl_datasets.parquet import Parquet

SMALL = (3, 8, 8)
SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


def _encoded(kind: str, mode: str = "RGB", **more: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(1, 1, SMALL)[0][0].transpose(1, 2, 0)).convert(mode).save(buffer, kind, **more)
    return buffer.getvalue()


IMAGES = [
    _encoded("PNG"), _encoded("PNG", "RGBA"), _encoded("PNG", "P"), _encoded("PNG", "1"), _encoded("PNG", "LA"),
    _encoded("JPEG"), _encoded("JPEG", "L", progressive=True), _encoded("JPEG", "CMYK"), _encoded("PPM"),
    _encoded("PPM", "L"), _encoded("BMP"), _encoded("BMP", "P"), b"P3\n8 8\n255\n" + b"1 2 3 " * 64,
    _encoded("GIF", "P"),
]  # fmt: skip


@fuzzed()
@given(st.one_of(mutated(IMAGES), st.binary(max_size=200)))
def test_any_image_is_decoded_or_refused(data: bytes) -> None:
    with contained():
        image = decode.decode(data, "x.png", None)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.nbytes <= 3 * decode.MAX_PIXELS
    with contained():
        assert decode.decode(data, "x.png", decode.whole(4)).shape == (3, 4, 4)
    with contained():
        assert decode.decode(data, "x.png", decode.centre(4)).shape == (3, 4, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder beside one that nobody may touch."""
    top = tmp_path_factory.mktemp("images")
    (top / "outside").mkdir()
    (top / "outside" / "precious.png").write_bytes(IMAGES[0])
    return top / "set"


@st.composite
def names(draw: st.DrawFn) -> str:
    """A name that a file system takes."""
    raw = draw(
        st.one_of(nasty_text(), st.sampled_from(["train", "test", "0", "1", "²", "٣", ".hidden", "a b", "\udcff"]))
    )
    name = raw.replace("/", "_").replace("\0", "_").encode("utf-8", "surrogateescape" if "\udcff" in raw else "replace")
    return name[:100].decode("utf-8", "surrogateescape") or "x"


ENTRIES = ("image", "spoiled", "link", "dangling", "folder", "empty", "outside")


def _entry(path: Path, kind: str, data: bytes) -> None:
    if kind in ("image", "spoiled"):
        path.write_bytes(IMAGES[0] if kind == "image" else data)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        goals = {"link": path.parent, "dangling": Path("nowhere"), "outside": path.parents[3] / "outside/precious.png"}
        path.symlink_to(goals[kind])


def _pooled(dataset: Dataset) -> None:
    """The same images for a scan, which takes a folder without a split or without labels, too."""
    with contained():
        found = dataset.pool(None, lambda count: torch.arange(count)[:3])
        assert 1 <= len(found.images) <= 3
        assert found.names is None or found.images.y.max() < len(found.names)


@fuzzed(0.3)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["", "train", "test"]), names()),
        st.lists(
            st.tuples(names(), st.sampled_from([".png", ".PNG", ".jpg", ""]), st.sampled_from(ENTRIES)), max_size=3
        ),
        max_size=4,
    ),
    mutated(IMAGES),
    st.sampled_from([None, 4]),
)
def test_any_folder_is_loaded_or_refused(place: Path, tree: dict[Any, Any], data: bytes, size: int | None) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for (split, name), files in tree.items():
        folder = place / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for stem, suffix, kind in files:
            path = folder / (stem + suffix)
            if not path.exists() and not path.is_symlink():
                _entry(path, kind, data)
    before = listing(place.parent)
    dataset = Folder(path=str(place), size=size)
    with contained():
        dataset.find(None)
    for split in SPLITS:
        with contained():
            images = dataset.load(split, None)
            assert images.y.max() < dataset.classes
    _pooled(dataset)
    assert listing(place.parent) == before


def _parquet(folder: Path, **more: Any) -> bytes:
    write_parquet(folder, pixels(6, 2, SMALL), pixels(6, 2, SMALL))
    table = pq.read_table(next(folder.glob("train*")))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **more)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def parquets(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    kinds: list[dict[str, Any]] = [{}, {"compression": "zstd"}, {"use_dictionary": False, "compression": "none"},
                                   {"data_page_version": "2.0", "compression": "gzip"}]  # fmt: skip
    return [_parquet(tmp_path_factory.mktemp("parquet"), **kind) for kind in kinds]


@fuzzed()
@given(data=st.data())
def test_any_parquet_file_is_loaded_or_refused(place: Path, parquets: list[bytes], data: st.DataObject) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in ("train", "test"):
        spoil = data.draw(st.booleans()) or name == "train"
        (place / f"{name}.parquet").write_bytes(data.draw(mutated(parquets)) if spoil else parquets[0])
    dataset = Parquet(path=str(place), size=data.draw(st.sampled_from([None, 4])))
    with contained():
        dataset.find(None)
    for split in SPLITS:
        with contained():
            images = dataset.load(split, None)
            assert images.y.max() < dataset.classes <= decode.MAX_CLASSES
    _pooled(dataset)
    _pooled(Parquet(path=str(place / "train.parquet")))


@fuzzed(0.5)
@given(
    st.lists(st.one_of(st.sampled_from(IMAGES), st.binary(max_size=9), st.none()), min_size=1, max_size=4),
    st.lists(st.one_of(st.integers(-1, 3), st.sampled_from([10**12, 2**63 - 1]), st.none()), min_size=4, max_size=4),
    st.sampled_from(["img", "image", "x"]), st.sampled_from(["label", "fine_label", "y"]), st.booleans(), nasty_json(),
)  # fmt: skip
def test_any_table_is_loaded_or_refused(
    place: Path, blobs: list[bytes | None], labels: list[int | None], image: str, label: str, plain: bool, meta: Any
) -> None:
    """Tables that are sound and hold what they should not: no images, absurd labels, names of classes of any kind."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    column = (
        pa.array(blobs, pa.binary())
        if plain
        else pa.array(
            [{"bytes": blob, "path": None} for blob in blobs], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        )
    )
    table = pa.table({image: column, label: pa.array(labels[: len(blobs)], pa.int64())})
    named = {"info": {"features": {label: {"names": meta}}}}
    for name in ("train", "test"):
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(named)}), place / f"{name}.parquet")
    dataset = Parquet(path=str(place))
    with contained():
        dataset.find(None)
    for split in SPLITS:
        with contained():
            dataset.load(split, None)
    _pooled(dataset)


@fuzzed(0.5)
@given(data=st.data())
def test_any_pickled_batch_is_read_or_refused(place: Path, data: st.DataObject) -> None:
    kept = place.parent / "batches"
    if not kept.exists():
        for protocol in (2, 4, 5):
            write_pickles(kept / str(protocol), pixels(10, 10), pixels(2, 10), protocol)
    valid = [(kept / str(protocol) / "test_batch").read_bytes() for protocol in (2, 4, 5)]
    (place.parent / "batch").write_bytes(data.draw(mutated(valid)))
    with contained():
        cifar.read_batch(place.parent / "batch", "labels")


@fuzzed(0.5)
@given(
    mutated([b"Filename;Width;ClassId\n00000.ppm;30;16\n00001.ppm;40;1\n", b"\xef\xbb\xbfFilename;ClassId\na.ppm;1\n"])
)
def test_any_table_of_signs_is_read_or_refused(place: Path, content: bytes) -> None:
    root = place.parent / "signs"
    test = root / "GTSRB" / "Final_Test" / "Images"
    if not root.exists():
        write_signs(root / "GTSRB" / "Final_Training" / "Images", 1, 1)
        test.mkdir(parents=True)
        (test / "00000.ppm").write_bytes(encode(pixels(1, 1, SMALL)[0][0]))
    (root / gtsrb.TRUTH).write_bytes(content)
    with contained():
        found = gtsrb.Gtsrb(split="final")._parts(root)
        assert all(file.parent == test for file in found.test.files)


def test_what_is_sound_is_loaded(place: Path, parquets: list[bytes]) -> None:
    """The fuzz targets reach their ends: what is not spoiled is read whole."""
    shutil.rmtree(place, ignore_errors=True)
    write_folder(place / "train", pixels(6, 2, SMALL))
    write_folder(place / "test", pixels(6, 2, SMALL))
    assert len(Folder(path=str(place)).load("train", None)) == 6
    for content in parquets:
        for name in ("train", "test"):
            (place / f"{name}.parquet").write_bytes(content)
        assert len(Parquet(path=str(place)).load("test", None)) == 6
