"""How much more a machine trains when several jobs share it: images a second, all together, of N processes at once.

    python benchmarks/packing.py --device cuda --jobs 1 2 4 8 16

A small network leaves a large GPU idle between its kernels; this is what `--workers N` has to gain there.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier

import torch
from common import context, fresh_network
from figures import Setting, Sizes
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_mcl import kit, memory
from backdoorbench_mcl.api import Batch, Context, Images, Recipe

IMAGES = 6400


def train(device: str, precision: str, batch: int, seconds: float, ready: Barrier) -> float:
    """Train a WRN-16-1 on random images for about `seconds`, after all have warmed up: images a second."""
    torch.set_num_threads(1)
    memory.keep()
    setting = Setting(
        torch.device(device), "bf16" if precision == "bf16" else "fp32", 1, seconds, Sizes("short", 1, 1, 1, 1, 1)
    )
    network = fresh_network(setting).train()
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=draw)
    images = Images(x, torch.randint(0, 10, (IMAGES,), generator=draw)).to(setting.device)

    def loss(given: Batch) -> Tensor:
        return F.cross_entropy(network(given.x), given.y)

    def run(steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe(steps=steps, batch=batch, lr=0.01)
            kit.fit(network, images, context(Context, setting, Path(folder)), loss, recipe=recipe, steady=True)

    run(10)
    ready.wait(timeout=120)
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        run(20)
        steps += 20
    return steps * batch / (time.perf_counter() - started)


def together(jobs: int, device: str, precision: str, batch: int, seconds: float) -> list[float]:
    """Images a second of each of `jobs` processes."""
    spawn = mp.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(jobs, spawn) as pool:
        ready = manager.Barrier(jobs)
        running = [pool.submit(train, device, precision, batch, seconds, ready) for _ in range(jobs)]
        return [one.result() for one in running]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    rows: list[list[object]] = []
    alone = 0.0
    for jobs in given.jobs:
        rates = together(jobs, given.device, given.precision, given.batch, given.seconds)
        alone = alone or sum(rates) / jobs
        rows.append([jobs, f"{sum(rates):.0f}", f"{min(rates):.0f}-{max(rates):.0f}", f"{sum(rates) / alone:.2f}"])
    print(tabulate(rows, ["jobs", "images/s together", "of each", "against the first"], tablefmt="github"))


if __name__ == "__main__":
    main()
