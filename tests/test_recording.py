"""What `tox -e regress` says of a drift: the cell, old and new values, and the version that should have risen."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pinned
import pytest
import small
from conftest import Reference

from backdoorbench_mcl import provenance, recording
from backdoorbench_mcl.errors import UserError

WIDE = {"asr": 100.0, "ba": 100.0, "tca": 100.0}


@pytest.fixture
def made(reference: Reference, toy_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The 2x2 toy matrix as a recording, through JSON as a file would be."""
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    found = recording.record(small.options(), reference.runs, {"MKL_CBWR": "AVX2", "HOME": "x"})
    text = json.dumps(found)
    assert os.fspath(reference.runs) not in text
    out: dict[str, Any] = json.loads(text)
    return out


def stage(made: dict[str, Any], title: str) -> Any:
    (found,) = [one for one in made["stages"] if one["title"] == title]
    return found


def cell(made: dict[str, Any], name: str) -> Any:
    (found,) = [one for one in made["cells"] if one["cell"] == name]
    return found


def test_a_run_agrees_with_itself(made: dict[str, Any], reference: Reference) -> None:
    assert made["made"]["kernels"] == {"MKL_CBWR": "AVX2"}
    assert {one["artefact"] for one in made["stages"]} == set(reference.artefacts.values())
    assert [one["cell"] for one in made["cells"]] == [
        "badnets 0 x before", "badnets 0 x ft 0", "badnets 0 x mcldef 0",
        "blend 0 x before", "blend 0 x ft 0", "blend 0 x mcldef 0",
    ]  # fmt: skip
    assert recording.drift(made, made, {}) == []


def test_other_bytes_under_the_same_key_name_cell_values_and_version(made: dict[str, Any]) -> None:
    now = copy.deepcopy(made)
    stage(now, "ft on badnets 0")["artefact"] = "other"
    stage(now, "judge ft on badnets 0")["artefact"] = "other, too"
    changed = cell(now, "badnets 0 x ft 0")
    old = changed["asr_k"]
    changed["asr_k"] = old + 1
    n = changed["asr_n"]
    (line,) = recording.drift(made, now, {})
    assert line.startswith(f"badnets 0 x ft 0: ASR {100 * old / n:.2f} BA ")
    assert f"-> ASR {100 * (old + 1) / n:.2f} BA " in line
    assert "ft on badnets 0: other bytes under the same key, so the version should rise of " in line
    assert "backdoorbench-mcl/ft version 1" in line
    assert "judge" not in line  # follows from the repair


def test_a_drift_of_a_victim_is_told_once_for_each_cell_and_at_its_root(made: dict[str, Any]) -> None:
    now = copy.deepcopy(made)
    for one in now["stages"]:
        if "blend" in one["title"]:
            one["artefact"] = "other"
    lines = recording.drift(made, now, {})
    assert [line.partition(":")[0] for line in lines] == ["blend 0 x before", "blend 0 x ft 0", "blend 0 x mcldef 0"]
    for line in lines:
        assert "the same counts; blend victim 0: other bytes under the same key" in line
        assert line.count("other bytes") == 1
        assert "backdoorbench-mcl/blend version 1" in line


def test_a_version_that_rose_is_declared_and_asks_for_a_new_baseline(made: dict[str, Any]) -> None:
    now = copy.deepcopy(made)
    raise_version(now)
    (line,) = recording.drift(made, now, {})
    assert "ft on badnets 0: declared by its key (" in line
    assert "ft version 2" in line
    assert "record the baseline again" in line
    assert "judge ft" not in line


def raise_version(now: dict[str, Any]) -> None:
    """Version 2 of ft on badnets, with other keys from there on."""
    renamed = {}
    for title in ("ft on badnets 0", "judge ft on badnets 0"):
        one = stage(now, title)
        renamed[one["key"]] = one["key"] = one["key"] + "*"
        one["inputs"] = [f"{key}*" if f"{key}*" in renamed.values() else key for key in one["inputs"]]
        one["methods"] = [text.replace("ft version 1", "ft version 2") for text in one["methods"]]
    changed = cell(now, "badnets 0 x ft 0")
    changed["stages"] = [f"{key}*" if f"{key}*" in renamed.values() else key for key in changed["stages"]]


