"""The stage graph of a matrix: what has to exist, under which key, before which row (design 1.3). Pure, free of torch.

train -> trial -> predict (before) ; train -> invert -> defend -> predict ; two predictions -> row. The key of a
stage is a hash of everything that its result depends on, the keys of its inputs included; so equal stages of
different cells are one node, and what a store holds is never computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from . import cells, evaluate
from .registry import Described
from .request import BEFORE, Request
from .rows import Row

Kind = Literal["train", "trial", "invert", "defend", "predict"]
_REMAINING: Mapping[Kind, int] = {"train": 4, "trial": 3, "invert": 3, "defend": 2, "predict": 1}


@dataclass(frozen=True)
class Node:
    """One stage. spec: what is hashed; inputs: role -> key of another stage; methods: what the job constructs."""

    key: str
    kind: Kind
    title: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    methods: Mapping[str, Described]
    victim_seed: int
    defense_seed: int | None = None
    target: int | None = None
    gated_by: str | None = None  # the `before` prediction that decides whether this stage is worth computing
    order: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Among ready stages the one with most work behind it goes first; ties in the order of the table."""
        return (-_REMAINING[self.kind], self.order)


@dataclass(frozen=True)
class Cell:
    """One row to be: its skeleton and the stages that it is scored from. `after` is None for the undefended victim."""

    row: Row
    victim: str
    before: str
    after: str | None
    own: tuple[str, ...]  # stages whose seconds are the cell's alone
    shared: tuple[str, ...]  # stages that other cells use too, charged to each user in the report

    @property
    def key(self) -> str:
        return self.row.key


@dataclass
class Plan:
    """Nodes by key, and cells in the order of the table."""

    nodes: dict[str, Node] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)


