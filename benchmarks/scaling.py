"""Time against the number of cells, images, classes and workers: `python benchmarks/scaling.py OUT`.

Writes scaling.json and scaling.png into the folder OUT.

Cells are those of the tests' toy plugin with an engine that does not compute (`echo`), so that what is measured is the
driver; images, classes and workers cost what the methods cost on WRN-16-1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
sys.path[:0] = [str(HERE), str(TESTS), str(TESTS / "toy")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS / "toy"), os.environ.get("PYTHONPATH")]))

from common import NoSnapshot  # noqa: E402
from echo import PER_SEED, asked, drive  # noqa: E402

from backdoorbench_mcl import kit, plan, provenance, request, runner  # noqa: E402
from backdoorbench_mcl.api import Images, InverterContext, Recipe  # noqa: E402
from bbmcl_inverters.nc_full import NCFull  # noqa: E402
from bbmcl_models.wrn import WRN  # noqa: E402

Points = list[tuple[int, float]]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def planned(sizes: Sequence[int]) -> Points:
    """Seconds to plan so many cells."""
    found = []
    for size in sizes:
        wanted = asked(size)
        found.append((PER_SEED * len(wanted.seeds), seconds(partial(plan.build, wanted))))
    return found


def driven(sizes: Sequence[int]) -> tuple[Points, Points]:
    """Seconds of the driver to fill so many cells without computing anything, and to find them all stored."""
    filled: Points = []
    stored: Points = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="bbmcl-scaling-") as folder:
            wanted = asked(size)
            graph = plan.build(wanted)
            filled.append(
                (len(graph.cells), seconds(partial(drive, wanted, graph, Path(folder, "runs"), Path(folder, "kept"))))
            )
            stored.append(
                (len(graph.cells), seconds(partial(drive, wanted, graph, Path(folder, "runs"), Path(folder, "none"))))
            )
        print(f"{len(graph.cells)} cells: {filled[-1][1]:.1f} s, again {stored[-1][1]:.2f} s", flush=True)
    return filled, stored


def network(classes: int) -> Any:
    torch.manual_seed(0)
    return WRN().build(classes, (3, 32, 32)).to(memory_format=torch.channels_last).eval()


def judged(sizes: Sequence[int]) -> Points:
    """Seconds to predict so many images of 32x32, on one thread."""
    model, x = network(10), torch.randint(0, 256, (max(sizes), 3, 32, 32), dtype=torch.uint8)
    kit.predict(model, x[:512])
    return [(size, seconds(partial(kit.predict, model, x[:size]))) for size in sizes]


def detected(sizes: Sequence[int], workdir: Path) -> Points:
    """Seconds of `nc-full`, 20 coarse steps a label and 20 fine ones for three, on 256 images of so many classes."""
    found = []
    for classes in sizes:
        clean = Images(torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8), torch.full((256,), -1))
        context = InverterContext(
            rng=torch.Generator().manual_seed(0), device=torch.device("cpu"), workdir=workdir, classes=classes,
            log=lambda line: None, tick=lambda done, total, count: None, snapshot=NoSnapshot(), recipe=Recipe(),
            augment=None, clean=clean,
        )  # fmt: skip
        inverter, model = NCFull(coarse_steps=20, steps=20, images_per_step=64), network(classes)
        found.append((classes, seconds(partial(inverter.detect, model, context))))
        print(f"{classes} classes: {found[-1][1]:.1f} s", flush=True)
    return found


def worked(counts: Sequence[int]) -> Points:
    """Seconds of a matrix of six victims of `shapes`, none of which waits for another, with so many workers."""
    found = []
    for workers in counts:
        with tempfile.TemporaryDirectory(prefix="bbmcl-scaling-") as folder:
            options = request.Options(
                "badnets",
                request.NOTHING,
                seeds="0-5",
                budget="quick",
                overrides=("train.steps=150",),
                precision="fp32",
            )
            settings = runner.Settings(Path(folder, "runs"), workers=workers, threads=1)
            took = seconds(partial(runner.run_matrix, options, settings, live=False))
        found.append((workers, took))
        print(f"{workers} workers: {took:.1f} s", flush=True)
    return found


def draw(told: dict[str, Any], file: Path) -> None:
    """Six panels, one measure each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "plan": ("cells", "planning"), "driver": ("cells", "driver, nothing computed"),
        "again": ("cells", "a finished matrix again"), "images": ("images of 32x32", "predictions, 1 thread"),
        "classes": ("classes", "nc-full, 20 + 20 steps of 64 images"), "workers": ("workers", "six victims on 2 cores"),
    }  # fmt: skip
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for panel, (name, (unit, title)) in zip(axes.flat, titles.items(), strict=True):
        sizes, values = zip(*told[name], strict=True)
        panel.plot(sizes, values, "o-", color="#2458a6")
        panel.set(xlabel=unit, ylabel="seconds", title=title, ylim=(0, None), xlim=(0, None))
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of scaling.json and scaling.png")
    parser.add_argument("--cells", type=int, default=3000, help="the most cells that are driven")
    parser.add_argument("--plan", type=int, default=100_000, help="the most cells that are planned")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bbmcl-scaling-") as cache:
        os.environ.setdefault("BBMCL_CACHE", cache)
        driver, again = driven([size for size in (100, 300, 1000, 3000, 10_000, 30_000) if size <= given.cells])
        told: dict[str, Any] = {
            "driver": driver, "again": again,
            "plan": planned([size for size in (1000, 10_000, 30_000, 100_000) if size <= given.plan]),
            "images": judged([1000, 2000, 5000, 10_000]), "classes": detected([5, 10, 20, 40], Path(cache)),
            "workers": worked([1, 2, 3]),
        }  # fmt: skip
    told["where"] = {name: provenance.collect()[name] for name in ("processor", "machine_class", "cores", "versions")}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scaling.json").write_text(json.dumps(told, indent=1) + "\n")
    draw(told, given.out / "scaling.png")
    print(json.dumps({name: points for name, points in told.items() if name != "where"}))


if __name__ == "__main__":
    main()