def test_counts_that_move_alone_are_the_evaluators(made: dict[str, Any]) -> None:
    now = copy.deepcopy(made)
    cell(now, "blend 0 x ft 0")["tca_k"] += 1
    (line,) = recording.drift(made, now, {})
    assert "scored otherwise under evaluator version" in line
    cell(now, "blend 0 x ft 0")["key"] = "new"
    assert "record the baseline again" in recording.drift(made, now, {})[0]


def test_a_failure_is_a_drift(made: dict[str, Any]) -> None:
    now = copy.deepcopy(made)
    cell(now, "badnets 0 x mcldef 0").update(state="failed", reason="out of memory", asr_k=None, ba_k=None)
    for changes in ({}, {"machine_class": "elsewhere"}):
        now["made"] |= changes
        (line,) = recording.drift(made, now, WIDE)
        assert "-> failed (out of memory)" in line


def test_cells_that_come_and_go_are_named(made: dict[str, Any]) -> None:
    now = copy.deepcopy(made)
    cell(now, "badnets 0 x ft 0")["cell"] = "badnets 0 x new 0"
    assert recording.drift(made, now, {}) == [
        "badnets 0 x ft 0: recorded, and no longer a cell", "badnets 0 x new 0: a cell, and not recorded",
    ]  # fmt: skip


def test_with_pinned_kernels_the_level_of_the_processor_does_not_matter(made: dict[str, Any]) -> None:
    for kernels, expected in ((dict.fromkeys(provenance.KERNELS, "avx2"), True), ({"MKL_CBWR": "AVX2"}, False)):
        old, new = copy.deepcopy(made), copy.deepcopy(made)
        for one, machine in ((old, "x86_64-v3/amd/cpu"), (new, "x86_64-v4-bf16/amd/cpu")):
            one["made"] |= {"kernels": kernels, "machine_class": machine}
        assert recording.exact(old, new) is expected
        new["made"]["machine_class"] = "x86_64-v3/intel/cpu"
        assert not recording.exact(old, new)


@pytest.mark.parametrize("name", ["machine_class", "kernels", "versions"])
def test_elsewhere_cells_are_compared_within_tolerances(made: dict[str, Any], name: str) -> None:
    now = copy.deepcopy(made)
    now["made"][name] = {"torch": "9"} if name != "machine_class" else "elsewhere"
    assert not recording.exact(made, now)
    for one in now["stages"]:
        one["artefact"] = "other"
    changed = cell(now, "blend 0 x ft 0")
    changed["ba_k"] -= round(changed["ba_n"] * 0.05)
    assert recording.drift(made, now, WIDE | {"ba": 6.0}) == []
    (line,) = recording.drift(made, now, WIDE | {"ba": 4.0})
    assert line.startswith("blend 0 x ft 0: BA ")
    assert "more than 4 points apart" in line


@pytest.fixture
def elsewhere(made: dict[str, Any]) -> dict[str, Any]:
    """The same as if computed on another machine: other bytes, the same counts."""
    now = copy.deepcopy(made)
    now["made"]["machine_class"] = "elsewhere"
    for one in now["stages"]:
        one["artefact"] = "other"
    return now


def test_elsewhere_a_repair_that_drifts_names_the_versions_of_the_repair(
    made: dict[str, Any], elsewhere: dict[str, Any]
) -> None:
    cell(elsewhere, "blend 0 x mcldef 0")["ba_k"] = 0
    (line,) = recording.drift(made, elsewhere, recording.POINTS)
    assert line.startswith("blend 0 x mcldef 0: BA ")
    assert "if this is no rounding, the version should rise of " in line
    assert "backdoorbench-mcl/mcldef version 1" in line
    assert "backdoorbench-mcl/nc-box version 1" in line
    assert "blend version" not in line  # the victim is what it was


