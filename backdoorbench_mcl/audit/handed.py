"""What stands in for a benchmark's victim here: an unknown model, and clean images of one's own. Free of torch.

The stages of a matrix are used as they are, inversions and repairs alike, so that a scan computes what a benchmark has
measured. `Handed` says what they face, `HandedGrants` fills their folders.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from .. import cells
from ..datacache import DataInfo
from ..grant import Grants
from ..plan import Node
from ..registry import Described
from ..store import Store
from ..text import one_line

ATTACKER = Described("attack", "the model", "the model", "", "", {}, 0, "", {})  # its target is set where known


@dataclass(frozen=True)
class Handed:
    """A model and clean images. folder: its `weights.safetensors` and `meta.json`; model: its architecture;
    classes, shape (C, H, W), mean, std: how it is fed; sha256: of its weights.

    x: uint8 (N, C, H, W); y: int64 (N,), -1 where unknown. repair, held: positions of images that scans and repairs
    get, and of those that only the judgement sees. names: of the classes.
    """

    folder: Path
    model: Described
    sha256: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip_ok: bool
    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    repair: NDArray[np.int64]
    held: NDArray[np.int64]
    images: str  # SHA-256 over all pixels and labels
    names: tuple[str, ...] | None = None

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return bool((self.y >= 0).all())

    @cached_property
    def data(self) -> DataInfo:
        """The images that repairs get, in their order, with their labels, as stages know data sets."""
        digest = hashlib.sha256(np.ascontiguousarray(self.x[self.repair]).data)
        digest.update(np.ascontiguousarray(self.y[self.repair]).data)
        identity = cells.key({"granted": digest.hexdigest(), "flip_ok": self.flip_ok})
        return DataInfo(
            "", identity, identity, "", len(self.repair), 0, self.classes, self.shape, self.mean, self.std,
            self.flip_ok, False, "full", "", (), Path(),
        )  # fmt: skip

    @property
    def key(self) -> str:
        """Stands where stages name their victim."""
        feeding = {"classes": self.classes, "shape": list(self.shape), "mean": list(self.mean), "std": list(self.std)}
        return cells.key({
            "handed": self.sha256, "model": dict(self.model.identity), "images": self.data.hash, **feeding,
        })  # fmt: skip

    def name(self, label: int) -> str:
        """A label as people know it. Example: `3 (cat)`, `3` where classes have no names."""
        return f"{label} ({one_line(self.names[label], 60)})" if self.names and label < len(self.names) else str(label)


class HandedGrants(Grants):
    """Fills the folders of jobs that face a handed model."""

    def __init__(self, handed: Handed, store: Store, **settings: Any) -> None:
        super().__init__(handed.data, store, **settings)
        self.handed = handed

    def _clean(self, node: Node, victim: Path, into: Path, labels: bool) -> None:
        index = self.handed.repair
        y = self.handed.y[index] if labels else np.full(len(index), -1, np.int64)
        save_file({"x": np.ascontiguousarray(self.handed.x[index]), "y": y}, into / "clean.safetensors")


__all__ = ["ATTACKER", "Handed", "HandedGrants"]
