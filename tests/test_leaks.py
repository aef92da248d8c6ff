"""What a method can reach: a defense that searches memory, open files, environment, processes and files finds nothing
but what it was granted, and a job's folder holds exactly that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from backdoorbench_mcl import confine, datacache, plan, runner
from backdoorbench_mcl.grant import Grants
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store

FLIP = bytes(byte ^ 0xAA for byte in range(256))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_env: dict[str, str]) -> Iterator[Path]:
    """A victim of `blend`, whose trigger is a random image, with a repair by MCLDef."""
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        runs = tmp_path_factory.mktemp("leaks") / "runs"
        rows = runner.run_matrix(
            small.options("blend", "mcldef"), Settings(runs=runs, workers=1, threads=1), live=False
        )
        assert [row.state for row in rows] == ["ok", "ok"]
        yield runs


def flipped(values: NDArray[Any]) -> str:
    return np.ascontiguousarray(values).tobytes().translate(FLIP).hex()


def needles(runs: Path) -> dict[str, list[str]]:
    """What to look for, by name: whole images as bytes and as the floats that a network sees, the trigger, the draw of
    the poisoned images. "granted" is what must be found.
    """
    asked = small.resolve(small.options("blend", "mcldef"))
    store = Store(runs)
    graph = plan.build(asked)
    by_kind = {node.kind: node for node in graph.nodes.values()}
    paths = {kind: store.open(stage) for kind, n in by_kind.items() if (stage := store.stage(n.key)) is not None}
    store.close()
    grants = Grants(asked.data, store, device="cpu", precision="fp32", threads=1, isolation="process")
    clean = grants.clean_index(by_kind["defend"], paths["train"])
    train, _ = datacache.open_split(asked.data, "train")
    test, _ = datacache.open_split(asked.data, "test")
    trial = load_file(paths["trial"] / "trial.safetensors")["x"]
    attack = load_file(paths["train"] / "attack.safetensors")
    others = np.setdiff1d(np.arange(len(train)), clean)

    def seen(images: NDArray[Any]) -> list[str]:
        return [text for x in images[:2] for text in (flipped(x), flipped(x.astype(np.float32) / 255))]

    trigger = [
        flipped(value.ravel()[:256]) for name, value in attack.items() if name.startswith("state.") and value.size > 16
    ]
    assert trigger
    return {
        "granted": [flipped(train[index]) for index in clean[:3]], "test": seen(test), "triggered": seen(trial),
        "other training images": seen(train[others]), "trigger": trigger,
        "poison index": [flipped(np.sort(attack["poison_index"])[:12]), flipped(attack["poison_index"][:12])],
    }  # fmt: skip


def snoop(runs: Path, wanted: dict[str, list[str]], isolation: str, files: bool) -> tuple[Row, dict[str, list[str]]]:
    """The row of a search, and the places where anything of each name was found."""
    names = [name for name, texts in wanted.items() for _ in texts]
    hidden = ",".join(f"'{text}'" for texts in wanted.values() for text in texts)
    asked = small.options("blend", f"snoop(files={str(files).lower()}, needles=({hidden}))")
    rows = runner.run_matrix(asked, Settings(runs=runs, workers=1, threads=1, isolation=isolation), live=False)
    row = rows[-1]
    assert row.reason.startswith("RuntimeError at bbmcl_toy_snoop.py"), row.reason
    told = json.loads(row.reason.partition(": ")[2])
    assert told["bytes"]["memory"] > 50e6  # it did look
    found: dict[str, set[str]] = {name: set() for name in wanted}
    for name, places in zip(names, told["found"], strict=True):
        found[name] |= set(places)
    return row, {name: sorted(places) for name, places in found.items()}


@pytest.mark.skipif(confine.abi_version() == 0, reason="this kernel has no Landlock")
def test_a_search_of_everything_finds_what_was_granted_alone(finished: Path) -> None:
    row, found = snoop(finished, needles(finished), "landlock", files=True)
    assert row.isolation == "landlock"
    assert "memory" in found.pop("granted")  # or the search is no good
    assert found == {name: [] for name in found}


def test_without_landlock_memory_and_open_files_hold_no_more(finished: Path) -> None:
    """Files of the user are open to it there, which the threat model says; its own process has nothing to find."""
    wanted = needles(finished)
    _, found = snoop(finished, wanted, "process", files=False)
    assert "memory" in found.pop("granted")
    assert {name: set(places) - {"other processes"} for name, places in found.items()} == {
        name: set() for name in found
    }


FOLDERS = {  # stage -> files in `in/` with their tensors, and what `spec.json` says beyond what every job is told
    "train": ({}, {"attack", "recipe", "needs"}),
    "trial": ({"attack.safetensors": {"poison_index", "state.*"}}, {"attack", "attack_meta"}),
    "invert": (
        {"weights.safetensors": {"*"}, "clean.safetensors": {"x", "y"}},
        {"inverter", "recipe", "needs", "grants", "labels", "detected"},
    ),
    "defend": (
        {"weights.safetensors": {"*"}, "clean.safetensors": {"x", "y"}, "need-trigger.safetensors": {"*"}},
        {"defense", "recipe", "needs", "grants"},
    ),
    "predict": ({"weights.safetensors": {"*"}, "x.npy": set()}, set()),
}
EVERY = {
    "job", "device", "precision", "threads", "isolation", "snapshot_every", "snapshot", "readable", "seeds", "data",
    "model",
}  # fmt: skip


def test_a_folder_holds_exactly_what_was_granted(finished: Path, tmp_path: Path) -> None:
    asked = small.resolve(small.options("blend", "mcldef"))
    store = Store(finished)
    grants = Grants(asked.data, store, device="cpu", precision="fp32", threads=1, isolation="process")
    test, labels = datacache.open_split(asked.data, "test")
    seen = set()
    for node in plan.build(asked).nodes.values():
        folder = tmp_path / node.key
        folder.mkdir()
        inputs = {role: store.open(stage) for role, key in node.inputs.items() if (stage := store.stage(key))}
        grants.fill(node, inputs, folder)
        files, said = FOLDERS[node.kind]
        assert {path.name for path in (folder / "in").iterdir()} == set(files), node.kind
        assert {path.name for path in folder.iterdir()} == {"in", "spec.json"}
        for name, tensors in files.items():
            if name.endswith(".safetensors") and "*" not in tensors:
                with safe_open(folder / "in" / name, "np") as held:
                    assert {key if "." not in key else "state.*" for key in held.keys()} <= tensors, name  # noqa: SIM118
        spec = json.loads((folder / "spec.json").read_text())
        assert set(spec) - EVERY == said, node.kind
        if node.kind in ("invert", "defend"):
            held_y = load_file(folder / "in" / "clean.safetensors")["y"]
            assert (held_y == -1).all()  # neither uses labels
            assert spec["grants"] == ({"target": 1} if node.kind == "defend" else {})
            assert spec["readable"] == []
        if node.kind == "predict":
            x = np.load(folder / "in" / "x.npy")
            assert len(x) == 2 * len(test)  # as many clean as triggered ones
            place = {image.tobytes(): i for i, image in enumerate(x)}
            order = [place[image.tobytes()] for image in test]
            assert abs(float(np.corrcoef(order, np.arange(len(test)))[0, 1])) < 0.3  # neither in order
            assert abs(float(np.mean(order)) / len(x) - 0.5) < 0.1  # nor all in one half
        seen.add(node.kind)
    store.close()
    assert seen == set(FOLDERS)
    assert len(labels) == len(test)
