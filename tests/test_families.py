"""torchvision:NAME, timm:NAME: fourteen networks from ResNet to ViT by one set of checks, and the tracing by itself."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import PluginError, UserError
from backdoorbench_mcl.params import selection
from bbmcl_defenses.mcldef import head_parameters
from bbmcl_models import bbmcl_models
from bbmcl_models.families import Family, Timm, Torchvision
from bbmcl_models.traced import ExactPool, Traced, map_size, pooling

Shape = tuple[int, int, int]
Maps = list[tuple[int, int]]

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")

# name, side of the images, (channels, side) of the stages
NETWORKS: list[tuple[str, int, Maps]] = [
    ("torchvision:resnet18", 64, [(64, 16), (128, 8), (256, 4), (512, 2)]),
    ("torchvision:resnet50", 64, [(256, 16), (512, 8), (1024, 4), (2048, 2)]),
    ("torchvision:mnasnet0_5", 32, [(8, 16), (16, 8), (24, 4), (48, 2)]),
    ("torchvision:densenet121", 64, [(256, 16), (512, 8), (1024, 4), (1024, 2)]),
    ("torchvision:mobilenet_v3_small", 64, [(16, 16), (24, 8), (48, 4), (576, 2)]),
    ("torchvision:shufflenet_v2_x0_5", 64, [(24, 16), (48, 8), (96, 4), (1024, 2)]),
    ("torchvision:efficientnet_b0", 64, [(24, 16), (40, 8), (112, 4), (1280, 2)]),
    ("torchvision:regnet_y_400mf", 64, [(48, 16), (104, 8), (208, 4), (440, 2)]),
    ("torchvision:googlenet", 64, [(192, 16), (480, 8), (832, 4), (1024, 2)]),
    ("torchvision:convnext_tiny", 32, [(96, 8), (192, 4), (384, 2)]),
    ("torchvision:swin_t", 64, [(96, 16), (192, 8), (384, 4), (768, 2)]),
    ("timm:resnet18d", 64, [(64, 16), (128, 8), (256, 4), (512, 2)]),
    ("timm:convnext_atto", 64, [(40, 16), (80, 8), (160, 4), (320, 2)]),
    ("timm:deit_tiny_patch16_224", 64, []),
]
MARKED = [pytest.param(*row, marks=[needs_timm] if row[0].startswith("timm") else []) for row in NETWORKS]


def family(text: str) -> Family:
    name, _, arch = text.partition(":")
    cls = {"torchvision": Torchvision, "timm": Timm}[name]
    return cls(**cls.parse(":" + arch))


def build(text: str, shape: Shape, classes: int = 5, seed: int = 0) -> Traced:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family(text).build(classes, shape)
    assert isinstance(model, Traced)
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("text", "side", "maps"), MARKED)
def test_network(text: str, side: int, maps: Maps) -> None:
    model = build(text, (3, side, side))
    model.set_normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    assert all(module.training for module in model.modules())
    model.eval()
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, side, side, generator=rng)  # not the number of images it was traced with
    with torch.no_grad():
        out = model.forward_all(x)
        assert torch.equal(out.logits, model.net(model.normalise(x)))
        assert torch.equal(out.logits, model(x))
        assert torch.equal(out.logits, model.head(model.embed(x)))
    assert out.logits.shape == (3, 5)
    assert out.embed.ndim == 2
    assert [tuple(stage.shape) for stage in out.stages] == [(3, channels, size, size) for channels, size in maps]

    # the head: one linear layer on the embedding, found by autograd as mcldef does
    found = {id(p) for p in head_parameters(model, x[:1])}
    head = {name for name, p in model.named_parameters() if id(p) in found}
    assert head == {f"net.{model.anatomy.head}.{part}" for part in ("weight", "bias")}
    assert model.net.get_submodule(model.anatomy.head).in_features == out.embed.shape[1]

    # gradients reach every parameter and the pixels
    model.train()
    pixels = x.clone().requires_grad_(True)
    live = model.forward_all(pixels)
    assert [stage.shape for stage in live.stages] == [stage.shape for stage in out.stages]
    torch.autograd.backward(F.cross_entropy(live.logits, torch.tensor([0, 1, 2])))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert pixels.grad is not None
    assert bool(pixels.grad.abs().sum() > 0)

    # a frozen copy lives on by itself, stages included; the state dict has the library's names and is complete
    model.eval()
    other = kit.frozen(model)
    with torch.no_grad():
        want = model.forward_all(x)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for p in model.parameters():
            p.zero_()
        got = other.forward_all(x)
        assert all(
            torch.equal(a, b) for a, b in zip((got.logits, *got.stages), (want.logits, *want.stages), strict=True)
        )
        assert not torch.equal(model(x), want.logits)
        model.load_state_dict(weights)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), want.logits, rtol=1e-3, atol=1e-4)
    assert not any(name.startswith("net.") for name in weights)
    assert set(weights) == set(model.net.state_dict())
    assert not any(p.requires_grad for p in other.parameters())
    assert hooks(model) == hooks(other) == 0


@pytest.mark.parametrize("text", ["torchvision:wide_resnet50_2", "torchvision:vgg11_bn", "torchvision:vit_b_32"])
def test_large_networks_are_cut_at_the_right_places(text: str) -> None:
    """And have the library's names; the other checks would cost memory and seconds here."""
    model = build(text, (3, 32, 32)).eval()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        out = model.forward_all(x)
        assert torch.equal(out.logits, model.net(model.normalise(x)))
    assert [stage.shape[2] for stage in out.stages] == ([] if "vit" in text else [16, 8, 4, 2])
    with torch.device("meta"):
        net = torchvision.models.get_model(text.partition(":")[2], num_classes=5)
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    shapes.pop("encoder.pos_embedding", None)  # the one tensor whose size follows the image's
    ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
    ours.pop("encoder.pos_embedding", None)
    assert ours == shapes


