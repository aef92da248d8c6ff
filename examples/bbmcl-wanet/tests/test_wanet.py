"""The contract of backdoorbench_mcl, one test per sentence; below it the warp, the batches, the training."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from backdoorbench_mcl.api import AttackContext, Batch, Classifier, Images, Recipe, State, UserError
from backdoorbench_mcl.kit import predict
from backdoorbench_mcl.testing import parametrize_with_checks, toys
from bbmcl_wanet.method import WaNet, control_offsets, moved, offsets, sampling_grid, shares, warp

EXPECTED = {"check_trigger_is_learnable": "the toys are noise around a colour: warped, they are such noise again"}


@parametrize_with_checks([WaNet(target=1, rate=0.2, strength=4.0)], EXPECTED)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the warp


def test_offsets_have_the_size_that_was_asked_for() -> None:
    control = control_offsets(4, seeded())
    assert control.shape == (2, 4, 4)
    assert control.abs().mean().item() == pytest.approx(1, abs=1e-6)
    assert bool((control < 0).any()) and bool((control > 0).any())
    wide = offsets(control, 0.5, 7, 10)
    assert wide.shape == (7, 10, 2)
    for (row, column), (i, j) in {(0, 0): (0, 0), (0, 9): (0, 3), (6, 0): (3, 0), (6, 9): (3, 3)}.items():
        assert wide[row, column].tolist() == pytest.approx((0.5 * control[:, i, j]).tolist(), abs=1e-5)
    assert torch.allclose(offsets(control, 1.0, 7, 10), 2 * wide, atol=1e-6)


def test_no_offset_changes_nothing() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    state = State({"offset": torch.zeros(16, 16, 2)})
    assert torch.equal(WaNet().stamp(x, torch.zeros(2), state, seeded()), x)


def test_one_pixel_to_the_right_and_none_down() -> None:
    """Each pixel shows its right neighbour, the last one itself. `W - 1` pixels lie between -1 and 1."""
    offset = torch.zeros(4, 6, 2)
    offset[..., 0] = 2 * 6 / 5
    x = torch.arange(6, dtype=torch.uint8).mul(40).expand(1, 1, 4, 6)
    out = WaNet().stamp(x, torch.zeros(1), State({"offset": offset}), seeded())
    assert out[0, 0].tolist() == [[40, 80, 120, 160, 200, 200]] * 4


def literal(image: Tensor, offset: Tensor, noise: Tensor | None = None) -> list[list[float]]:
    """One channel (H, W) seen through offsets (H, W, 2), pixel by pixel; noise (H, W, 2) moves where it looks again,
    from within the image.
    """
    height, width = image.shape
    out = []
    for row in range(height):
        line = []
        for column in range(width):
            x, y = 2 * column / (width - 1) - 1, 2 * row / (height - 1) - 1
            for step in (offset,) if noise is None else (offset, noise):
                x = min(max(x + float(step[row, column, 0]) / width, -1.0), 1.0)
                y = min(max(y + float(step[row, column, 1]) / height, -1.0), 1.0)
            right, down = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
            left, top = min(math.floor(right), width - 2), min(math.floor(down), height - 2)
            a, b = right - left, down - top
            corners = [float(image[top + i, left + j]) for i in (0, 1) for j in (0, 1)]
            upper, lower = (1 - a) * corners[0] + a * corners[1], (1 - a) * corners[2] + a * corners[3]
            line.append((1 - b) * upper + b * lower)
        out.append(line)
    return out


@pytest.mark.parametrize("strength", [0.5, 3.0, 40.0])
def test_warping_is_a_literal_bilinear_interpolation(strength: float) -> None:
    """On coordinates, the column in red and the row in green, and on noise in blue; strong offsets meet the border."""
    height, width = 9, 13
    x = torch.zeros(1, 3, height, width)
    x[0, 0], x[0, 1] = torch.arange(width) / 13, torch.arange(height)[:, None] / 13
    x[0, 2] = torch.rand(height, width, generator=seeded(1))
    offset = offsets(control_offsets(4, seeded(2)), strength, height, width)
    out = warp(x, sampling_grid(offset))[0]
    for channel in range(3):
        expected = torch.tensor(literal(x[0, channel], offset))
        assert (out[channel] - expected).abs().max() <= 0.5 / 255 + 1e-5  # which rounding may add
    assert torch.allclose(out * 255, (out * 255).round(), atol=1e-4)


GOLDEN = [[128, 143, 160, 163, 156, 154, 154, 153], [119, 130, 151, 129, 123, 153, 132, 128]]  # top left, red


def test_a_stamp_needs_its_state_alone() -> None:
    """Uint8 to uint8, one image as many, no draw from the generator."""
    attack, x = WaNet(), toys.make_images(6).x
    ctx = toys.context(AttackContext, train=toys.make_images(8))
    state = attack.prepare(toys.context(AttackContext, train=toys.make_images(8), classes=10))
    rng, y = seeded(5), torch.zeros(6, dtype=torch.int64)
    before = rng.get_state()
    out = attack.stamp(x, y, state, rng)
    assert torch.equal(rng.get_state(), before)
    assert all(torch.equal(attack.stamp(x[i : i + 1], y[:1], state, rng)[0], out[i]) for i in range(6))
    assert out[0, 0, :2, :8].tolist() == GOLDEN
    with pytest.raises(UserError, match=r"target=5 is not a class of this data set; expected 0..3"):
        attack.prepare(ctx)


# ---------------------------------------------------------------- a batch


@pytest.mark.parametrize(
    ("size", "rate", "cross", "expected"),
    [
        (64, 0.1, 2.0, (6, 12)),
        (40, 0.5, 1.0, (20, 20)),
        (100, 0.29, 0.0, (29, 0)),
        (5, 0.1, 2.0, (0, 0)),  # no noise where nothing is warped
        (50, 0.29, 1.5, (14, 21)),  # of 14.5 and of 21
        (19, 0.1, 2.0, (1, 2)),  # not floor(3.8): the second comes from the first
        (10, 0.4, 1.5, (4, 6)),
        (1, 1, 0, (1, 0)),
    ],
)
def test_shares_of_a_batch(size: int, rate: float, cross: float, expected: tuple[int, int]) -> None:
    assert shares(size, rate, cross) == expected


def test_noise_starts_from_the_edge_of_the_image() -> None:
    """A warp far beyond the right edge ends at the edge, from where the noise leads back into the image."""
    grid = sampling_grid(torch.full((5, 5, 2), 100.0))
    assert torch.equal(grid, torch.ones(5, 5, 2))
    back = moved(grid.expand(1, -1, -1, -1), torch.full((1, 5, 5, 2), -1.0))
    assert torch.allclose(back, torch.full((1, 5, 5, 2), 0.8))


@pytest.mark.parametrize("strength", [0.5, 40.0])  # at 40 most pixels look beyond the border, before their noise
def test_what_a_batch_is_made_of(strength: float) -> None:
    attack, images = WaNet(target=1, rate=0.2, cross=1.5, strength=strength), toys.make_images(20)
    state = attack.prepare(toys.context(AttackContext, train=images))
    offset = state.tensors["offset"]
    batch = Batch(images.x.float() / 255, images.y, torch.arange(20))
    seen, told = attack._seen(batch, sampling_grid(offset), seeded(3)), attack._told(batch)
    stamped = attack.stamp(images.x, images.y, state, seeded()).float() / 255
    assert torch.allclose(seen[:4], stamped[:4], atol=1e-6)  # what is learnt is what the test images will show
    assert told[:4].tolist() == [1] * 4
    assert torch.equal(seen[10:], batch.x[10:]) and torch.equal(told[4:], images.y[4:])
    noise = 2 * torch.rand(6, 32, 32, 2, generator=seeded(3)) - 1
    for i in range(6):
        expected = torch.tensor(literal(batch.x[4 + i, 0], offset, noise[i]))
        assert (seen[4 + i, 0] - expected).abs().max() <= 0.5 / 255 + 1e-5
        assert not torch.equal(seen[4 + i], stamped[4 + i])
    assert torch.equal(batch.x, images.x.float() / 255) and torch.equal(batch.y, images.y)  # nothing is written to it


@pytest.mark.parametrize(("cross", "message"), [(9.5, "ask for 1.05 of each batch, expected at most 1")])
def test_rates_that_do_not_fit(cross: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WaNet(cross=cross)


def test_batches_too_small_for_the_rate() -> None:
    attack = WaNet(target=1, rate=0.02)
    ctx = toys.context(AttackContext, train=toys.make_images(100))
    with pytest.raises(UserError, match=r"rate=0.02 of a batch of 32 images is not one image; raise wanet.rate"):
        attack.train(toys.fresh(), attack.prepare(ctx), ctx)


# ---------------------------------------------------------------- the training


class Pixels(Classifier):
    """One hidden layer on all pixels: it sees places, as the toy network does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 16 * 16, 64)
        self.fc = nn.Linear(64, 4)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.first(x.flatten(1)).relu(), ()

    def head(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(z))


