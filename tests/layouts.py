"""Tiny data sets in every layout that the loaders read, made on the fly.

pixels(count, classes=10, shape=(3, 32, 32), seed=0) -> Part     uint8 (N, C, H, W), int64 (N,), every class present
write_pickles(folder, train, test, protocol=2)      torchvision's cifar-10-batches-py
write_parquet(folder, train, test, ...)             <split>-00000-of-00001.parquet of PNG or JPEG bytes
write_folder(folder, part)                          folder/CLASS/N.png
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Part = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


def pixels(count: int, classes: int = 10, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Part:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), np.uint8), np.arange(count, dtype=np.int64) % classes


def encode(image: npt.NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, kind)
    return buffer.getvalue()


def write_pickles(folder: Path, train: Part, test: Part, protocol: int = 2) -> None:
    folder.mkdir(parents=True)
    parts = [(train[0][i::5], train[1][i::5]) for i in range(5)]
    for name, (x, y) in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], [*parts, test], strict=True):
        batch = {
            "batch_label": name,
            "labels": y.tolist(),
            "data": x.reshape(len(x), -1),
            "filenames": ["a.png"] * len(x),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol))


def table(
    images: list[Any], labels: list[Any], image: str = "img", label: str = "label", names: list[str] | None = None
) -> pa.Table:
    schema: dict[str, Any] = {label: {"_type": "ClassLabel", "names": names}}
    meta = {b"huggingface": json.dumps({"info": {"features": schema}}).encode()} if names is not None else None
    return pa.table({image: images, label: pa.array(labels, pa.int64())}).replace_schema_metadata(meta)


def cells(x: npt.NDArray[np.uint8], kind: str = "PNG") -> list[dict[str, Any]]:
    return [{"bytes": encode(image, kind), "path": f"{i}.png"} for i, image in enumerate(x)]


def write_parquet(
    folder: Path, train: Part, test: Part, kind: str = "PNG", test_name: str = "test", **names: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (x, y) in (("train", train), (test_name, test)):
        pq.write_table(table(cells(x, kind), y.tolist(), **names), folder / f"{name}-00000-of-00001.parquet")


def write_folder(folder: Path, part: Part, kind: str = "PNG") -> None:
    for i, (image, label) in enumerate(zip(*part, strict=True)):
        path = folder / str(label) / f"{i:04d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, kind))
