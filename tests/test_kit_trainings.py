"""kit.share against exact fractions; trainings with names, which a restarted method passes through one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import MemorySnapshot, TinyNet, make_context, make_images, weight_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import Batch, Classifier, Recipe


class Killed(Exception):
    """Stands for the death of the process."""


def cross_entropy(model: Classifier) -> Callable[[Batch], Tensor]:
    return lambda batch: F.cross_entropy(model(batch.x), batch.y)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 60000))
def test_share_is_the_floor_of_the_typed_decimal(permille: int, total: int) -> None:
    assert kit.share(permille / 1000, total) == permille * total // 1000


@pytest.mark.parametrize(
    ("rate", "total", "count"),
    [(0.29, 100, 29), (0.1, 50000, 5000), (0.1, 26640, 2664), (0.1, 26000, 2600), (2.0, 3, 6), (1, 7, 7), (0, 7, 0)],
)
def test_share_by_hand(rate: float, total: int, count: int) -> None:
    assert kit.share(rate, total) == count


@pytest.mark.parametrize("kill", [("first", 6), ("second", 2), ("second", 6), ("third", 1), ("third", 8)], ids=str)
def test_a_restarted_method_passes_through_its_named_trainings(tmp_path: Path, kill: tuple[str, int]) -> None:
    """Four steps an epoch, two epochs each; between the trainings the method draws once more."""
    snapshot, names = MemorySnapshot(), ("first", "second", "third")
    lives: list[tuple[bytes, list[tuple[str, int]], dict[str, list[float]]]] = []

    def live(snapshot: MemorySnapshot, die: bool) -> None:
        ticks: list[tuple[str, int]] = []
        curves: dict[str, list[float]] = {}
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = TinyNet().train()

            def tick(done: int, total: int, images: int) -> None:
                ticks.append((name, done))
                if die and (name, done) == kill:
                    raise Killed

            ctx = make_context(
                tmp_path, 0, Recipe(epochs=2, batch=16), snapshot=snapshot, tick=tick,
                record=lambda curve, step, value: curves.setdefault(curve, []).append(value),
            )  # fmt: skip
            with contextlib.suppress(Killed):
                for name in names:
                    torch.rand(3, generator=ctx.rng)
                    kit.fit(model, make_images(64), ctx, cross_entropy(model), name=name)
        lives.append((weight_bytes(model), ticks, curves))

    live(MemorySnapshot(), die=False)
    live(snapshot, die=True)
    live(snapshot, die=False)
    whole, killed, resumed = lives
    assert killed[1][-1] == kill
    assert (resumed[0], resumed[2]) == (whole[0], whole[2])
    assert set(whole[2]) == {"loss, first", "loss, second", "loss, third"}
    first = (names.index(kill[0]) * 8 + kill[1] - 1) // 4 * 4  # the epoch in which it died is repeated, none before
    assert resumed[1] == whole[1][first:]


def test_the_name_of_a_training_has_no_slash(tmp_path: Path) -> None:
    model = TinyNet().train()
    with pytest.raises(ValueError, match=r"the name 'a/b' of a training has a slash"):
        kit.fit(model, make_images(64), make_context(tmp_path), cross_entropy(model), name="a/b")