def pictures(count: int, seed: int) -> Images:
    """Four smooth pictures of 3x16x16, `count` copies in all with a little noise: what is warped looks warped."""
    y = torch.arange(count) % 4
    coarse = torch.rand(4, 3, 6, 6, generator=seeded())
    smooth = 255 * interpolate(coarse, size=(16, 16), mode="bilinear", align_corners=True)
    noise = 3 * torch.randn(count, 3, 16, 16, generator=seeded(seed))
    return Images((smooth[y] + noise).clamp(0, 255).to(torch.uint8), y)


def test_the_network_obeys_the_warp() -> None:
    """ASR and BA above 95 on pictures of which there is something to warp."""
    attack = WaNet(target=1, rate=0.2, cross=0.5, strength=4.0)
    recipe = Recipe(steps=400, batch=40, lr=0.05, augment="none")
    ctx = toys.context(AttackContext, train=pictures(400, 1), recipe=recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pixels().train()
    state = attack.train(model, attack.prepare(ctx), ctx)
    test = pictures(200, 2)
    others = test.subset(test.y != 1)
    stamped = attack.stamp(others.x, others.y, state, seeded())
    assert toys.accuracy(model, test) > 95
    assert 100 * (predict(model, stamped) == 1).float().mean() > 95
    assert 100 * (predict(model, others.x) == 1).float().mean() < 5
