"""The gallery: pixels on the sheet are those of the store, and what is missing is said in one line."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import Bbmcl, Reference
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from backdoorbench_mcl import datacache
from backdoorbench_mcl.api import Dataset, Images, MaskPattern, Source
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.report import gallery
from backdoorbench_mcl.report.gallery import (
    Column,
    Found,
    Sheet,
    arrange,
    choose,
    difference,
    panel,
    sheets,
    stem,
    vector,
    wrap,
)
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Stage, Store

Pixels = NDArray[np.uint8]


class Noise(Dataset):
    """12 test images, 3x8x8, of 4 classes."""

    name = "noise"
    classes = 4
    shape = (3, 8, 8)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def find(self, root: Path | None) -> Source:
        return Source((), "procedural")

    def load(self, split: str, root: Path | None) -> Images:
        x = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(len(split)))
        return Images(x.to(torch.uint8), torch.arange(12) % 4)


def noise(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random(shape, np.float32)


class Bench:
    """A store with hand-made stages of one attack."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.cache, self.out = folder / "runs", folder / "cache", folder / "out"
        self.info = datacache.prepare(Noise(), None, self.cache, "key")
        self.x, self.y = datacache.open_split(self.info, "test")
        self.triggered = np.array(self.x)  # no longer a map of the file
        self.triggered[:, :, :3, :3] = 255
        self.store = Store(self.runs)
        self.scratch = folder / "scratch"
        self.rows: list[Row] = []

    def stage(self, key: str, kind: str, spec: dict[str, Any], meta: dict[str, Any], **files: dict[str, Any]) -> str:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        (self.scratch / "meta.json").write_text(json.dumps({"of": key, **meta}))
        for name, tensors in files.items():
            save_file(tensors, self.scratch / f"{name}.safetensors")
        self.store.commit(Stage(key, kind, spec, ""), self.scratch)
        return key

    def victim(self, name: str = "a" * 64, **labels: Any) -> Row:
        """Stages and the row of an undefended victim that calls every triggered image 1."""
        train = self.stage(name, "train", {"data": {"hash": self.info.hash}}, {})
        trial = self.stage("t" + name, "trial", {"victim": train}, {}, trial={"x": self.triggered})
        said = {
            "clean": self.y.astype(np.uint8), "triggered": np.ones(12, np.uint8), "y": self.y.astype(np.uint8),
            "goal": np.ones(12, np.uint8), "counted": (self.y != 1).astype(np.uint8),
        }  # fmt: skip
        before = self.stage("p" + name, "predict", {"weights": train, "trial": trial}, {}, predictions=said)
        row = Row(
            "row" + name, "noise", "net", labels.pop("attack", "badnets"), "before", labels.pop("victim_seed", 0), None,
            None, "ok", asr_before=99.5, ba_before=90.0, ftr_before=1.1,
            stages={"model": train, "before": before, "predict": before}, **labels,
        )  # fmt: skip
        self.rows.append(row)
        return row

    def defended(self, inverter: str, seed: int, where: str, meta: dict[str, Any], **tensors: NDArray[Any]) -> None:
        """A defense of the last victim with an inversion that made `tensors` (`label__name`: of one label)."""
        named = {name.replace("__", "/"): tensor for name, tensor in tensors.items()}
        told = {"class": where, "labels": [1], "l1": None, "success": None, **meta}
        key = self.stage(f"i{inverter}{seed}", "invert", {}, told, trigger=named)
        victim = next(row for row in reversed(self.rows) if row.defense == "before")
        stages = {**victim.stages, "invert": key}
        self.rows.append(
            replace(victim, key=key, defense="mcldef", defense_seed=seed, inverter=inverter, stages=stages)
        )

    def draw(self, images: int = 4) -> list[Path | UserError]:
        """The PNG of each sheet, or why there is none."""
        drawn = list(sheets(self.runs, self.rows, self.cache, self.out, images))
        pictures = [path for path in drawn if isinstance(path, Path)]
        assert [path.suffix for path in pictures] == [".png", ".svg"] * (len(pictures) // 2)
        return [item for item in drawn if not isinstance(item, Path) or item.suffix == ".png"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


class Told:
    """What `arrange` was given, in place of a sheet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heading: Sequence[str] = ()
        self.columns: dict[str, Column] = {}
        self.footing: Sequence[str] = ()
        monkeypatch.setattr(gallery, "arrange", self)

    def __call__(self, heading: Sequence[str], columns: Sequence[Column], footing: Sequence[str]) -> Sheet:
        self.heading, self.footing = heading, footing
        self.columns = {column.title: column for column in columns}
        return Sheet(1, 1, (), ())


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def first(column: Column) -> Pixels:
    entry = column.entries[0]
    assert entry is not None
    return entry[0]


# ---------------------------------------------------------------- pixels


def test_test_images_are_spread_over_the_classes() -> None:
    y = np.array([3, 0, 0, 9, 6, 3, 1, 2, 4, 5, 7, 8, 9])
    assert choose(y, 10, 4) == [1, 0, 4, 3]  # classes 0, 3, 6, 9: the first of each
    assert choose(y, 10, 1) == [1]
    assert choose(y, 10, 4) == choose(y[:6], 10, 4)  # a longer test set of the same beginning changes nothing
    assert choose(np.array([0, 1, 0, 1, 1]), 2, 4) == [0, 1, 2, 3]  # then the second of each class
    assert choose(np.array([1, 1, 1]), 3, 2) == [0, 1]  # no image of classes 0 and 2
    assert sorted(choose(y, 10, 99)) == list(range(13))


def test_difference_is_magnified_around_grey_and_cut() -> None:
    clean = np.array([[[100, 100, 100, 0, 255]]], np.uint8)
    triggered = np.array([[[100, 110, 90, 255, 0]]], np.uint8)
    assert difference(clean, triggered).tolist() == [[[128, 168, 88, 255, 0]]]


def test_blended_trigger_agrees_with_the_one_that_defenses_use() -> None:
    mask, pattern = noise(0, 8, 8), noise(1, 3, 8, 8)
    image = (255 * noise(2, 3, 8, 8)).astype(np.uint8)
    found = Found("nc-box", (), "blend", mask, pattern)
    x = torch.from_numpy(image).float()[None] / 255
    expected = MaskPattern(torch.from_numpy(mask), torch.from_numpy(pattern)).apply(x)[0] * 255
    assert np.abs(found.apply(image) - expected.numpy()).max() <= 0.5001
    assert np.abs(found.alone() - 255 * mask * pattern).max() <= 0.5001


def test_added_trigger_is_cut_to_what_a_pixel_can_show() -> None:
    found = Found("pixel", (), "add", pattern=np.array([[[0.2, -0.2, 0.0]]]))
    assert found.apply(np.array([[[250, 10, 7]]], np.uint8)).tolist() == [[[255, 0, 7]]]
    assert found.alone().tolist() == [[[255, 0, 128]]]


@pytest.mark.parametrize("size, shown", [(8, 96), (28, 84), (32, 96), (64, 128), (224, 224)])
def test_small_images_are_enlarged_pixel_by_pixel(size: int, shown: int) -> None:
    image = (255 * noise(0, 3, size, size)).astype(np.uint8)
    picture = np.asarray(panel(image))
    assert picture.shape == (shown, shown, 3)
    factor = shown // size
    assert np.array_equal(picture, np.kron(image.transpose(1, 2, 0), np.ones((factor, factor, 1), np.uint8)))


def test_grey_images_are_shown_and_other_channels_are_refused() -> None:
    grey = (255 * noise(0, 1, 8, 8)).astype(np.uint8)
    assert np.array_equal(np.asarray(panel(grey))[::12, ::12], np.repeat(grey, 3, 0).transpose(1, 2, 0))
    with pytest.raises(UserError, match="4 channels"):
        panel(np.zeros((4, 8, 8), np.uint8))


def test_lines_fit_and_lose_no_letter() -> None:
    text = 'trigger found by mesa(alpha=0.1,betas=(0.5,0.8,0.9),width=256) with "aVeryLongWordWithoutAnyPlaceToBreakIt"'
    lines = wrap(text, 96)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(gallery._font().getlength(line) <= 96 for line in lines)
    assert wrap("clean", 96) == ["clean"]
    assert wrap("two words", 400) == ["two words"]
    assert wrap("a\n\x1b[31mb", 400) == ["a b"]


# ---------------------------------------------------------------- sheets


def holds(sheet: Path, image: Pixels) -> list[tuple[int, int]]:
    """Where (left, top) on the sheet the panel of an image lies."""
    picture, part = np.asarray(Image.open(sheet).convert("RGB")), np.asarray(panel(image))
    height, width = part.shape[:2]
    corners = np.argwhere((picture[: 1 - height, : 1 - width] == part[0, 0]).all(2))
    for i in range(6, height, 12):  # one pixel of every enlarged one narrows it down to what is worth comparing whole
        for j in range(6, width, 12):
            corners = corners[(picture[corners[:, 0] + i, corners[:, 1] + j] == part[i, j]).all(1)]
    return [(int(j), int(i)) for i, j in corners if np.array_equal(picture[i : i + height, j : j + width], part)]


def test_panels_lie_on_a_grid_with_the_pixels_of_the_store(bench: Bench) -> None:
    bench.victim()
    mask, pattern = np.zeros((8, 8), np.float32), noise(1, 3, 8, 8)
    mask[:2, :2] = 1
    bench.defended("nc-box", 0, "m:MaskPattern", {"l1": 4.0, "success": 98.0}, mask=mask, pattern=pattern)
    (sheet,) = bench.draw()
    assert isinstance(sheet, Path)
    found = Found("nc-box", (), "blend", mask, pattern)
    index = choose(bench.y, 4, 4)
    assert sorted(bench.y[index].tolist()) == [0, 1, 2, 3]
    tops = []
    for i in index:
        places = [
            holds(sheet, image)
            for image in (
                bench.x[i], bench.triggered[i], difference(bench.x[i], bench.triggered[i]), found.apply(bench.x[i]),
            )
        ]  # fmt: skip
        assert all(len(where) == 1 for where in places), places
        assert [where[0][0] for where in places] == [10, 116, 222, 328]
        assert len({where[0][1] for where in places}) == 1
        tops.append(places[0][0][1])
    assert tops == sorted(tops)
    assert holds(sheet, found.alone()) == [(434, tops[0])]


def test_the_svg_holds_the_same_pixels_and_letters(bench: Bench) -> None:
    bench.victim(attack="badnets(target=1)")
    (sheet,) = bench.draw()
    assert isinstance(sheet, Path)
    root = ElementTree.parse(sheet.with_suffix(".svg")).getroot()
    assert (int(root.attrib["width"]), int(root.attrib["height"])) == Image.open(sheet).size
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    images = root.findall("{*}image")
    assert len(images) == 12
    for element in images:
        x, y, width, height = (int(element.attrib[name]) for name in ("x", "y", "width", "height"))
        own = Image.open(io.BytesIO(base64.b64decode(element.attrib["href"].partition(",")[2])))
        assert own.size == (8, 8)
        assert np.array_equal(np.asarray(own), pixels[y : y + height : 12, x : x + width : 12])
    assert "badnets(target=1) on noise, net" in " ".join(text.text or "" for text in root.findall("{*}text"))


def test_letters_of_others_are_no_markup_in_the_svg() -> None:
    column = Column("<script>alert(1)</script>&", [(np.zeros((1, 8, 8), np.uint8), ['"</text>\ud800'])])
    sheet = vector(arrange(["a<b"], [column]))
    root = ElementTree.fromstring(sheet)
    assert {element.tag.partition("}")[2] for element in root.iter()} == {"svg", "rect", "image", "text"}
    assert "a<b" in [element.text for element in root.iter()]


def test_what_is_written_beside_the_pictures(bench: Bench, told: Told) -> None:
    bench.victim(attack="badnets(target=1)")
    blend = {"mask": noise(0, 8, 8), "pattern": noise(1, 3, 8, 8)}
    bench.defended("nc-box", 0, "m:MaskPattern", {"l1": 7.714, "success": 99.93}, **blend)
    bench.draw()
    assert list(told.heading) == [
        "badnets(target=1) on noise, net, victim seed 0",
        "preset paper, budget full; undefended: ASR 99.50 % (FTR 1.10 %), BA 90.00 %",
    ]
    assert list(told.columns) == [
        "clean", "triggered", "difference x4 (grey: none)", "trigger found by nc-box", "mask x pattern",
    ]  # fmt: skip
    lines = {title: [e and list(e[1]) for e in column.entries] for title, column in told.columns.items()}
    assert lines["clean"] == [[f"class {k}", f"victim: {k}"] for k in range(4)]
    assert lines["triggered"] == [["not counted" if k == 1 else "wanted: 1", "victim: 1"] for k in range(4)]
    largest = [int((255 - bench.x[i, :, :3, :3].astype(int)).max()) for i in choose(bench.y, 4, 4)]
    assert lines["difference x4 (grey: none)"] == [[f"largest: {value}"] for value in largest]
    assert lines["mask x pattern"] == [["mask L1 7.71", "success 99.9 %"], None, None, None]


def test_every_inverter_once_and_by_its_first_seed(bench: Bench, told: Told) -> None:
    bench.victim()
    for seed in (1, 0):
        bench.defended("pixel", seed, "m:Additive", {}, delta=np.full((3, 8, 8), seed / 10, np.float32))
    bench.defended("random", 0, "m:MaskPattern", {}, mask=noise(0, 8, 8), pattern=noise(1, 3, 8, 8))
    bench.defended("mesa", 0, "m:Patches", {"success": 51.0}, location=np.arange(4), weight=noise(2, 4, 4))
    bench.draw()
    assert list(told.columns)[3:] == [
        "trigger found by pixel", "pattern x4 (grey: none)", "trigger found by random", "mask x pattern",
    ]  # fmt: skip
    assert np.array_equal(first(told.columns["trigger found by pixel"]), first(told.columns["clean"]))  # seed 0: adds 0
    assert list(told.footing) == ["mesa: no picture (Patches); success 51.0 %"]


def test_of_the_labels_that_a_detector_flagged_the_first_is_shown(bench: Bench, told: Told) -> None:
    bench.victim()
    tensors = {f"{label}__mask": noise(label, 8, 8) for label in (1, 3)}
    tensors |= {f"{label}__pattern": noise(label, 3, 8, 8) for label in (1, 3)}
    bench.defended("nc-full", 0, "m:MaskPattern", {"labels": [3, 1]}, **tensors)
    bench.defended("nc-calm", 0, "m:Trigger", {"labels": []})
    bench.draw()
    expected = Found("", (), "blend", tensors["3__mask"], tensors["3__pattern"]).alone()
    assert "trigger found by nc-full, label 3" in told.columns
    assert np.array_equal(first(told.columns["mask x pattern"]), expected)
    assert list(told.footing) == ["nc-calm: called clean, no trigger"]


def test_the_same_images_for_every_attack_and_a_file_for_every_victim(bench: Bench, told: Told) -> None:
    names, clean = [], []
    odd = {"attack": "blend(file=/x/../y)", "victim_seed": 3}
    for key, labels in (("a" * 64, {}), ("b" * 64, {}), ("c" * 64, odd)):
        bench.rows.clear()
        row = bench.victim(key, **labels)
        (path,) = bench.draw(2)
        assert path == bench.out / f"{stem(row)}.png"
        names.append(stem(row))
        clean.append([entry and entry[0].tobytes() for entry in told.columns["clean"].entries])
    assert names == ["noise_badnets_seed0_aaaaaaaa", "noise_badnets_seed0_bbbbbbbb",
                     "noise_blend-file-x-..-y_seed3_cccccccc"]  # fmt: skip
    assert clean[0] == clean[1] == clean[2]
    assert len(clean[0]) == 2


def test_drawn_again_it_is_the_same_file(bench: Bench) -> None:
    bench.victim()
    (path,) = bench.draw()
    assert isinstance(path, Path)
    before = path.read_bytes()
    path.write_bytes(b"an earlier picture")
    assert bench.draw() == [path]
    assert path.read_bytes() == before


# ---------------------------------------------------------------- what may be missing


def refused(drawn: Sequence[Path | UserError], *parts: str) -> None:
    (error,) = drawn
    assert isinstance(error, UserError)
    for part in parts:
        assert part in str(error)
    assert "\n" not in str(error)


def test_without_a_victim_there_is_nothing_to_draw(bench: Bench) -> None:
    bench.rows.append(Row("k", "noise", "net", "badnets", "before", 0, None, None, "failed", "out of memory"))
    with pytest.raises(UserError, match=r"no stored victim fits in .*runs; make one with bbmcl matrix"):
        bench.draw()
    assert not bench.out.exists()


def test_a_lost_data_cache_is_named_with_the_way_back(bench: Bench) -> None:
    bench.victim()
    shutil.rmtree(bench.cache)
    refused(bench.draw(), "the images of noise", bench.info.hash[:12], "bbmcl data check noise")


def test_cached_images_that_are_gone_are_named(bench: Bench) -> None:
    bench.victim()
    (bench.info.folder / "test_x.npy").unlink()
    refused(bench.draw(), "cannot read test")


@pytest.mark.parametrize("key", ["t" + "a" * 64, "p" + "a" * 64, "a" * 64])
def test_a_stage_that_is_gone_is_said_and_other_victims_are_drawn(bench: Bench, key: str) -> None:
    bench.victim()
    bench.store.ledger._db.execute("DELETE FROM stage WHERE key = ?", (key,))
    refused(bench.draw(), "badnets, victim 0", "no longer stored", "bbmcl matrix")
    other = bench.victim("b" * 64, attack="blend")
    drawn = bench.draw()
    assert isinstance(drawn[0], UserError)
    assert drawn[1:] == [bench.out / f"{stem(other)}.png"]


def test_damage_is_said(bench: Bench) -> None:
    bench.victim()
    stage = bench.store.stage("t" + "a" * 64)
    assert stage is not None
    file = bench.store.artefacts.path(stage.artefact) / "trial.safetensors"
    whole = load_file(file)
    whole["x"][0] ^= 1
    save_file(whole, file)
    refused(bench.draw(), "test images of badnets, victim 0 are damaged", "bbmcl matrix")


def test_a_lost_trigger_costs_its_column_only(bench: Bench, told: Told) -> None:
    bench.victim()
    bench.defended("nc-box", 0, "m:MaskPattern", {}, mask=noise(0, 8, 8), pattern=noise(1, 3, 8, 8))
    bench.store.forget("inc-box0")
    assert bench.draw() == [bench.out / f"{stem(bench.rows[0])}.png"]
    assert len(told.columns) == 3
    assert told.footing[0].startswith("nc-box: inverted triggers are no longer stored")


# ---------------------------------------------------------------- the command


def test_the_command_on_a_real_matrix(reference: Reference, bbmcl: Bbmcl, tmp_path: Path) -> None:
    runs = shutil.copytree(reference.runs, tmp_path / "runs")
    done = bbmcl("gallery", "--runs", str(runs), "--images", "3", "-o", "pictures")
    assert (done.returncode, done.stderr) == (0, "")
    names = [Path(line) for line in done.stdout.splitlines()]
    assert [(*name.stem.split("_")[:3], name.suffix) for name in names] == [
        ("tiny", attack, "seed0", kind) for attack in ("badnets", "blend") for kind in (".png", ".svg")
    ]
    sizes = {Image.open(tmp_path / name).size for name in names if name.suffix == ".png"}
    assert len(sizes) == 1 and min(sizes.pop()) > 300  # five columns, for nc-box has a picture
    one = bbmcl("gallery", "--runs", str(runs), "--attacks", "blend")
    assert [Path(line).parent for line in one.stdout.splitlines()] == [runs / "gallery"] * 2
    none = bbmcl("gallery", "--runs", str(runs), "--attacks", "sig")
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("bbmcl: no stored victim fits") and none.stderr.count("\n") == 1
    lost = bbmcl("gallery", "--runs", str(runs), BBMCL_CACHE=str(tmp_path / "empty"))
    assert lost.returncode == 2
    assert "bbmcl data check tiny" in lost.stderr and lost.stderr.count("\n") == 1


def test_no_torch_is_needed() -> None:
    code = "import sys, backdoorbench_mcl.report.gallery; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
