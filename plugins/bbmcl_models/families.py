"""torchvision:NAME and timm:NAME: the classification networks of two libraries, untrained, by their names there.

`torchvision:resnet50`, `timm:resnet18d`. Weights are random, drawn as the library draws them; nothing is downloaded.
Embedding, head and stages are found by watching one forward pass (`kit.Traced`), so that every network that ends in a
linear layer will do; one without stages (a vision transformer) is n/a for methods that compare maps, such as nad.
State-dict names are the library's.

Networks whose size depends on the image's (vision transformers) are built for it; most others are made for 224 pixels
and leave little of 32: torchvision:resnet50 divides each side by 32. Where an image is too small, building says so.
Paper: those of the networks. Differs: weights are random, and auxiliary classifiers are left out. Should reach: no
number. timm is an extra: pip install 'backdoorbench-mcl[timm]'. Where the backward pass of a layer has no
deterministic form on a GPU, training there fails with PyTorch's line for it; adaptive pooling, as in VGG, is replaced
by one that has.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torchvision.models
from torch import nn

from backdoorbench_mcl.api import Classifier, Model, UserError
from backdoorbench_mcl.kit import Traced

Shape = tuple[int, int, int]

# what libraries raise for an image that is too small, or of a number of channels or a shape that does not fit
UNFIT = (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError)


class Family(Model):
    """Networks of a library. arch: the name there. Raises UserError for a name that the library does not have."""

    def __init__(self, *, arch: str) -> None:
        names = self.names()
        if arch not in names:
            close = difflib.get_close_matches(arch, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {len(names)}, such as {names[0]!r}"
            raise UserError(f"{self.name}: no network {arch!r}; {hint}")
        self.arch = arch

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        """`":resnet50"` -> `{"arch": "resnet50"}`. Raises UserError for any other form."""
        if not text.startswith(":") or text == ":":
            raise UserError(f"model {cls.name + text!r}: expected {cls.name}:NAME, as in {cls.name}:resnet50")
        return {"arch": text[1:]}

    @classmethod
    @abstractmethod
    def names(cls) -> Sequence[str]:
        """The library's classification networks."""

    @abstractmethod
    def network(self, classes: int, shape: Shape) -> nn.Module:
        """The library's network with random weights, for images of `shape` where that can be chosen."""

    def build(self, classes: int, shape: Shape) -> Classifier:
        """Raises UserError where the network does not take images of `shape`, or does not end in a linear layer."""
        label = f"{self.name}:{self.arch}"
        try:
            return Traced(self.network(classes, shape), shape, label)
        except UNFIT as error:
            size = "x".join(map(str, shape))
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{label}: no forward pass with images of {size}, which may be too small for it: {reason}"
            ) from error


class Torchvision(Family):
    """Classification networks of torchvision, `torchvision:NAME`. Example: `Torchvision(arch="resnet50")`.

    arch: the name there. Raises UserError for an unknown one.
    """

    name = "torchvision"
    paper = "TorchVision maintainers and contributors, TorchVision: PyTorch's Computer Vision library, 2016"

    @classmethod
    def names(cls) -> Sequence[str]:
        names: list[str] = torchvision.models.list_models(module=torchvision.models)
        return names

    def network(self, classes: int, shape: Shape) -> nn.Module:
        builder = torchvision.models.get_model_builder(self.arch)
        takes = inspect.signature(typing.get_type_hints(builder)["return"]).parameters
        # init_weights said outright silences a warning that the default may change
        wanted = {"image_size": shape[1], "input_size": shape[1:], "aux_logits": False, "init_weights": True}
        options = {name: value for name, value in wanted.items() if name in takes}
        net: nn.Module = builder(weights=None, num_classes=classes, **options)
        return net


class Timm(Family):
    """Networks of PyTorch Image Models, `timm:NAME`. Example: `Timm(arch="resnet18d")`.

    arch: the name there, without the tag of pretrained weights. Raises UserError for an unknown one, and where timm
    is not installed.
    """

    name = "timm"
    paper = "Wightman, PyTorch Image Models, 2019, doi 10.5281/zenodo.4414861"

    @staticmethod
    def _library() -> Any:
        try:
            return importlib.import_module("timm")
        except ImportError as error:
            raise UserError(f"timm: {error}; pip install 'backdoorbench-mcl[timm]'") from error

    @classmethod
    def names(cls) -> Sequence[str]:
        names: list[str] = cls._library().list_models()
        return names

    def network(self, classes: int, shape: Shape) -> nn.Module:
        timm = self._library()
        fixed = getattr(timm.get_pretrained_cfg(self.arch), "fixed_input_size", False)
        options = {"img_size": shape[1:]} if fixed else {}
        net: nn.Module = timm.create_model(
            self.arch, pretrained=False, num_classes=classes, in_chans=shape[0], **options
        )
        return net
