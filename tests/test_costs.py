"""How long a run will take: by what was measured, or "unknown"."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import small
from conftest import Bbmcl
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_mcl import costs, provenance
from backdoorbench_mcl.costs import Costs, forecast, sort, tails
from backdoorbench_mcl.devices import CONTEXT, ROOM, Devices
from backdoorbench_mcl.plan import Kind, Node, Plan
from backdoorbench_mcl.store import Measured, Stage, Store


def graph(*inputs: tuple[int, ...]) -> Plan:
    """Stages "0", "1", ..., each made from those of the numbers given, all of which are smaller."""
    nodes = {
        str(i): Node(str(i), "defend", f"stage {i}", {}, {f"r{j}": str(j) for j in others}, {}, 0, order=i)
        for i, others in enumerate(inputs)
    }
    return Plan(nodes)


def makespan(found: Plan, seconds: Mapping[str, float], workers: int, rank: Callable[[str], Any]) -> float:
    """On a processor, where workers are the only limit."""
    return costs.makespan(found, seconds, workers, rank, Devices(["cpu"], {}), lambda key: None)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Plan, dict[str, float]]:
    size = draw(st.integers(1, 8))
    above = [tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)))) if i else () for i in range(size)]
    seconds = {str(i): float(draw(st.integers(0, 9))) for i in range(size)}
    return graph(*above), seconds


def longest(found: Plan, seconds: Mapping[str, float], key: str) -> float:
    """The longest chain from a stage on, by walking all of them."""
    below = [other for other, node in found.nodes.items() if key in node.inputs.values()]
    return seconds[key] + max((longest(found, seconds, other) for other in below), default=0.0)


@given(graphs())
def test_the_critical_path_is_the_longest_of_all_chains(made: tuple[Plan, dict[str, float]]) -> None:
    found, seconds = made
    assert tails(found, seconds) == {key: longest(found, seconds, key) for key in found.nodes}


@given(graphs(), st.integers(1, 4))
def test_a_run_takes_what_its_work_and_its_longest_chain_allow(
    made: tuple[Plan, dict[str, float]], workers: int
) -> None:
    found, seconds = made
    ahead = tails(found, seconds)
    took = makespan(found, seconds, workers, lambda key: -ahead[key])
    total, chain = sum(seconds.values()), max(ahead.values())
    assert max(chain, total / workers) - 1e-9 <= took <= total / workers + chain  # Graham's bound
    if workers == 1:
        assert took == total


def test_the_longest_chain_first_is_as_good_as_the_best_order() -> None:
    found = graph((), (), (), (0,))  # 0 then 3 is the long one
    seconds = {"0": 1.0, "1": 2.0, "2": 2.0, "3": 4.0}
    orders = [dict(zip(found.nodes, places, strict=True)) for places in itertools.permutations(range(4))]
    best = min(makespan(found, seconds, 2, order.__getitem__) for order in orders)
    ahead = tails(found, seconds)
    assert makespan(found, seconds, 2, lambda key: -ahead[key]) == best == 5.0
    assert max(makespan(found, seconds, 2, order.__getitem__) for order in orders) == 7.0


def test_what_exists_takes_no_time() -> None:
    assert makespan(graph((), (0,), (1,)), {"2": 3.0}, 2, str) == 3.0


@pytest.mark.parametrize(
    "needs, took",
    [
        ([1000.0, 1000.0, 1000.0], 20.0),  # two fit
        ([None, None, None], 30.0),  # not measured: one at a time
        ([1000.0, None, 1000.0], 30.0),  # the second waits for an empty GPU, and the third does not overtake it
        ([0.0, None, 0.0], 10.0),  # two use none of the GPU
        ([9000.0, 9000.0, 0.0], 20.0),
    ],
)
def test_on_a_gpu_jobs_have_to_fit(needs: list[float | None], took: float) -> None:
    found = graph((), (), ())
    room = Devices(["cuda:0"], {"cuda:0": (2000.0 + 2 * CONTEXT) / ROOM + 1})
    seconds = dict.fromkeys(found.nodes, 10.0)
    assert costs.makespan(found, seconds, 3, str, room, lambda key: needs[int(key)]) == took
    assert room.held == {"cuda:0": []}


def test_what_nobody_measured_counts_as_what_was_or_else_as_one() -> None:
    found = graph((), (0,), (1,), ())
    assert costs.ahead(found, set(found.nodes), Costs(found, [])) == {"0": 3.0, "1": 2.0, "2": 1.0, "3": 1.0}
    kinds: list[Kind] = ["train", "invert", "defend", "train"]
    for (key, node), kind in zip(list(found.nodes.items()), kinds, strict=True):
        spec = {**ROOT, "stage": kind}
        found.nodes[key] = dataclasses.replace(node, kind=kind, spec=spec)
    known = Costs(found, [])
    known.add("0", 40.0)
    known.add("2", 6.0)
    assert costs.ahead(found, {"0", "1", "2", "3"}, known) == {"0": 86.0, "1": 46.0, "2": 6.0, "3": 40.0}
    assert costs.ahead(found, set(), known) == dict.fromkeys(found.nodes, 0.0)
    assert costs.ahead(found, {"1", "2"}, known) == {"0": 46.0, "1": 46.0, "2": 6.0, "3": 0.0}


ROOT: dict[str, Any] = {"stage": "train", "data": {"hash": "d"}, "model": {"name": "m"}, "attack": {"name": "a"}}
REPAIR: dict[str, Any] = {
    "stage": "defend", "suspect": "t", "victim": "v",
    "defense": {"name": "ft", "params": {"x": 1}}, "clean_rate": 0.05, "target": 3,
    "defense_seed": 0, "needs": {"trigger": "t"}, "precision": "fp32",
}  # fmt: skip


def test_seeds_do_not_make_a_sort_and_work_does() -> None:
    roots = {"v": ROOT, "w": {**ROOT, "victim_seed": 7, "attack": {"name": "b"}}, "u": {**ROOT, "model": {"name": "n"}}}
    same = sort(REPAIR, roots.get)
    assert same
    changes: list[dict[str, Any]] = [
        {"defense_seed": 1}, {"suspect": "s"}, {"victim": "w"}, {"target": 0}, {"target": 5},
        {"needs": {"trigger": "s"}},
    ]  # fmt: skip
    for change in changes:
        assert sort({**REPAIR, **change}, roots.get) == same, change
    changes = [
        {"clean_rate": 0.1}, {"precision": "bf16"}, {"victim": "u"}, {"target": None}, {"needs": {}},
        {"defense": {"name": "ft", "params": {"x": 2}}},
    ]  # fmt: skip
    for change in changes:
        assert sort({**REPAIR, **change}, roots.get) not in ("", same), change
    assert sort({**REPAIR, "victim": "gone"}, roots.get) == ""


@pytest.mark.parametrize(
    "spec",
    [
        [], "stage", None, {}, {"data": {}}, {"victim": ["a"]}, {"victim": "itself"}, {"victim": {"x": 1}},
        {"data": {}, "model": {}, "lr": float("nan")}, {"data": {}, "model": {}, "x": object()},
    ],
)  # fmt: skip
def test_what_is_no_spec_has_no_sort(spec: Any) -> None:
    """Archives bring stages that others wrote."""
    loop = {"itself": {"victim": "itself"}}
    assert sort(spec, loop.get) == ""
    known = Costs(Plan({}), [Measured(spec, 5.0)], loop.get)
    assert known._seconds == {}


def judged(seconds: float) -> Measured:
    return Measured({"stage": "predict", "weights": "r", "trial": "t", "precision": "fp32"}, seconds)


def test_an_estimate_is_the_median_of_its_sort_or_nothing() -> None:
    nodes = {key: dataclasses.replace(node, spec=spec) for (key, node), spec in zip(
        graph((), (0,), (1,)).nodes.items(),
        [ROOT, {**REPAIR, "victim": "0"}, {"stage": "predict", "weights": "1", "trial": "q", "precision": "fp32"}],
        strict=True,
    )}  # fmt: skip
    found, stored = Plan(nodes), {"r": {**REPAIR, "victim": "v"}, "v": {**ROOT, "attack": {"name": "other"}}}
    known = Costs(found, [judged(s) for s in (9.0, 1.0, 2.0)], stored.get)
    assert [known.seconds(key) for key in found.nodes] == [None, None, 2.0]
    told = forecast(found, found.nodes, known, 2, str)
    assert (told.seconds, told.unknown, told.stages) == (2.0, 2, 3)
    assert str(told) == "about 2.0 s, without 2 of 3 stages, which were not measured yet"
    known.add("0", 60.0)
    known.add("1", 30.0)
    assert str(forecast(found, found.nodes, known, 2, str)) == "about 1:32 min"
    assert forecast(found, ["1", "2"], known, 2, str, {"1": 25.0}).seconds == 5.0 + 2.0
    assert forecast(found, ["1"], known, 2, str, {"1": 99.0}).seconds == 0.0  # longer than ever: it ends any moment
    assert str(forecast(found, found.nodes, known, None, str)) == "about 1:32 min, one job after the other"
    assert forecast(found, ["2"], Costs(found, []), 2, str).seconds is None
    assert str(forecast(found, [], known, 2, str)) == "nothing is left to compute"


def test_only_the_newest_measurements_count() -> None:
    found = graph(())
    found.nodes["0"] = dataclasses.replace(found.nodes["0"], spec=ROOT)
    known = Costs(found, [Measured(ROOT, 100.0)] * 50 + [Measured(ROOT, 4.0)] * costs.RECENT)
    assert known.seconds("0") == 4.0


def test_stages_of_other_machines_and_thread_counts_tell_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "meta.json").write_text("{}")
    here = provenance.machine_class("cpu")
    told: list[tuple[str, int, dict[str, Any]]] = [
        (here, 1, {"seconds": 5.0, "wall": 6.0}), (here, 1, {"seconds": 3.0}), (here, 2, {"seconds": 70.0}),
        ("other", 1, {"seconds": 80.0}), (here, 1, {"seconds": -1.0}), (here, 1, {}),
    ]  # fmt: skip
    gpu = [0.0, 700.0, None, None, None, None]
    for (_, _, cost), most in zip(told, gpu, strict=True):
        cost.update({} if most is None else {"peak_gpu_mb": most})
    for i, (machine, threads, cost) in enumerate(told):
        store.commit(Stage(f"{i}", "train", ROOT, "", {"machine": machine, "threads": threads}, cost), tmp_path / "out")
    assert [(stage.seconds, stage.gpu_mb) for stage in store.measured(here, 1, 10)] == [(6.0, 0.0), (3.0, 700.0)]
    assert [stage.seconds for stage in store.measured(here, 1, 3)] == [3.0]  # of the newest three one says something
    store.close()


def test_another_seed_takes_what_the_first_one_took(bbmcl: Bbmcl) -> None:
    arguments = (*small.command("badnets", "ft"), "--workers", "1", "--threads-per-job", "1")
    assert "time: unknown, nothing like it was measured here" in bbmcl(*arguments, "--dry-run").stdout
    first = bbmcl(*arguments)
    assert "time: unknown" in first.stderr
    assert "time: nothing is left to compute" in bbmcl(*arguments, "--dry-run").stdout
    told = bbmcl(*arguments, "--seeds", "0-1", "--dry-run").stdout
    assert "time: about" in told
    assert "not measured" not in told
    assert "not measured yet" in bbmcl(*small.command("badnets", "ft,mcldef"), "--workers", "1",
                                       "--threads-per-job", "1", "--dry-run").stdout  # fmt: skip


def test_every_stage_of_a_plan_has_a_sort(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    found = small.build(small.options("badnets,blend", "ft,mcldef", seeds="0-1", defense_seeds="0-2", retune=10))
    known = Costs(found, [])
    sorts = {key: known.sort(key) for key in found.nodes}
    assert all(sorts.values())
    kinds = {
        kind: {sorts[k] for k, node in found.nodes.items() if node.kind == kind}
        for kind in ("train", "defend", "predict")
    }
    assert {kind: len(names) for kind, names in kinds.items()} == {"train": 2, "defend": 2, "predict": 1}
