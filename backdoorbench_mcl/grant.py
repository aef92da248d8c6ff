"""Who sees what: the one file to audit. It fills the folder of a job, and a job can read nothing else.

| stage     | finds in its folder                                                                                 |
|-----------|-----------------------------------------------------------------------------------------------------|
| surrogate | a pointer to the prepared data set (the attacker controls the training data)                        |
| train     | the same pointer, and the weights of the surrogates that it needs                                   |
| suspect   | the same again, and what the attack prepared for this victim                                        |
| trial     | the same pointer, and what the attack prepared for this victim                                      |
| verdict   | the victim's weights, the clean images without labels                                               |
| invert    | the same, and the target label, or the labels that a verdict flagged; of what the inverter declared |
|           | in `knows` the values: the place of the patch, or the attack itself with what it prepared           |
| defend    | the victim's weights, the clean images (labels only if it uses them), the stages that it needs, and |
|           | of what it declared in `knows` the values: the target label, the poisoned training set in random     |
|           | order; never the poison indices or a test image                                                     |
| retune    | a repaired model's weights, a few triggered test images with the attacker's labels, their clean     |
|           | twins with the true ones                                                                            |
|           | (a repair that is built again by a function of its own runs in retune, predict and embed as well)   |
| predict   | a model's weights and one shuffled array of images, clean and triggered, without labels or flags    |
| embed     | the weights of a model and of its victim, clean and triggered test images apart                     |

Free of torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from . import artefacts, cells, datacache
from .errors import NotApplicable, PluginError
from .plan import NEED, Kind, Node
from .registry import Described
from .store import Store

ROLES: Mapping[Kind, tuple[cells.Role, ...]] = {  # the draws of each job; the seed of another would tell about it
    "surrogate": ("init", "order"),
    "train": ("init", "trigger", "poison", "order"),
    "suspect": ("init", "trigger", "poison", "suspect"),
    "trial": ("init", "stamp"),
    "verdict": ("init", "invert", "stamp"),
    "invert": ("init", "invert", "stamp"),
    "defend": ("init", "order"),
    "retune": ("init",),
    "predict": ("init",),
    "embed": ("init",),
}
POISON_INDEX = "poison_index"  # in what an attack left: which training images it changed
_CHUNK = 256  # triggered images copied at a time
EMBEDDED = 5000  # points of an embedding at most (spec 10)
LONG: frozenset[Kind] = frozenset(
    {"surrogate", "train", "suspect", "verdict", "invert", "defend"}
)  # jobs that leave snapshots
GRANTABLE: Mapping[str, frozenset[str]] = {
    "inverter": frozenset({"target", "location", "trigger"}), "defense": frozenset({"target", "suspect"}),
}  # fmt: skip


class Grants:
    """Fills job folders for the stages of one data set. threads, isolation, snapshot_every: settings of every job."""

    def __init__(
        self, data: datacache.DataInfo, store: Store, *, device: str, precision: str, threads: int,
        isolation: str, snapshot_every: float = 2.0, exclude_poisoned: bool = False,
    ) -> None:  # fmt: skip
        self.data = data
        self.store = store
        self.exclude_poisoned = exclude_poisoned
        self.common: dict[str, Any] = {
            "device": device,
            "precision": precision,
            "threads": threads,
            "isolation": isolation,
            "snapshot_every": snapshot_every,
        }

    def fill(self, node: Node, inputs: Mapping[str, Path], folder: Path, device: str | None = None) -> None:
        """Write `spec.json` and `in/` of the job that computes `node`, from the verified artefacts of its inputs.

        device: the one of several that this job gets, None where the run has one.

        Raises PluginError when the method declared knowledge that cannot be granted, NotApplicable where the attack has
        no such thing to tell.
        """
        (folder / "in").mkdir()
        # the name of a stage's snapshots is its key, from which `predict` could tell how its images were shuffled
        snapshots = self.store.snapshots(node.key).absolute() if node.kind in LONG else folder / "snapshots"
        spec: dict[str, Any] = {
            "job": node.kind,
            **self.common,
            "device": device or self.common["device"],
            "snapshot": str(snapshots),
            "readable": [],
            "seeds": {role: self._seed(node, role) for role in ROLES[node.kind]},
            "data": {
                k: v for k, v in self.data.as_dict().items() if k in ("classes", "shape", "mean", "std", "flip_ok")
            },
            **{name: method.spec for name, method in node.methods.items()},
        }
        getattr(self, f"_{node.kind}")(node, inputs, folder / "in", spec)
        (folder / "spec.json").write_text(json.dumps(spec))

    def _seed(self, node: Node, role: cells.Role) -> int:
        """A surrogate draws from roles of its own, or it would be the attack's victim without the poison."""
        own: Mapping[str, cells.Role] = {"init": "surrogate-init", "order": "surrogate-order"}
        role = own[role] if node.kind == "surrogate" else role
        return cells.seed(role, self.data.hash, node.victim_seed, node.defense_seed)

    def _point_to_data(self, spec: dict[str, Any]) -> None:
        spec["data"] = self.data.as_dict()
        spec["readable"] = [str(self.data.folder)]

    def _surrogate(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        self._point_to_data(spec)

    def _train(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        self._point_to_data(spec)
        self._needs(node.methods["attack"], inputs, into, spec)

    def _suspect(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        self._train(node, inputs, into, spec)
        self._attack(inputs, into, spec)
        spec["content"] = artefacts.read_meta(inputs["victim"]).get("content")

    def _trial(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        self._point_to_data(spec)
        self._attack(inputs, into, spec)

    def _attack(self, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        """What the attack prepared for a victim."""
        shutil.copyfile(inputs["victim"] / "attack.safetensors", into / "attack.safetensors")
        spec["attack_meta"] = artefacts.read_meta(inputs["victim"])["attack"]

    def _model(self, source: Path, into: Path, spec: dict[str, Any], name: str = "weights") -> None:
        """The weights of a stage, and how its network is built again where a repair changed it."""
        shutil.copyfile(source / "weights.safetensors", into / f"{name}.safetensors")
        if (how := artefacts.read_meta(source).get("rebuild")) is not None:
            spec.setdefault("rebuild", {})[name] = how

    def _invert(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        inverter = node.methods["inverter"]
        shutil.copyfile(inputs["victim"] / "weights.safetensors", into / "weights.safetensors")
        self._clean(node, inputs["victim"], into, labels=False)
        self._needs(inverter, inputs, into, spec)
        _withhold(inverter)
        spec["grants"] = {}
        if "location" in inverter.knows:
            spec["grants"]["location"] = artefacts.read_meta(inputs["trial"]).get("location")
            if spec["grants"]["location"] is None:
                raise NotApplicable(f"{inverter.label}: the trigger of this attack is no patch of fixed pixels")
        if "trigger" in inverter.knows:
            known = load_file(inputs["victim"] / "attack.safetensors")
            state = {name: tensor for name, tensor in known.items() if name != POISON_INDEX}
            save_file(state, into / "attack.safetensors")
            spec["attack_meta"] = artefacts.read_meta(inputs["victim"])["attack"]
        spec["detected"] = "verdict" in inputs
        if spec["detected"]:
            spec["labels"] = artefacts.read_meta(inputs["verdict"])["flagged"]
        elif node.target is None:
            raise NotApplicable(f"{inverter.label}: the attack has no single target label")
        else:
            spec["labels"] = [node.target]

    def _verdict(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        shutil.copyfile(inputs["victim"] / "weights.safetensors", into / "weights.safetensors")
        self._clean(node, inputs["victim"], into, labels=False)

    def _defend(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        defense = node.methods["defense"]
        _withhold(defense)
        shutil.copyfile(inputs["victim"] / "weights.safetensors", into / "weights.safetensors")
        self._clean(node, inputs["victim"], into, labels=bool(defense.uses_labels))
        spec["grants"] = {"target": node.target} if "target" in defense.knows else {}
        if "suspect" in defense.knows:
            shutil.copyfile(inputs["suspect"] / "suspect.safetensors", into / "suspect.safetensors")
            spec["grants"]["suspect"] = "suspect.safetensors"
        self._needs(defense, inputs, into, spec)

    def _needs(self, method: Described, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        """The stages that a method asked for, and what is to be made of their tensors."""
        spec["needs"] = {}
        for name, need in method.needs.items():
            source = inputs[NEED + name]
            meta = artefacts.read_meta(source)
            told = {"kind": need["kind"]}
            if need["kind"] == "verdict":
                told["verdict"] = {field: meta[field] for field in ("flagged", "index", "norms")}
            elif need["kind"] == "trigger":
                shutil.copyfile(source / "trigger.safetensors", into / f"{NEED}{name}.safetensors")
                told.update({field: meta[field] for field in ("class", "labels", "modules", "detected")})
            else:
                self._model(source, into, spec, NEED + name)
            spec["needs"][name] = told

    def clean_index(self, node: Node, victim: Path) -> NDArray[np.int64]:
        """Which training images are the clean ones of a stage. victim: the artefact of the model that it faces.

        Who sees the training set gets no clean copy of a poisoned image: it would find the twin, and the trigger.
        """
        split_seed = cells.seed("split", self.data.hash, node.victim_seed, node.defense_seed)
        exclude = poisoned(victim) if self.exclude_poisoned or "suspect" in node.inputs else None
        return cells.clean_index(self.data.n_train, float(node.spec["clean_rate"]), split_seed, exclude)

    def _clean(self, node: Node, victim: Path, into: Path, labels: bool) -> None:
        index = self.clean_index(node, victim)
        x, y = datacache.open_split(self.data, "train")
        y = np.array(y[index]) if labels else np.full(len(index), -1, np.int64)
        save_file({"x": np.ascontiguousarray(x[index]), "y": y}, into / "clean.safetensors")

    def _predict(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        self._model(inputs["weights"], into, spec)
        clean, _ = datacache.open_split(self.data, "test")
        order = self.shuffle(node)
        shuffled = np.lib.format.open_memmap(
            into / "x.npy", mode="w+", dtype=np.uint8, shape=(2 * len(clean), *clean.shape[1:])
        )
        inverse = np.argsort(order)
        shuffled[inverse[: len(clean)]] = clean
        with safe_open(inputs["trial"] / "trial.safetensors", "np") as trial:
            triggered = trial.get_slice("x")
            for start in range(0, len(clean), _CHUNK):
                places = inverse[len(clean) :][start : start + _CHUNK]
                shuffled[places] = triggered[start : start + len(places)]
        shuffled.flush()

    def _retune(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        self._model(inputs["weights"], into, spec)
        clean, y = datacache.open_split(self.data, "test")
        with safe_open(inputs["trial"] / "trial.safetensors", "np") as trial:
            counted = np.flatnonzero(trial.get_tensor("counted"))
            used = self._drawn("retune", node, counted, int(node.spec["images"]))
            triggered = _picked(trial.get_slice("x"), used)
            goal = trial.get_tensor("goal")[used]
        x = np.concatenate([triggered, np.ascontiguousarray(clean[used])])
        save_file(
            {"x": x, "y": np.concatenate([goal, np.array(y[used])]).astype(np.int64)}, into / "retune.safetensors"
        )
        spec["used"] = used.tolist()

    def _embed(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        """A fifth of the clean test images of each class (spec 10), half as many triggered ones and their twins."""
        self._model(inputs["weights"], into, spec)
        self._model(inputs["victim"], into, spec, "victim")
        x, y = datacache.open_split(self.data, "test")
        labels = np.array(y)
        most = 2 * EMBEDDED // 3 // self.data.classes
        groups = [np.flatnonzero(labels == label) for label in range(self.data.classes)]
        drawn = [self._drawn("embed", node, g, max(1, min(len(g) // 5, most))) for g in groups if len(g)]
        plain = np.concatenate(drawn)
        with safe_open(inputs["trial"] / "trial.safetensors", "np") as trial:
            counted = np.flatnonzero(trial.get_tensor("counted"))
            shown = self._drawn("embed", node, counted, max(1, len(plain) // 2))
            triggered = _picked(trial.get_slice("x"), shown)
        tensors: dict[str, NDArray[Any]] = {
            "clean": np.ascontiguousarray(x[plain]), "y": labels[plain], "triggered": triggered,
            "twins": np.ascontiguousarray(x[shown]),
        }  # fmt: skip
        save_file(tensors, into / "points.safetensors")

    def _drawn(self, role: cells.Role, node: Node, among: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """`count` of the test images `among`, or all; the same ones for every model of a victim seed, sorted."""
        rng = np.random.Generator(np.random.PCG64(cells.seed(role, self.data.hash, node.victim_seed)))
        if len(among) == 0:
            raise NotApplicable("the attack counts no test image")
        return np.sort(rng.permutation(among)[:count])

    def shuffle(self, node: Node) -> NDArray[np.int64]:
        """Position in the shuffled array -> position in (clean test images, triggered test images)."""
        seed = cells.seed("shuffle", node.key, node.victim_seed, node.defense_seed)
        return np.random.Generator(np.random.PCG64(seed)).permutation(2 * self.data.n_test).astype(np.int64)

    def judge(self, node: Node, trial: Path, out: Path) -> None:
        """Turn the labels of a predict job into stored predictions, in test order, beside what judges them."""
        labels = load_file(out / "labels.safetensors")["labels"]
        count = self.data.n_test
        plain = np.empty(2 * count, np.int64)
        plain[self.shuffle(node)] = labels
        small = np.uint8 if self.data.classes <= 256 else np.uint16
        with safe_open(trial / "trial.safetensors", "np") as known:
            goal, counted = known.get_tensor("goal"), known.get_tensor("counted")
        _, y = datacache.open_split(self.data, "test")
        (out / "labels.safetensors").unlink()
        save_file(
            {
                "clean": plain[:count].astype(small),
                "triggered": plain[count:].astype(small),
                "y": np.array(y).astype(small),
                "goal": goal.astype(small),
                "counted": counted.astype(np.uint8),
            },
            out / "predictions.safetensors",
        )
        (out / artefacts.META).write_text(json.dumps({"images": count}))


def _picked(images: Any, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Images of a stored array that may be larger than memory."""
    return np.concatenate([images[int(i) : int(i) + 1] for i in index])


def poisoned(victim: Path) -> NDArray[np.int64]:
    """Indices of the training images that a victim's attacker changed."""
    with safe_open(victim / "attack.safetensors", "np") as attack:
        index: NDArray[np.int64] = attack.get_tensor(POISON_INDEX)
    return index


def _withhold(method: Described) -> None:
    withheld = sorted(set(method.knows) - GRANTABLE[method.kind])
    if withheld:
        raise PluginError(f"{method.label} asks to know {', '.join(withheld)}, which this version cannot grant")


__all__ = ["GRANTABLE", "Grants", "poisoned"]
