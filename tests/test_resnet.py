"""resnet18, preactresnet18: golden sizes of spec 13, torchvision as an oracle, and the formulas of the paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from helpers import make_context, make_images
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import Classifier, Recipe, UserError
from bbmcl_defenses.mcldef import head_parameters
from bbmcl_models import bbmcl_models
from bbmcl_models.preact import PreActResNet, PreActResNet18
from bbmcl_models.resnet import ResNet, ResNet18

Shape = tuple[int, int, int]


def build(classes: int = 10, shape: Shape = (3, 32, 32), seed: int = 0, **params: Any) -> ResNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNet18(**params).build(classes, shape)


def preact(classes: int = 10, shape: Shape = (3, 32, 32)) -> PreActResNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PreActResNet18().build(classes, shape)


def stir(model: nn.Module) -> Tensor:
    """Batch norms that do something, and two images."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    assert tensor is not None
                    tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
    return torch.rand(2, 3, 32, 32, generator=rng)


def oracle(stem: str, classes: int) -> nn.Module:
    """torchvision's network, with the stem replaced where it has to be; equal weights from an equal seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: nn.Module = torchvision.models.resnet18(weights=None, num_classes=classes)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


@pytest.mark.parametrize(
    ("classes", "stem", "count"), [(10, "cifar", 11173962), (20, "cifar", 11179092), (20, "imagenet", 11186772)]
)
def test_golden_sizes(classes: int, stem: str, count: int) -> None:
    model = build(classes, stem=stem)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    theirs = {name: tensor.shape for name, tensor in oracle(stem, classes).state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == theirs


def test_weights_are_drawn_as_torchvision_draws_them() -> None:
    ours, theirs = build(20, (3, 224, 224)).state_dict(), oracle("imagenet", 20).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_forward_equals_torchvision(stem: str) -> None:
    model, net = build(stem=stem).eval(), oracle(stem, 10).eval()
    model.set_normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    x = stir(model)
    net.load_state_dict(model.state_dict())
    held: list[Tensor] = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        net.get_submodule(name).register_forward_hook(lambda module, given, out: held.append(out))
    with torch.no_grad():
        normal = (x - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.25])[:, None, None]
        want = net(normal)
        out = model.forward_all(x)
    torch.testing.assert_close(out.logits, want, rtol=1e-4, atol=1e-4)
    assert len(out.stages) == 4
    for ours, theirs in zip(out.stages, held, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert out.embed.shape == (2, 512)
    assert float(out.embed.min()) >= 0


@pytest.mark.parametrize(
    ("size", "stem", "kernel"),
    [(32, "auto", 3), (64, "auto", 3), (65, "auto", 7), (224, "auto", 7), (224, "cifar", 3), (32, "imagenet", 7)],
)
def test_stem(size: int, stem: str, kernel: int) -> None:
    model = build(shape=(3, size, size), stem=stem)
    assert model.conv1.kernel_size == (kernel, kernel)
    assert model.stem == ("cifar" if kernel == 3 else "imagenet")


def test_stage_sizes() -> None:
    with torch.no_grad():
        small = build().eval().forward_all(torch.rand(1, 3, 32, 32)).stages
        large = build(shape=(3, 96, 96)).eval().forward_all(torch.rand(1, 3, 96, 96)).stages
    assert [tuple(stage.shape[1:]) for stage in small] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert [tuple(stage.shape[1:]) for stage in large] == [(64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3)]


def test_grid_keeps_places_and_the_logits() -> None:
    """At 64 pixels the last map is 8x8: four tiles, whose averages the head averages again."""
    pool, grid = build(shape=(3, 64, 64)).eval(), build(shape=(3, 64, 64), feature="grid").eval()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, tiled = pool.forward_all(x), grid.forward_all(x)
        assert torch.equal(grid.head(grid.embed(x)), grid(x))
    assert tiled.embed.shape == (2, 512 * 4)
    last = tiled.stages[-1]
    want = torch.stack([last[:, :, i : i + 4, j : j + 4].mean((2, 3)) for i in (0, 4) for j in (0, 4)], 2)
    torch.testing.assert_close(tiled.embed, want.flatten(1))
    torch.testing.assert_close(tiled.logits, plain.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiled.embed.view(2, 512, 4).mean(2), plain.embed)


def test_grid_is_pool_at_32_pixels() -> None:
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain, tiled = (build(feature=feature).eval().forward_all(x) for feature in ("pool", "grid"))
    torch.testing.assert_close(plain.embed, tiled.embed)
    torch.testing.assert_close(plain.logits, tiled.logits)


@pytest.mark.parametrize(
    ("size", "stem", "words"),
    [(40, "auto", "40x40 were given, expected multiples of 32 with the cifar"), (224, "auto", "of 128 with the image")],
)
def test_a_grid_that_does_not_fit_is_explained(size: int, stem: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(shape=(3, size, size), stem=stem, feature="grid")


def test_grid_fits_the_authors_setting() -> None:
    """Spec 3.2: 28x28 at 224 pixels with the cifar stem, 512 x 7 x 7 features."""
    model = build(20, (3, 224, 224), stem="cifar", feature="grid")
    assert model.fc.in_features == 512
    assert model.head(torch.rand(1, 512 * 7 * 7)).shape == (1, 20)


def recompute(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The pre-activation network in eval mode, from the state dict alone."""

    def active(name: str, a: Tensor) -> Tensor:
        parts = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (weights[f"{name}.{part}"][:, None, None] for part in parts)
        return ((a - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)

    a = F.conv2d(x, weights["conv1.weight"], padding=1)
    stages = []
    for group in (1, 2, 3, 4):
        for number in (0, 1):
            name = f"layer{group}.{number}"
            stride = 2 if group > 1 and number == 0 else 1
            u = active(f"{name}.bn1", a)
            v = active(f"{name}.bn2", F.conv2d(u, weights[f"{name}.conv1.weight"], stride=stride, padding=1))
            r = F.conv2d(v, weights[f"{name}.conv2.weight"], padding=1)
            shortcut = weights.get(f"{name}.shortcut.weight")
            a = r + (a if shortcut is None else F.conv2d(u, shortcut, stride=stride))
        stages.append(a)
    z = active("bn", a).flatten(2).mean(2)
    return z @ weights["fc.weight"].T + weights["fc.bias"], z, stages


def test_preact_equals_the_formulas() -> None:
    model = preact().eval()
    x = stir(model)
    with torch.no_grad():
        out = model.forward_all(x)
        logits, z, stages = recompute(model.state_dict(), x)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11172170
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out.embed, z, rtol=1e-4, atol=1e-3)
    for ours, theirs in zip(out.stages, stages, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert [stage.shape[2] for stage in out.stages] == [32, 16, 8, 4]


@pytest.mark.parametrize("make", [build, preact])
def test_initialisation(make: Callable[[], Classifier]) -> None:
    model = make()
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        assert conv.bias is None
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert float(conv.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
    assert len(convs) == 20


@pytest.mark.parametrize("make", [build, preact])
def test_head_copies_and_gradients(make: Callable[[], Classifier]) -> None:
    model = make().eval()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(model.head(model.embed(x)), model(x))
    fc = model.get_submodule("fc")
    assert {id(p) for p in head_parameters(model, x.detach())} == {id(p) for p in fc.parameters()}
    other = kit.frozen(model)
    torch.autograd.backward(model.train()(x).square().sum())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)
    with torch.no_grad():
        before = other(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(x), before)


def test_a_single_image_left_over_joins_the_batch_before_it(tmp_path: Path) -> None:
    """Batch norm refuses one image where its map is a single pixel, as that of the ImageNet stem at 32 pixels is."""
    images, seen = make_images(33, classes=4), []
    assert [len(batch.x) for batch in images.batches(16)] == [16, 16, 1]
    assert [len(batch.x) for batch in images.subset(torch.arange(1)).batches(16, lone=False)] == [1]
    recipe = Recipe(epochs=2, batch=16, augment="none")
    ctx = make_context(tmp_path, 0, recipe, tick=lambda done, total, n: seen.append((done, total, n)))
    model = build(4, stem="imagenet").train()
    kit.fit(model, images, ctx, lambda batch: F.cross_entropy(model(batch.x), batch.y))
    assert seen == [(1, 4, 16), (2, 4, 17), (3, 4, 16), (4, 4, 17)]


def test_parameters_are_checked_and_other_channels_work() -> None:
    with pytest.raises(UserError, match="stem='cifer'"):
        ResNet18(stem="cifer")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes no suffix"):
        ResNet18.parse("-18")
    assert ResNet18().params == {"stem": "auto", "feature": "pool"}
    assert build(4, (1, 32, 32))(torch.rand(2, 1, 32, 32)).shape == (2, 4)
    assert preact(4, (1, 32, 40))(torch.rand(2, 1, 32, 40)).shape == (2, 4)


def test_entries_point_at_the_classes() -> None:
    targets = {entry.name: entry.target for entry in bbmcl_models()}
    for cls in (ResNet18, PreActResNet18):
        assert targets[cls.name] == f"{cls.__module__}:{cls.__name__}"
