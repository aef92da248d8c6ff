"""What stages take, from what stages like them took (design: estimates are measurements or "unknown"). Free of torch.

Two stages are of one sort when they differ in seeds alone: same work, same methods with the same parameters, same
network, data and precision, on the same class of machine with the same number of threads. None stands in for another.
"""

from __future__ import annotations

import heapq
import statistics
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from . import provenance
from .cells import canonical
from .devices import Devices
from .plan import Plan
from .progress import duration
from .store import Measured, Store

Specs = Callable[[str], "Mapping[str, Any] | None"]  # key of a stage -> what is hashed
_OTHERS = ("victim", "weights")  # where a spec names the stage whose network and data it shares
_SEEDS = {"victim_seed", "defense_seed", "trial", "test", *_OTHERS}
DEPTH = 20  # stages between a judgement and its victim: there are three at most
_GIVEN = {"target", "verdict", "needs", "suspect"}  # which one is given makes no difference, whether one is does
REMEMBERED = 5000  # the newest stages of a store that are looked at
RECENT = 20  # measurements of a sort that an estimate rests on: machines and versions change


def sort(spec: Any, specs: Specs) -> str:
    """The sort of a stage; specs: looks up the stages that it was made from. "" where these are gone, and for what is
    no spec of a stage: stores may come from elsewhere.
    """
    root = _root(spec, specs)
    if root is None:
        return ""
    own = {name: value for name, value in spec.items() if name not in _SEEDS}
    own |= {name: spec[name] not in (None, {}) for name in _GIVEN & set(spec)}
    try:
        return sys.intern(canonical({**own, "data": root["data"], "model": root["model"]}))
    except (ValueError, TypeError, RecursionError):
        return ""


def _root(spec: Any, specs: Specs) -> Mapping[str, Any] | None:
    """The spec that names network and data of a stage: its own, or that of the network that it was made from."""
    for _ in range(DEPTH):
        if not isinstance(spec, Mapping):
            return None
        if "data" in spec:
            return spec if "model" in spec else None
        other = next((spec[name] for name in _OTHERS if name in spec), None)
        spec = specs(other) if isinstance(other, str) else None
    return None


class Costs:
    """Estimates of the stages of a plan. measured: oldest first; specs: of stages that the plan lacks."""

    def __init__(self, plan: Plan, measured: Iterable[Measured], specs: Specs = lambda key: None) -> None:
        self.plan = plan
        self._specs = specs
        self._seconds: dict[str, deque[float]] = {}
        self._gpu: dict[str, deque[float]] = {}
        self._sorts: dict[str, str] = {}
        for stage in measured:
            self._add(sort(stage.spec, self._spec), stage.seconds, stage.gpu_mb)

    def _spec(self, key: str) -> Mapping[str, Any] | None:
        return self.plan.nodes[key].spec if key in self.plan.nodes else self._specs(key)

    def _add(self, name: str, seconds: float, gpu_mb: float | None) -> None:
        if not name:
            return
        self._seconds.setdefault(name, deque(maxlen=RECENT)).append(seconds)
        if gpu_mb is not None:
            self._gpu.setdefault(name, deque(maxlen=RECENT)).append(gpu_mb)

    def sort(self, key: str) -> str:
        """The sort of a stage of the plan."""
        if key not in self._sorts:
            self._sorts[key] = sort(self.plan.nodes[key].spec, self._spec)
        return self._sorts[key]

    def add(self, key: str, seconds: float, gpu_mb: float | None = None) -> None:
        """A stage of the plan has just been measured."""
        self._add(self.sort(key), seconds, gpu_mb)

    def seconds(self, key: str) -> float | None:
        """What a stage takes, the median of its sort; None where nothing of it was measured."""
        found = self._seconds.get(self.sort(key)) if self._seconds else None
        return statistics.median(found) if found else None

    def gpu_mb(self, key: str) -> float | None:
        """The most memory of a GPU that a stage of this sort has held, 0 for one that uses none; None where that was
        not measured.
        """
        found = self._gpu.get(self.sort(key)) if self._gpu else None
        return max(found) if found else None


def of(plan: Plan, store: Store, device: str, threads: int) -> Costs:
    """What the store measured on machines like this one with as many threads a job."""

    def spec(key: str) -> Mapping[str, Any] | None:
        stage = store.stage(key)
        return None if stage is None else stage.spec

    return Costs(plan, store.measured(provenance.machine_class(device), threads, REMEMBERED), spec)


