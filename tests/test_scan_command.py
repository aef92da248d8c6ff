"""`bbmcl scan` and `bbmcl purify` as they are typed: a file of weights, a folder of images, real children."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import handed_toy as toy
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from backdoorbench_mcl.cli import app
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.store import Store

CHEAP = ["--threads-per-job", "1", "--budget", "quick", "--set", "nc-box.steps=250", "--set", "uap.steps=60"]
LOOK = ["--arch", "handed_toy:network", "--clean", "photos", "--mean", "0", "--std", "1"]
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory: a backdoored model and a clean one, labelled photos, the same without labels."""
    folder = tmp_path_factory.mktemp("desk")
    for name, backdoored in (("bad", True), ("good", False)):
        weights = {f"module.{key}": value for key, value in toy.trained(backdoored).state_dict().items()}
        torch.save({"state_dict": weights, "epoch": 3, "optimizer": {}}, folder / f"{name}.pth")
    x, y = toy.images(240, 5)
    for i, (image, label) in enumerate(zip(x.numpy(), y.tolist(), strict=True)):
        for place in (folder / "photos" / NAMES[label], folder / "loose"):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(place / f"{i:03}.png")
    (folder / "same.safetensors").write_bytes(b"a")
    (folder / "config.json").write_text("{}")
    (folder / "handed_toy.py").write_bytes(Path(toy.__file__).read_bytes())
    return folder


