"""Clean images without a split: what the loaders make of them, and the confined job that reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from layouts import cells, encode, pixels, table, write_folder, write_parquet
from test_hostile_images import png

from backdoorbench_mcl import clean, confine, pooling, runner
from backdoorbench_mcl.api import Images, MixedSizes, Pool
from backdoorbench_mcl.engines.base import Finished, Isolation
from backdoorbench_mcl.engines.local import Local
from backdoorbench_mcl.engines.single import DEFAULTS
from backdoorbench_mcl.errors import PluginError, UserError
from backdoorbench_mcl.registry import Registry
from bbmcl_datasets.cifar import Cifar10
from bbmcl_datasets.decode import MAX_CLASSES
from bbmcl_datasets.folder import Folder
from bbmcl_datasets.parquet import Parquet

SMALL = (3, 8, 8)
IMAGE = pixels(1, 1, SMALL)[0]
HELD: Isolation = "landlock" if confine.abi_version() else "process"


def pool(path: Path, kind: type[Folder] | type[Parquet] = Folder, **given: Any) -> Pool:
    return kind(path=str(path), **given).pool(None)


def write_flat(folder: Path, x: Any, kind: str = "PNG") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(x):
        (folder / f"{i:04d}.{kind.lower()}").write_bytes(encode(image, kind))
    return folder


def contents(images: Images) -> list[tuple[bytes, int]]:
    return sorted((x.numpy().tobytes(), int(y)) for x, y in zip(images.x, images.y, strict=True))


# ---------------------------------------------------------------- folders


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    x, _ = pixels(5, shape=SMALL)
    write_flat(tmp_path, x)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_bytes(b"not an image")
    found = pool(tmp_path)
    assert np.array_equal(found.images.x.numpy(), x)
    assert found.images.y.tolist() == [-1] * 5
    assert (found.names, found.note, found.native) == (None, "lossless", (8, 8))


def test_class_folders_are_labelled_by_their_sorted_names(tmp_path: Path) -> None:
    x, y = pixels(6, 3, SMALL)
    write_folder(tmp_path, (x, y))
    for number, name in (("0", "cat"), ("1", "ant"), ("2", "dog")):
        (tmp_path / number).rename(tmp_path / name)
    found = pool(tmp_path)
    assert found.names == ("ant", "cat", "dog")
    assert contents(found.images) == sorted((i.tobytes(), [1, 0, 2][k]) for i, k in zip(x, y, strict=True))


def test_class_folders_that_are_numbers_are_the_labels(tmp_path: Path) -> None:
    x, _ = pixels(3, 3, SMALL)
    write_folder(tmp_path, (x, np.array([7, 3, 10])))
    found = pool(tmp_path)
    assert found.names is None
    assert found.images.y.tolist() == [3, 7, 10]
    assert np.array_equal(found.images.x.numpy(), x[[1, 0, 2]])


def test_a_size_is_given_to_all_and_their_own_is_told(tmp_path: Path) -> None:
    write_flat(tmp_path, pixels(3, shape=(3, 8, 6))[0], "JPEG")
    found = pool(tmp_path, size=4)
    assert tuple(found.images.x.shape) == (3, 3, 4, 4)
    assert (found.note, found.native) == ("JPEG, resized to 4x4", (8, 6))
    (tmp_path / "x.png").write_bytes(encode(pixels(1, shape=SMALL)[0][0]))
    found = pool(tmp_path, size=4)
    assert (found.note, found.native) == ("mixed (1 lossless, 3 JPEG), resized to 4x4", None)
    with pytest.raises(MixedSizes, match="8x8 pixels, but the first image has 6x8; give size=N"):
        pool(tmp_path)


def test_only_the_images_that_are_drawn_are_read(tmp_path: Path) -> None:
    x, y = pixels(6, 2, SMALL)
    write_flat(tmp_path / "flat", x)
    (tmp_path / "flat" / "0001.png").write_bytes(b"broken")
    found = Folder(path=str(tmp_path / "flat")).pool(None, lambda count: torch.tensor([count - 1, 2]))
    assert np.array_equal(found.images.x.numpy(), x[[5, 2]])
    rows = cells(x)
    pq.write_table(table([*rows[:4], {"bytes": b"broken"}, rows[5]], y.tolist()), tmp_path / "a.parquet")
    drawn = Parquet(path=str(tmp_path / "a.parquet")).pool(None, lambda count: torch.tensor([3, 0]))
    assert contents(drawn.images) == sorted((x[i].tobytes(), int(y[i])) for i in (0, 3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: None, r"f: no image in it; expected files ending in \.bmp"),
        (lambda f: write_flat(f / "cat", []), "cat: no image in it"),
        (lambda f: (write_flat(f, IMAGE), write_flat(f / "cat", IMAGE)), r"images and folders \(0000.png, cat/\)"),
        (lambda f: (write_flat(f / "train", IMAGE), write_flat(f / "val", IMAGE), write_flat(f / "doc", IMAGE)),
         "is split into train, val; name one of them, as in .*/f/train"),
        (lambda f: write_flat(f / "test" / "cat", IMAGE), "is split into test; name one of them, as in .*/f/test"),
        (lambda f: (write_flat(f / "1", IMAGE), write_flat(f / "01", IMAGE)), "numbers up to 1.*expected each once"),
        (lambda f: write_flat(f / "65536", IMAGE), "numbers up to 65536.*from 0 to 65535"),
        (lambda f: (f / "a.png").write_bytes(b"GIF89a"), "a.png: not a readable"),
        (lambda f: (f / "a.png").write_bytes(png(9_000, 9_000)), "a.png: 9000x9000 pixels, more than"),
        (lambda f: (f / "a.png").write_bytes(encode(IMAGE[0])[:90]), "a.png: not a readable"),
        (lambda f: (f / "a.png").symlink_to("/dev/zero"), "a.png: is a link that leads out of .*/f, which is not"),
        (lambda f: (f / "a.png").symlink_to("nowhere"), "a.png: cannot be read: No such file"),
        (lambda f: (f / "a.png").symlink_to("a.png"), "a.png: cannot be read: Too many levels"),
        (lambda f: (f / "a.png").symlink_to("../secret.png"), "a.png: is a link that leads out"),
        (lambda f: (f / "cat").symlink_to("../secret"), "cat: is a link that leads out"),
        (lambda f: (write_flat(f / "cat", IMAGE), (f / "cat" / "b.png").symlink_to(f.parent / "secret.png")),
         "b.png: is a link that leads out"),
        (lambda f: os.mkfifo(f / "a.png"), "a.png: cannot be read: is a pipe"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    write_flat(tmp_path / "secret", IMAGE)
    (tmp_path / "secret.png").write_bytes(encode(IMAGE[0]))
    (tmp_path / "f").mkdir()
    spoil(tmp_path / "f")
    with pytest.raises(UserError, match=message) as caught:
        pool(tmp_path / "f")
    assert "\n" not in str(caught.value)


def test_links_within_the_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    write_flat(tmp_path / "f" / "cat", IMAGE)
    (tmp_path / "f" / "cat" / "again.png").symlink_to("0000.png")
    (tmp_path / "f" / "dog").symlink_to("cat")
    (tmp_path / "link").symlink_to("f")
    found = pool(tmp_path / "link")
    assert (len(found.images), found.names) == (4, ("cat", "dog"))


def test_a_folder_of_too_many_classes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_CLASSES == 1 << 16
    monkeypatch.setattr("bbmcl_datasets.folder.MAX_CLASSES", 1)
    write_folder(tmp_path, pixels(2, 2, SMALL))
    with pytest.raises(UserError, match="holds 2 class folders, expected at most 1"):
        pool(tmp_path)


def test_a_data_set_with_splits_says_how_it_is_given() -> None:
    with pytest.raises(UserError, match=r"a test split; give it by its name and a rate, as in cifar10@0\.05"):
        Cifar10().pool(None)


# ---------------------------------------------------------------- Parquet


def test_one_parquet_file_with_labels_and_names(tmp_path: Path) -> None:
    x, y = pixels(6, 3, SMALL)
    pq.write_table(table(cells(x), y.tolist(), names=["a", "b", "c", "unseen"]), tmp_path / "any.parquet")
    found = pool(tmp_path / "any.parquet", Parquet)
    assert np.array_equal(found.images.x.numpy(), x)
    assert found.images.y.tolist() == y.tolist()
    assert (found.names, found.note, found.native) == (("a", "b", "c", "unseen"), "lossless", (8, 8))


@pytest.mark.parametrize("values", [None, [-1] * 6, [None] * 6])
def test_a_parquet_file_without_labels(tmp_path: Path, values: list[Any] | None) -> None:
    x, _ = pixels(6, 3, SMALL)
    columns: dict[str, Any] = {"image": cells(x, "JPEG")}
    if values is not None:
        columns["label"] = pa.array(values, pa.int64())
    pq.write_table(pa.table(columns), tmp_path / "any.parquet")
    found = pool(tmp_path / "any.parquet", Parquet, size=4)
    assert found.images.y.tolist() == [-1] * 6
    assert (found.names, found.note, found.native) == (None, "JPEG, resized to 4x4", (8, 8))


def test_a_folder_of_shards_of_any_name_is_read_together(tmp_path: Path) -> None:
    x, y = pixels(6, 3, SMALL)
    for name, part in (("b-00001-of-00009.parquet", slice(0, 2)), ("a.parquet", slice(2, 6))):
        pq.write_table(table(cells(x[part]), y[part].tolist()), tmp_path / name)
    (tmp_path / "readme.md").write_text("")
    (tmp_path / ".x.parquet").write_text("")
    found = pool(tmp_path, Parquet)
    assert np.array_equal(found.images.x.numpy(), np.concatenate([x[2:], x[:2]]))
    assert found.images.y.tolist() == [2, 0, 1, 2, 0, 1]
    some = Parquet(path=str(tmp_path)).pool(None, lambda count: torch.tensor([5, 1, 4]))
    assert contents(some.images) == sorted((x[i].tobytes(), int(y[i])) for i in (0, 1, 3))


ROWS = cells(pixels(4, 2, SMALL)[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: None, "no Parquet file in it"),
        (lambda f: (f / "a.parquet").write_bytes(b"PAR1"), "a.parquet: not a readable Parquet"),
        (lambda f: pq.write_table(pa.table({"pic": ROWS}), f / "a.parquet"), "columns pic; expected one of img, image"),
        (lambda f: pq.write_table(table([], []), f / "a.parquet"), "0 rows in all, expected at least 1"),
        (lambda f: pq.write_table(table(ROWS, [0, 1, -1, 0]), f / "a.parquet"), "row 2: label -1"),
        (lambda f: pq.write_table(table(ROWS, [0, 1, None, 0]), f / "a.parquet"), "row 2: label None"),
        (lambda f: pq.write_table(table(ROWS, [0, 1, 9, 0], names=["a"]), f / "a.parquet"), "there is a label 9"),
        (lambda f: (pq.write_table(table(ROWS, [0] * 4), f / "a.parquet"),
                    pq.write_table(pa.table({"img": ROWS}), f / "b.parquet")),
         "a.parquet has the columns img and label, b.parquet has img and no label; expected the same"),
        (lambda f: (f / "a.parquet").symlink_to("/dev/zero"), "a.parquet: is a link that leads out"),
        (lambda f: os.mkfifo(f / "a.parquet"), "is no ordinary file"),
    ],
)  # fmt: skip
def test_parquet_that_cannot_be_read_is_one_line(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        pool(tmp_path, Parquet)
    assert "\n" not in str(caught.value)


def test_a_file_that_claims_more_rows_than_can_be_drawn_from_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(table(ROWS, [0] * 4), tmp_path / "a.parquet")
    monkeypatch.setattr("bbmcl_datasets.parquet.MAX_ROWS", 3)
    with pytest.raises(UserError, match="4 rows in all, expected at least 1 and at most 3"):
        pool(tmp_path, Parquet)
    with pytest.raises(UserError, match=r"parquet:.*b\.parquet: no such file or folder"):
        pool(tmp_path / "b.parquet", Parquet)


# ---------------------------------------------------------------- the job


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBMCL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return runner.registry()


def run_job(folder: Path, source: clean.Source, known: Registry, isolation: Isolation, **asked: Any) -> Finished:
    folder.mkdir()
    spec = clean.spec(source, clean.described(source, known), isolation=isolation, **asked)
    full = {**DEFAULTS, "snapshot": str(folder / "snapshots"), **spec}
    (folder / "spec.json").write_text(json.dumps(full))
    with Local(1, inline=isolation == "inline") as engine:
        engine.start(folder)
        while True:
            for event in engine.events():
                if isinstance(event, Finished):
                    return event


Run = Callable[..., tuple[Finished, Path]]


@pytest.fixture
def job(tmp_path: Path, known: Registry) -> Run:
    """`job(DATA, most=5)` runs the job on what `--clean DATA` names: how it ended, and its folder."""

    def run(data: str | Path, isolation: Isolation = HELD, **asked: Any) -> tuple[Finished, Path]:
        folder = tmp_path / f"job-{len(list(tmp_path.glob('job-*')))}"
        return run_job(folder, clean.parse(str(data)), known, isolation, **asked), folder

    return run


def read(run: tuple[Finished, Path]) -> clean.Clean:
    event, folder = run
    assert (event.state, event.reason) == ("ok", "")
    assert event.result["isolation"] in (HELD, "inline", "process")
    assert event.result["strays"] == []
    return clean.collected(folder / "out")


def test_the_same_images_give_the_same_array_from_every_source(tmp_path: Path, job: Run) -> None:
    x, y = pixels(12, 3, SMALL)
    write_folder(tmp_path / "a", (x, y))
    pq.write_table(table(cells(x), y.tolist()), tmp_path / "b.parquet")
    event, folder = job(tmp_path / "a")
    one, two = read((event, folder)), read(job(tmp_path / "b.parquet", isolation="process"))
    assert event.result["isolation"] == HELD
    assert np.array_equal(one.x, two.x) and np.array_equal(one.y, two.y)
    assert (one.hash, one.native, one.labelled) == (two.hash, (8, 8), True)
    assert one.y.tolist() != sorted(one.y.tolist())
    assert contents(Images(torch.from_numpy(one.x), torch.from_numpy(one.y))) == sorted(
        (i.tobytes(), int(k)) for i, k in zip(x, y, strict=True)
    )
    other = read(job(tmp_path / "a", isolation="inline", seed=1))
    assert (other.hash, other.y.tolist() != one.y.tolist()) == (one.hash, True)
    meta = json.loads((folder / "out" / "meta.json").read_text())
    assert meta == {"names": None, "labelled": True, "images": 12, "shape": [3, 8, 8], "native": [8, 8],
                    "note": "lossless", "hash": one.hash}  # fmt: skip


def test_few_of_many_are_drawn_and_larger_draws_hold_smaller_ones(tmp_path: Path, job: Run) -> None:
    x, _ = pixels(40, shape=SMALL)
    write_flat(tmp_path / "f", x)
    five, again, nine = (read(job(tmp_path / "f", isolation="inline", most=most)) for most in (5, 5, 9))
    assert np.array_equal(five.x, again.x) and five.hash == again.hash
    assert (five.x.shape, five.labelled, five.names) == ((5, 3, 8, 8), False, None)
    assert {i.tobytes() for i in five.x} < {i.tobytes() for i in nine.x} < {i.tobytes() for i in x}


def test_sizes_that_differ_fall_back_on_one(tmp_path: Path, job: Run) -> None:
    write_flat(tmp_path / "f", pixels(2, shape=(3, 8, 6))[0])
    write_flat(tmp_path / "f", pixels(1, shape=SMALL)[0], "BMP")
    found = read(job(tmp_path / "f", fallback=16))
    assert (found.x.shape, found.native, found.note) == ((3, 3, 16, 16), None, "lossless, resized to 16x16")
    event, _ = job(tmp_path / "f")
    assert event.state == "failed" and "give size=N" in event.reason


@pytest.mark.parametrize(
    ("side", "asked", "expected"),
    [
        (32, {"fallback": 16}, 32),  # an input of small networks is left alone
        (100, {"fallback": 16}, 16),
        (100, {"fallback": 100}, 100),
        (100, {}, 100),
        (32, {"size": 20, "fallback": 16}, 20),
    ],
)
def test_large_images_are_resized_and_a_size_that_is_asked_for_wins(
    tmp_path: Path, job: Run, side: int, asked: dict[str, int], expected: int
) -> None:
    write_flat(tmp_path / "f", pixels(2, shape=(3, side, side))[0])
    found = read(job(tmp_path / "f", isolation="inline", **asked))
    assert (found.x.shape, found.native) == ((2, 3, expected, expected), (side, side))
    assert found.note == ("lossless" if side == expected else f"lossless, resized to {expected}x{expected}")


def test_a_size_in_the_selection_wins_over_the_fallback(tmp_path: Path, job: Run) -> None:
    write_flat(tmp_path / "f", pixels(2, shape=(3, 100, 100))[0])
    found = read(job(f"folder:{tmp_path / 'f'}(size=50)", isolation="inline", fallback=16))
    assert found.x.shape == (2, 3, 50, 50)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "a.png").write_bytes(png(9_000, 9_000)), "a.png: 9000x9000 pixels, more than"),
        (lambda f: (f / "a.png").write_bytes(encode(IMAGE[0])[:90]), "a.png: not a readable"),
        (lambda f: (f / "a.png").symlink_to("../secret.png"), "a.png: is a link that leads out of"),
        (lambda f: (f / "a.png").symlink_to("/dev/zero"), "a.png: is a link that leads out of"),
        (lambda f: os.truncate(os.open(f / "a.png", os.O_CREAT | os.O_RDWR), 100 << 30), "a.png: cannot be read: has"),
    ],
)
def test_hostile_images_are_one_line_of_the_confined_job(
    tmp_path: Path, job: Run, spoil: Callable[[Path], Any], message: str
) -> None:
    (tmp_path / "secret.png").write_bytes(encode(IMAGE[0]))
    write_flat(tmp_path / "f", IMAGE)
    spoil(tmp_path / "f")
    event, _ = job(tmp_path / "f")
    assert event.state == "failed"
    assert message in event.reason and "\n" not in event.reason


@pytest.mark.skipif(HELD != "landlock", reason="this kernel has no Landlock")
def test_the_kernel_refuses_a_link_that_no_check_has_seen(tmp_path: Path, known: Registry) -> None:
    write_flat(tmp_path / "secret", IMAGE)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "link").symlink_to("../secret")  # PATH itself, as a link out of what the job is granted
    source = clean.parse(str(tmp_path / "f" / "link"))
    event = run_job(tmp_path / "job", replace(source, path=tmp_path / "f"), known, "landlock")
    assert event.state == "failed"
    assert event.reason == f"{tmp_path / 'f' / 'link'}: cannot be read: Permission denied"


# ---------------------------------------------------------------- what a plugin may return


def _made(y: list[int], names: tuple[str, ...] | None = None) -> Pool:
    x = torch.zeros(len(y), 3, 4, 4, dtype=torch.uint8)
    return Pool(Images(x, torch.tensor(y, dtype=torch.int64)), names, "lossless", None)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "returned NoneType, expected a Pool"),
        (_made([]), "expected a Pool with at least one image"),
        (_made([0, -1]), "labels -1 to 0, expected all -1"),
        (_made([0, 1 << 16]), "labels 0 to 65536"),
        (_made([0, 2], ("a", "b")), "names 2 classes, but has a label 2"),
        (_made([0], ("a" * 1001,)), "a name of 1,001 characters"),
    ],
)
def test_a_pool_that_breaks_the_contract_is_one_line(made: Any, message: str) -> None:
    with pytest.raises((PluginError, UserError), match=message):
        pooling._check("x/y", made)


def test_what_is_no_output_of_the_job_is_refused(tmp_path: Path, job: Run) -> None:
    write_flat(tmp_path / "f", IMAGE)
    event, folder = job(tmp_path / "f", isolation="inline")
    assert event.state == "ok"
    meta = json.loads((folder / "out" / "meta.json").read_text())
    spoilt: Any
    for spoilt in ({**meta, "native": [1]}, {**meta, "names": 3}, {}, []):
        (folder / "out" / "meta.json").write_text(json.dumps(spoilt))
        with pytest.raises(UserError, match="not read as they should"):
            clean.collected(folder / "out")
    (folder / "out" / "meta.json").unlink()
    (folder / "out" / "meta.json").symlink_to(folder / "spec.json")
    with pytest.raises(UserError, match="is no ordinary file"):
        clean.collected(folder / "out")


def test_a_folder_of_parquet_files_is_given_to_parquet(tmp_path: Path, job: Run) -> None:
    write_parquet(tmp_path / "hub", pixels(6, 3, SMALL), pixels(3, 3, SMALL, seed=1), names=["a", "b", "c"])
    found = read(job(tmp_path / "hub"))
    assert (len(found.y), found.names) == (9, ("a", "b", "c"))
