"""The data cache: order and hash follow from content alone, damage is seen, nothing half-written is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Part, pixels, write_folder

import backdoorbench_mcl
from backdoorbench_mcl import datacache
from backdoorbench_mcl.api import Dataset, Images, Source
from backdoorbench_mcl.datacache import DataInfo
from backdoorbench_mcl.errors import PluginError, UserError
from bbmcl_datasets.folder import Folder

SHAPE = (3, 4, 5)


class Fake(Dataset):
    """Two parts in memory; as its source it names the files that a test gives."""

    name = "fake"
    mean = (0.5, 0.25, 0.1)
    std = (0.2, 0.2, 0.3)

    def __init__(self) -> None:
        self.classes = 3
        self.shape = SHAPE
        self.parts: dict[str, Part] = {"train": pixels(30, 3, SHAPE, 1), "test": pixels(9, 3, SHAPE, 2)}
        self.files: tuple[Path, ...] = ()

    def find(self, root: Path | None) -> Source:
        return Source(self.files, "lossless")

    def load(self, split: Literal["train", "test"], root: Path | None) -> Images:
        x, y = self.parts[split]
        return Images(torch.from_numpy(x), torch.from_numpy(y))


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    data = Fake()
    data.files = (tmp_path / "source.bin",)
    data.files[0].write_bytes(b"original")
    return data


def contents(info: DataInfo) -> tuple[npt.NDArray[Any], ...]:
    return (*datacache.open_split(info, "train"), *datacache.open_split(info, "test"))


# ---------------------------------------------------------------- order and identity


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=30), st.randoms())
def test_order_and_hash_do_not_depend_on_the_order_of_rows(rows: list[tuple[int, int]], random: Any) -> None:
    """Few pixel values and labels, so that copies with equal and with different labels occur."""
    shuffled = list(rows)
    random.shuffle(shuffled)
    results = []
    for given_rows in (rows, shuffled):
        x = np.stack([np.full((1, 2, 2), value, np.uint8) for value, _ in given_rows])
        y = np.array([label for _, label in given_rows], np.int64)
        pixel = datacache.digests(x)
        sort = datacache.order(pixel, y)
        keys = [(bytes(p), int(label)) for p, label in zip(pixel[sort], y[sort], strict=True)]
        assert keys == sorted(keys)
        results.append(
            (
                x[sort].tobytes(),
                y[sort].tobytes(),
                datacache.content_hash(4, (1, 2, 2), {"train": (pixel[sort], y[sort])}),
            )
        )
    assert results[0] == results[1]


def test_the_hash_is_fixed_for_ever() -> None:
    """Victims are stored under it: a change of this value throws every user's results away."""
    x = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    y = np.array([1, 0], np.int64)
    pixel = datacache.digests(x)
    sort = datacache.order(pixel, y)
    part = (pixel[sort], y[sort])
    assert datacache.content_hash(2, (3, 2, 2), {"train": part, "test": part}) == (
        "045016caaf6ca7514cf847be14f7d6ec525b9ecf27461536dd2905f40732b3cd"
    )


def test_the_hash_covers_pixels_labels_classes_and_splits(fake: Fake, tmp_path: Path) -> None:
    def change(edit: Callable[[Fake], Any]) -> DataInfo:
        other = Fake()
        edit(other)
        return datacache.prepare(other, None, tmp_path / "cache", "k")

    def label(data: Fake) -> None:
        data.parts["train"] = (data.parts["train"][0], (data.parts["train"][1] + 1) % 3)

    def pixel(data: Fake) -> None:
        data.parts["test"][0][3, 1, 2, 2] ^= 1

    def classes(data: Fake) -> None:
        data.classes = 4

    def swap(data: Fake) -> None:
        data.parts = {"train": data.parts["test"], "test": data.parts["train"]}

    def constants(data: Fake) -> None:
        data.mean = (0.1, 0.1, 0.1)

    base = change(lambda data: None)
    others = [change(edit) for edit in (label, pixel, classes, swap)]
    assert len({base.hash, *(info.hash for info in others)}) == 5
    assert others[1].hash_train == base.hash_train
    assert others[1].hash_test != base.hash_test
    assert change(constants).hash == base.hash  # a matter of the model, not of the data
    assert base.class_counts_train == (10, 10, 10)


