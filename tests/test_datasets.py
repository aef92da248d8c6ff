"""The loaders: the same pixels from every layout, hostile and damaged files, and what a user is told."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from layouts import cells, encode, pixels, table, write_folder, write_parquet, write_pickles
from PIL import Image

import bbmcl_datasets
from backdoorbench_mcl import datacache
from backdoorbench_mcl.api import Dataset
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.kit import statistics
from bbmcl_datasets.cifar import Cifar10, Cifar100, read_batch
from bbmcl_datasets.decode import MAX_PIXELS, decode, stack, whole
from bbmcl_datasets.folder import Folder, class_folders
from bbmcl_datasets.parquet import Parquet

TRAIN, TEST = pixels(40, seed=1), pixels(20, seed=2)


def test_every_entry_leads_to_the_data_set_of_its_name() -> None:
    entries = bbmcl_datasets.bbmcl_datasets()
    assert [entry.name for entry in entries] == [
        "shapes", "cifar10", "cifar100", "gtsrb", "imagenet20", "folder", "parquet",
    ]  # fmt: skip
    for entry in entries:
        module, _, name = entry.target.partition(":")
        found = getattr(importlib.import_module(module), name)
        assert issubclass(found, Dataset)
        assert found.name == entry.name


def test_the_same_pixels_are_the_same_data_from_every_source(tmp_path: Path) -> None:
    write_pickles(tmp_path / "a" / "cifar-10-batches-py", TRAIN, TEST)
    write_parquet(tmp_path / "b" / "cifar10", TRAIN, TEST)
    write_folder(tmp_path / "c" / "train", TRAIN)
    write_folder(tmp_path / "c" / "val", TEST)
    cache = tmp_path / "cache"
    infos = [
        datacache.prepare(Cifar10(), tmp_path / "a", cache, "pickles"),
        datacache.prepare(Cifar10(), tmp_path / "b", cache, "parquet"),
        datacache.prepare(Cifar10(), tmp_path / "b" / "cifar10", cache, "root is the folder"),
        datacache.prepare(Parquet(path="cifar10"), tmp_path / "b", cache, "parquet:"),
        datacache.prepare(Folder(path=str(tmp_path / "c")), None, cache, "folder:"),
    ]
    assert len({(i.hash, i.hash_train, i.hash_test, i.folder, i.note, i.class_counts_train) for i in infos}) == 1
    assert infos[0].note == "lossless; 40 train + 20 test images"
    x, y = datacache.open_split(infos[-1], "train")
    expected = sorted(zip(datacache.digests(TRAIN[0]).tolist(), TRAIN[1].tolist(), range(40), strict=True))
    assert np.array_equal(x, TRAIN[0][[i for *_, i in expected]])
    assert y.tolist() == [label for _, label, _ in expected]


# ---------------------------------------------------------------- cifar


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_batches_of_every_age_are_read(tmp_path: Path, protocol: int) -> None:
    write_pickles(tmp_path / "cifar-10-batches-py", TRAIN, TEST, protocol)
    images = Cifar10().load("test", tmp_path)
    assert np.array_equal(images.x.numpy(), TEST[0])
    assert images.y.tolist() == TEST[1].tolist()


@pytest.mark.parametrize("protocol", range(6))
def test_keys_may_be_bytes(tmp_path: Path, protocol: int) -> None:
    """Who loads the published files with encoding="bytes" and saves them again has such keys."""
    batch = {b"data": TEST[0].reshape(len(TEST[0]), -1), b"labels": TEST[1].tolist()}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol))
    x, y = read_batch(tmp_path / "test_batch", "labels")
    assert np.array_equal(x, TEST[0])
    assert y.tolist() == TEST[1].tolist()


def test_a_batch_as_python_2_wrote_it_is_read(tmp_path: Path) -> None:
    data = bytes(range(256)) * 12
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01K\x01M\x00\x0c\x86" + dtype + b"\x89"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + state
    batch = b"\x80\x02}(U\x04data" + array + b"T" + len(data).to_bytes(4, "little") + data + b"tbU\x06labels]K\x03au."
    (tmp_path / "test_batch").write_bytes(batch)
    x, y = read_batch(tmp_path / "test_batch", "labels")
    assert x.shape == (1, 3, 32, 32)
    assert x.tobytes() == data
    assert y.tolist() == [3]


class _Call:
    """Pickles as a call of `function(*args)`, followed by a state if one is given."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced if self.reduced[2] is not None else self.reduced[:2]


