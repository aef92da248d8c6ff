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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from common import COUNT, EVAL_BATCH, Run, as_job, context, fresh_network, long_enough, seconds, usual_heap
from figures import Figures, Setting
from plain import Bare, fine_tune, loader_forever, plain_network
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import Batch, Context, Images, InverterContext, Recipe
from bbmcl_inverters.nc_box import NCBox
from bbmcl_models.wrn import WideResNet

TRAIN_BATCH = 64  # training and inversion, spec 4.9 and 5.1
CLEAN = 39 * TRAIN_BATCH  # about 5 % of CIFAR-10, in whole batches


@pytest.fixture
def network(setting: Setting) -> WideResNet:
    return fresh_network(setting)


def bare_batch(images: Images, batch: int, setting: Setting) -> Callable[[], Tensor]:
    """One random batch, augmented afresh at each call: float32 (B, C, H, W), channels_last."""
    augment, rng = kit.augmentation("crop+flip", flip_ok=True), torch.Generator().manual_seed(0)
    assert augment is not None
    x = images.x[:batch].to(setting.device)
    return lambda: augment(x, rng).float().div_(255).contiguous(memory_format=torch.channels_last)


def compete(
    benchmark: BenchmarkFixture, setting: Setting, figures: Figures, harness: Run, plain: Run, bare: Run
) -> None:
    """Alternate the three. pytest-benchmark times the harness; the rivals run in the set-up of each of its rounds."""
    usual_heap()
    counts = {run: long_enough(run, setting) for run in (harness, plain, bare)}

    def rate(run: Run) -> float:
        return counts[run] * figures.batch / seconds(run, counts[run], setting.device)

    def rivals() -> None:
        figures.plain.append(rate(plain))
        figures.bare.append(rate(bare))

    def measured() -> None:
        with as_job():
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

        recipe = Recipe(steps=batches, lr=0.01)
        kit.fit(network, there, context(Context, setting, tmp_path), loss, recipe=recipe, steady=True)  # as victims are

    def random_batches() -> Iterator[tuple[Tensor, Tensor]]:
        draw, y = bare_batch(images, TRAIN_BATCH, setting), images.y[:TRAIN_BATCH].to(setting.device)
        while True:
            yield draw(), y

    plain = partial(fine_tune, plain_network(network), loader_forever(images, TRAIN_BATCH, True, setting.device))
    bare = partial(fine_tune, Bare(copy.deepcopy(network), setting.precision), random_batches())
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
