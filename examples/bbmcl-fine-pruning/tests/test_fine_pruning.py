"""The contract of backdoorbench_mcl, one test per sentence; below it the layer, the order of the cuts, where they stop,
and a backdoor that is cut.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backdoorbench_mcl.api import Classifier, DefenseContext, Granted, NotApplicable, Recipe, Repaired, UserError
from backdoorbench_mcl.kit import fit, masked, predict
from backdoorbench_mcl.testing import parametrize_with_checks, toys
from bbmcl_fine_pruning.method import FinePruning, Pruned, calls, choose_layer, most_cut, prune
from bbmcl_models.preact import PreActResNet18
from bbmcl_models.resnet import ResNet18
from bbmcl_models.wrn import WRN


@parametrize_with_checks([FinePruning(), FinePruning(layer="conv1", ratio=0.25)])
def test_conformance(check: Callable[[], None]) -> None:
    check()


def context(ticks: list[tuple[int, int]] | None = None, **recipe: object) -> DefenseContext:
    """By default a single step that hardly moves anything."""
    settings = {"steps": 1, "batch": 32, "lr": 1e-6, "augment": "none", **recipe}
    seen = [] if ticks is None else ticks
    return toys.context(
        DefenseContext, clean=toys.clean_images(), needs={}, granted=Granted("fine-pruning", {}),
        recipe=Recipe(**settings), tick=lambda done, total, images: seen.append((done, total)),  # type: ignore[arg-type]
    )  # fmt: skip


def cut_of(model: Classifier, defense: FinePruning) -> dict[str, list[int]]:
    masks: dict[str, list[int]] = defense.defend(model, context()).params["masks"]
    return masks


class Net(Classifier):
    """A sequence of layers, the largest value of each map, a linear layer. head: the numbers that this one gets."""

    def __init__(self, layers: nn.Module, head: int) -> None:
        super().__init__()
        self.layers = layers
        self.fc = nn.Linear(head, 4)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = self.layers(x)
        return out.amax((2, 3)) if out.ndim == 4 else out.flatten(1), ()

    def head(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(z))


# ---------------------------------------------------------------- the layer


class Residual(nn.Module):
    """relu(x + conv(x)), its shortcut before its convolution; beside it a head that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.unused = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


class Tokens(nn.Module):
    """A patch embedding, then tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 5, 16, stride=16)
        self.mix = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.mix(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Twice(nn.Module):
    """One ReLU behind each of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.relu(self.two(self.relu(self.one(x)))))


def layer_of(model: Classifier, asked: str | None = None) -> str:
    return choose_layer(calls(model.eval(), toys.make_images(2).x), asked)


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (toys.fresh(), "bn2"),
        (WRN(depth=10).build(4, toys.SHAPE), "bn1"),  # whose last convolution by definition is a shortcut
        (WRN(depth=16).build(4, toys.SHAPE), "bn1"),
        (ResNet18().build(4, toys.SHAPE), "layer4"),
        (PreActResNet18().build(4, toys.SHAPE), "bn"),
        (Net(Residual(), 3), "layers"),
        (Net(Twice(), 6), "layers"),
    ],
    ids=["toy", "wrn-10", "wrn-16", "resnet18", "preactresnet18", "residual", "twice"],
)
def test_the_layer_is_the_last_to_put_out_maps_when_the_network_runs(model: Classifier, layer: str) -> None:
    assert layer_of(model) == layer
    assert not any(module._forward_hooks for module in model.modules())  # the victim is left as it was


@pytest.mark.parametrize("layers", [nn.Flatten(), Tokens()], ids=["flat", "tokens"])
def test_networks_without_last_maps(layers: nn.Module) -> None:
    model = Net(layers, 3 * 32 * 32 if isinstance(layers, nn.Flatten) else 5)
    with pytest.raises(NotApplicable, match=r"no maps \(B, C, H, W\) come from a last convolution"):
        FinePruning().defend(model, context())