@pytest.mark.parametrize(
    "hostile",
    [
        lambda mark: _Call(os.system, f"touch {mark}"),
        lambda mark: _Call(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: _Call(os.mkdir, str(mark)),
        lambda mark: {"labels": [0], "data": _Call(getattr, _Call(__import__, "os"), "system")},
        lambda mark: {"labels": [0], "data": np.array([os.getcwd], object)},
        lambda mark: {"labels": [0], "data": _Call(np.ndarray, (3072,), np.dtype("u1"))},
        lambda mark: {"labels": [0], "data": np.zeros((1, 3072), np.float32)},
        lambda mark: {"labels": [0, 1], "data": np.zeros((1, 3072), np.uint8)},
        lambda mark: {"labels": ["dog"], "data": np.zeros((1, 3072), np.uint8)},
        lambda mark: [1, 2, 3],
    ],
)
def test_a_hostile_pickle_runs_nothing_and_is_named(tmp_path: Path, hostile: Callable[[Path], Any]) -> None:
    mark, path = tmp_path / "executed", tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(hostile(mark), 4))
    with pytest.raises(UserError, match="test_batch: not a readable"):
        read_batch(path, "labels")
    assert not mark.exists()


TEXT = b"X" + (20_000).to_bytes(4, "little") + b"a" * 20_000 + b"q\x00c_codecs\nencode\nq\x01U\x06latin1q\x02"
AGAIN = b"h\x01h\x00h\x02\x86R"  # the text encoded once more
BOMBS = {
    "memo": b"\x80\x02Nr" + (1 << 28).to_bytes(4, "little") + b".",
    "hash": b"\x80\x02}K\x01K\x02\x86" + b"2\x86" * 60 + b"K\x01s.",
    "copies": b"\x80\x02(" + TEXT + AGAIN * 5_000 + b"l.",
    "claim": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_pickle_takes_neither_much_memory_nor_time(tmp_path: Path, kind: str) -> None:
    """The first was found by fuzzing: nine bytes that made an unpickler take four gigabytes."""
    path = tmp_path / "test_batch"
    path.write_bytes(BOMBS[kind])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="test_batch: not a readable"):
            read_batch(path, "labels")
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_an_empty_batch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({"labels": [], "data": np.zeros((0, 3072), np.uint8)}, 4))
    with pytest.raises(UserError, match="0 labels for 0 images"):
        read_batch(path, "labels")


def test_labels_that_are_lists_of_lists_are_not_unfolded(tmp_path: Path) -> None:
    path = tmp_path / "test_batch"
    labels: list[Any] = [0]
    for _ in range(60):
        labels = [labels, labels]
    path.write_bytes(pickle.dumps({"labels": labels, "data": np.zeros((2, 3072), np.uint8)}, 4))
    with pytest.raises(UserError, match="no list of whole numbers under 'labels'"):
        read_batch(path, "labels")


def test_a_pickle_cannot_alter_the_reader(tmp_path: Path) -> None:
    """BUILD writes a state into an object: into a name it goes nowhere, and the next file is read as ever."""
    path = tmp_path / "test_batch"
    for name in ("numpy\nndarray", "numpy\ndtype", "numpy._core.numeric\n_frombuffer", "_codecs\nencode"):
        path.write_bytes(b"\x80\x02c" + name.encode() + b"\nN}U\x04codeU\x02u1s\x86b.")
        with pytest.raises(UserError, match="not a readable"):
            read_batch(path, "labels")
    write_pickles(tmp_path / "cifar-10-batches-py", TRAIN, TEST)
    assert len(Cifar10().load("train", tmp_path)) == 40


def test_a_truncated_batch_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_pickles(folder, TRAIN, TEST)
    (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:5000])
    with pytest.raises(UserError, match="data_batch_3: not a readable pickle"):
        Cifar10().load("train", tmp_path)


def test_cifar100_reads_fine_labels_from_both_layouts(tmp_path: Path) -> None:
    x, y = pixels(100, 100)
    (tmp_path / "a" / "cifar-100-python").mkdir(parents=True)
    for name in ("train", "test"):
        batch = {"data": x.reshape(100, -1), "fine_labels": y.tolist(), "coarse_labels": [0] * 100}
        (tmp_path / "a" / "cifar-100-python" / name).write_bytes(pickle.dumps(batch, 2))
    write_parquet(tmp_path / "b" / "cifar100", (x, y), (x, y), label="fine_label")
    one, two = (Cifar100().load("train", tmp_path / name) for name in "ab")
    assert torch.equal(one.x, two.x)
    assert one.y.tolist() == two.y.tolist() == y.tolist()


