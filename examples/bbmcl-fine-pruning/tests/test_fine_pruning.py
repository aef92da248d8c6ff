"""The contract of backdoorbench_mcl, one test per sentence; below it the order of the cuts and where they stop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from backdoorbench_mcl.api import Classifier, DefenseContext, Granted, NotApplicable, Recipe, UserError
from backdoorbench_mcl.testing import parametrize_with_checks, toys
from bbmcl_fine_pruning.method import FinePruning, accuracy, last_convolution, mean_activation, prune


@parametrize_with_checks([FinePruning(), FinePruning(layer="conv1", ratio=0.25, step=2)])
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Flat(Classifier):
    """A network without convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x.mean((2, 3)), ()

    def head(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(z))


class Known(Classifier):
    """One convolution whose channels are known multiples of the red pixel, then the largest of all channels."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, len(weights), 1, bias=False)
        self.fc = nn.Linear(len(weights), 4)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, 0, 0, 0] = torch.tensor(weights)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = self.conv(x)
        return out.amax((2, 3)), (out,)

    def head(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(z))


def test_activations_of_known_channels() -> None:
    x = torch.zeros(2, 3, 1, 2, dtype=torch.uint8)
    x[0, 0, 0], x[1, 0, 0] = torch.tensor([255, 51]), torch.tensor([0, 102])  # red: 1, 0.2; 0, 0.4
    found = mean_activation(Known([1.0, -3.0, 0.5, 0.0]), "conv", x)
    assert torch.allclose(found, torch.tensor([0.4, 0.0, 0.2, 0.0], dtype=torch.float64), atol=1e-7)
    assert found.argsort(stable=True).tolist() == [1, 3, 2, 0]  # equal ones in their own order


def test_activations_are_those_of_a_literal_loop() -> None:
    model, x = toys.victim(), toys.clean_images(30).x
    total = [0.0] * 16
    with torch.no_grad():
        for image in x:
            inner = torch.relu(model.bn1(model.conv1(model.normalise(image[None].float() / 255))))  # type: ignore[operator]
            maps = model.conv2(inner)[0]  # type: ignore[operator]  # (16, 8, 8)
            for channel in range(16):
                total[channel] += sum(max(0.0, float(value)) for value in maps[channel].flatten()) / 64
    found = mean_activation(model, "conv2", x)
    assert found.tolist() == pytest.approx([value / 30 for value in total], abs=1e-4)
    assert not any(module._forward_hooks for module in model.modules())  # the victim is left as it was


@pytest.mark.parametrize(
    ("accuracies", "settings", "cut"),
    [
        ([90, 90, 89, 86, 85, 90], (4, 1.0, 1), 3),  # the fourth cut costs 5 points; what comes later does not matter
        ([90, 90, 89, 86, 86, 86], (4, 1.0, 1), 5),  # never all of the six
        ([90, 90, 89, 86, 86, 86], (0, 1.0, 1), 1),
        ([90, 90, 90, 90, 90, 90], (4, 0.5, 1), 3),
        ([90, 90, 90, 90, 90, 90], (4, 0.0, 1), 0),
        ([90, 0, 90, 0, 89, 90], (4, 1.0, 2), 5),  # looks after 2, 4 and the last, shorter step
        ([90, 0, 0, 90, 90, 90], (100, 1.0, 1), 5),
    ],
)
def test_where_cutting_stops(accuracies: list[float], settings: tuple[float, float, int], cut: int) -> None:
    order = [5, 3, 1, 0, 2, 4]
    seen: list[list[int]] = []

    def judge(channels: list[int]) -> float:
        seen.append(channels)
        return accuracies[len(channels)]

    assert prune(order, judge, *settings) == cut
    assert all(channels == order[: len(channels)] for channels in seen)


def defend(model: Classifier, defense: FinePruning) -> dict[str, list[int]]:
    ctx = toys.context(
        DefenseContext, clean=toys.clean_images(), needs={}, granted=Granted("fine-pruning", {}),
        recipe=Recipe(steps=1, batch=32, lr=1e-6, augment="none"),
    )  # fmt: skip
    masks: dict[str, list[int]] = defense.defend(model, ctx).params["masks"]
    return masks


def test_what_is_cut_is_what_a_literal_loop_cuts() -> None:
    victim, clean = toys.victim(), toys.clean_images()
    order = mean_activation(victim, "conv2", clean.x).argsort(stable=True).tolist()
    floor = accuracy(victim, clean) - 4
    kept: list[int] = []
    for channel in order[:-1]:
        trial = toys.victim()
        with torch.no_grad():
            trial.conv2.weight[[*kept, channel]] = 0  # type: ignore[operator,union-attr]  # no bias: its output is 0
        if accuracy(trial, clean) < floor:
            break
        kept.append(channel)
    assert 0 < len(kept) < 15  # the toy victim does need some of them
    assert defend(toys.victim(), FinePruning(ratio=1.0)) == {"conv2": sorted(kept)}


def test_the_mask_is_in_place_while_training() -> None:
    """What is cut gets no gradient, so that only weight decay may move it."""
    victim = toys.victim()
    before = victim.conv2.weight.detach().clone()  # type: ignore[operator,union-attr]
    ctx = toys.context(
        DefenseContext, clean=toys.clean_images(), needs={}, granted=Granted("fine-pruning", {}),
        recipe=Recipe(steps=3, batch=32, lr=0.1, weight_decay=0.0, augment="none"),
    )  # fmt: skip
    made = FinePruning().defend(victim, ctx)
    cut = made.params["masks"]["conv2"]
    moved = (made.model.conv2.weight != before).flatten(1).any(1)  # type: ignore[union-attr]
    assert moved.logical_not().nonzero().flatten().tolist() == cut


def test_the_layer() -> None:
    assert last_convolution(toys.victim()) == "conv2"
    assert list(defend(toys.victim(), FinePruning(layer="conv1"))) == ["conv1"]
    with pytest.raises(NotApplicable, match="no convolution"):
        defend(Flat(), FinePruning())
    with pytest.raises(UserError, match="no module 'conv3'; the network has conv1, "):
        defend(toys.victim(), FinePruning(layer="conv3"))
    with pytest.raises(UserError, match="'fc' does not put out maps"):
        defend(toys.victim(), FinePruning(layer="fc"))
