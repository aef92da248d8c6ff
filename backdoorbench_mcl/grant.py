"""Who sees what: the one file to audit. It fills the folder of a job, and a job can read nothing else.

| stage   | finds in its folder                                                                                   |
|---------|-------------------------------------------------------------------------------------------------------|
| train   | a pointer to the prepared data set (the attacker controls the training data)                          |
| trial   | the same pointer, and what the attack prepared for this victim                                        |
| invert  | the victim's weights, the clean images without labels, the target label                               |
| defend  | the victim's weights, the clean images (labels only if it uses them), the stages that it needs, and   |
|         | of what it declared in `knows` the values; never the trigger, the poison indices or a test image      |
| predict | a model's weights and one shuffled array of images, clean and triggered, without labels or flags      |

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
from safetensors.numpy import load_file, save_file

from . import artefacts, cells, datacache
from .errors import PluginError
from .plan import Kind, Node
from .store import Store

ROLES: Mapping[Kind, tuple[cells.Role, ...]] = {  # the draws of each job; the seed of another would tell about it
    "train": ("init", "trigger", "poison", "order"),
    "trial": ("init", "stamp"),
    "invert": ("init", "invert", "stamp"),
    "defend": ("init", "order"),
    "predict": ("init",),
}
LONG: frozenset[Kind] = frozenset({"train", "invert", "defend"})  # jobs that leave snapshots
GRANTABLE = frozenset({"target"})


class Grants:
    """Fills job folders for the stages of one data set. threads, isolation, snapshot_every: settings of every job."""

    def __init__(
        self, data: datacache.DataInfo, store: Store, *, clean_rate: float, device: str, precision: str, threads: int,
        isolation: str, snapshot_every: float = 2.0,
    ) -> None:  # fmt: skip
        self.data = data
        self.store = store
        self.clean_rate = clean_rate
        self.common: dict[str, Any] = {
            "device": device,
            "precision": precision,
            "threads": threads,
            "isolation": isolation,
            "snapshot_every": snapshot_every,
        }

    def fill(self, node: Node, inputs: Mapping[str, Path], folder: Path) -> None:
        """Write `spec.json` and `in/` of the job that computes `node`, from the verified artefacts of its inputs.

        Raises PluginError when the method declared knowledge that cannot be granted.
        """
        (folder / "in").mkdir()
        # the name of a stage's snapshots is its key, from which `predict` could tell how its images were shuffled
        snapshots = self.store.snapshots(node.key).absolute() if node.kind in LONG else folder / "snapshots"
        spec: dict[str, Any] = {
            "job": node.kind,
            **self.common,
            "snapshot": str(snapshots),
            "readable": [],
            "seeds": {
                role: cells.seed(role, self.data.hash, node.victim_seed, node.defense_seed) for role in ROLES[node.kind]
            },
            "data": {
                k: v for k, v in self.data.as_dict().items() if k in ("classes", "shape", "mean", "std", "flip_ok")
            },
            **{name: method.spec for name, method in node.methods.items()},
        }
        getattr(self, f"_{node.kind}")(node, inputs, folder / "in", spec)
        (folder / "spec.json").write_text(json.dumps(spec))

    def _point_to_data(self, spec: dict[str, Any]) -> None:
        spec["data"] = self.data.as_dict()
        spec["readable"] = [str(self.data.folder)]

    def _train(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        self._point_to_data(spec)

    def _trial(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        self._point_to_data(spec)
        shutil.copyfile(inputs["victim"] / "attack.safetensors", into / "attack.safetensors")
        spec["attack_meta"] = artefacts.read_meta(inputs["victim"])["attack"]

    def _invert(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        if node.target is None:
            raise PluginError(f"{node.methods['inverter'].label} needs one target label; this attack has none")
        shutil.copyfile(inputs["victim"] / "weights.safetensors", into / "weights.safetensors")
        self._clean(node, into, labels=False)
        spec["grants"] = {"target": node.target}

    def _defend(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        defense = node.methods["defense"]
        withheld = sorted(set(defense.knows) - GRANTABLE)
        if withheld:
            raise PluginError(f"{defense.label} asks to know {', '.join(withheld)}, which this version cannot grant")
        shutil.copyfile(inputs["victim"] / "weights.safetensors", into / "weights.safetensors")
        self._clean(node, into, labels=bool(defense.uses_labels))
        spec["grants"] = {"target": node.target} if "target" in defense.knows else {}
        spec["needs"] = {}
        for name in defense.needs:
            source = inputs[f"need-{name}"]
            shutil.copyfile(source / "trigger.safetensors", into / f"need-{name}.safetensors")
            spec["needs"][name] = {"class": artefacts.read_meta(source)["class"]}

    def _clean(self, node: Node, into: Path, labels: bool) -> None:
        split_seed = cells.seed("split", self.data.hash, node.victim_seed, node.defense_seed)
        index = cells.clean_index(self.data.n_train, self.clean_rate, split_seed)
        x, y = datacache.open_split(self.data, "train")
        y = np.array(y[index]) if labels else np.full(len(index), -1, np.int64)
        save_file({"x": np.ascontiguousarray(x[index]), "y": y}, into / "clean.safetensors")

    def _predict(self, node: Node, inputs: Mapping[str, Path], into: Path, spec: dict[str, Any]) -> None:
        shutil.copyfile(inputs["weights"] / "weights.safetensors", into / "weights.safetensors")
        clean, _ = datacache.open_split(self.data, "test")
        triggered = load_file(inputs["trial"] / "trial.safetensors")["x"]
        order = self.shuffle(node)
        shuffled = np.lib.format.open_memmap(
            into / "x.npy", mode="w+", dtype=np.uint8, shape=(2 * len(clean), *clean.shape[1:])
        )
        inverse = np.argsort(order)
        shuffled[inverse[: len(clean)]] = clean
        shuffled[inverse[len(clean) :]] = triggered
        shuffled.flush()

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
        known = load_file(trial / "trial.safetensors")
        _, y = datacache.open_split(self.data, "test")
        (out / "labels.safetensors").unlink()
        save_file(
            {
                "clean": plain[:count].astype(small),
                "triggered": plain[count:].astype(small),
                "y": np.array(y).astype(small),
                "goal": known["goal"].astype(small),
                "counted": known["counted"].astype(np.uint8),
            },
            out / "predictions.safetensors",
        )
        (out / artefacts.META).write_text(json.dumps({"images": count}))


__all__ = ["GRANTABLE", "Grants"]