def test_a_layer_by_name() -> None:
    assert list(cut_of(toys.victim(), FinePruning(layer="conv1"))) == ["conv1"]
    assert layer_of(Net(Tokens(), 5), "layers.patches") == "layers.patches"
    for model, wrong in (
        (toys.victim(), "conv3"), (toys.victim(), "fc"), (Net(Residual(), 3), "layers.unused"),
        (Net(Twice(), 6), "layers.relu"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"layer='{wrong}' was given, expected a module that puts out maps .*: "):
            layer_of(model, wrong)
    with pytest.raises(UserError, match=r"layer='fc' was given, .*: this network has none"):
        layer_of(Net(nn.Flatten(), 3 * 32 * 32), "fc")


def test_zeros_in_the_weights_do_not_cut_a_channel_behind_a_shortcut() -> None:
    """Why the repair is masks: no filter's zeros stop what the shortcut brings."""
    x = toys.make_images(8).x.float() / 255
    cut, zeroed = Net(Residual(), 3).eval(), Net(Residual(), 3).eval()
    masked(cut, {"layers": [0]})
    weights = zeroed.state_dict()
    weights["layers.conv.weight"][0], weights["layers.conv.bias"][0] = 0, 0
    assert bool((cut.embed(x)[:, 0] == 0).all())
    assert bool((zeroed.embed(x)[:, 0] > 0).all())


# ---------------------------------------------------------------- the order


def known(weights: list[float]) -> Classifier:
    """One convolution whose channels are known multiples of the red pixel."""
    conv = nn.Conv2d(3, len(weights), 1, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, 0, 0, 0] = torch.tensor(weights)
    return Net(nn.Sequential(conv), len(weights))


def test_activations_of_known_channels() -> None:
    x = torch.zeros(2, 3, 1, 2, dtype=torch.uint8)
    x[0, 0, 0], x[1, 0, 0] = torch.tensor([255, 51]), torch.tensor([0, 102])  # red: 1, 0.2; 0, 0.4
    pruned = Pruned(known([1.0, -3.0, 0.5, 0.0]), "layers.0")
    pruned.accuracy([0], toys.make_images(2))
    found = pruned.activation(x)  # of the network before any cut
    assert torch.allclose(found, torch.tensor([0.4, 0.0, 0.2, 0.0], dtype=torch.float64), atol=1e-7)
    assert found.argsort(stable=True).tolist() == [1, 3, 2, 0]  # equal ones in their own order


def test_activations_are_those_of_a_literal_loop() -> None:
    model, x = toys.victim(), toys.clean_images(30).x
    total = [0.0] * 16
    with torch.no_grad():
        for image in x:
            inner = torch.relu(model.bn1(model.conv1(model.normalise(image[None].float() / 255))))  # type: ignore[operator]
            maps = model.bn2(model.conv2(inner))[0]  # type: ignore[operator]  # (16, 8, 8)
            for channel in range(16):
                total[channel] += sum(max(0.0, float(value)) for value in maps[channel].flatten()) / 64
    found = Pruned(model, "bn2").activation(x)
    assert found.tolist() == pytest.approx([value / 30 for value in total], abs=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("ratio", "channels", "most"), [(1.0, 6, 5), (0.5, 6, 3), (0.0, 6, 0), (0.29, 100, 29), (0.95, 512, 486), (1, 1, 0)]
)
def test_the_most_that_is_cut(ratio: float, channels: int, most: int) -> None:
    assert most_cut(ratio, channels) == most


@pytest.mark.parametrize("most", [0, 1, 2, 5, 15, 16, 31, 486])
def test_cutting_stops_where_a_literal_loop_stops(most: int) -> None:
    """Accuracies that only fall: every place where they can cross the bar."""
    for last in range(most + 1):
        looks: list[int] = []

        def judge(count: int, last: int = last, looks: list[int] = looks) -> float:
            looks.append(count)
            return 90.0 if count == 0 else 86.0 if count <= last else 85.9

        literal = 0
        while literal < most and judge(literal + 1) >= 86:
            literal += 1
        looks.clear()
        assert prune(most, judge, 4) == literal == last
        assert len(looks) <= 1 + most.bit_length()
        assert all(0 <= count <= most for count in looks)


def test_where_accuracy_rises_again_the_next_channel_costs_too_much() -> None:
    accuracies = [90, 90, 85, 90, 90, 85, 90, 84]
    kept = prune(7, lambda count: float(accuracies[count]), 4)
    assert kept in (1, 4, 6)
    assert accuracies[kept] >= 86 > accuracies[kept + 1]


def test_what_is_cut_is_what_a_literal_loop_cuts() -> None:
    """At a drop of 30 points, which the toy victim reaches once and for all; before that it goes up and down."""
    victim, clean = toys.victim(), toys.clean_images()
    order = Pruned(victim, "bn2").activation(clean.x).argsort(stable=True).tolist()
    floor = toys.accuracy(victim, clean) - 30
    kept: list[int] = []
    for channel in order[:-1]:
        trial = toys.victim()
        with torch.no_grad():
            trial.bn2.weight[[*kept, channel]] = 0  # type: ignore[operator,union-attr]
            trial.bn2.bias[[*kept, channel]] = 0  # type: ignore[operator,union-attr]
        if toys.accuracy(trial, clean) < floor:
            break
        kept.append(channel)
    assert 0 < len(kept) < 15  # the toy victim does need some of them
    assert cut_of(toys.victim(), FinePruning(ratio=1.0, max_drop=30)) == {"bn2": sorted(kept)}


def test_looks_and_training_are_one_progress() -> None:
    ticks: list[tuple[int, int]] = []
    FinePruning().defend(toys.victim(), context(ticks, steps=6))
    looks = 1 + most_cut(0.95, 16).bit_length()
    assert looks == 5
    assert {total for _, total in ticks} == {looks + 6}
    done = [step for step, _ in ticks]
    assert done == sorted(set(done)) and done[-7:] == list(range(looks, looks + 7))


# ---------------------------------------------------------------- the repair


def test_the_mask_is_in_place_while_training() -> None:
    """What is cut gets no gradient, so that only weight decay may move it."""
    victim = toys.victim()
    before = victim.conv2.weight.detach().clone()  # type: ignore[operator,union-attr]
    made = FinePruning().defend(victim, context(steps=3, lr=0.1, weight_decay=0.0))
    cut = made.params["masks"]["bn2"]
    moved = (made.model.conv2.weight != before).flatten(1).any(1)  # type: ignore[union-attr]
    assert moved.logical_not().nonzero().flatten().tolist() == cut


def dormant() -> Classifier:
    """A clean toy network with a backdoor of one channel: a filter for the patch in the first layer, which alone feeds
    the channel of the second, which alone speaks for the target. Both lie where the network has least to lose.
    """
    board = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    best, found = 0.0, toys.clean_model()
    quiet = int(Pruned(found, "bn2").activation(toys.clean_images().x).argmin())
    for first in range(16):
        model = toys.clean_model()
        weights = model.state_dict()
        for name, channel, scale, shift in (("bn1", first, 1.0, -20.0), ("bn2", quiet, 1.0, 0.0)):
            weights[f"{name}.weight"][channel], weights[f"{name}.bias"][channel] = scale, shift
            weights[f"{name}.running_mean"][channel], weights[f"{name}.running_var"][channel] = 0, 1
        weights["conv1.weight"][first] = board
        weights["conv2.weight"][:, first] = 0
        weights["conv2.weight"][quiet] = 0
        weights["conv2.weight"][quiet, first, 2, 2] = 1
        weights["fc.weight"][:, quiet] = 0
        weights["fc.weight"][toys.TARGET, quiet] = 2
        accuracy = toys.accuracy(model, toys.clean_images())
        if accuracy > best:
            best, found = accuracy, model
    return found


def asr(model: Classifier) -> float:
    test = toys.make_images(toys.TEST, 2)
    stamped = toys.stamped(test.x[test.y != toys.TARGET])
    return 100 * float((predict(model, stamped) == toys.TARGET).float().mean())


def test_a_backdoor_in_a_dormant_channel_goes() -> None:
    """ASR above 95 before, and after fine-tuning alone; below 20 at unharmed BA after both."""
    test = toys.make_images(toys.TEST, 2)
    victim = dormant()
    before = toys.accuracy(victim, test)
    assert asr(victim) > 95
    assert before > 75

    tuned, ctx = dormant().train(), context(steps=60, lr=0.01)
    fit(tuned, ctx.clean, ctx, lambda batch: cross_entropy(tuned(batch.x), batch.y))
    assert asr(tuned) > 95

    made = FinePruning().defend(dormant(), context(steps=60, lr=0.01))
    assert isinstance(made, Repaired)
    assert asr(made.model) < 20
    assert toys.accuracy(made.model, test) > before - 5
