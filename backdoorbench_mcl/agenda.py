"""What to do next: which cells are worth a look, which of the stages that can be computed goes first. Free of torch.

A cell is looked at when a stage that it rests on has come, gone or failed, so that a run takes time in proportion to
its cells and not to their square.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping

from .plan import Cell, Node, Plan


def stages_of(cell: Cell) -> list[str]:
    """Keys of the stages that a cell names itself; what these are made from comes on top."""
    return [cell.before, *filter(None, [cell.after]), *cell.extras.values()]


def closures(plan: Plan) -> dict[str, frozenset[str]]:
    """Stage -> itself, and every stage that has to exist before it: inputs and gates, however far up."""
    out: dict[str, frozenset[str]] = {}
    for key, node in plan.nodes.items():  # a plan names inputs before what is made from them
        out[key] = frozenset({key}).union(*(out[other] for other in node.above))
    return out


class Agenda:
    """The unfinished cells of a plan, and the stages that they are waiting for. ahead: of `costs`.

    Example: `agenda.touch([key])`, then look at each of `agenda.due()`, `agenda.add(node)` what one lacks, and compute
    `agenda.pop()`.
    """

    def __init__(self, plan: Plan, ahead: Mapping[str, float]) -> None:
        self.plan = plan
        self.ahead = ahead
        above = closures(plan)
        self.rests = [frozenset[str]().union(*(above[key] for key in stages_of(cell))) for cell in plan.cells]
        self.users: dict[str, list[int]] = {key: [] for key in plan.nodes}
        for i, keys in enumerate(self.rests):
            for key in keys:
                self.users[key].append(i)
        self.open = set(range(len(plan.cells)))
        self.waiting = Counter({key: len(cells) for key, cells in self.users.items()})
        self._due = set(self.open)
        self._heap: list[tuple[tuple[float, ...], str]] = []
        self._queued: set[str] = set()

    def close(self, cell: int) -> None:
        """A cell is settled, and waits for nothing any more."""
        self.open.discard(cell)
        self._due.discard(cell)
        for key in self.rests[cell]:
            self.waiting[key] -= 1

    def touch(self, keys: Iterable[str]) -> None:
        """Stages came, went or failed: the cells that rest on them are due."""
        for key in keys:
            self._due.update(self.open.intersection(self.users[key]))

    def touch_all(self) -> None:
        """Anything may have changed."""
        self._due |= self.open

    def due(self) -> list[int]:
        """The cells to look at, in the order of the table; they are not due any more then."""
        due, self._due = sorted(self._due), set()
        return due

    def add(self, node: Node) -> None:
        """A stage that can be computed now, all it is made from being there."""
        if node.key not in self._queued:
            self._queued.add(node.key)
            heapq.heappush(self._heap, (self.rank(node), node.key))

    def reckon(self, ahead: Mapping[str, float]) -> None:
        """Times are known better: what is queued is put in order anew."""
        self.ahead = ahead
        self._heap = [(self.rank(self.plan.nodes[key]), key) for key in self._queued]
        heapq.heapify(self._heap)

    def rank(self, node: Node) -> tuple[float, ...]:
        """Which stage goes first: a judgement, which takes seconds and ends a cell, so that a run that is stopped
        half-way has half of its rows; then what has most work behind it, by measured time and else by kind.
        """
        turn, order = node.rank
        return (min(turn, 1), -self.ahead.get(node.key, 0.0), turn, order)

    def pop(self) -> Node | None:
        """The stage to compute next, None where nothing can be."""
        while self._heap:
            _, key = heapq.heappop(self._heap)
            self._queued.discard(key)
            if self.waiting[key]:
                return self.plan.nodes[key]
        return None


__all__ = ["Agenda", "closures", "stages_of"]