class Builder:
    """Makes the nodes of one request; each method returns the key of the stage that it names."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.plan = Plan()
        data = request.data
        self.data = {"hash": data.hash, "mean": list(data.mean), "std": list(data.std), "flip_ok": data.flip_ok}
        self.clean_n = cells.clean_count(data.n_train, request.clean_rate)

    def node(self, kind: Kind, title: str, spec: Mapping[str, Any], **rest: Any) -> str:
        full = {"stage": kind, **spec}
        key = cells.key(full)
        if key not in self.plan.nodes:
            self.plan.nodes[key] = Node(key, kind, title, full, order=len(self.plan.nodes), **rest)
        return key

    def train(self, attack: Described, seed: int) -> str:
        request = self.request
        spec = {
            "data": self.data,
            "attack": attack.identity,
            "model": request.model.identity,
            "recipe": request.train.identity,
            "victim_seed": seed,
            "precision": request.precision,
        }
        methods = {"attack": attack, "model": request.model, "recipe": request.train}
        return self.node("train", f"{attack.label} victim {seed}", spec, inputs={}, methods=methods, victim_seed=seed)

    def trial(self, attack: Described, seed: int, victim: str) -> str:
        spec = {"victim": victim, "test": self.request.data.hash_test, "attack": attack.identity}
        title = f"{attack.label} test images {seed}"
        methods = {"attack": attack}
        return self.node("trial", title, spec, inputs={"victim": victim}, methods=methods, victim_seed=seed)

    def predict(self, weights: str, trial: str, title: str, seed: int, gate: str | None) -> str:
        spec = {"weights": weights, "trial": trial, "precision": self.request.precision}
        inputs = {"weights": weights, "trial": trial}
        methods = {"model": self.request.model}
        return self.node("predict", title, spec, inputs=inputs, methods=methods, victim_seed=seed, gated_by=gate)

    def invert(self, text: str, attack: Described, victim: str, seed: int, defense_seed: int, gate: str) -> str:
        request = self.request
        inverter = request.inverters[text]
        spec = {
            "victim": victim,
            "inverter": inverter.identity,
            "target": attack.attack_target,
            "clean_rate": request.clean_rate,
            "augment": request.defend.params["augment"],
            "defense_seed": defense_seed,
            "precision": request.precision,
        }
        return self.node(
            "invert", f"{inverter.label} on {attack.label} {seed}", spec, inputs={"victim": victim},
            methods={"inverter": inverter, "model": request.model, "recipe": request.defend}, victim_seed=seed,
            defense_seed=defense_seed, target=attack.attack_target, gated_by=gate,
        )  # fmt: skip

    def defend(
        self, defense: Described, attack: Described, victim: str, seed: int, defense_seed: int, gate: str
    ) -> str:
        request = self.request
        needs = {
            name: self.invert(need["method"], attack, victim, seed, defense_seed, gate)
            for name, need in defense.needs.items()
        }
        spec = {
            "victim": victim,
            "defense": defense.identity,
            "recipe": request.defend.identity,
            "needs": needs,
            "target": attack.attack_target if "target" in defense.knows else None,
            "clean_rate": request.clean_rate,
            "defense_seed": defense_seed,
            "precision": request.precision,
        }
        return self.node(
            "defend", f"{defense.label} on {attack.label} {seed}", spec,
            inputs={"victim": victim, **{f"need-{name}": key for name, key in needs.items()}},
            methods={"defense": defense, "model": request.model, "recipe": request.defend}, victim_seed=seed,
            defense_seed=defense_seed, target=attack.attack_target, gated_by=gate,
        )  # fmt: skip

    def row(self, attack: Described, defense: Described | None, seed: int, defense_seed: int | None, key: str) -> Row:
        request = self.request
        resolved: dict[str, Any] = {
            "attack": dict(attack.identity),
            "model": dict(request.model.identity),
            "dataset": dict(request.dataset.identity),
            "train": dict(request.train.params),
        }
        inverter = None
        if defense is not None:
            resolved["defense"] = dict(defense.identity)
            resolved["defend"] = dict(request.defend.params)
            for need in defense.needs.values():
                inverter = request.inverters[need["method"]].label
                resolved["inverter"] = dict(request.inverters[need["method"]].identity)
        return Row(
            key=key, dataset=request.dataset.label, model=request.model.label, attack=attack.label,
            defense=BEFORE if defense is None else defense.label, victim_seed=seed, defense_seed=defense_seed,
            clean_rate=None if defense is None else request.clean_rate, state="failed",
            knows=() if defense is None else defense.knows,
            uses_labels=None if defense is None else defense.uses_labels,
            inverter=inverter, clean_n=None if defense is None else self.clean_n, target=attack.attack_target,
            preset=request.preset, budget=request.budget, precision=request.precision, device=request.device,
            toy=request.data.toy, params=resolved,
        )  # fmt: skip

    def undefended(self, attack: Described, seed: int) -> tuple[str, str, str]:
        """Victim, its triggered test images, its predictions."""
        victim = self.train(attack, seed)
        trial = self.trial(attack, seed, victim)
        return victim, trial, self.predict(victim, trial, f"before on {attack.label} {seed}", seed, None)

    def cell(
        self, attack: Described, seed: int, undefended: tuple[str, str, str], defense: Described | None = None,
        defense_seed: int | None = None,
    ) -> None:  # fmt: skip
        victim, trial, before = undefended
        after, own, shared = None, (before,), (victim,)
        if defense is not None and defense_seed is not None:
            repaired = self.defend(defense, attack, victim, seed, defense_seed, before)
            after = self.predict(repaired, trial, f"judge {defense.label} on {attack.label} {seed}", seed, before)
            needs = self.plan.nodes[repaired].spec["needs"]
            own, shared = (repaired,), tuple(needs.values())
        key = cells.key({"row": [before, after], "evaluator": evaluate.EVALUATOR_VERSION})
        row = self.row(attack, defense, seed, defense_seed, key)
        self.plan.cells.append(Cell(row, victim, before, after, own, shared))


def build(request: Request) -> Plan:
    """The plan of a request: per attack and victim seed the undefended victim, then each defense and defense seed."""
    builder = Builder(request)
    for attack in request.attacks:
        for seed in request.seeds:
            undefended = builder.undefended(attack, seed)
            builder.cell(attack, seed, undefended)
            for defense in request.defenses:
                for defense_seed in request.defense_seeds:
                    builder.cell(attack, seed, undefended, defense, defense_seed)
    return builder.plan


__all__ = ["Builder", "Cell", "Kind", "Node", "Plan", "build"]
