"""What the machine allows: flops and bytes of WRN-16-1 an image, peak arithmetic, bandwidth, and what each job reaches.

    python benchmarks/roofline.py [--threads 1 2] [--images 640] [--json | --text]

Flops are multiply-adds times two, of convolutions and the last layer, layer by layer from the network itself; bytes
are those of a float32 network that reads every input and writes every output once and keeps nothing in a cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_mcl import kit, memory
from backdoorbench_mcl.api import Batch, Classifier, Images
from backdoorbench_mcl.provenance import collect, supports_bf16
from bbmcl_models.wrn import WRN

BATCH, EVAL_BATCH, FLOAT = 64, 512, 4


class Cost(NamedTuple):
    """For one image. bytes: read and written."""

    flops: int
    bytes: int


class Layer(NamedTuple):
    """A layer with its own arithmetic: inputs, outputs and weights in numbers, multiply-adds an image."""

    name: str
    kind: str
    inputs: int
    outputs: int
    weights: int
    macs: int


def layers(model: Classifier, shape: tuple[int, int, int] = (3, 32, 32)) -> list[Layer]:
    """Convolutions, batch norms and linear layers in the order in which they run."""
    found: list[Layer] = []
    handles = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            weights = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            matrix = module.weight.numel() if isinstance(module, (nn.Conv2d, nn.Linear)) else 0
            places = out.shape[2] * out.shape[3] if out.ndim == 4 else 1
            found.append(Layer(name, type(module).__name__, given[0].numel(), out.numel(), weights, matrix * places))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            handles.append(module.register_forward_hook(watch(name)))
    with torch.no_grad():
        model.eval()(torch.rand(1, *shape))
    for handle in handles:
        handle.remove()
    return found


def forward_cost(found: list[Layer], batch: int) -> Cost:
    """A forward pass. A batch norm's output is read and written once more by the ReLU behind it."""
    numbers = 0.0
    for layer in found:
        numbers += layer.inputs + layer.outputs + layer.weights / batch
        numbers += 2 * layer.outputs if layer.kind == "BatchNorm2d" else 0
    return Cost(2 * sum(layer.macs for layer in found), round(FLOAT * numbers))


def training_cost(found: list[Layer], batch: int) -> Cost:
    """Forward and backward with weight gradients: each layer once more for its input, once more for its weights. The
    first layer's input takes no gradient.
    """
    forward = forward_cost(found, batch)
    return Cost(3 * forward.flops - 2 * found[0].macs, 3 * forward.bytes)


def inversion_cost(found: list[Layer], batch: int) -> Cost:
    """Forward, and backward to the image only."""
    forward = forward_cost(found, batch)
    return Cost(2 * forward.flops, 2 * forward.bytes)


# ---------------------------------------------------------------- the machine


def rate(body: Callable[[], object], amount: float, seconds: float = 0.5) -> float:
    """The best rate of several runs, in units of `amount` a second: load can only lower it."""
    body()
    best, spent = 0.0, 0.0
    while spent < seconds:
        started = time.perf_counter()
        body()
        taken = time.perf_counter() - started
        best, spent = max(best, amount / taken), spent + taken
    return best


def bandwidth(numbers: int = 16 << 20) -> dict[str, float]:
    """GB/s of copies and of a = b + s c, on arrays of 64 MB; written memory is not counted twice."""
    a, b, c = (torch.rand(numbers) for _ in range(3))
    size = numbers * FLOAT / 1e9
    return {
        "copy": rate(lambda: a.copy_(b), 2 * size),
        "triad": rate(lambda: torch.add(b, c, alpha=3, out=a), 3 * size),
    }