@dataclass(frozen=True)
class Forecast:
    """How long a run takes. seconds: with `unknown` of `stages` stages counted as nothing; None where nothing of it was
    measured.
    """

    seconds: float | None
    unknown: int
    stages: int
    alone: bool = False  # how many jobs there will be at once is not known, so one is counted on

    def __str__(self) -> str:
        if not self.stages:
            return "nothing is left to compute"
        if self.seconds is None:
            return "unknown, nothing like it was measured here"
        some = f", without {self.unknown} of {self.stages} stages, which were not measured yet" if self.unknown else ""
        one = ", one job after the other" if self.alone else ""
        return f"about {duration(self.seconds)}{one}{some}"


def forecast(
    plan: Plan, missing: Collection[str], costs: Costs, workers: int | None, rank: Callable[[str], Any],
    spent: Mapping[str, float] = MappingProxyType({}), devices: Devices | None = None,
) -> Forecast:  # fmt: skip
    """What computing the `missing` stages takes with `workers` jobs at once, the smallest `rank` first.

    workers: None where nobody knows. spent: seconds that stages which are being computed have had by now. devices:
    empty, on which jobs have to find room; they are used up.
    """
    known = {key: costs.seconds(key) for key in missing}
    unknown = sum(seconds is None for seconds in known.values())
    left = {key: max(0.0, (whole or 0.0) - spent.get(key, 0.0)) for key, whole in known.items()}
    if unknown == len(known):
        return Forecast(None, unknown, len(known))
    place = Devices(["cpu"], {}) if devices is None else devices
    return Forecast(
        makespan(plan, left, workers or 1, rank, place, costs.gpu_mb), unknown, len(known), alone=workers is None
    )


def makespan(
    plan: Plan, seconds: Mapping[str, float], workers: int, rank: Callable[[str], Any],
    devices: Devices, need: Callable[[str], float | None],
) -> float:  # fmt: skip
    """Seconds that the stages of `seconds` take, `workers` at once, each after those that it is made from.

    Of those that can be started the one with the smallest `rank` is, and waits for room where `devices` have none for
    what it is measured to `need` of them. Stages that are not in `seconds` exist.
    """
    above = {key: node.above & seconds.keys() for key, node in plan.nodes.items() if key in seconds}
    below: dict[str, list[str]] = {}
    for key, others in above.items():
        for other in others:
            below.setdefault(other, []).append(key)
    ready = [(rank(key), key) for key, others in above.items() if not others]
    heapq.heapify(ready)
    running: list[tuple[float, str, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < workers and (name := devices.place(need(ready[0][1]))) is not None:
            _, key = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[key], key, name))
        now, done, name = heapq.heappop(running)
        devices.release(name, need(done))
        for key in below.get(done, ()):
            above[key].discard(done)
            if not above[key]:
                heapq.heappush(ready, (rank(key), key))
    return now


def ahead(plan: Plan, missing: Collection[str], costs: Costs) -> dict[str, float]:
    """Stage -> seconds of the longest chain of stages that begins with it: the critical path, from there on.

    A stage that was not measured counts as much as the median of its kind in the plan, or of all where its kind was
    not, or as one where nothing was; what exists, as nothing.
    """
    if not missing:  # to ask for the sorts of all stages takes seconds in a large plan
        return dict.fromkeys(plan.nodes, 0.0)
    known = {key: seconds for key in plan.nodes if (seconds := costs.seconds(key)) is not None}
    kinds: dict[str, list[float]] = {}
    for key, seconds in known.items():
        kinds.setdefault(plan.nodes[key].kind, []).append(seconds)
    typical = {kind: statistics.median(found) for kind, found in kinds.items()}
    other = statistics.median(known.values()) if known else 1.0
    return tails(plan, {key: known.get(key, typical.get(plan.nodes[key].kind, other)) for key in missing})


def tails(plan: Plan, seconds: Mapping[str, float]) -> dict[str, float]:
    """The longest chain that begins with each stage. seconds: of stages alone, nothing for those that it lacks."""
    out = {key: seconds.get(key, 0.0) for key in plan.nodes}
    for key, node in reversed(plan.nodes.items()):  # a plan names inputs before what is made from them
        for other in node.above:
            out[other] = max(out[other], seconds.get(other, 0.0) + out[key])
    return out


__all__ = ["RECENT", "Costs", "Forecast", "ahead", "forecast", "makespan", "of", "sort", "tails"]
