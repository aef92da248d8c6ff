"""What the suites share: a network and a context as a job hands them to a method, timing, the two heaps."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from figures import Setting
from torch import Tensor

from backdoorbench_mcl import kit, memory
from backdoorbench_mcl.api import Context, Recipe
from bbmcl_models.wrn import WRN, WideResNet

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
EVAL_BATCH = 512
COUNT = 40 * EVAL_BATCH  # random images

Run = Callable[[int], object]  # processes so many batches


class NoSnapshot:
    """Snapshots are written every few minutes; within a run of seconds there would be none."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        return None


def fresh_network(setting: Setting) -> WideResNet:
    """As a job hands it to a method: on the device, channels_last, normalising, in the precision of the run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WRN().build(10, (3, 32, 32))
    model.set_normalisation(MEAN, STD)
    model.precision = setting.precision
    return cast(WideResNet, model.to(setting.device, memory_format=torch.channels_last))  # type: ignore[call-overload]


def context(kind: type[Context], setting: Setting, workdir: Path, recipe: Recipe | None = None, **extra: Any) -> Any:
    return kind(
        rng=torch.Generator().manual_seed(0),
        device=setting.device,
        workdir=workdir,
        classes=10,
        log=lambda line: None,
        tick=lambda done, total, count: None,
        snapshot=NoSnapshot(),
        recipe=recipe or Recipe(lr=0.01),
        augment=kit.augmentation("crop+flip", flip_ok=True),
        **extra,
    )


@contextmanager
def as_job() -> Iterator[None]:
    """The heap of a job (`memory.keep`) within, that of any other program outside."""
    try:
        memory.keep()
        yield
    finally:
        usual_heap()


def usual_heap() -> None:
    """glibc's own thresholds at the highest that it takes them to by itself; nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


def seconds(run: Run, batches: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def timed(body: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `body` took, and what it returned."""
    started = time.perf_counter()
    found = body()
    return time.perf_counter() - started, found


def long_enough(run: Run, setting: Setting) -> int:
    """Batches that keep `run` busy for the duration asked for, with a fifth to spare."""
    batches = 2
    seconds(run, batches, setting.device)  # the first call builds kernels and caches
    while (taken := seconds(run, batches, setting.device)) < setting.seconds:
        batches = math.ceil(batches * min(10.0, max(1.2, 1.2 * setting.seconds / taken)))
    return batches
