"""`--sweep`: grammar, what it selects, what it shares, and rows that tell their value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small
from conftest import Bbmcl

from backdoorbench_mcl import params, plan
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.rows import Row


def labels(text: str, *lines: str) -> list[str]:
    return [s.label for s in params.swept(params.selection(text), [params.sweep(line) for line in lines])]


def test_a_column_for_every_value() -> None:
    assert labels("mcldef", "mcldef.temperature=0.1,0.5, 1") == [
        "mcldef(temperature=0.1)", "mcldef(temperature=0.5)", "mcldef(temperature=1)",
    ]  # fmt: skip
    assert labels("mcldef(inverter=nc-box(lr=0.1, lam=1))", "mcldef.temperature=1") == [
        "mcldef(inverter=nc-box(lr=0.1, lam=1), temperature=1)"
    ]
    assert labels("mcldef", "ft.lr=1") == ["mcldef"]


def test_labels_are_selections_again() -> None:
    for one in params.swept(
        params.selection("mcldef(a=1)"), [params.sweep("mcldef.inverter=nc-box(lr=0.1, b=2),true")]
    ):
        again = params.selection(one.label)
        assert (again.name, dict(again.params)) == (one.name, dict(one.params))


def test_several_sweeps_multiply() -> None:
    assert labels("ft", "ft.lr=0.1,0.01", "ft.steps=5,6") == [
        "ft(lr=0.1, steps=5)", "ft(lr=0.1, steps=6)", "ft(lr=0.01, steps=5)", "ft(lr=0.01, steps=6)",
    ]  # fmt: skip


def test_the_clean_rate_has_no_method() -> None:
    found = params.sweep("clean-rate=0.01,0.05")
    assert (found.name, found.parameter, found.values) == (None, "clean_rate", [("0.01", 0.01), ("0.05", 0.05)])


@pytest.mark.parametrize(
    "line, says",
    [
        ("mcldef.temperature", "expected name.param=v1,v2"),
        ("temperature=1,2", "expected name.param=v1,v2"),
        (".x=1", "expected name.param=v1,v2"),
        ("ft.=1", "expected name.param=v1,v2"),
        ("ft.lr=", "at least one value"),
        ("ft.lr=0.1,0.10", "given twice"),
        ("ft.lr=(1", "is missing"),
    ],
)
def test_a_sweep_of_no_use(line: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        params.sweep(line)


@pytest.mark.parametrize(
    "defenses, sweeps, says",
    [
        ("ft", ("mcldef.temperature=1,2",), "no such attack or defense is selected; this run has"),
        ("mcldef", ("mcldeff.temperature=1",), "did you mean 'mcldef'"),
        ("mcldef(temperature=1)", ("mcldef.temperature=2,3",), "sets it already"),
        ("ft", ("defend.lr=0.1,0.2",), "a recipe holds for a whole table"),
        ("ft", ("clean-rate=0.1,1.5",), "expected a share above 0"),
        ("ft", ("clean-rate=true",), "expected a share above 0"),
        ("ft", ("ft.lr=1", "ft.lr=2"), "given twice"),
        ("mcldef", ("mcldef.temprature=1,2",), "temprature"),
    ],
)
def test_a_sweep_that_does_not_fit_the_run(
    defenses: str, sweeps: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    with pytest.raises(UserError, match=says):
        small.resolve(small.options("badnets", defenses, sweeps=sweeps))


def test_clean_rates_share_the_victim_and_have_the_keys_of_runs_of_their_own(
    monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    both = small.build(small.options("badnets", "ft,mcldef", sweeps=("clean-rate=0.1,0.2",)))
    alone = [small.build(small.options("badnets", "ft,mcldef", clean_rate=rate)) for rate in (0.1, 0.2)]
    assert set(both.nodes) == {key for one in alone for key in one.nodes}
    assert sum(node.kind == "train" for node in both.nodes.values()) == 1
    assert {cell.key for cell in both.cells} == {cell.key for one in alone for cell in one.cells}
    assert [(c.row.defense, c.row.clean_rate, c.row.clean_n) for c in both.cells] == [
        ("before", None, None), ("ft", 0.1, 32), ("mcldef", 0.1, 32), ("ft", 0.2, 64), ("mcldef", 0.2, 64),
    ]  # fmt: skip
    titles = [node.title for node in both.nodes.values() if node.kind == "defend"]
    assert len(set(titles)) == len(titles) == 4
    assert isinstance(both, plan.Plan)


def test_a_swept_matrix_from_a_file(bbmcl: Bbmcl, tmp_path: Path) -> None:
    config = tmp_path / "sweep.toml"
    config.write_text("[sweep.ft]\nlr = [0.1, 0.01]\n")
    done = bbmcl(*small.command("badnets", "ft"), "--config", str(config), "--format", "json", "--runs", "runs")
    assert done.returncode == 0, done.stderr
    rows = [Row.from_dict(item) for item in json.loads(done.stdout)]
    assert [row.defense for row in rows] == ["before", "ft(lr=0.1)", "ft(lr=0.01)"]
    assert [row.params["defense"]["params"]["lr"] for row in rows[1:]] == [0.1, 0.01]
    assert len({row.key for row in rows}) == 3


def test_the_clean_rate_swept_from_end_to_end(bbmcl: Bbmcl) -> None:
    command = (*small.command("badnets", "ft"), "--sweep", "clean-rate=0.1,0.2", "--runs", "runs")
    done = bbmcl(*command)
    assert done.returncode == 0, done.stderr
    assert "clean rate 10 %" in done.stdout
    assert "clean rate 20 %" in done.stdout
    assert "ft on badnets 0, 10 % clean" in done.stderr
