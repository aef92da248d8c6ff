"""Tiny data sets in every layout that the loaders read, made on the fly.

pixels(count, classes=10, shape=(3, 32, 32), seed=0) -> Part     uint8 (N, C, H, W), int64 (N,), every class present
write_pickles(folder, train, test, protocol=2)      torchvision's cifar-10-batches-py
write_parquet(folder, train, test, ...)             <split>-00000-of-00001.parquet of PNG or JPEG bytes
write_folder(folder, part)                          folder/CLASS/N.png
write_signs(folder, tracks=3, frames=2, seed=0)     GTSRB: folder/00000/00000_00000.ppm ... of 43 classes, with tables
write_final_test(folder, truth, count=50)           GTSRB: folder/00000.ppm ..., labels in the file `truth`
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


def sign(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A photograph of its own size, as in GTSRB."""
    height, width = rng.integers(3, 9, 2)
    return rng.integers(0, 256, (3, height, width), np.uint8)


def write_signs(folder: Path, tracks: int = 3, frames: int = 2, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for label in range(43):
        inside = folder / f"{label:05d}"
        inside.mkdir(parents=True)
        (inside / f"GT-{label:05d}.csv").write_text("Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n")
        for track in range(tracks):
            for frame in range(frames):
                (inside / f"{track:05d}_{frame:05d}.ppm").write_bytes(encode(sign(rng), "PPM"))


def write_final_test(folder: Path, truth: Path, count: int = 50, seed: int = 9) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(count):
        (folder / f"{i:05d}.ppm").write_bytes(encode(sign(rng), "PPM"))
        rows.append(f"{i:05d}.ppm;53;54;6;5;48;49;{i * 7 % 43}")
    (folder / "GT-final_test.test.csv").write_text("Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2\n")
    truth.write_text("\r\n".join(rows) + "\r\n")
