"""What keeps jobs small gives the same results as what it replaces; how small is measured in tests/large."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_images
from tiny import Tiny, images
from torch import Tensor

from backdoorbench_mcl import kit, victims
from backdoorbench_mcl.api import Attack, Images, Location, Poisoned, State
from backdoorbench_mcl.errors import PluginError

STATE = State()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_poison_laid_over_images_trains_like_poison_written_into_them() -> None:
    clean = make_images(50, shape=(3, 8, 8))
    before = clean.x.clone()
    index = kit.choose(50, 17, generator(3))
    poisoned = Poisoned(index, 255 - clean.x[index], (clean.y[index] + 1) % 10)
    x, y = clean.x.clone(), clean.y.clone()
    x[index], y[index] = poisoned.x, poisoned.y
    images = victims._poisoned(clean, poisoned, torch.device("cpu"))
    augment = kit.augmentation("crop+flip", True)
    assert len(images) == 50
    for ours, theirs in zip(
        images.batches(16, generator(1), augment), Images(x, y).batches(16, generator(1), augment), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(images.subset(torch.tensor([int(index[4]), 0])).x, x[[int(index[4]), 0]])
    assert torch.equal(images.y, y)
    assert torch.equal(clean.x, before)  # pages of a map that is written to would become memory
    assert images.x.data_ptr() == clean.x.data_ptr()
    moved = images.to("cpu")  # never without what is laid over: it would train a clean victim
    assert torch.equal(moved.x, x)
    assert torch.equal(moved.y, y)


class Corner(Attack):
    """Draws its colour image by image; `spoil` changes what stamp returns."""

    name = "corner"

    def poison(self, train: Images, state: State, rng: torch.Generator) -> Poisoned:
        raise NotImplementedError

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        x[:, :, 5:, 6:] = torch.randint(0, 256, (len(x), 3, 1, 1), generator=rng, dtype=torch.uint8)
        return x


class Wide(Corner):
    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        return x[..., :3]


def fake_job(folder: Path) -> Any:
    return SimpleNamespace(folder=folder, rng=lambda role: generator(7))


def test_images_stamped_in_parts_are_those_stamped_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_images(23, shape=(3, 8, 8))
    before = images.x.clone()
    whole = victims._stamped(fake_job(tmp_path), Corner(), images.x, images.y, STATE).clone()
    assert torch.equal(whole, Corner().stamp(before.clone(), images.y, STATE, generator(7)))
    monkeypatch.setattr(victims, "_CHUNK", 5 * 3 * 8 * 8)
    parts = victims._stamped(fake_job(tmp_path), Corner(), images.x, images.y, STATE)
    assert torch.equal(parts, whole)
    assert torch.equal(images.x, before)
    with pytest.raises(PluginError, match=r"corner: stamp\(\) returned torch.uint8 \(5, 3, 8, 3\), expected uint8"):
        victims._stamped(fake_job(tmp_path), Wide(), images.x, images.y, STATE)


def test_the_place_of_a_patch_is_found_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_images(23, shape=(3, 8, 8)).x
    one, many = x.clone(), x.clone()
    one[:, :, 5:7, 2:6] = torch.randint(0, 256, (3, 2, 4), generator=generator(), dtype=torch.uint8)
    many[:, :, 5:7, 2:6] = torch.randint(0, 256, (23, 3, 2, 4), generator=generator(), dtype=torch.uint8)
    last = one.clone()
    last[-1, 0, 5, 2] ^= 1
    for chunk in (1 << 25, 5 * 3 * 8 * 8):
        monkeypatch.setattr(victims, "_CHUNK", chunk)
        assert victims._location(x, one) == Location(5, 2, 2, 4)
        assert victims._location(x, many) is None
        assert victims._location(x, last) is None
        assert victims._location(x, x) is None


@pytest.mark.parametrize(("side", "expected"), [(8, 512), (32, 512), (64, 128), (224, 64), (1000, 64)])
def test_large_images_are_predicted_a_few_at_a_time(side: int, expected: int) -> None:
    assert kit.at_once(torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(5, 3, side, side)) == expected


@pytest.mark.parametrize(("side", "expected"), [(8, 128), (32, 128), (33, 120), (64, 32), (96, 16), (224, 16)])
def test_of_large_images_fewer_are_moved_at_a_time(side: int, expected: int) -> None:
    """A gradient with respect to the images keeps every map of the network: 30 MB an image of 224x224 in ResNet-18."""
    x = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(5, 3, side, side)
    assert kit.at_once(x, 128, 16) == expected
    assert kit.at_once(x, 4, 16) == 4


def test_a_surrogate_is_judged_alike_in_any_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random starts are those of one search over all images, and so is what it finds."""
    found: list[Tensor] = []
    search = kit.pgd

    def watched(*given: Any, **how: Any) -> Tensor:
        found.append(search(*given, **how))
        return found[-1]

    monkeypatch.setattr(kit, "pgd", watched)
    for given, passes in ((images(150, size=32), [128, 22]), (images(20, size=96), [16, 4])):
        found.clear()
        accuracy = victims._under_pgd(Tiny(), given, generator(1))
        assert [len(part) for part in found] == passes
        how: dict[str, Any] = {"eps": 8 / 255, "step": 2 / 255, "steps": 10, "rng": generator(1)}
        moved = search(Tiny(), given.x.float() / 255, given.y, **how)
        assert torch.equal(torch.cat(found), moved)
        assert accuracy == 100 * float((Tiny()(moved).argmax(1) == given.y).float().mean())