def test_writing_in_chunks_changes_nothing(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = datacache.prepare(fake, None, tmp_path / "a", "k")
    monkeypatch.setattr(datacache, "_CHUNK", 150)  # two images of 60 bytes
    parts = datacache.prepare(fake, None, tmp_path / "b", "k")
    assert parts.hash == whole.hash
    for one, two in zip(contents(whole), contents(parts), strict=True):
        assert np.array_equal(one, two)
    assert datacache.check(parts) == []


def test_a_loader_may_return_a_map_of_a_file_that_waits_in_the_cache(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `tempfile` puts it while data are loaded: on the disk that needs the room anyhow. /tmp may be memory."""
    inside: list[bool] = []

    def spooled(split: Literal["train", "test"], root: Path | None) -> Images:
        x, y = fake.parts[split]
        with tempfile.NamedTemporaryFile() as file:
            inside.append(Path(file.name).is_relative_to(tmp_path / "cache" / "arrays"))
            file.write(x.data)
            file.flush()
            return Images(torch.from_numpy(np.memmap(file, np.uint8, "c", shape=x.shape)), torch.from_numpy(y))

    whole = datacache.prepare(fake, None, tmp_path / "cache", "k")
    before = tempfile.gettempdir()
    monkeypatch.setattr(fake, "load", spooled)
    assert datacache.prepare(fake, None, tmp_path / "cache", "k2").hash == whole.hash
    assert inside == [True, True]
    assert tempfile.gettempdir() == before
    assert [path.name for path in (tmp_path / "cache" / "arrays").iterdir()] == [whole.hash]


# ---------------------------------------------------------------- maps and records


def test_a_split_is_a_map_and_the_private_one_leaves_the_file_alone(fake: Fake, tmp_path: Path) -> None:
    info = datacache.prepare(fake, None, tmp_path / "cache", "k")
    x, y = datacache.open_split(info, "train")
    assert isinstance(x, np.memmap)
    assert (x.dtype, x.shape) == (np.dtype("uint8"), (30, *SHAPE))
    assert (y.dtype, y.shape) == (np.dtype("int64"), (30,))
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 0
    private, _ = datacache.open_split(info, "train", "c")
    assert torch.from_numpy(private).dtype == torch.uint8
    private[:] = 0
    assert datacache.check(info) == []
    assert x.any()


def test_a_record_survives_json(fake: Fake, tmp_path: Path) -> None:
    info = datacache.prepare(fake, None, tmp_path / "cache", "k")
    assert DataInfo.from_dict(json.loads(json.dumps(info.as_dict()))) == info
    assert datacache.lookup(tmp_path / "cache", "k", None) == info
    assert info.note == "lossless; 30 train + 9 test images"


def test_the_cache_can_be_moved_and_lists_what_it_holds(fake: Fake, tmp_path: Path) -> None:
    first = datacache.prepare(fake, None, tmp_path / "cache", "b")
    datacache.prepare(fake, None, tmp_path / "cache", "a")
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "moved" / "index" / "junk.json").write_text("[1, 2")
    assert [info.key for info in datacache.entries(tmp_path / "moved")] == ["a", "b"]
    found = datacache.lookup(tmp_path / "moved", "b", None)
    assert found == replace(first, folder=tmp_path / "moved" / "arrays" / first.hash)
    assert found is not None
    assert datacache.check(found) == []
    assert datacache.entries(tmp_path / "nowhere") == []


def test_looking_up_needs_no_torch(fake: Fake, tmp_path: Path) -> None:
    datacache.prepare(fake, None, tmp_path / "cache", "k")
    script = """
        import sys
        from pathlib import Path
        from backdoorbench_mcl import datacache
        info = datacache.lookup(Path(sys.argv[1]), "k", None)
        assert datacache.check(info) == [] and datacache.open_split(info, "test")[0].shape == (9, 3, 4, 5)
        print("torch" in sys.modules)
    """
    assert run(script, tmp_path / "cache").stdout == "False\n"


# ---------------------------------------------------------------- staleness


def test_a_changed_source_is_seen(fake: Fake, tmp_path: Path) -> None:
    source, cache = fake.files[0], tmp_path / "cache"
    info = datacache.prepare(fake, None, cache, "k")
    assert datacache.lookup(cache, "other", None) is None
    stat = source.stat()
    source.write_bytes(b"changed!")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert datacache.lookup(cache, "k", None) is None
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert datacache.lookup(cache, "k", None) == info
    source.write_bytes(b"longer than before")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert datacache.lookup(cache, "k", None) is None
    source.unlink()
    assert datacache.lookup(cache, "k", None) is None


def test_an_image_added_to_a_folder_is_seen(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", pixels(20, 2, SHAPE))
    data, cache = Folder(path=str(tmp_path / "set"), test_fraction=0.5), tmp_path / "cache"
    datacache.prepare(data, None, cache, "k")
    assert datacache.lookup(cache, "k", None) is not None
    write_folder(tmp_path / "more", pixels(1, 1, SHAPE, seed=5))
    (tmp_path / "more" / "0" / "0000.png").rename(tmp_path / "set" / "0" / "new.png")
    assert datacache.lookup(cache, "k", None) is None
    assert datacache.prepare(data, None, cache, "k").note.startswith("lossless, split by pixel hash (0.5 for test)")
    assert datacache.lookup(cache, "k", None) is not None


def test_two_data_roots_never_answer_for_each_other(fake: Fake, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one = datacache.prepare(fake, tmp_path / "one", cache, "k")
    assert datacache.lookup(cache, "k", tmp_path / "two") is None
    assert datacache.lookup(cache, "k", None) is None
    fake.parts["train"] = pixels(30, 3, SHAPE, 7)
    two = datacache.prepare(fake, tmp_path / "two", cache, "k")
    assert datacache.lookup(cache, "k", tmp_path / "one") == one != two
    assert datacache.lookup(cache, "k", tmp_path / "two") == two


def test_a_relative_path_is_another_one_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, data = tmp_path / "cache", Folder(path="set", test_fraction=0.5)
    infos = []
    for seed, name in enumerate(("here", "there")):
        write_folder(tmp_path / name / "set", pixels(20, 2, SHAPE, seed))
        monkeypatch.chdir(tmp_path / name)
        assert datacache.lookup(cache, "k", None) is None
        infos.append(datacache.prepare(data, None, cache, "k"))
        assert datacache.lookup(cache, "k", None) == infos[-1]
    assert infos[0].hash != infos[1].hash
    monkeypatch.chdir(tmp_path / "here")
    assert datacache.lookup(cache, "k", None) == infos[0]


def test_data_without_files_serve_every_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = datacache.prepare(Fake(), None, tmp_path / "cache", "k")
    monkeypatch.chdir(tmp_path)
    assert datacache.lookup(tmp_path / "cache", "k", tmp_path) == info


def test_a_source_that_changes_while_it_is_read_is_refused(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(split: Literal["train", "test"], root: Path | None) -> Images:
        fake.files[0].write_bytes(b"rewritten by another program")
        return Fake().load(split, root)

    monkeypatch.setattr(fake, "load", load)
    with pytest.raises(UserError, match="changed while it was read; run again"):
        datacache.prepare(fake, None, tmp_path / "cache", "k")
    assert datacache.entries(tmp_path / "cache") == []
    assert list((tmp_path / "cache" / "arrays").iterdir()) == []


# ---------------------------------------------------------------- damage


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["train_x.npy", "train_y.npy", "test_x.npy", "test_y.npy", "manifest.json"])
@pytest.mark.parametrize("spoil", [_flip, _cut, Path.unlink])
def test_damage_is_found_and_repaired(fake: Fake, tmp_path: Path, name: str, spoil: Callable[[Path], Any]) -> None:
    cache = tmp_path / "cache"
    info = datacache.prepare(fake, None, cache, "k")
    spoil(info.folder / name)
    problems = datacache.check(info)
    assert len(problems) == 1
    assert name in problems[0]
    if spoil is not _flip or name == "manifest.json":  # a flipped pixel costs a full read to see
        assert datacache.lookup(cache, "k", None) is None
    assert datacache.prepare(fake, None, cache, "k") == info
    assert datacache.check(info) == []
    assert datacache.lookup(cache, "k", None) == info
    assert sorted(path.name for path in (cache / "arrays").iterdir()) == [info.hash]


@pytest.mark.parametrize("name", ["train_x.npy", "test_y.npy"])
def test_opening_a_truncated_or_missing_map_says_what_to_do(fake: Fake, tmp_path: Path, name: str) -> None:
    info = datacache.prepare(fake, None, tmp_path / "cache", "k")
    for spoil in (_cut, Path.unlink):
        spoil(info.folder / name)
        with pytest.raises(UserError, match="delete that folder and run again"):
            contents(info)
    with pytest.raises(UserError, match="not what was stored"):
        datacache.open_split(replace(info, n_test=8, n_train=8), "test" if "train" in name else "train")


def test_a_record_with_a_changed_digit_is_not_believed(fake: Fake, tmp_path: Path) -> None:
    datacache.prepare(fake, None, tmp_path / "cache", "k")
    (record,) = (tmp_path / "cache" / "index").iterdir()
    text = record.read_text()
    record.write_text(text.replace("0.25", "0.26"))
    assert "0.26" in record.read_text()
    assert datacache.lookup(tmp_path / "cache", "k", None) is None
    record.write_text(text)
    assert datacache.lookup(tmp_path / "cache", "k", None) is not None


# ---------------------------------------------------------------- crashes, full disks, contracts

FAKE = """
    import os, signal, sys, time
    from pathlib import Path
    from types import SimpleNamespace
    import numpy as np
    from backdoorbench_mcl import datacache

    def load(split, root):
        n = 300 if split == "train" else 90
        return SimpleNamespace(x=np.random.default_rng(n).integers(0, 256, (n, 3, 8, 8), np.uint8), y=np.arange(n) % 3)

    fake = SimpleNamespace(
        name="fake", classes=3, shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, flip_ok=True,
        toy=True, budget="quick", params={}, load=load, find=lambda root: SimpleNamespace(files=(), note="procedural"),
    )
    cache = Path(sys.argv[1])
"""


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(script, *args), capture_output=True, text=True, timeout=60, env=environment())


def command(script: str, *args: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]


def environment() -> dict[str, str]:
    roots = [str(Path(backdoorbench_mcl.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots)), "OPENBLAS_NUM_THREADS": "1"}


def test_a_process_killed_at_any_step_leaves_nothing_to_be_misread(tmp_path: Path) -> None:
    """One child per step, killed at its n-th call that changes the disk, until one gets through."""
    kill = (
        FAKE
        + """
    def deadly(function):
        def wrapper(*args):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return wrapper

    for step in range(1, 100):
        folder, left = cache / str(step), step
        child = os.fork()
        if child == 0:
            for name in ("fsync", "rename", "replace", "mkdir"):
                setattr(os, name, deadly(getattr(os, name)))
            datacache.prepare(fake, None, folder, "k")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        info = datacache.lookup(folder, "k", None)
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        assert info is None or datacache.check(info) == []
        print("none" if info is None else "whole")
        again = datacache.prepare(fake, None, folder, "k")
        assert datacache.lookup(folder, "k", None) == again and datacache.check(again) == []
    assert datacache.check(info) == []
    """
    )
    done = run(kill, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:8] == ["none"] * 8
    assert done.stdout.split()[-1] == "whole"  # killed after the last rename: the work is not lost


def test_processes_that_prepare_at_once_all_end_well(tmp_path: Path) -> None:
    race = (
        FAKE
        + """
    while time.time() < float(sys.argv[2]):
        pass
    for i in range(10):
        info = datacache.prepare(fake, None, cache, f"k{i % 2}")
        assert datacache.lookup(cache, info.key, None) == info and datacache.check(info) == []
    print(info.hash)
    """
    )
    start = time.time() + 1.0
    racers = [
        subprocess.Popen(command(race, tmp_path, start), stdout=-1, stderr=-1, text=True, env=environment())
        for _ in range(3)
    ]
    outcomes = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], outcomes
    assert len({out for out, _ in outcomes}) == 1
    assert len(list((tmp_path / "arrays").iterdir())) == 1


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    full = (
        FAKE
        + """
    import resource
    from backdoorbench_mcl.errors import UserError
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        datacache.prepare(fake, None, cache, "k")
    except UserError as error:
        print(error)
    """
    )
    done = run(full, tmp_path / "cache")
    assert done.stdout.startswith(f"cannot write the data cache {tmp_path / 'cache'}: File too large; make room"), done
    assert done.stdout.count("\n") == 1
    assert datacache.lookup(tmp_path / "cache", "k", None) is None
    assert list((tmp_path / "cache" / "arrays").iterdir()) == []


def test_a_cache_that_cannot_be_a_folder_is_one_line(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the data cache .*file/cache: Not a directory"):
        datacache.prepare(fake, None, tmp_path / "file" / "cache", "k")
    assert datacache.lookup(tmp_path / "file" / "cache", "k", None) is None


def test_what_killed_processes_left_long_ago_is_removed(fake: Fake, tmp_path: Path) -> None:
    arrays = tmp_path / "cache" / "arrays"
    for name in (".tmp-old", ".tmp-new"):
        (arrays / name).mkdir(parents=True)
        (arrays / name / "train_x.npy").write_bytes(b"half")
    os.utime(arrays / ".tmp-old", (0, 0))
    info = datacache.prepare(fake, None, tmp_path / "cache", "k")
    assert sorted(path.name for path in arrays.iterdir()) == [".tmp-new", info.hash]


def test_a_data_set_that_breaks_its_contract_is_named(fake: Fake, tmp_path: Path) -> None:
    x, y = fake.parts["train"]
    for attribute, value, message in (
        ("parts", {"train": (x, y + 1)}, r"fake: train has int64 labels 1-3, expected int64 0-2"),
        ("parts", {"train": (x[:, :, :2], y)}, "fake: train is uint8"),
        ("mean", (0.5,), "fake: expected 3 values each for mean and std"),
        ("std", (0.5, 0.0, 0.5), "std above 0"),
    ):
        bad = Fake()
        setattr(bad, attribute, bad.parts | value if isinstance(value, dict) else value)
        with pytest.raises(PluginError, match=message):
            datacache.prepare(bad, None, tmp_path / "cache", "k")
    empty = Fake()
    empty.parts["test"] = (x[:0], y[:0])
    with pytest.raises(UserError, match="fake: the test split has no images"):
        datacache.prepare(empty, None, tmp_path / "cache", "k")
    assert list((tmp_path / "cache" / "arrays").iterdir()) == []
