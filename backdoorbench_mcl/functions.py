"""A network that a function of the user's builds, `package.module:function`: what `--arch` names beside the families.

The function runs in the process that uses the network, the working directory being importable there (`nearby`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .api import Classifier, Model
from .errors import UserError
from .text import one_line, raised_at
from .traced import Traced

COUNTS = ("num_classes", "classes")  # what a function may call its number of classes


class OtherWidth(UserError):
    """The network has another number of classes than it was asked for. width: that number."""

    def __init__(self, message: str, width: int) -> None:
        super().__init__(message)
        self.width = width


class Function(Model):
    """What `function`, "package.module:name", returns: a Classifier, or a network that ends in a linear layer.

    It is called with `num_classes=` or `classes=` if it takes one of them, else without arguments. Example:
    `Function(function="torchvision.models:resnet18").build(10, (3, 32, 32))`
    """

    name = "function"

    def __init__(self, *, function: str) -> None:
        self.function = function

    def build(self, classes: int, shape: tuple[int, int, int]) -> Classifier:
        """Raises UserError, one line, for a function that cannot be imported or called, or returns no such network;
        OtherWidth where its logits are not one for each class.
        """
        make = self._imported()
        try:
            made = make(**_given(make, classes))
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise UserError(f"{self.function} raised {_told(error)} when called for {classes} classes") from error
        if not isinstance(made, nn.Module):
            raise UserError(f"{self.function} returned {type(made).__name__}, expected a torch.nn.Module")
        try:
            model = made if isinstance(made, Classifier) else Traced(made, shape, self.function)
            width = _width(model, shape)
        except UserError:
            raise
        except Exception as error:
            size = "x".join(map(str, shape))
            raise UserError(
                f"{self.function}: no forward pass with images of {size}, which may not be its size: {_told(error)}"
            ) from error
        if width != classes:
            raise OtherWidth(
                f"{self.function} built a network of {width} classes, expected {classes}; have it take num_classes, or "
                "leave the number of classes out",
                width,
            )
        return model

    def _imported(self) -> Callable[..., Any]:
        module, _, name = self.function.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{self.function} cannot be imported: {_told(error)}; expected package.module:function, of a module "
                "in the working directory or installed"
            ) from error
        if not callable(found):
            raise UserError(f"{self.function} is {type(found).__name__}, expected a function that builds a network")
        make: Callable[..., Any] = found
        return make


def _given(make: Callable[..., Any], classes: int) -> dict[str, int]:
    """The arguments that a function is called with."""
    try:
        takes = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return {}
    names = [one.name for one in takes if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if any(one.kind is one.VAR_KEYWORD for one in takes) and "classes" not in names:
        return {"num_classes": classes}  # as torchvision's builders pass it on
    return next(({name: classes} for name in COUNTS if name in names), {})


def _width(model: Classifier, shape: tuple[int, int, int]) -> int:
    """How many logits there are. The network stays in its mode."""
    if isinstance(model, Traced):
        out = model.net.get_submodule(model.anatomy.head).out_features
        assert isinstance(out, int)
        return out
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape))
    finally:
        for module, training in modes:
            module.training = training
    if logits.ndim != 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)}, expected (N, classes)")
    return int(logits.shape[1])


def _told(error: BaseException) -> str:
    text = one_line(str(error), 200)
    return f"{type(error).__name__} at {raised_at(error)}{': ' if text else ''}{text}"


__all__ = ["Function", "OtherWidth"]
