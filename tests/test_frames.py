"""The Python API: frames equal the rows behind them, whatever their states; the example runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small
from conftest import Reference
from made import make

import backdoorbench_mcl as bbmcl
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.frames import frame
from backdoorbench_mcl.rows import Row

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY: dict[str, Any] = {
    "dataset": "tiny", "model": "tiny-net", "clean_rate": 0.2,
    "set": {"badnets.target": 1, "badnets.rate": np.float64(0.2), "mcldef.inverter": "nc-box(steps=20)",
            "train.steps": np.int64(200), "defend.steps": 20},
}  # fmt: skip
FT = {**TINY, "set": {name: value for name, value in TINY["set"].items() if not name.startswith("mcldef")}}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])


def test_a_stored_folder_is_a_frame_with_the_numbers_of_its_rows(reference: Reference) -> None:
    table = bbmcl.load_results(reference.runs)
    assert len(table) == len(reference.rows) == 6
    by_key = {row.key: row for row in reference.rows}
    for one in table.to_dict("records"):
        row = by_key[one["key"]]
        assert (one["attack"], one["defense"], one["state"]) == (row.attack, row.defense, row.state)
        assert one["asr"] == row.asr
        assert one["ba_k"] == row.ba_k
        assert one["knows"] == ", ".join(row.knows)
        assert pd.isna(one["defense_seed"]) == (row.defense_seed is None)
    assert not {"params", "versions", "stages"} & set(table)


def test_parameters_are_columns_on_request(reference: Reference) -> None:
    table = bbmcl.load_results(reference.runs, parameters=True).set_index(["attack", "defense"])
    assert table.loc[("badnets", "mcldef"), "inverter.steps"] == 20
    assert table.loc[("badnets", "mcldef"), "defense.temperature"] == 0.5
    assert table["defense.temperature"].isna()["badnets", "ft"]
    assert table.loc[("blend", "before"), "attack.alpha"] == 0.9
    assert set(table["train.steps"]) == {200}
    assert {type(value) for value in table["train.milestones"]} == {tuple}


def test_columns_and_types_do_not_depend_on_the_rows() -> None:
    whole = frame([make("badnets", "ft", 3.0, 90.0)])
    for other in (frame([]), frame([make("badnets", "ft", state="failed", reason="no\nmemory")])):
        assert list(other.columns) == list(whole.columns)
        assert other.dtypes.equals(whole.dtypes)
    assert whole.asr.dtype == np.float64
    assert whole.asr_k.dtype == "Int64"
    assert whole.toy.dtype == "boolean"
    assert whole.target_class_erased.dtype == "boolean"
    assert not frame([]).columns.duplicated().any()


def test_thousands_of_cells_with_gaps_are_averaged_over_what_there_is() -> None:
    rows: list[Row] = [make("badnets", f"d{i % 10}", float(i % 7), 90.0, victim=i) for i in range(1000)]
    rows += [make("badnets", "d0", state="failed", victim=1000)]
    table = frame(rows)
    assert table.groupby("defense").asr.mean()["d0"] == pytest.approx(
        np.mean([float(i % 7) for i in range(0, 1000, 10)])
    )
    assert (table.state == "failed").sum() == 1


def test_run_computes_and_the_command_finds_it_stored(
    toy: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = bbmcl.run("badnets", ["ft"], seeds=[0], runs=tmp_path / "runs", workers=1, quiet=True, **FT)
    assert capfd.readouterr() == ("", "")
    assert list(table.defense) == ["before", "ft"]
    assert set(table.state) == {"ok"}
    again = bbmcl.run("badnets", "ft", seeds="0", runs=tmp_path / "runs", workers=1, parameters=True, **FT)
    said = capfd.readouterr()
    assert "preset paper" in said.err
    assert said.out == ""
    pd.testing.assert_frame_equal(again[table.columns], table)


def test_the_environment_names_the_folder(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBMCL_RUNS", str(reference.runs))
    assert len(bbmcl.load_results()) == 6


def test_errors_are_the_lines_of_the_command(tmp_path: Path, toy: None) -> None:
    with pytest.raises(UserError, match="no results in"):
        bbmcl.load_results(tmp_path / "nothing")
    with pytest.raises(UserError, match="did you mean 'badnets'"):
        bbmcl.run("badnet", "ft", runs=tmp_path / "runs", **TINY)
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        bbmcl.run("badnets", "mcldef", sweep={"mcldef.temperatur": [1, 2]}, runs=tmp_path / "runs", **TINY)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = bbmcl.runn


def test_a_script_needs_no_guard(toy_env: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    options = {**FT, "set": {"badnets.target": 1, "train.steps": 20}}
    script.write_text(
        "print('once')\nimport backdoorbench_mcl\n"
        f"print(len(backdoorbench_mcl.run('badnets', 'ft', runs='runs', workers=1, quiet=True, **{options!r})))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=toy_env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("once\n2\n", "")


def test_the_example_runs(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("temperature", EXAMPLES / "temperature.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(tmp_path / "runs"), workers=1, **TINY)
    out = capsys.readouterr().out
    for value in example.TEMPERATURES:
        assert f"mcldef(temperature={value})" in out
    assert "5 cells stored" in out
    assert (tmp_path / "runs" / "temperature.png").read_bytes().startswith(b"\x89PNG")


def test_the_package_is_imported_without_pandas_and_torch() -> None:
    code = "import backdoorbench_mcl as b, sys; print({'pandas', 'torch', 'numpy'} & set(sys.modules), 'run' in dir(b))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set() True\n"