def arithmetic(dtype: torch.dtype) -> dict[str, float]:
    """Gflop/s of a product of 1024x1024 matrices and of the network's convolutions of 16, 32 and 64 channels."""
    a, b = (torch.rand(1024, 1024).to(dtype) for _ in range(2))
    out = {"matmul": rate(lambda: a @ b, 2 * 1024**3 / 1e9)}
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        x = torch.rand(BATCH, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
        w = torch.rand(channels, channels, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
        flops = 2 * 9 * channels**2 * size**2 * BATCH / 1e9
        out[f"conv {channels}x{size}x{size}"] = rate(functools.partial(_convolve, x, w), flops)
    return out


@torch.inference_mode()
def _convolve(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


# ---------------------------------------------------------------- the jobs


def jobs(images: int) -> dict[str, tuple[float, Cost]]:
    """Images a second of each kind of pass, with what an image costs."""
    model = WRN().build(10, (3, 32, 32)).to(memory_format=torch.channels_last)
    model.precision = "bf16" if supports_bf16() else "fp32"
    data = Images(torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8), torch.zeros(images, dtype=torch.int64))
    augment, rng = kit.augmentation("crop+flip", True), torch.Generator().manual_seed(0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = layers(model)

    def batches(step: Callable[[Batch], object]) -> float:
        def one_pass() -> None:
            for batch in data.batches(BATCH, rng, augment):
                step(batch)

        return rate(one_pass, images)

    def train(batch: Batch) -> None:
        model.train()
        sgd.zero_grad(set_to_none=True)
        torch.autograd.backward(F.cross_entropy(model(batch.x), batch.y))
        sgd.step()

    reached = {"train": (batches(train), training_cost(found, BATCH))}
    still = kit.frozen(model)
    mask = torch.rand(32, 32).requires_grad_()
    reached["invert"] = (
        batches(lambda b: torch.autograd.grad(F.cross_entropy(still((1 - mask) * b.x), b.y), mask)),
        inversion_cost(found, BATCH),
    )
    reached["predict"] = (rate(lambda: kit.predict(still, data.x), images), forward_cost(found, EVAL_BATCH))
    return reached


def measure(threads: list[int], images: int) -> dict[str, Any]:
    """Everything, JSON-ready, for each number of threads."""
    memory.keep()
    model = WRN().build(10, (3, 32, 32))
    found = layers(model)
    costs = {
        "forward": forward_cost(found, EVAL_BATCH), "training": training_cost(found, BATCH),
        "inversion": inversion_cost(found, BATCH),
    }  # fmt: skip
    out: dict[str, Any] = {
        "processor": collect()["processor"], "torch": torch.__version__, "fast bf16": supports_bf16(),
        "an image": {name: cost._asdict() for name, cost in costs.items()}, "threads": {},
    }  # fmt: skip
    for count in threads:
        torch.set_num_threads(count)
        peak = {"fp32": arithmetic(torch.float32)} | ({"bf16": arithmetic(torch.bfloat16)} if supports_bf16() else {})
        lanes = bandwidth()
        best, wide = max(peak["bf16" if supports_bf16() else "fp32"].values()), max(lanes.values())
        reached = {}
        for name, (speed, cost) in jobs(images).items():
            compute, move = speed * cost.flops / 1e9, speed * cost.bytes / 1e9
            reached[name] = {
                "images a second": speed, "Gflop/s": compute, "GB/s": move,
                "of the arithmetic": compute / best, "of the bandwidth": move / wide,
                "bound of both": min(best * 1e9 / cost.flops, wide * 1e9 / cost.bytes),
            }  # fmt: skip
        out["threads"][str(count)] = {"GB/s": lanes, "Gflop/s": peak, "jobs": reached}
    return out


def text(found: dict[str, Any]) -> str:
    """The same as lines."""
    lines = [f"{found['processor']}, torch {found['torch']}, fast bf16: {found['fast bf16']}"]
    for name, cost in found["an image"].items():
        ratio = cost["flops"] / cost["bytes"]
        lines.append(
            f"{name}: {cost['flops'] / 1e6:.1f} Mflop, {cost['bytes'] / 1e6:.2f} MB an image, {ratio:.1f} flop/byte"
        )
    for count, one in found["threads"].items():
        lines.append(
            f"{count} threads: " + ", ".join(f"{name} {value:.1f} GB/s" for name, value in one["GB/s"].items())
        )
        for precision, peak in one["Gflop/s"].items():
            lines.append(
                f"  {precision}: " + ", ".join(f"{name} {value:.0f}" for name, value in peak.items()) + " Gflop/s"
            )
        for name, job in one["jobs"].items():
            lines.append(
                f"  {name}: {job['images a second']:.0f} images/s, {job['Gflop/s']:.0f} Gflop/s "
                f"({100 * job['of the arithmetic']:.0f} % of the best above), {job['GB/s']:.1f} GB/s "
                f"({100 * job['of the bandwidth']:.0f} %); both bounds allow {job['bound of both']:.0f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=640, help="in a pass; more gives steadier figures")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true")
    shown.add_argument("--text", action="store_true", help="the default")
    given = parser.parse_args()
    found = measure(given.threads, given.images)
    print(json.dumps(found, indent=1) if given.json else text(found))


if __name__ == "__main__":
    main()