def test_missing_cifar_says_what_where_and_three_ways(tmp_path: Path) -> None:
    for root, where in ((tmp_path, str(tmp_path)), (None, "no data root was given")):
        with pytest.raises(UserError) as caught:
            Cifar10().find(root)
        text = str(caught.value)
        for part in (
            where,
            "cifar-10-batches-py/",
            "cifar10/train-*.parquet",
            "download=true",
            "--data-root",
            "BBMCL_DATA",
        ):
            assert part in text
        assert "\n" not in text


def test_another_data_set_is_not_taken_for_cifar(tmp_path: Path) -> None:
    write_parquet(tmp_path / "ten", TRAIN, TEST)
    write_parquet(tmp_path / "small", pixels(20, shape=(3, 28, 28)), pixels(20, shape=(3, 28, 28)))
    with pytest.raises(UserError, match="expected cifar100: labels 0-99"):
        Cifar100().load("train", tmp_path / "ten")
    with pytest.raises(UserError, match="is this another data set"):
        Cifar10().load("train", tmp_path / "small")


def test_download_goes_through_torchvision_and_says_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(root: str, download: bool) -> None:
        assert download
        write_pickles(Path(root) / "cifar-10-batches-py", TRAIN, TEST)

    def fail(root: str, download: bool) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    with pytest.raises(UserError, match=r"download to .* failed \(name resolution failed\)"):
        Cifar10(download=True).find(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fetch)
    assert Cifar10(download=True).find(tmp_path).note == "lossless"
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    assert len(Cifar10(download=True).find(tmp_path).files) == 6


# ---------------------------------------------------------------- parquet


def test_parquet_takes_classes_from_the_names_and_statistics_from_training(tmp_path: Path) -> None:
    train, test = pixels(12, 3, (3, 5, 7)), pixels(6, 3, (3, 5, 7), seed=3)
    write_parquet(tmp_path, train, test, image="image", test_name="validation", names=["a", "b", "c", "unseen"])
    data = Parquet(path=str(tmp_path))
    images = data.load("train", None)
    assert (data.classes, data.shape) == (4, (3, 5, 7))
    assert np.array_equal(images.x.numpy(), train[0])
    share = train[0].astype(np.float64) / 255
    assert data.mean == pytest.approx(share.mean((0, 2, 3)), abs=5.1e-5)
    assert data.std == pytest.approx(share.std((0, 2, 3)), abs=5.1e-5)
    assert data.load("test", None).y.tolist() == test[1].tolist()
    write_parquet(tmp_path, train, pixels(6, 5, (3, 5, 7)))
    (tmp_path / "validation-00000-of-00001.parquet").unlink()
    data.load("train", None)
    assert data.classes == 5  # without names: the highest label of both splits


def test_parquet_of_plain_bytes_and_jpeg_is_read_and_noted(tmp_path: Path) -> None:
    x, y = pixels(4, 2)
    for name in ("train", "test"):
        pq.write_table(table([encode(i, "JPEG") for i in x], y.tolist()), tmp_path / f"{name}.parquet")
    data = Parquet(path=str(tmp_path), size=8)
    assert data.find(None).note == "JPEG, resized to 8x8"
    data.load("train", None)
    assert data.shape == (3, 8, 8)


def _damage_row(folder: Path, images: list[Any], labels: list[Any] | None = None) -> None:
    labels = [0, 1, 0, 1][: len(images)] if labels is None else labels
    pq.write_table(table(images, labels), folder / "train-00000-of-00001.parquet")


