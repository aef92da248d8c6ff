"""Shipped methods by way of the harness, on a toy in seconds: what each asks for, gets, and is marked with."""

from __future__ import annotations

from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file

from backdoorbench_mcl import runner
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store

SETTINGS = (
    "train.steps=200", "defend.steps=10", "nc-box.steps=20", "pixel.steps=9", "uap.steps=8", "mesa.steps=7",
    "mesa.width=16", "mesa.batch=16", "nc-full.steps=6", "nc-full.coarse_steps=4", "nc-full.images_per_step=32",
    "nc-full.patience=1", "ibau.rounds=1", "random.like=nc-box",
)  # fmt: skip
TOLD: dict[str, tuple[str, ...]] = {
    "nad": (),
    "ibau": (),
    "nc(target=detect)": (),
    "mcldef+": ("target",),
    "mcldef(inverter=pixel)": ("target",),
    "mcldef(inverter=uap)": ("target",),
    "mcldef(inverter=random)": ("target",),
    "mcldef(inverter=zero)": ("target",),
    "mcldef(inverter=nc-full)": ("target",),
    "mcldef(inverter=mesa)": ("location", "target"),
    "mcldef(inverter=true)": ("target", "trigger"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shipped") / "runs"


@pytest.fixture(scope="module")
def rows(runs: Path, toy_env: dict[str, str]) -> dict[str, Row]:
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        asked = small.options("badnets(target=1,rate=0.2)", ",".join(TOLD), overrides=SETTINGS)
        found = runner.run_matrix(asked, Settings(runs=runs, workers=2, threads=1), live=False)
    return {row.defense: row for row in found if row.defense != "before"}


def mask(runs: Path, row: Row) -> torch.Tensor:
    store = Store(runs)
    stage = store.stage(row.stages["invert"])
    assert stage is not None
    found = load_file(store.open(stage) / "trigger.safetensors")["mask"]
    store.close()
    return found


@pytest.mark.parametrize("label", list(TOLD))
def test_a_cell_of_it_ends_well_and_tells_what_it_was_told(label: str, rows: dict[str, Row]) -> None:
    row = rows[label]
    assert (row.state, row.reason) == ("ok", "")
    assert row.knows == TOLD[label]
    assert row.asr is not None
    assert row.uses_labels == (not label.startswith("mcldef"))


def test_a_detector_has_the_word_where_no_label_was_told(rows: dict[str, Row]) -> None:
    assert rows["nc(target=detect)"].verdict == "clean" or rows["nc(target=detect)"].verdict.startswith("flagged ")
    assert all(row.verdict == "" for label, row in rows.items() if label != "nc(target=detect)")


def test_each_search_is_as_long_as_it_was_asked_to_be(rows: dict[str, Row]) -> None:
    steps = {label: row.inverter_steps for label, row in rows.items() if label.startswith("mcldef(")}
    names = ("pixel", "uap", "random", "zero", "mesa", "true", "nc-full")
    assert [steps[f"mcldef(inverter={name})"] for name in names] == [9, 8, None, None, 7, None, 6]


def test_the_controls_are_what_they_say(rows: dict[str, Row], runs: Path) -> None:
    fitted, shuffled = (mask(runs, rows[label]) for label in ("mcldef+", "mcldef(inverter=random)"))
    assert torch.equal(fitted.flatten().sort().values, shuffled.flatten().sort().values)
    assert not torch.equal(fitted, shuffled)
    nothing, true = rows["mcldef(inverter=zero)"], rows["mcldef(inverter=true)"]
    assert (nothing.inverter_success, nothing.inverter_pixels_changed) == (0.0, 0.0)
    assert true.inverter_success is not None and true.inverter_success > 90
    assert true.inverter_pixels_changed is not None and 6 < true.inverter_pixels_changed <= 9
