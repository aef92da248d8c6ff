"""What a runs folder holds beside rows: predictions, embeddings. What is missing or damaged is None."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from .. import artefacts
from ..evaluate import marks
from ..rows import Row
from ..store import Store
from .figures import Embedding
from .inference import Judged


class Evidence:
    """The artefacts behind rows of one runs folder; every answer is None where a stage is gone or damaged."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def folder(self, row: Row, kind: str) -> Path | None:
        """The verified artefact of a stage that a row names."""
        stage = self.store.stage(row.stages[kind]) if kind in row.stages else None
        if stage is None:
            return None
        try:
            return self.store.open(stage)
        except artefacts.Damaged:
            return None

    def predictions(self, row: Row) -> Judged | None:
        """Right or wrong, fired or not, per test image."""
        folder = self.folder(row, "predict")
        if folder is None:
            return None
        found = load_file(folder / "predictions.safetensors")
        counted = found["counted"].astype(bool)
        return Judged(found["clean"] == found["y"], (found["triggered"] == found["goal"])[counted])

    def embedding(self, row: Row) -> Embedding | None:
        """The features of the row's model in the plane."""
        folder = self.folder(row, "embed")
        if folder is None:
            return None
        found = load_file(folder / "embedding.safetensors")
        title = row.attack if row.defense == "before" else f"{row.attack} / {row.defense}"
        seeds = f"victim seed {row.victim_seed}"
        if row.defense_seed is not None:
            seeds += f", defense seed {row.defense_seed}"
        mark = "target class erased" if marks(row)["target_class_erased"] else ""
        return Embedding(title, seeds, found["xy"], found["y"].astype(np.int64), artefacts.read_meta(folder), mark)


__all__ = ["Evidence"]