GOOD = cells(pixels(4, 2)[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: _damage_row(f, [*GOOD[:2], {"bytes": GOOD[2]["bytes"][:300], "path": ""}]), "row 2: not a readable"),
        (lambda f: _damage_row(f, [*GOOD[:1], {"bytes": b"GIF89a", "path": ""}]), "row 1: not a readable PNG, JPEG"),
        (lambda f: _damage_row(f, [*GOOD[:3], {"bytes": None, "path": "x"}]), "row 3: holds no image bytes"),
        (lambda f: _damage_row(f, [*GOOD[:3], None]), "row 3: holds no image bytes"),
        (lambda f: _damage_row(f, GOOD, [0, 1, -1, 0]), "row 2: label -1"),
        (lambda f: _damage_row(f, GOOD, [0, 1, None, 0]), "row 2: label None"),
        (lambda f: _damage_row(f, [*GOOD[:2], *cells(pixels(1, 1, (3, 8, 9))[0])]), "row 2: 9x8 pixels.*size=N"),
        (lambda f: _damage_row(f, []), "holds no rows"),
        (lambda f: _damage_row(f, cells(pixels(4, 2, (3, 8, 8))[0])), "test images 32x32; give size=N"),
        (lambda f: (f / "train-00000-of-00001.parquet").write_bytes(b"PAR1"), "train.*not a readable Parquet"),
        (lambda f: (f / "train-00001-of-00003.parquet").write_bytes(b""), "train has the shards"),
        (lambda f: (f / "test-00000-of-00001.parquet").unlink(), r"needs train-\*.parquet and test-\*.parquet"),
        (
            lambda f: pq.write_table(table(GOOD, [0] * 4, image="pic"), f / "train-00000-of-00001.parquet"),
            "columns pic",
        ),
        (
            lambda f: pq.write_table(table(GOOD, [0, 1, 2, 9], names=["a"]), f / "train-00000-of-00001.parquet"),
            "label 9",
        ),
    ],
)
def test_damaged_parquet_is_named_in_one_line(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    write_parquet(tmp_path, pixels(4, 2), pixels(4, 2))
    spoil(tmp_path)
    data = Parquet(path=str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        (data.load("train", None), data.load("test", None))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_cut_inside_its_data_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path, pixels(40, 2), pixels(4, 2))
    path = tmp_path / "train-00000-of-00001.parquet"
    whole = bytearray(path.read_bytes())
    whole[200:40_000] = bytes(39_800)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet"):
        Parquet(path=str(tmp_path)).load("train", None)


# ---------------------------------------------------------------- folder


def test_a_folder_without_splits_is_split_by_pixels_alone(tmp_path: Path) -> None:
    part = pixels(120, 3, (3, 4, 4))
    write_folder(tmp_path / "a", part)
    data = Folder(path=str(tmp_path / "a"), test_fraction=0.3)
    assert data.find(None).note == "lossless, split by pixel hash (0.3 for test)"
    train, test = (data.load("train", None), data.load("test", None))
    assert len(train) + len(test) == 120
    assert 20 <= len(test) <= 52  # 36 expected, sd 5: three of them
    assert (data.classes, data.shape) == (3, (3, 4, 4))

    def held(path: Path) -> set[bytes]:
        return {image.numpy().tobytes() for image in Folder(path=str(path), test_fraction=0.3).load("test", None).x}

    for i, (image, label) in enumerate(zip(*part, strict=True)):  # other names, every image twice
        for copy in "xy":
            path = tmp_path / "b" / str(label) / f"{999 - i}{copy}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(image, "BMP"))
    before = held(tmp_path / "a")
    assert held(tmp_path / "b") == before
    write_folder(tmp_path / "a" / "more", pixels(30, 1, (3, 4, 4), seed=9))
    (tmp_path / "a" / "more" / "0").rename(tmp_path / "a" / "3")
    (tmp_path / "a" / "more").rmdir()
    assert before < held(tmp_path / "a")


def test_class_folders_that_are_numbers_are_labelled_by_value(tmp_path: Path) -> None:
    for name in ("10", "2", "1", ".hidden"):
        (tmp_path / name).mkdir()
    assert [path.name for path in class_folders(tmp_path)] == ["1", "2", "10"]
    (tmp_path / "b").mkdir()
    assert [path.name for path in class_folders(tmp_path)] == ["1", "10", "2", "b"]


def test_a_mixed_folder_says_so(tmp_path: Path) -> None:
    write_folder(tmp_path, pixels(4, 2), "PNG")
    write_folder(tmp_path, pixels(3, 2), "JPEG")
    (tmp_path / "0" / "notes.txt").write_text("not an image")
    assert Folder(path=str(tmp_path)).find(None).note.startswith("mixed (4 lossless, 3 JPEG)")


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: _put(f / "train/0/bad.png", b"\x89PNG\r\n\x1a\nxx"), "bad.png: not a readable"),
        (lambda f: _put(f / "train/0/empty.png", b""), "empty.png: not a readable"),
        (
            lambda f: _put(f / "train/1/wide.png", encode(pixels(1, 1, (3, 4, 9))[0][0])),
            "wide.png: 9x4 pixels.*32x32.*size=N",
        ),
        (lambda f: _put(f / "test/cat/a.png", encode(TRAIN[0][0])), "cat: no such class"),
        (lambda f: _put(f / "train/new/readme.txt", b"x"), "new: no image in it"),
        (lambda f: (f / "test").rename(f / "tests"), "has train/ but neither test/ nor val/"),
        (lambda f: (f / "train").rename(f / "x"), "no image in it"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    write_folder(tmp_path / "train", pixels(4, 2))
    write_folder(tmp_path / "test", pixels(4, 2))
    spoil(tmp_path)
    data = Folder(path=str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        (data.load("train", None), data.load("test", None))
    assert "\n" not in str(caught.value)


def test_test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", pixels(4, 2))
    write_folder(tmp_path / "test", pixels(4, 2, (3, 8, 8)))
    with pytest.raises(UserError, match="8x8 pixels, but training images have 32x32; give size=N"):
        Folder(path=str(tmp_path)).load("test", None)
    assert Folder(path=str(tmp_path), size=16).load("test", None).x.shape == (4, 3, 16, 16)


def test_a_path_is_looked_for_below_the_root_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "set", pixels(4, 2, (3, 4, 4)))
    data = Folder(path="set")
    assert data.find(tmp_path / "root").files[0] == tmp_path / "set"
    write_folder(tmp_path / "root" / "set", pixels(4, 2, (3, 4, 4)))
    assert data.find(tmp_path / "root").files[0] == tmp_path / "root" / "set"
    with pytest.raises(
        UserError, match=r"folder:nowhere: no such folder; looked for .*root/nowhere and .*nowhere; give"
    ):
        Folder(path="nowhere").find(tmp_path / "root")


@pytest.mark.parametrize("kind", [Folder, Parquet])
def test_the_argument_of_a_family_is_its_path(kind: type[Folder] | type[Parquet]) -> None:
    assert kind.parse(":a/b:c") == {"path": "a/b:c"}
    for text in (":", "-16", ""):
        with pytest.raises(UserError, match=f"write {kind.name}:PATH"):
            kind.parse(text)
    with pytest.raises(UserError, match="needs a value for 'path'"):
        kind()  # type: ignore[call-arg]
    with pytest.raises(UserError, match="size=0"):
        kind(path="x", size=0)


# ---------------------------------------------------------------- decoding


def test_resizing_is_pils_bilinear_of_the_whole_image() -> None:
    image = pixels(1, 1, (3, 20, 50))[0][0]
    expected = Image.fromarray(image.transpose(1, 2, 0)).resize((12, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(decode(encode(image), "x", whole(12)), np.asarray(expected).transpose(2, 0, 1))


def _saved(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_grey_and_palette_become_rgb_and_alpha_goes() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(decode(_saved(Image.fromarray(grey)), "x", None), np.stack([grey] * 3))
    rgba = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert decode(_saved(rgba), "x", None)[:, 0, 0].tolist() == [10, 20, 30]
    palette = Image.new("RGB", (2, 2), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode(_saved(palette), "x", None)[:, 1, 1].tolist() == [10, 20, 30]


def test_sixteen_bits_and_bombs_are_refused() -> None:
    deep = Image.fromarray(np.full((4, 4), 60_000, np.uint16))
    with pytest.raises(UserError, match=r"deep\.png: pixels of mode I;16"):
        decode(_saved(deep), "deep.png", None)
    bomb = _saved(Image.new("1", (MAX_PIXELS // 1000, 1001)))
    assert len(bomb) < 100_000
    with pytest.raises(UserError, match=r"bomb\.png: 64000x1001 pixels, more than"):
        decode(bomb, "bomb.png", None)


def test_a_constant_channel_can_still_be_normalised() -> None:
    mean, std = statistics(np.full((3, 2, 4, 4), 51, np.uint8))
    assert mean == (0.2, 0.2)
    assert std == (0.0039, 0.0039)


# ---------------------------------------------------------------- larger than memory


def test_decoded_images_wait_in_a_file_and_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("bbmcl_datasets.decode._CHUNK_BYTES", 5 * 3 * 8 * 9)
    images = pixels(23, 2, (3, 8, 9))[0]
    blobs = [(str(i), encode(image)) for i, image in enumerate(images)]
    x, kept = stack(iter(blobs), None)
    assert isinstance(x, np.memmap)
    assert np.array_equal(x, images) and kept.all() and kept.shape == (23,)
    assert list(tmp_path.iterdir()) == []  # it has no name, so that a kill leaves nothing behind
    some, kept = stack(iter(blobs), None, lambda image: image[0, 0, 0] < 128)
    assert kept.tolist() == [image[0, 0, 0] < 128 for image in images]
    assert np.array_equal(some, images[kept])
    none, kept = stack(iter(blobs), None, lambda image: False)
    assert none.shape == (0, 3, 8, 9) and not kept.any()
    assert statistics(images) == statistics(x)


def test_a_disk_that_fills_up_while_decoding_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(UserError, match=r"cannot keep decoded images in .*: No space left on device; make room there"):
        stack([("x", encode(TRAIN[0][0]))], None)