def test_weights_come_from_the_global_generator_alone() -> None:
    """Equal seeds give equal weights, the library's own; the tracing draws nothing and leaves batch norm alone."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = torchvision.models.get_model("mobilenet_v3_small", weights=None, num_classes=5)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        model = Torchvision(arch="mobilenet_v3_small").build(5, (3, 64, 64))
        assert torch.equal(torch.get_rng_state(), after)
    ours, theirs = model.state_dict(), net.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_auxiliary_classifiers_are_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build("torchvision:googlenet", (3, 32, 32))
    assert not any("aux" in name for name in model.state_dict())


@needs_timm
def test_timm_takes_other_channels() -> None:
    model = build("timm:resnet18d", (1, 32, 48)).eval()
    with torch.no_grad():
        out = model.forward_all(torch.rand(2, 1, 32, 48))
    assert [tuple(stage.shape[2:]) for stage in out.stages] == [(8, 12), (4, 6), (2, 3), (1, 2)]


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        ("torchvision:squeezenet1_1", (3, 64, 64), "squeezenet1_1: its logits are not what one last linear layer"),
        ("torchvision:inception_v3", (3, 32, 32), "inception_v3: no forward pass with images of 3x32x32, which may be"),
        ("torchvision:mobilenet_v3_small", (1, 32, 32), "no forward pass with images of 1x32x32.*channels"),
        ("torchvision:vit_b_16", (3, 40, 40), "no forward pass with images of 3x40x40.*indivisible"),
        pytest.param("timm:dpn48b", (3, 64, 64), "dpn48b: its logits are not what one", marks=needs_timm),
    ],
)
def test_networks_that_do_not_fit_are_explained(text: str, shape: Shape, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build(text, shape)
    assert "\n" not in str(caught.value)


def test_family_grammar() -> None:
    assert Torchvision.parse(":resnet50") == {"arch": "resnet50"}
    typed = selection("torchvision:wide_resnet50_2")
    assert (typed.name, typed.suffix) == ("torchvision", ":wide_resnet50_2")
    assert Torchvision(arch="resnet50").params == {"arch": "resnet50"}
    for text in ("-50", ":", ""):
        with pytest.raises(UserError, match="expected torchvision:NAME, as in torchvision:resnet50"):
            Torchvision.parse(text)
    with pytest.raises(UserError, match="needs a value for 'arch'"):
        Torchvision()  # type: ignore[call-arg]


def test_unknown_names_are_answered_with_a_near_one() -> None:
    with pytest.raises(UserError, match=r"torchvision: no network 'resnet5O'; did you mean 'resnet50'\?"):
        Torchvision(arch="resnet5O")
    with pytest.raises(UserError, match=r"torchvision: no network 'zzz'; it has \d+, such as 'alexnet'"):
        Torchvision(arch="zzz")
    with pytest.raises(UserError, match="no network 'fasterrcnn_resnet50_fpn'"):  # detection, not classification
        Torchvision(arch="fasterrcnn_resnet50_fpn")


@needs_timm
@pytest.mark.parametrize("arch", ["resnet18e", "resnet18.a1_in1k", "hf-hub:timm/resnet18"])
def test_timm_has_names_only(arch: str) -> None:
    """A tag or an address would stand for weights from the net."""
    with pytest.raises(UserError, match=rf"timm: no network '{arch}'"):
        Timm(arch=arch)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"^timm: No module named 'timm'; pip install 'backdoorbench-mcl\[timm\]'$"):
        Timm(arch="resnet18d")


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    build("torchvision:mobilenet_v3_small", (3, 32, 32))
    if importlib.util.find_spec("timm") is not None:
        build("timm:mobilenetv3_small_050", (3, 32, 32))


def test_entries_point_at_the_classes() -> None:
    targets = {entry.name: entry.target for entry in bbmcl_models()}
    for cls in (Torchvision, Timm):
        assert targets[cls.name] == f"{cls.__module__}:{cls.__name__}"


# ---------------------------------------------------------------- the tracing by itself


class Toy(nn.Module):
    """Two resolutions and all that could be taken for a third, or for the wrong map of the two."""

    def __init__(self, end: str = "linear") -> None:
        super().__init__()
        self.end = end
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.squeeze = nn.Conv2d(4, 4, 1)  # at 1x1, in the middle
        self.two = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 2, 2))  # its first map is not a stage
        self.act = nn.ReLU(inplace=True)  # called three times
        self.up = nn.Upsample(scale_factor=2)
        self.attend = nn.Identity()
        self.fc = nn.Linear(6, 5)
        self.extra = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        one = self.one(x)
        one = one * self.squeeze(one.mean((2, 3), keepdim=True)).sigmoid()
        two = self.two(self.act(one))
        self.up(two)  # larger than one before it
        self.attend(x.new_zeros(len(x), 2, 3, 7))  # no aspect of an image
        self.attend(x.new_zeros(len(x) * 4, 2, 2, 2))  # no batch
        two = self.act(self.act(two))  # in place: overwrites what `two` returned
        z = two.mean((2, 3))
        if self.end == "tokens":
            return self.fc(z[:, None])[:, 0]
        if self.end == "dense":
            return self.fc(z[:, None])
        if self.end == "softmax":
            return self.fc(z).softmax(1)
        if self.end == "two":
            return (self.fc(z) + self.extra(z)) / 2
        if self.end == "twice":
            return self.fc(self.fc(z)[:, :1].expand(-1, 6))
        if self.end == "fickle" and self.training:
            return self.extra(z)
        return self.fc(z)


def trace(net: nn.Module, side: int = 8) -> Traced:
    return Traced(net, (3, side, side), "toy")


def test_stages_of_a_network_full_of_traps() -> None:
    net = Toy()
    model = trace(net).eval()
    assert [(stage.module, stage.copy) for stage in model.anatomy.stages] == [("two", True)]
    assert model.anatomy.head == "fc"
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        (stage,) = model.forward_all(x).stages
        gated = net.one(model.normalise(x))
        gated = gated * net.squeeze(gated.mean((2, 3), keepdim=True)).sigmoid()
        torch.testing.assert_close(stage, net.two(gated.relu()))
    assert float(stage.min()) < 0, "the step in place has reached the stage"


def test_a_gradient_flows_back_from_a_copied_stage() -> None:
    net = Toy()
    model = trace(net)
    torch.autograd.backward(model.forward_all(torch.rand(2, 3, 8, 8)).stages[0].square().sum())
    assert net.one.weight.grad is not None
    assert net.fc.weight.grad is None


@pytest.mark.parametrize("end", ["tokens", "dense", "softmax", "two", "twice"])
def test_other_ends_than_one_linear_layer_are_refused(end: str) -> None:
    with pytest.raises(UserError, match=r"^toy: its logits are not what one last linear layer makes of a vector"):
        trace(Toy(end))


def test_another_way_while_training_is_said() -> None:
    model = trace(Toy("fickle"))
    model.eval()(torch.rand(2, 3, 8, 8))
    with pytest.raises(PluginError, match="toy: in train mode the forward pass takes another way"):
        model.train()(torch.rand(2, 3, 8, 8))
    assert hooks(model) == 0


def test_no_hook_outlives_a_forward_pass_that_fails() -> None:
    net = Toy()
    model = trace(net)
    with pytest.raises(RuntimeError):
        model(torch.rand(2, 4, 8, 8))
    assert hooks(model) == 0
    with pytest.raises(RuntimeError):
        Traced(net, (4, 8, 8), "toy")
    assert hooks(net) == 0
    assert net.training


def test_sequences_that_pass_through_resolutions_are_looked_into() -> None:
    def down(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, out, 2, 2))

    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), *(down(4 + i, 5 + i) for i in range(5)))
    model = trace(nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)), 32)
    assert [stage.module for stage in model.anatomy.stages] == ["0.2", "0.3", "0.4", "0.5"]
    with torch.no_grad():
        stages = model.forward_all(torch.rand(2, 3, 32, 32)).stages
    assert [tuple(stage.shape[1:]) for stage in stages] == [(5, 16, 16), (6, 8, 8), (7, 4, 4), (8, 2, 2)]


def test_other_modules_that_pass_through_resolutions_are_not_looked_into() -> None:
    """The maps within an attention or a fusion module are no trunk."""

    class Hidden(nn.Module):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return x

    def stages(kind: type[nn.Module]) -> list[str]:
        body = kind(*(nn.Conv2d(4, 4, 2, 2) for _ in range(3)))
        ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), body, *ends)
        return [stage.module for stage in trace(net, 32).anatomy.stages]

    assert stages(nn.Sequential) == ["1", "2.0", "2.1", "2"]
    assert stages(Hidden) == ["1", "2"]


def test_the_first_layer_alone_makes_no_stage() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Conv2d(3, 6, 4, 4)
            self.mix = nn.Linear(6, 6)
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.mix(self.cut(x).flatten(2).mT).mean(1))
            return logits

    assert trace(Tokens()).anatomy == ("fc", ())


@pytest.mark.parametrize(
    ("out", "image", "want"),
    [
        ((2, 96, 8, 8), (32, 32), (8, 8, False)),
        ((2, 8, 8, 96), (32, 32), (8, 8, True)),
        ((2, 8, 8, 8), (32, 32), (8, 8, False)),
        ((2, 96, 1, 1), (32, 32), (1, 1, False)),
        ((2, 7, 20, 11), (40, 22), (20, 11, False)),
        ((2, 7, 5, 3), (40, 22), (5, 3, False)),
        ((2, 5, 3, 7), (40, 22), (5, 3, True)),
        ((2, 7, 11, 20), (40, 22), None),
        ((2, 3, 65, 65), (64, 64), None),
        ((4, 96, 8, 8), (32, 32), None),
        ((2, 64, 96), (32, 32), None),
    ],
)
def test_map_size(out: tuple[int, ...], image: tuple[int, int], want: tuple[int, int, bool] | None) -> None:
    assert map_size(out, image) == want


# ---------------------------------------------------------------- pooling with a deterministic backward


def ops(tensor: Tensor) -> Iterator[str]:
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            yield node.name()
            todo += [above for above, _ in node.next_functions]


@pytest.mark.parametrize("size", [7, (6, 6), (3, None), (5, 2), 1])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (7, 7), (8, 5), (13, 10)])
def test_exact_pool_is_adaptive_pooling(size: Any, shape: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, theirs = ExactPool(size)(x), F.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(ours, theirs)
    weights = torch.rand(theirs.shape, generator=torch.Generator().manual_seed(1))
    (mine,), (reference,) = (torch.autograd.grad((out * weights).sum(), x, retain_graph=True) for out in (ours, theirs))
    torch.testing.assert_close(mine, reference)
    assert not any("Adaptive" in name for name in ops(ours))


def test_pooling_matrix() -> None:
    assert pooling(4, 2).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert pooling(3, 2).tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5]]
    assert pooling(1, 3).tolist() == [[1], [1], [1]]


def test_adaptive_pooling_is_replaced() -> None:
    model = trace(nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18, 5)))
    assert isinstance(model.net.get_submodule("1"), ExactPool)
    assert not any("AdaptiveAvgPool" in name for name in ops(model(torch.rand(2, 3, 8, 8))))