def bbmcl(desk: Path, *typed: str, status: int = 0) -> Result:
    """The command in this process, its jobs in children as always."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        patch.syspath_prepend(str(desk))
        done = CliRunner().invoke(app, list(typed), catch_exceptions=False)
    assert done.exit_code == status, done.stdout + done.stderr
    return done


def stages(desk: Path) -> list[str]:
    """Kinds of all that was computed so far."""
    store = Store(desk / "bbmcl-runs")
    try:
        return [stage.kind for stage in store.stages()]
    finally:
        store.close()


@pytest.fixture(scope="module")
def scanned(desk: Path) -> dict[str, Any]:
    done = bbmcl(desk, "scan", "bad.pth", *LOOK, *CHEAP, "--format", "json", status=3)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_scan_finds_the_label_and_says_so_by_its_exit_status(scanned: dict[str, Any]) -> None:
    assert scanned["scan"]["call"] == "suspicious" and scanned["scan"]["target"] == toy.TARGET
    assert scanned["scan"]["names"] == list(NAMES)
    assert scanned["model"]["inside"] == "state_dict" and scanned["model"]["left_out"] == ["epoch", "optimizer"]
    assert scanned["images"] == {
        "total": 240, "searched": 192, "held_out": 48, "labelled": True, "sha256": scanned["images"]["sha256"],
    }  # fmt: skip


@pytest.mark.usefixtures("scanned")
def test_scan_in_words_and_as_a_page_computes_nothing_again(desk: Path) -> None:
    before = stages(desk)
    done = bbmcl(desk, "scan", "bad.pth", *LOOK, *CHEAP, status=3)
    assert "verdict: suspicious, label 3 (dog)" in done.stdout and "<--" in done.stdout
    assert "of those held out)" in done.stdout
    page = bbmcl(desk, "scan", "bad.pth", *LOOK, *CHEAP, "--format", "html", status=3)
    text = (desk / page.stdout.strip()).read_text()
    assert "suspicious, label 3 (dog)" in text and text.count("<img") >= 2 * toy.CLASSES
    assert "http" not in text.replace("http-equiv", "")
    assert stages(desk) == before


@pytest.mark.usefixtures("scanned")
def test_purify_uses_the_scan_and_writes_weights_with_a_card(desk: Path) -> None:
    done = bbmcl(desk, "purify", "bad.pth", *LOOK, *CHEAP, "--defense", "nc", "-o", "out/clean.safetensors")
    assert "repairing with nc against label 3 (dog)" in done.stderr
    net = toy.network().eval()
    net.load_state_dict(load_file(desk / "out" / "clean.safetensors"))
    assert toy.asr(net) < 20 and toy.accuracy(net) > 90
    card = json.loads((desk / "out" / "clean.json").read_text())
    assert card["output"]["file"] == "clean.safetensors" and card["repairs"][0]["target"] == toy.TARGET
    assert card["repairs"][0]["success_after"] < card["repairs"][0]["success_before"]
    assert "sent to 3 (dog) by the trigger found" in done.stdout


@pytest.mark.usefixtures("scanned")
def test_all_tries_what_can_be_used_and_keeps_the_best(desk: Path) -> None:
    done = bbmcl(
        desk, "purify", "bad.pth", *LOOK, *CHEAP, "--all", "--set", "defend.steps=20", "-o", "best.safetensors",
        "--format", "html",
    )  # fmt: skip
    card = json.loads((desk / "best.json").read_text())
    names = [one["defense"] for one in card["repairs"]]
    assert {"ft", "nc", "nad", "mcldef"} <= set(names)
    kept = [one for one in card["repairs"] if not one["gone"] and not one["reason"]]
    scores = [one["score"] for one in kept]
    assert len(scores) >= 3 and scores == sorted(scores, reverse=True) and kept == card["repairs"][: len(kept)]
    net = toy.network().eval()
    net.load_state_dict(load_file(desk / "best.safetensors"))
    assert card["repairs"][0]["ba_after"] == pytest.approx(toy.accuracy(net), abs=15)
    page = (desk / done.stdout.strip()).read_text()
    assert "All repairs" in page and "t-SNE" in page


def test_a_clean_model_is_called_clean_and_not_repaired(desk: Path) -> None:
    typed = ["--set", "mcldef.temperature=0.4", "-o", "never.safetensors"]
    done = bbmcl(desk, "purify", "good.pth", *LOOK, *CHEAP, *typed, status=4)
    assert "verdict: clean" in done.stdout and "nothing is repaired" in done.stderr
    assert not (desk / "never.safetensors").exists()


def test_without_labels_mcldef_works_and_nothing_is_said_of_accuracy(desk: Path) -> None:
    unlabelled = ["--arch", "handed_toy:network", "--clean", "loose", "--norm", "none"]
    done = bbmcl(desk, "purify", "bad.pth", *unlabelled, *CHEAP, "--target", "3", "-o", "loose.safetensors")
    card = json.loads((desk / "loose.json").read_text())
    assert card["repairs"][0]["ba_after"] is None and card["repairs"][0]["agreement"] > 80
    assert "called right" not in done.stdout and "called as by the original" in done.stdout
    whole = bbmcl(
        desk, "purify", "bad.pth", *unlabelled, *CHEAP, "--target", "3", "--hold-out", "0", "-o", "w.safetensors"
    )
    assert "nothing was held out" in whole.stdout


@pytest.mark.parametrize(
    "typed, line",
    [
        (["scan", "none.pth", *LOOK], "none.pth: there is no such file; expected a file of weights"),
        (["scan", "photos", *LOOK], "photos: "),
        (["scan", "bad.pth", *LOOK, "--classes", "10"], "the file has 8 classes, --classes 10 was given"),
        (["scan", "bad.pth", *LOOK[:2], "--clean", "nowhere"], "nowhere: no such file or folder"),
        (["scan", "bad.pth", *LOOK[:2], "--clean", "loose"], "the clean images have no labels"),
        (["scan", "bad.pth", *LOOK[:4], "--mean", "0"], "--mean and --std belong together"),
        (["scan", "bad.pth", *LOOK[:4], "--mean", "0,x", "--std", "1"], "--mean '0,x': expected numbers"),
        (["scan", "bad.pth", *LOOK[:4], "--norm", "cifar"], "--norm 'cifar': expected one of images, imagenet, none"),
        (["scan", "bad.pth", *LOOK, "--norm", "none"], "--norm none and --mean: give one of them"),
        (["scan", "bad.pth", *LOOK, "--hold-out", "1.5"], "--hold-out 1.5: expected a share from 0 to 0.9"),
        (["scan", "bad.pth", *LOOK, "--budget", "big"], "--budget 'big'"),
        (["scan", "bad.pth", *LOOK, "--names", "a,b"], "--names has 2 names, but the model has 8 classes"),
        (["scan", "bad.pth", "--arch", "wrn-16-1", *LOOK[2:]], "conv1.weight is missing"),
        (["scan", "bad.pth", "--arch", "wrn-16", *LOOK[2:]], "expected wrn-DEPTH-WIDEN"),
        (["scan", "bad.pth", "--arch", "handed_toi:network", *LOOK[2:]], "there is no module 'handed_toi'"),
        (["purify", "bad.pth", *LOOK, "-o", "out.pth"], "--out out.pth: expected a name that ends in .safetensors"),
        (["purify", "bad.pth", *LOOK, "-o", "o.safetensors", "--target", "cat"], "--target 'cat': expected a label"),
        (["purify", "bad.pth", *LOOK, "-o", "o.safetensors", "--target", "8"], "--target 8: the model has the labels"),
        (["purify", "bad.pth", *LOOK, "-o", "o.safetensors", "--defense", "abc"], "unknown defense 'abc'"),
        (["purify", "bad.pth", *LOOK, "-o", "o.safetensors", "--defense", "ft", "--all"], "give one of them"),
        (["purify", "bad.pth", *LOOK, "-o", "o.safetensors", "--all", "--hold-out", "0"], "hold some out"),
        (["purify", "same.safetensors", *LOOK, "-o", "same.safetensors"], "is the model itself"),
        (["purify", "bad.pth", *LOOK, "-o", "config.safetensors"], "config.json is there and is no card"),
        (["scan", "bad.pth", *LOOK, "-o", "page.html"], "is for --format html"),
    ],
)  # fmt: skip
def test_misuse_is_one_line(desk: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], line: str) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(str(desk))
    with pytest.raises(UserError) as caught:  # which `main` prints as one line, with status 2
        CliRunner().invoke(app, typed, catch_exceptions=False)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_with_a_hostile_name_is_shown_without_its_escapes(desk: Path) -> None:
    names = ",".join([*NAMES[:3], "\x1b]0;pwned\x07\x1b[31mdog", *NAMES[4:]])
    typed = [*LOOK[:2], "--clean", "loose", *LOOK[4:], "--names", names]
    done = bbmcl(desk, "purify", "bad.pth", *typed, *CHEAP, "--target", "3", "-o", "named.safetensors")
    assert "label 3 (dog)" in done.stderr and "\x1b" not in done.stderr + done.stdout


def test_a_hostile_file_ends_the_command_with_one_line_and_status_2(desk: Path) -> None:
    (desk / "page.pth").write_text("<html>not here any more</html>")
    done = subprocess.run(
        [sys.executable, "-m", "backdoorbench_mcl", "scan", "page.pth", *LOOK], cwd=desk, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = [text for text in done.stderr.splitlines() if text.startswith("bbmcl: ")]
    assert len(last) == 1 and "page.pth: is a page of HTML or XML" in last[0]
