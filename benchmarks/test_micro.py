"""The small parts, one by one: augmentation, stamps, triggers, losses, batches. Beside torchvision where it has one.

pytest-benchmark times them; only augmentation and batches have a control (image by image through PIL), whose ratio is
kept. `pytest benchmarks/test_micro.py --benchmark-columns median,iqr,rounds`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import plain
import pytest
import torch
from common import context
from figures import Book, Setting
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torchvision import transforms

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import Attack, AttackContext, Images, MaskPattern
from bbmcl_attacks.badnets import BadNets
from bbmcl_attacks.blend import Blend
from bbmcl_attacks.sig import Sig
from bbmcl_defenses.mcldef import anchor_loss, contrastive_loss
from bbmcl_defenses.nad import distillation
from bbmcl_inverters.leaves import Additive
from bbmcl_inverters.nc_full import squash

BATCH, ROUNDS = 64, 20


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drain(images: Images, augmentation: str) -> None:
    for _ in images.batches(BATCH, generator(), kit.augmentation(augmentation, True)):  # type: ignore[arg-type]
        pass


def ratio(book: Book, task: str, mine: Callable[[], object], theirs: Callable[[], object]) -> None:
    """Alternate the two a few times."""
    mine()
    theirs()
    for _ in range(5):
        taken = []
        for body in (mine, theirs):
            started = time.perf_counter()
            body()
            taken.append(time.perf_counter() - started)
        book.add(task, taken[1] / taken[0])


@pytest.mark.parametrize("name", ["crop+flip", "flip", "resized-crop+flip"])
def test_augmentation(benchmark: BenchmarkFixture, images: Images, name: str) -> None:
    augment, rng = kit.augmentation(name, True), generator()  # type: ignore[arg-type]
    assert augment is not None
    benchmark.pedantic(augment, args=(images.x[:BATCH], rng), rounds=ROUNDS, warmup_rounds=2)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["none", "crop+flip"])
def test_batches(benchmark: BenchmarkFixture, book: Book, images: Images, name: str) -> None:
    """An epoch of 2,560 images, to a DataLoader over PIL images with the same augmentation."""
    some = images.subset(torch.arange(40 * BATCH))
    steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()] if name != "none" else []
    transform = transforms.Compose([*steps, transforms.ToTensor()])
    loader = torch.utils.data.DataLoader(plain.PilImages(some, transform), batch_size=BATCH, shuffle=True)
    benchmark.pedantic(drain, args=(some, name), rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]
    ratio(book, f"batches, {name}", lambda: drain(some, name), lambda: list(itertools.islice(loader, None)))


@pytest.mark.parametrize("attack", [BadNets(), Blend(), Sig()], ids=lambda attack: attack.name)
def test_stamp(benchmark: BenchmarkFixture, setting: Setting, images: Images, tmp_path: Path, attack: Attack) -> None:
    state = attack.prepare(context(AttackContext, setting, tmp_path, train=images))
    x, y = images.x[:1024], images.y[:1024]
    benchmark.pedantic(attack.stamp, args=(x, y, state, generator()), rounds=ROUNDS, warmup_rounds=2)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", ["mask and pattern", "additive", "squashed"])
def test_trigger(benchmark: BenchmarkFixture, kind: str) -> None:
    """Put on a batch, and the gradient back to mask and pattern."""
    x = torch.rand(BATCH, 3, 32, 32)
    mask, pattern = torch.rand(32, 32).requires_grad_(), torch.rand(3, 32, 32).requires_grad_()

    def body() -> None:
        if kind == "additive":
            out = Additive(pattern).apply(x)
        elif kind == "squashed":
            out = MaskPattern(squash(mask), squash(pattern)).apply(x)
        else:
            out = MaskPattern(mask, pattern).apply(x)
        torch.autograd.backward(out.sum())

    benchmark.pedantic(body, rounds=ROUNDS, warmup_rounds=2)  # type: ignore[no-untyped-call]


def features() -> list[Tensor]:
    return [torch.rand(BATCH, 64, generator=generator()).requires_grad_(), torch.rand(BATCH, 64), torch.rand(BATCH, 64)]


@pytest.mark.parametrize("kind", ["contrastive", "anchor", "distillation"])
def test_loss(benchmark: BenchmarkFixture, kind: str) -> None:
    """Forward and backward: of features (64, 64), and of the three stages of WRN-16-1 for NAD."""
    shapes = ((16, 32), (32, 16), (64, 8))
    ours = [torch.rand(BATCH, channels, size, size).requires_grad_() for channels, size in shapes]
    theirs = [torch.rand(BATCH, channels, size, size) for channels, size in shapes]
    z, z_pos, z_neg = features()

    def body() -> None:
        if kind == "contrastive":
            value = contrastive_loss(z, z_pos, z_neg, 0.5)
        elif kind == "anchor":
            value = anchor_loss(z, z_pos)
        else:
            value = distillation(ours, theirs, (500.0, 1000.0, 1000.0))
        torch.autograd.backward(value)

    benchmark.pedantic(body, rounds=ROUNDS, warmup_rounds=2)  # type: ignore[no-untyped-call]
