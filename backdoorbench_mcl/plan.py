"""The stage graph of a matrix: what has to exist, under which key, before which row (design 1.3). Pure, free of torch.

surrogate -> train -> trial -> predict (before) ; train -> verdict -> invert -> defend -> predict ; two predictions
-> row. Surrogates and verdicts are there only where a method needs them, and a defense may need the result of another,
an inverter the trigger of another. The key of a stage is a hash of everything that its result depends on, the keys of
its inputs included; so equal stages of different cells are one node, and what a store holds is never computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from . import cells, evaluate
from .needed import labels_used, wanted_by
from .registry import Described
from .request import BEFORE, CONTROL, Request
from .rows import Row

Kind = Literal["surrogate", "train", "suspect", "trial", "verdict", "invert", "defend", "retune", "predict", "embed"]
_TURN: Mapping[Kind, int] = {  # first what takes seconds and ends a cell, then what has most work behind it
    "predict": 0, "surrogate": 1, "train": 2, "suspect": 3, "trial": 3, "verdict": 3, "invert": 4, "defend": 5,
    "retune": 5, "embed": 6,
}  # fmt: skip
NEED = "need-"  # role of an input that a method asked for, with the method's name for it


_ACTORS: Mapping[Kind, str] = {  # whose method does the work of a stage
    "surrogate": "model", "train": "attack", "suspect": "attack", "trial": "attack", "verdict": "inverter",
    "invert": "inverter", "defend": "defense", "retune": "model", "predict": "model", "embed": "model",
}  # fmt: skip


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
    def above(self) -> set[str]:
        """Keys of the stages that have to exist before this one is begun: its inputs, and the gate."""
        return {*self.inputs.values(), *filter(None, [self.gated_by])}

    @property
    def actor(self) -> Described:
        """The method that a failure of this stage is blamed on."""
        return self.methods[_ACTORS[self.kind]]

    @property
    def rank(self) -> tuple[int, int]:
        """Which of the ready stages goes first: by `_TURN`, then in the order of the table.

        A cell is judged as soon as it is repaired, so that a run that is stopped half-way has half of its rows.
        """
        return (_TURN[self.kind], self.order)


@dataclass(frozen=True)
class Cell:
    """One row to be: its skeleton and the stages that it is scored from. `after` is None for the undefended victim,
    and where `undefined` says why the method has no meaning for the attack.
    """

    row: Row
    victim: str
    before: str
    after: str | None
    own: tuple[str, ...]  # stages whose seconds are the cell's alone
    shared: tuple[str, ...]  # stages that other cells use too, charged to each user in the report
    surrogates: tuple[str, ...] = ()
    trigger: str | None = None  # the inversion that the defense itself asked for
    undefined: str = ""
    extras: Mapping[str, str] = field(default_factory=dict)  # stages beside the score: "embed", "retuned" -> key

    @property
    def key(self) -> str:
        return self.row.key


@dataclass
class Plan:
    """Nodes by key, and cells in the order of the table."""

    nodes: dict[str, Node] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)


class Undefended(NamedTuple):
    """Keys of a victim, its triggered test images and its predictions."""

    victim: str
    trial: str
    before: str


@dataclass(frozen=True)
class Case:
    """One victim as a repair with one defense seed faces it."""

    attack: Described
    seed: int
    defense_seed: int
    victim: str
    trial: str
    before: str
    clean_rate: float

    @property
    def name(self) -> str:
        """For titles. Example: `badnets 0`"""
        return f"{self.attack.label} {self.seed}"

    @property
    def fields(self) -> dict[str, Any]:
        """What all nodes of the case have in common."""
        return {"victim_seed": self.seed, "defense_seed": self.defense_seed, "gated_by": self.before}


def _roles(needs: Mapping[str, str]) -> dict[str, str]:
    """Names of needs -> the roles under which their stages are inputs."""
    return {NEED + name: key for name, key in needs.items()}


class Builder:
    """Makes the nodes of one request; each method returns the key of the stage that it names."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.plan = Plan()
        data = request.data
        self.data = {"hash": data.hash, "mean": list(data.mean), "std": list(data.std), "flip_ok": data.flip_ok}
        self.exclusion = {"exclude_poisoned": True} if request.exclude_poisoned else {}

    def node(self, kind: Kind, title: str, spec: Mapping[str, Any], **rest: Any) -> str:
        full = {"stage": kind, **spec}
        key = cells.key(full)
        if key not in self.plan.nodes:
            self.plan.nodes[key] = Node(key, kind, title, full, order=len(self.plan.nodes), **rest)
        return key

    def at(self, case: Case) -> str:
        """What a title says of the clean rate: something only where there are several."""
        return f", {100 * case.clean_rate:g} % clean" if len(self.request.clean_rates) > 1 else ""

    def surrogate(self, name: str) -> str:
        """A clean model of the victim's architecture, the attacker's own: one for all attacks and victim seeds."""
        request = self.request
        recipe = request.needed["recipe", name]
        spec = {
            "data": self.data,
            "model": request.model.identity,
            "recipe": recipe.identity,
            "precision": request.precision,
        }
        methods = {"model": request.model, "recipe": recipe}
        return self.node("surrogate", f"{name} surrogate", spec, inputs={}, methods=methods, victim_seed=0)

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
        needs = {name: self.surrogate(need["method"]) for name, need in attack.needs.items()}
        if needs:
            spec["needs"] = needs
        methods = {"attack": attack, "model": request.model, "recipe": request.train}
        title = f"{attack.label} victim {seed}"
        return self.node("train", title, spec, inputs=_roles(needs), methods=methods, victim_seed=seed)

    def suspect(self, case: Case) -> str:
        """The training set as a victim saw it."""
        source = self.plan.nodes[case.victim]
        spec = {"victim": case.victim, "version": 1}
        inputs = {**source.inputs, "victim": case.victim}
        title = f"{case.attack.label} training images {case.seed}"
        return self.node("suspect", title, spec, inputs=inputs, methods=source.methods, victim_seed=case.seed,
                         gated_by=case.before)  # fmt: skip

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

    def inversion(self, case: Case, inverter: Described) -> dict[str, Any]:
        """What every inversion depends on."""
        return {
            **self.exclusion,
            "victim": case.victim,
            "inverter": inverter.identity,
            "clean_rate": case.clean_rate,
            "augment": self.request.defend.params["augment"],
            "defense_seed": case.defense_seed,
            "precision": self.request.precision,
        }

    def verdict(self, text: str, case: Case) -> str:
        """What the detector behind `text` says of the victim."""
        inverter = self.request.needed["inverter", text]
        methods = {"inverter": inverter, "model": self.request.model, "recipe": self.request.defend}
        title = f"{inverter.label} verdict on {case.name}{self.at(case)}"
        spec = self.inversion(case, inverter)
        return self.node("verdict", title, spec, inputs={"victim": case.victim}, methods=methods, **case.fields)

    def invert(self, need: Mapping[str, Any], case: Case) -> str:
        """A trigger for the attack's target, or one for each label that a verdict flagged."""
        request, attack = self.request, case.attack
        inverter = request.needed["inverter", need["method"]]
        detected = need["verdict"] is not None
        spec = {**self.inversion(case, inverter), "target": None if detected else attack.attack_target}
        inputs, methods = {"victim": case.victim}, {"inverter": inverter, "model": request.model}
        if detected:
            inputs["verdict"] = spec["verdict"] = self.verdict(need["verdict"], case)
        # what it relies on is fitted to the same labels, or the target would get in by way of it
        needs = {
            name: self.invert({**other, "verdict": need["verdict"]}, case) for name, other in inverter.needs.items()
        }
        if needs:
            spec["needs"] = needs
            inputs.update(_roles(needs))
        if "location" in inverter.knows:
            inputs["trial"] = case.trial
        if "trigger" in inverter.knows:
            methods["attack"] = attack
        return self.node(
            "invert", f"{inverter.label} on {case.name}{self.at(case)}", spec, inputs=inputs,
            methods={**methods, "recipe": request.defend}, target=attack.attack_target, **case.fields,
        )  # fmt: skip

    def defend(self, defense: Described, case: Case) -> str:
        """The repaired model, after everything that the defense needs."""
        request, attack = self.request, case.attack
        needs = {name: self.need(need, case) for name, need in defense.needs.items()}
        spec = {
            **self.exclusion,
            "victim": case.victim,
            "defense": defense.identity,
            "recipe": request.defend.identity,
            "needs": needs,
            "target": attack.attack_target if "target" in defense.knows else None,
            "clean_rate": case.clean_rate,
            "defense_seed": case.defense_seed,
            "precision": request.precision,
        }
        told = {"suspect": self.suspect(case)} if "suspect" in defense.knows else {}
        spec.update({**told, "exclude_poisoned": True} if told else {})
        return self.node(
            "defend", f"{defense.label} on {case.name}{self.at(case)}", spec,
            inputs={"victim": case.victim, **_roles(needs), **told},
            methods={"defense": defense, "model": request.model, "recipe": request.defend},
            target=attack.attack_target, **case.fields,
        )  # fmt: skip

    def need(self, need: Mapping[str, Any], case: Case) -> str:
        """The stage behind one need of a defense."""
        if need["kind"] == "trigger":
            return self.invert(need, case)
        if need["kind"] == "verdict":
            return self.verdict(need["method"], case)
        return self.defend(self.request.needed["defense", need["method"]], case)

    def behind(self, key: str) -> list[str]:
        """The stages that a repair rests on, nearest first: inversions, verdicts, other repairs; never the victim."""
        out: list[str] = []
        level = [key]
        while level:
            inputs = [self.plan.nodes[other].inputs.items() for other in level]
            level = [other for found in inputs for role, other in found if role == "verdict" or role.startswith(NEED)]
            out += level
        return list(dict.fromkeys(out))

    def methods_behind(self, method: Described) -> list[Described]:
        """Everything that a method needs, and what that needs in turn."""
        out: list[Described] = []
        waiting = [method]
        while waiting:
            waiting = [self.request.needed[item] for other in waiting for item in wanted_by(other)]
            out += waiting
        return out

    def row(
        self, attack: Described, defense: Described | None, seed: int, defense_seed: int | None, rate: float | None,
        key: str,
    ) -> Row:  # fmt: skip
        request = self.request
        resolved: dict[str, Any] = {
            "attack": dict(attack.identity),
            "model": dict(request.model.identity),
            "dataset": dict(request.dataset.identity),
            "train": dict(request.train.params),
        }
        if attack.attack_control:
            made = {**attack.identity, "params": attack.attack_control["params"]}
            resolved["control"] = {"attack": made, "set": attack.attack_control["set"]}
        inverter = None
        for method in [attack] if defense is None else [attack, defense]:
            for other in self.methods_behind(method):
                resolved.setdefault(f"needs {other.kind}", {})[other.label] = dict(other.identity)
        if defense is not None:
            resolved["defense"] = dict(defense.identity)
            resolved["defend"] = dict(request.defend.params)
            resolved.update(self.exclusion)
            triggers = [need["method"] for need in defense.needs.values() if need["kind"] == "trigger"]
            for text in triggers[:1]:
                inverter = request.needed["inverter", text].label
                resolved["inverter"] = dict(request.needed["inverter", text].identity)
        return Row(
            key=key, dataset=request.dataset.label, model=request.model.label, attack=attack.label,
            defense=BEFORE if defense is None else defense.label, victim_seed=seed, defense_seed=defense_seed,
            clean_rate=rate, state="failed",
            knows=() if defense is None else defense.told,
            uses_labels=None if defense is None else labels_used(defense, request.needed),
            inverter=inverter, clean_n=None if rate is None else cells.clean_count(request.data.n_train, rate),
            target=attack.attack_target, controls=attack.attack_controls,
            preset=request.preset, budget=request.budget, precision=request.precision, device=request.device,
            toy=request.data.toy, data=request.data.note, overrides=self.overrides(attack, defense), params=resolved,
        )  # fmt: skip

    def overrides(self, attack: Described, defense: Described | None) -> tuple[str, ...]:
        """The `--set` lines that mean something in a row."""
        methods = [self.request.dataset, self.request.model, self.request.train, attack, *self.methods_behind(attack)]
        if defense is not None:
            methods += [self.request.defend, defense, *self.methods_behind(defense)]
        names = {name for m in methods for name in (m.label, m.full_name, m.full_name.rpartition("/")[2])}
        return tuple(line for line in self.request.overrides if line.partition("=")[0].rpartition(".")[0] in names)

    def retuned(self, weights: str, facing: Undefended, what: str, seed: int, case: Case | None = None) -> str:
        """The judgement of a model after a few steps on triggered images (spec 12.3, item 9). case: of a repaired one;
        a clean one learns the trigger whatever became of the attack.
        """
        spec = {"weights": weights, "trial": facing.trial, "images": self.request.retune, "version": 1,
                "precision": self.request.precision}  # fmt: skip
        inputs = {"weights": weights, "trial": facing.trial}
        methods = {"model": self.request.model}
        fields = {"victim_seed": seed} if case is None else case.fields
        tuned = self.node("retune", f"re-tune {what}", spec, inputs=inputs, methods=methods, **fields)
        return self.predict(
            tuned, facing.trial, f"judge re-tuned {what}", seed, None if case is None else facing.before
        )

    def embed(self, weights: str, facing: Undefended, what: str, seed: int) -> str:
        """The features of a model on clean and triggered test images, laid out in the plane (spec 10)."""
        spec = {"weights": weights, "victim": facing.victim, "trial": facing.trial, "version": 1,
                "precision": self.request.precision}  # fmt: skip
        inputs = {"weights": weights, "victim": facing.victim, "trial": facing.trial}
        gate = None if weights == facing.victim else facing.before
        methods = {"model": self.request.model}
        return self.node(
            "embed", f"embed {what}", spec, inputs=inputs, methods=methods, victim_seed=seed, gated_by=gate
        )

    def undefended(self, attack: Described, seed: int) -> Undefended:
        """Victim, its triggered test images, its predictions."""
        victim = self.train(attack, seed)
        trial = self.trial(attack, seed, victim)
        return Undefended(victim, trial, self.predict(victim, trial, f"before on {attack.label} {seed}", seed, None))

    def cell(
        self, attack: Described, seed: int, facing: Undefended, defense: Described | None = None,
        defense_seed: int | None = None, rate: float | None = None,
    ) -> None:  # fmt: skip
        after, undefined = None, ""
        triggers: list[str] = []
        extras: dict[str, str] = {}
        own: tuple[str, ...] = (facing.before,)
        shared: tuple[str, ...] = (facing.victim,)
        if defense is not None and "target" in defense.told and attack.attack_target is None:
            undefined = "the attack has no single target label"
        elif defense is not None and attack.attack_controls == "training" and "suspect" in defense.told:
            undefined = "the attacker trained the model: there is no training set to look at"
        elif defense is not None and attack.attack_controls == "training" and self.exclusion:
            undefined = "the attacker trained the model: which images are poisoned differs from epoch to epoch"
        elif defense is not None and defense_seed is not None and rate is not None:
            case = Case(attack, seed, defense_seed, *facing, rate)
            repaired = self.defend(defense, case)
            title = f"judge {defense.label} on {case.name}{self.at(case)}"
            after = self.predict(repaired, facing.trial, title, seed, facing.before)
            own, shared = (repaired,), tuple(self.behind(repaired))
            what = f"{defense.label} on {case.name}{self.at(case)}"
            if self.request.retune and not is_control(attack):
                extras["retuned"] = self.retuned(repaired, facing, what, seed, case)
            if self.request.embed and not is_control(attack):
                extras["embed"] = self.embed(repaired, facing, what, seed)
            inputs = self.plan.nodes[repaired].inputs
            triggers = [inputs[NEED + name] for name, need in defense.needs.items() if need["kind"] == "trigger"]
        elif defense is None:
            if self.request.embed and not is_control(attack):
                extras["embed"] = self.embed(facing.victim, facing, f"{attack.label} {seed}", seed)
            clean = next((other for other in self.request.attacks if is_control(other)), None)
            if self.request.retune and clean is not None and not is_control(attack):
                what = f"{clean.label} on {attack.label} {seed}"
                extras["retuned_clean"] = self.retuned(self.train(clean, seed), facing, what, seed)
        spec = {"row": [facing.before, after], "evaluator": evaluate.EVALUATOR_VERSION}
        if undefined and defense is not None:
            needs = [other.identity for other in self.methods_behind(defense)]
            recipe = self.request.defend.identity
            about = {**self.exclusion, "clean_rate": rate, "defense_seed": defense_seed}
            spec["undefined"] = {**about, "defense": defense.identity, "needs": needs, "recipe": recipe}
        row = self.row(attack, defense, seed, defense_seed, rate, cells.key(spec))
        roles = self.plan.nodes[facing.victim].inputs
        surrogates = tuple(key for role, key in roles.items() if role.startswith(NEED))
        trigger = triggers[0] if triggers else None
        self.plan.cells.append(
            Cell(row, facing.victim, facing.before, after, own, shared, surrogates, trigger, undefined, extras)
        )


def is_control(attack: Described) -> bool:
    """Whether an attack is none: its victims are clean models."""
    return attack.full_name.rpartition("/")[2] == CONTROL


def build(request: Request) -> Plan:
    """The plan of a request: per attack and victim seed the undefended victim, then each clean rate, defense and
    defense seed."""
    builder = Builder(request)
    for attack in request.attacks:
        for seed in request.seeds:
            facing = builder.undefended(attack, seed)
            builder.cell(attack, seed, facing)
            for rate in request.clean_rates:
                for defense in request.defenses:
                    for defense_seed in request.defense_seeds:
                        builder.cell(attack, seed, facing, defense, defense_seed, rate)
    return builder.plan


__all__ = ["NEED", "Builder", "Case", "Cell", "Kind", "Node", "Plan", "Undefended", "build"]
