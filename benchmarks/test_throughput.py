"""Throughput of training, inversion and evaluation, beside what a user would write and what the machine can do.

Three contenders run in turn (harness, plain, bare, harness, ...), so that a change of load meets all of them:

- harness: `kit.fit`, `NCBox.invert` and `kit.predict` as the jobs call them;
- plain: a torch DataLoader over PIL images with torchvision's transforms (num_workers=0) and an fp32 loop;
- bare: the same network, augmentation, batch and precision on one batch of random tensors, with nothing else around.

No test decides on timings; the table at the end says where the harness is below 0.9 of the bare loop. Images are
random: no step's time depends on their content. Run: `pytest benchmarks`; see README.md here for results.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from figures import Figures, Setting
from numpy.typing import NDArray
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import Batch, Classifier, Context, Images, InverterContext, Recipe
from bbmcl_inverters.nc_box import NCBox
from bbmcl_models.wrn import WRN, WideResNet

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
TRAIN_BATCH = 64  # training and inversion, spec 4.9 and 5.1
EVAL_BATCH = 512
COUNT = 40 * EVAL_BATCH
CLEAN = 39 * TRAIN_BATCH  # about 5 % of CIFAR-10, in whole batches

Run = Callable[[int], None]  # processes so many batches


class NoSnapshot:
    """Snapshots are written every few minutes; within a run of seconds there would be none."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        return None


class PilImages(Dataset[tuple[Tensor, int]]):
    """The images as torchvision's CIFAR10 serves them: an array turned into a PIL image, then transformed."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self.x: NDArray[np.uint8] = images.x.permute(0, 2, 3, 1).contiguous().numpy()
        self.y: list[int] = images.y.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.x[index])), self.y[index]


@pytest.fixture(scope="module")
def images() -> Images:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (COUNT, 3, 32, 32), generator=rng, dtype=torch.uint8)
    return Images(x, torch.randint(0, 10, (COUNT,), generator=rng))


@pytest.fixture
def network(setting: Setting) -> WideResNet:
    """As a job hands it to a method: on the device, channels_last, normalising, in the precision of the run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WRN().build(10, (3, 32, 32))
    model.set_normalisation(MEAN, STD)
    model.precision = setting.precision
    return cast(WideResNet, model.to(setting.device, memory_format=torch.channels_last))  # type: ignore[call-overload]


class Bare(torch.nn.Module):
    """The network without its wrapper: normalised images -> logits float32."""

    def __init__(self, model: Classifier, precision: str) -> None:
        super().__init__()
        self.model = model
        self.autocast = precision == "bf16"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model.head(self.model.features(x)[0])
        return logits.float()


def plain_network(network: WideResNet) -> Bare:
    """fp32 in the default memory order, on images that the transforms have normalised."""
    model = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    return Bare(model, "fp32")


def loader_forever(images: Images, batch: int, augment: bool, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()] if augment else []
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    loader = DataLoader(PilImages(images, transform), batch_size=batch, shuffle=augment, num_workers=0)
    while True:
        for x, y in loader:
            yield x.to(device), y.to(device)


def bare_batch(images: Images, batch: int, setting: Setting) -> Callable[[], Tensor]:
    """One random batch, augmented afresh at each call: float32 (B, C, H, W), channels_last."""
    augment, rng = kit.augmentation("crop+flip", flip_ok=True), torch.Generator().manual_seed(0)
    assert augment is not None
    x = images.x[:batch].to(setting.device)
    return lambda: augment(x, rng).float().div_(255).contiguous(memory_format=torch.channels_last)


def context(kind: type[Context], setting: Setting, workdir: Path, **extra: Any) -> Any:
    return kind(
        rng=torch.Generator().manual_seed(0),
        device=setting.device,
        workdir=workdir,
        classes=10,
        log=lambda line: None,
        tick=lambda done, total, count: None,
        snapshot=NoSnapshot(),
        recipe=Recipe(lr=0.01),
        augment=kit.augmentation("crop+flip", flip_ok=True),
        **extra,
    )