def test_elsewhere_a_victim_that_drifts_is_the_cause_of_what_its_repairs_show(
    made: dict[str, Any], elsewhere: dict[str, Any]
) -> None:
    for name in ("blend 0 x before", "blend 0 x ft 0"):
        cell(elsewhere, name)["ba_k"] = 0
    lines = recording.drift(made, elsewhere, recording.POINTS)
    assert [line.partition(":")[0] for line in lines] == ["blend 0 x before", "blend 0 x ft 0"]
    for line in lines:
        assert "backdoorbench-mcl/blend version 1" in line
        assert "ft version" not in line


def test_elsewhere_a_version_that_rose_asks_for_a_new_baseline(made: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    raise_version(elsewhere)
    cell(elsewhere, "badnets 0 x ft 0")["ba_k"] = 0
    (line,) = recording.drift(made, elsewhere, recording.POINTS)
    assert "ft version 2" in line
    assert "record the baseline again" in line
    assert "should rise" not in line


def test_elsewhere_tca_and_the_gate_are_compared(made: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    changed = cell(elsewhere, "badnets 0 x ft 0")
    n = changed["tca_n"]
    cell(made, "badnets 0 x ft 0")["tca_k"] = n
    changed["tca_k"] = n // 2
    (line,) = recording.drift(made, elsewhere, WIDE | {"tca": 40.0})
    assert line.startswith(f"badnets 0 x ft 0: TCA 100.00 -> {100 * (n // 2) / n:.2f}, more than 40 points apart")
    assert recording.drift(made, elsewhere, WIDE | {"tca": 60.0}) == []
    cell(elsewhere, "blend 0 x before")["gate"] = "flagged"
    (line,) = recording.drift(made, elsewhere, WIDE)
    assert line.startswith("blend 0 x before: gate 'ok' -> 'flagged'")


def test_elsewhere_a_number_that_comes_or_goes_is_a_drift(made: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    cell(elsewhere, "blend 0 x ft 0").update(asr_k=0, asr_n=0)
    old = cell(made, "blend 0 x ft 0")
    percent = 100 * old["asr_k"] / old["asr_n"]
    (line,) = recording.drift(made, elsewhere, WIDE)
    assert line.startswith(f"blend 0 x ft 0: ASR {percent:.2f} -> undefined")
    (line,) = recording.drift(elsewhere, made, WIDE)
    assert line.startswith(f"blend 0 x ft 0: ASR undefined -> {percent:.2f}")


def test_a_cell_without_asr_can_drift(made: dict[str, Any]) -> None:
    for counts in (cell(made, "blend 0 x ft 0"),):
        counts.update(asr_k=0, asr_n=0, gate="")  # as on the attack none
    now = copy.deepcopy(made)
    cell(now, "blend 0 x ft 0")["ba_k"] += 1
    (line,) = recording.drift(made, now, {})
    assert line.startswith("blend 0 x ft 0: ASR undefined BA ")


def test_a_pinned_matrix_is_computed_where_nothing_is_stored(tmp_path: Path) -> None:
    default = tmp_path / "fresh"
    assert pinned.fresh({"BBMCL_RUNS": str(tmp_path)}, default) == default
    assert pinned.fresh({"BBMCL_REGRESS_RUNS": ""}, default) == default
    for empty in ("absent", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert pinned.fresh({"BBMCL_REGRESS_RUNS": str(tmp_path / empty)}, default) == tmp_path / empty
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "store.sqlite").touch()
    for used in ("used", "used/store.sqlite"):
        with pytest.raises(UserError, match="expected an empty or absent folder") as told:
            pinned.fresh({"BBMCL_REGRESS_RUNS": str(tmp_path / used)}, default)
        assert str(tmp_path / used) in str(told.value)


def test_a_new_version_of_the_package_alone_must_agree_bit_for_bit(made: dict[str, Any]) -> None:
    now = copy.deepcopy(made)
    now["made"]["versions"]["backdoorbench-mcl"] = "9.9"
    assert recording.exact(made, now)
