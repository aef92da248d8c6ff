"""torchvision:NAME, timm:NAME: fourteen networks from ResNet to ViT by one set of checks."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

import pytest
import torch
import torchvision.models
from torch import nn
from torch.nn import functional as F

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import UserError
from backdoorbench_mcl.kit import Traced
from backdoorbench_mcl.params import selection
from bbmcl_defenses.mcldef import head_parameters
from bbmcl_models import bbmcl_models
from bbmcl_models.families import Family, Timm, Torchvision

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
SLOW = ("torchvision:swin_t", "torchvision:resnet50")  # others of their design are faster
MARKED = [
    pytest.param(*row, marks=[*[needs_timm] * row[0].startswith("timm"), *[pytest.mark.slow] * (row[0] in SLOW)])
    for row in NETWORKS
]


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


@pytest.mark.parametrize("text", [
    pytest.param("torchvision:wide_resnet50_2", marks=pytest.mark.slow),
    pytest.param("torchvision:vgg11_bn", marks=pytest.mark.slow), "torchvision:vit_b_32",
])  # fmt: skip
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