def seconds(run: Run, batches: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def long_enough(run: Run, setting: Setting) -> int:
    """Batches that keep `run` busy for the duration asked for, with a fifth to spare."""
    batches = 2
    seconds(run, batches, setting.device)  # the first call builds kernels and caches
    while (taken := seconds(run, batches, setting.device)) < setting.seconds:
        batches = math.ceil(batches * min(10.0, max(1.2, 1.2 * setting.seconds / taken)))
    return batches


def compete(
    benchmark: BenchmarkFixture, setting: Setting, figures: Figures, harness: Run, plain: Run, bare: Run
) -> None:
    """Alternate the three. pytest-benchmark times the harness; the rivals run in the set-up of each of its rounds."""
    counts = {run: long_enough(run, setting) for run in (harness, plain, bare)}

    def rate(run: Run) -> float:
        return counts[run] * figures.batch / seconds(run, counts[run], setting.device)

    def rivals() -> None:
        figures.plain.append(rate(plain))
        figures.bare.append(rate(bare))

    def measured() -> None:
        figures.harness.append(rate(harness))

    benchmark.pedantic(measured, setup=rivals, rounds=setting.rounds)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(
        harness=figures.harness,
        plain=figures.plain,
        bare=figures.bare,
        threads=torch.get_num_threads(),
        precision=setting.precision,
        device=str(setting.device),
    )


def check(figures: Figures) -> None:
    """The figures are there; whether they please is for the reader of the table."""
    for values in (figures.harness, figures.plain, figures.bare):
        assert values
        assert all(math.isfinite(value) and value > 0 for value in values)


def test_training(
    benchmark: BenchmarkFixture,
    setting: Setting,
    record: Callable[[Figures], None],
    images: Images,
    network: WideResNet,
    tmp_path: Path,
) -> None:
    there = images.to(setting.device)
    network.train()

    def harness(batches: int) -> None:
        def loss(batch: Batch) -> Tensor:
            return F.cross_entropy(network(batch.x), batch.y)

        kit.fit(network, there, context(Context, setting, tmp_path), loss, recipe=Recipe(steps=batches, lr=0.01))

    def trainer(model: torch.nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> Run:
        model.train()
        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

        def run(count: int) -> None:
            for _ in range(count):
                x, y = next(batches)
                sgd.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(x), y))
                sgd.step()

        return run

    def random_batches() -> Iterator[tuple[Tensor, Tensor]]:
        draw, y = bare_batch(images, TRAIN_BATCH, setting), images.y[:TRAIN_BATCH].to(setting.device)
        while True:
            yield draw(), y

    plain = trainer(plain_network(network), loader_forever(images, TRAIN_BATCH, True, setting.device))
    bare = trainer(Bare(copy.deepcopy(network), setting.precision), random_batches())
    figures = Figures("training", TRAIN_BATCH)
    compete(benchmark, setting, figures, harness, plain, bare)
    record(figures)
    check(figures)


def test_inversion(
    benchmark: BenchmarkFixture,
    setting: Setting,
    record: Callable[[Figures], None],
    images: Images,
    network: WideResNet,
    tmp_path: Path,
) -> None:
    clean = images.subset(torch.arange(CLEAN))
    there = clean.to(setting.device)

    def harness(batches: int) -> None:
        inverter = NCBox(steps=batches, patience=10**6)
        inverter.invert(network, 0, context(InverterContext, setting, tmp_path, clean=there))

    def inverter(model: torch.nn.Module, batches: Iterator[Tensor]) -> Run:
        model.eval()
        mask = torch.rand(32, 32, device=setting.device).requires_grad_()
        pattern = torch.rand(3, 32, 32, device=setting.device).requires_grad_()
        adam = torch.optim.Adam([mask, pattern], lr=0.005)
        goal = torch.zeros(TRAIN_BATCH, dtype=torch.int64, device=setting.device)

        def run(count: int) -> None:
            for _ in range(count):
                x = next(batches)
                adam.zero_grad()
                logits = model((1 - mask) * x + mask * pattern)
                torch.autograd.backward(F.cross_entropy(logits, goal) + 0.01 * mask.abs().sum())
                adam.step()
                with torch.no_grad():
                    mask.clamp_(0, 1)
                    pattern.clamp_(0, 1)

        return run

    def random_batches() -> Iterator[Tensor]:
        draw = bare_batch(images, TRAIN_BATCH, setting)
        while True:
            yield draw()

    loaded = (x for x, _ in loader_forever(clean, TRAIN_BATCH, True, setting.device))
    plain = inverter(plain_network(network), loaded)
    bare = inverter(Bare(kit.frozen(network), setting.precision), random_batches())
    figures = Figures("inversion", TRAIN_BATCH)
    compete(benchmark, setting, figures, harness, plain, bare)
    record(figures)
    check(figures)


def test_evaluation(
    benchmark: BenchmarkFixture,
    setting: Setting,
    record: Callable[[Figures], None],
    images: Images,
    network: WideResNet,
) -> None:
    there = images.x.to(setting.device)

    def harness(batches: int) -> None:
        for start in range(0, batches * EVAL_BATCH, COUNT):
            kit.predict(network, there[: batches * EVAL_BATCH - start], EVAL_BATCH)

    def evaluator(model: torch.nn.Module, batches: Iterator[Tensor]) -> Run:
        model.eval()

        def run(count: int) -> None:
            with torch.inference_mode():
                torch.cat([model(next(batches)).argmax(1) for _ in range(count)]).cpu()

        return run

    def random_batches() -> Iterator[Tensor]:
        x = torch.rand(EVAL_BATCH, 3, 32, 32, device=setting.device).contiguous(memory_format=torch.channels_last)
        while True:
            yield x

    loaded = (x for x, _ in loader_forever(images, EVAL_BATCH, False, setting.device))
    plain = evaluator(plain_network(network), loaded)
    bare = evaluator(Bare(copy.deepcopy(network), setting.precision), random_batches())
    figures = Figures("evaluation", EVAL_BATCH)
    compete(benchmark, setting, figures, harness, plain, bare)
    record(figures)
    check(figures)
