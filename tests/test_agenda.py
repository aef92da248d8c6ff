"""Which cell is looked at, and which stage goes first."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import small

from backdoorbench_mcl import matrix, runner
from backdoorbench_mcl.agenda import Agenda, closures, stages_of
from backdoorbench_mcl.plan import Plan
from backdoorbench_mcl.runner import Settings


@pytest.fixture(scope="module")
def found(toy_env: dict[str, str]) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        return small.build(
            small.options("badnets,blend", "ft,mcldef,mcldef+", seeds="0-1", defense_seeds="0-2", retune=10)
        )


def above(plan: Plan, key: str) -> set[str]:
    """What has to exist before a stage, by walking up."""
    node = plan.nodes[key]
    direct = set(node.inputs.values()) | ({node.gated_by} if node.gated_by else set())
    return {key}.union(*(above(plan, other) for other in direct))


def test_a_cell_rests_on_all_that_its_stages_are_made_from(found: Plan) -> None:
    assert {key: set(keys) for key, keys in closures(found).items()} == {key: above(found, key) for key in found.nodes}
    agenda = Agenda(found, {})
    for cell, keys in zip(found.cells, agenda.rests, strict=True):
        assert keys == set().union(*(above(found, key) for key in stages_of(cell)))


def test_cells_are_due_when_one_of_their_stages_moves_and_not_otherwise(found: Plan) -> None:
    agenda = Agenda(found, {})
    assert agenda.due() == list(range(len(found.cells)))
    assert agenda.due() == []
    last = len(found.cells) - 1
    agenda.touch([str(found.cells[last].after)])
    assert agenda.due() == [last]
    victim = found.cells[0].victim
    agenda.touch([victim])
    of_victim = [i for i, cell in enumerate(found.cells) if cell.victim == victim]
    assert agenda.due() == of_victim
    agenda.close(of_victim[0])
    agenda.touch([victim])
    assert agenda.due() == of_victim[1:]
    agenda.touch_all()
    assert agenda.due() == [i for i in range(len(found.cells)) if i != of_victim[0]]


def test_what_no_cell_waits_for_is_not_computed(found: Plan) -> None:
    agenda = Agenda(found, {})
    cell = next(i for i, cell in enumerate(found.cells) if cell.after)
    own = found.nodes[str(found.cells[cell].after)]
    agenda.add(own)
    agenda.close(cell)
    assert agenda.waiting[own.key] == 0
    assert agenda.pop() is None


def test_judgements_first_and_then_what_has_most_behind_it(found: Plan) -> None:
    by_kind = {node.kind: node for node in found.nodes.values()}
    judged, repaired, trained, inverted = (by_kind[kind] for kind in ("predict", "defend", "train", "invert"))
    agenda = Agenda(found, {repaired.key: 30.0, trained.key: 90.0, inverted.key: 90.0, judged.key: 1.0})
    for ready in (repaired, inverted, trained, judged, trained):
        agenda.add(ready)
    order = [agenda.pop() for _ in range(5)]
    assert order == [judged, trained, inverted, repaired, None]  # at equal times what comes first in the graph


def test_what_is_queued_is_put_in_order_anew_when_times_are_known(found: Plan) -> None:
    by_kind = {node.kind: node for node in found.nodes.values()}
    trained, inverted, repaired = by_kind["train"], by_kind["invert"], by_kind["defend"]
    agenda = Agenda(found, {})
    for ready in (trained, inverted, repaired):
        agenda.add(ready)
    agenda.reckon({repaired.key: 9.0, inverted.key: 20.0, trained.key: 1.0})
    agenda.add(inverted)  # still queued once
    assert [agenda.pop() for _ in range(4)] == [inverted, repaired, trained, None]


def test_a_first_run_orders_what_waits_by_what_it_has_measured(
    monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str], tmp_path: Path
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    told: list[dict[str, float]] = []
    reckon = Agenda.reckon

    def look(self: Agenda, ahead: Mapping[str, float]) -> None:
        told.append(dict(ahead))
        reckon(self, ahead)

    monkeypatch.setattr(Agenda, "reckon", look)
    monkeypatch.setattr(matrix, "LEISURE", 0)
    asked = small.options("badnets", "ft")
    assert {row.state for row in runner.run_matrix(asked, Settings(runs=tmp_path / "runs"), live=False)} == {"ok"}
    kinds = {node.kind for node in small.build(asked).nodes.values()}
    assert len(told) >= len(kinds)  # each sort once
    assert max(told[0].values()) > 0.0
    assert max(told[0].values()) % 1 != 0  # measured seconds, not the count of stages


@pytest.mark.parametrize("seed", range(3))
def test_a_run_looks_at_a_cell_at_most_once_for_each_of_its_stages(found: Plan, seed: int) -> None:
    """The loop of `Matrix` with stages that are there as soon as they are begun, in whatever order."""
    rng, agenda = random.Random(seed), Agenda(found, {})
    stored: set[str] = set()
    looks = dict.fromkeys(agenda.open, 0)
    moved: set[str] = set()
    while agenda.open:
        agenda.touch(moved)
        moved.clear()
        for i in agenda.due():
            looks[i] += 1
            missing = agenda.rests[i] - stored
            if not missing:
                agenda.close(i)
            for key in missing:
                lacking = {*found.nodes[key].inputs.values(), *filter(None, [found.nodes[key].gated_by])}
                if lacking <= stored:
                    agenda.add(found.nodes[key])
        begun = [node for _ in range(rng.randint(1, 3)) if (node := agenda.pop())]
        assert begun or not agenda.open
        moved |= {node.key for node in begun}
        stored |= moved
    assert stored == set(found.nodes)
    assert all(count <= len(agenda.rests[i]) + 1 for i, count in looks.items())
