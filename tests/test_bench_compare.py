"""The suite's arithmetic: ratios become lines, and two runs are compared. No timing takes part."""

from __future__ import annotations

from pathlib import Path

import baseline
import pytest
import targets

MACHINE = {
    "machine class": "x86 avx2", "processor": "p", "device": "cpu", "precision": "fp32", "threads": 1,
    "cell": "printed", "matrix steps": 30,
}  # fmt: skip


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    baseline.save(path, MACHINE, {"training": [1.25, 1.5], "matrix": []})
    assert baseline.load(path) == (MACHINE, {"training": [1.25, 1.5]})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "machine": {}, "ratios": {}}',
             '{"format": 2, "machine": {}, "ratios": {"a": []}}', '{"format": 2, "machine": {}, "ratios": {"a": [0]}}',
             '{"format": 2, "machine": {}, "ratios": {"a": "fast"}}'],
)  # fmt: skip
def test_what_is_no_baseline_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "base.json"
    path.write_text(text)
    with pytest.raises(baseline.Unlike, match=r"base\.json") as told:
        baseline.load(path)
    assert "\n" not in str(told.value)
    with pytest.raises(baseline.Unlike, match="No such file"):
        baseline.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "name, value", [("machine class", "x86 avx512"), ("precision", "bf16"), ("threads", 2), ("cell", "short")]
)
def test_unlike_machines_are_not_compared(name: str, value: object) -> None:
    baseline.require_alike(MACHINE, dict(MACHINE))
    with pytest.raises(baseline.Unlike, match=f"not compared: {name} was"):
        baseline.require_alike(MACHINE, {**MACHINE, name: value})


@pytest.mark.parametrize(
    "old, new, fell",
    [
        ([2.0, 2.0, 2.0], [1.69], True),
        ([2.0, 2.0, 2.0], [1.71], False),  # within the tolerance
        ([2.0, 1.5, 2.0], [1.6], True),  # one disturbed round of the old run hides nothing
        ([2.0, 1.5, 2.0, 1.5, 2.0], [1.6], False),  # two are its spread
        ([2.6, 2.5, 2.6, 1.2, 2.6], [1.3], True),
        ([2.0, 1.5], [1.6], False),
        ([2.0, 1.65, 2.0], [1.6, 1.6, 9.0], True),  # the median counts, not the best round
        ([2.0], [3.0], False),
    ],
)
def test_a_regression_is_beyond_tolerance_and_range(old: list[float], new: list[float], fell: bool) -> None:
    assert baseline.regressed(old, new) is fell


def test_every_task_of_either_run_gets_a_line() -> None:
    told = baseline.compare({"a": [2.0], "b": [1.0]}, {"a": [1.0], "c": [3.0]})
    assert told == [
        ("a: 2.00 (2.00-2.00) -> 1.00, -50 %: REGRESSED", True),
        ("b: not run", False),
        ("c: 3.00, not in the baseline", False),
    ]


def test_all_targets_are_printed_with_their_shortfall_and_cause() -> None:
    measured = {
        "training": targets.Measured("training", [1.0, 1.2, 1.4]),
        "matrix": targets.Measured("matrix", [1.5]),
        "overhead": targets.Measured("overhead", [0.1, 0.7, 0.9], "60 cells"),
    }
    told = targets.lines(measured, "fp32", fast_bf16=False)
    assert len(told) == len(targets.TARGETS)
    by_name = {line.partition(":")[0]: (line, met) for line, met in told}
    line, met = by_name["training"]
    assert met is False
    assert "1.20x (1.00-1.40, n = 3), wanted at least 2.2x" in line
    assert "SHORT BY 1.00x; no fast bf16 here" in line
    assert by_name["matrix"][1] is True and by_name["matrix"][0].endswith("pass")
    assert by_name["overhead"][1] is False and "SHORT BY 0.20s" in by_name["overhead"][0]
    assert by_name["overhead"][0].endswith("[60 cells]")
    assert by_name["evaluation"][1] is None and "not measured" in by_name["evaluation"][0]
    assert "Fewer steps of inversion" in by_name["preset clean"][0]
    for precision, fast, why in [("bf16", True, "it was computed in bf16"), ("fp32", True, "fp32 was asked for"),
                                 ("bf16", False, "does not have in hardware")]:  # fmt: skip
        line = next(line for line, _ in targets.lines(measured, precision, fast) if line.startswith("training"))
        assert why in line


def test_a_ratio_without_its_quality_does_not_count() -> None:
    cell = targets.Measured("mcldef cell", [9.0], fault="BA worse by 45.0 points")
    ((line, met),) = [told for told in targets.lines({"mcldef cell": cell}, "bf16", True) if told[0].startswith("mcl")]
    assert met is False
    assert "DOES NOT COUNT, BA worse by 45.0 points" in line
