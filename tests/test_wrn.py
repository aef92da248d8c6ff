"""wrn: golden sizes of spec 13, names of the public code, and the network against a re-computation from spec 3.1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_mcl.api import UserError
from bbmcl_models import bbmcl_models
from bbmcl_models.wrn import WRN, WideResNet

Shape = tuple[int, int, int]


def build(text: str = "-16-1", classes: int = 10, shape: Shape = (3, 32, 32), seed: int = 0) -> WideResNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WRN(**WRN.parse(text)).build(classes, shape)


@pytest.mark.parametrize(("classes", "count"), [(10, 175066), (20, 175716), (43, 177211)])
def test_golden_sizes(classes: int, count: int) -> None:
    model = build(classes=classes)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert (sum(sizes), len(sizes)) == (count, 43)
    assert len(model.state_dict()) == 43 + 3 * 13  # thirteen batch norms keep a mean, a variance and a counter each


def test_multiply_adds_of_the_spec() -> None:
    model = build().eval()
    total = 0

    def count(module: torch.nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        weight: Tensor = module.weight  # type: ignore[assignment]
        total += weight.numel() * (out.shape[2] * out.shape[3] if out.ndim == 4 else 1)

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    model(torch.rand(1, 3, 32, 32))
    assert round(total / 1e6, 2) == 26.66


def test_state_dict_has_the_names_and_shapes_of_the_public_code() -> None:
    want = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 64), "fc.bias": (10,)}
    norms = {"bn1": 64}
    for group, (before, width) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
        for number, channels in enumerate([before, width]):
            block = f"block{group}.layer.{number}"
            norms |= {f"{block}.bn1": channels, f"{block}.bn2": width}
            want |= {f"{block}.conv1.weight": (width, channels, 3, 3), f"{block}.conv2.weight": (width, width, 3, 3)}
            if channels != width:
                want[f"{block}.convShortcut.weight"] = (width, channels, 1, 1)
    for name, width in norms.items():
        want |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        want[f"{name}.num_batches_tracked"] = ()
    assert {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()} == want


def recompute(weights: dict[str, Tensor], x: Tensor, blocks: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Spec 3.1 in eval mode, from the state dict alone."""

    def norm(name: str, a: Tensor) -> Tensor:
        parts = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (weights[f"{name}.{part}"][:, None, None] for part in parts)
        return ((a - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)

    a = F.conv2d(x, weights["conv1.weight"], padding=1)
    stages = []
    for group in (1, 2, 3):
        for number in range(blocks):
            name = f"block{group}.layer.{number}"
            stride = 2 if group > 1 and number == 0 else 1
            u = norm(f"{name}.bn1", a)
            v = norm(f"{name}.bn2", F.conv2d(u, weights[f"{name}.conv1.weight"], stride=stride, padding=1))
            r = F.conv2d(v, weights[f"{name}.conv2.weight"], padding=1)
            shortcut = weights.get(f"{name}.convShortcut.weight")
            a = r + (a if shortcut is None else F.conv2d(u, shortcut, stride=stride))
        stages.append(a)
    z = norm("bn1", a).flatten(2).mean(2)
    return z @ weights["fc.weight"].T + weights["fc.bias"], z, stages


@pytest.mark.parametrize(
    ("text", "shape"), [("-16-1", (3, 32, 32)), ("-10-2", (1, 32, 32)), ("-22-1", (3, 40, 36)), ("-16-1", (3, 96, 96))]
)
def test_forward_equals_the_formulas(text: str, shape: Shape) -> None:
    channels = shape[0]
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels]
    model = build(text, 7, shape).eval()
    model.set_normalisation(mean, std)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # batch norms that do something
        for name, tensor in model.state_dict().items():
            if ".bn" in name or name.startswith("bn1"):
                tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
    x = torch.rand(2, *shape, generator=rng)
    with torch.no_grad():
        out = model.forward_all(x)
        normal = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        logits, z, stages = recompute(model.state_dict(), normal, (WRN.parse(text)["depth"] - 4) // 6)
        assert torch.equal(model(x), out.logits)
        assert torch.equal(model.embed(x), out.embed)
    for got, want in [(out.logits, logits), (out.embed, z), *zip(out.stages, stages, strict=True)]:
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert out.embed.min() >= 0


def test_initialisation() -> None:
    model = build("-16-4")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            want = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            spread = float(module.weight.detach().std()) / want
            assert abs(spread - 1) < 4 / math.sqrt(2 * module.weight.numel()), name
            assert module.bias is None
        if isinstance(module, torch.nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
    assert bool((model.fc.bias == 0).all())
    # PyTorch's own for a linear layer: uniform in +-1/sqrt(fan in)
    assert 0.99 / math.sqrt(256) < float(model.fc.weight.detach().abs().max()) <= 1 / math.sqrt(256)


def test_weights_come_from_the_global_generator_alone() -> None:
    one, same, other = build(seed=1), build(seed=1), build(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_no_step_overwrites_what_hooks_and_attention_maps_hold() -> None:
    """The stages that are handed out still hold what the groups gave, and a gradient reaches the pixels."""
    model = build().eval()
    held: list[Tensor] = []
    for group in (model.block1, model.block2, model.block3):
        group.register_forward_hook(lambda module, given, out: held.append(out.detach().clone()))
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    out = model.forward_all(x)
    assert all(torch.equal(a, b) for a, b in zip(out.stages, held, strict=True))
    torch.autograd.backward(out.logits.sum())
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


def test_bf16_stays_close_and_gives_float32() -> None:
    model = build().eval()
    x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model.forward_all(x)
        model.precision = "bf16"
        half = model.forward_all(x)
        assert torch.equal(model(x), half.logits)
    assert {tensor.dtype for tensor in (half.logits, half.embed, *half.stages)} == {torch.float32}
    assert not torch.equal(full.logits, half.logits)
    assert float((full.logits - half.logits).abs().max()) < 0.05 * float(full.logits.abs().max())


def test_family_grammar() -> None:
    assert WRN.parse("-16-1") == {"depth": 16, "widen": 1}
    assert WRN.parse("-28-10") == {"depth": 28, "widen": 10}
    for text in ("-16", "", "-16-1-1", "-16-x", ":16-1"):
        with pytest.raises(UserError, match=r"expected wrn-DEPTH-WIDEN.*as in wrn-16-1"):
            WRN.parse(text)
    assert WRN().params == {"depth": 16, "widen": 1}


@pytest.mark.parametrize(("depth", "near"), [(17, "16 and 22"), (4, "10 and 16"), (20, "16 and 22")])
def test_a_depth_that_does_not_fit_is_explained(depth: int, near: str) -> None:
    with pytest.raises(UserError, match=f"depth={depth} was given, expected 6n\\+4.*nearest are {near}"):
        WRN(depth=depth)


def test_widen_must_be_positive() -> None:
    with pytest.raises(UserError, match="widen=0"):
        WRN(widen=0)


def test_entry_points_at_the_class() -> None:
    targets = {entry.name: entry.target for entry in bbmcl_models()}
    assert targets[WRN.name] == f"{WRN.__module__}:{WRN.__name__}"
