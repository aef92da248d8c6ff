"""`scan` and `purify` as functions, on a network in memory: any `nn.Module` that ends in a linear layer."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import api, artefacts, datacache, params, request, runner
from ..errors import UserError
from ..job import rebuilt, weights_of
from ..registry import Described
from ..runner import Resources
from ..store import Store
from ..text import one_line
from ..traced import Traced
from ..workdir import WorkFolder
from . import purify as repairing
from .borrowed import Here
from .handed import Handed
from .opened import split
from .purify import Judgement, Repair
from .scan import Scan
from .session import Machine, Session
from .stages import How

PROBED = 8  # images whose logits tell one network from another


@dataclass(frozen=True)
class Purified:
    """model: a repaired copy of the network, in eval mode; judgement: how it compares with the original on images that
    were held out; scan: what named the target, None where it was given.
    """

    model: nn.Module = field(repr=False)
    defense: str
    target: int | None
    judgement: Judgement
    scan: Scan | None


def scan(
    model: nn.Module, images: Any, labels: Any = None, *, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,),
    hold_out: float = 0.2, seed: int = 0, flip: bool = True, budget: str = "full", precision: str = "auto",
    set: Mapping[str, Any] | None = None, runs: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Scan:  # fmt: skip
    """Look for a backdoor in a network, which stays as it is.

    Args:
        model: takes images (B, C, H, W) after (x - mean) / std, gives logits (B, K) of a last linear layer.
        images: clean ones, (N, C, H, W): uint8, or floats in [0, 1]; tensor or array.
        labels: integers (N,), only kept for repairs that learn from them.
        mean, std: one number, or one per channel, in units of [0, 1]; by default the network takes pixels in [0, 1].
        hold_out: share of the images that the search does not see.
        flip: whether a mirrored image keeps its label.
        budget: "full", "mid" or "quick".
        set: parameters of methods, as in `{"nc-box.steps": 500}`.
        runs: a folder that keeps what was computed; by default nothing is kept.
        log: told in lines how it goes.

    Raises:
        UserError: the network has no last linear layer, or the images do not fit it.

    Example: `scan(model, images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).call` is "suspicious"
    """
    way = _Way(mean, std, hold_out, seed, flip, "clean", budget, precision, set or {}, runs, log)
    with _Live(model, images, labels, way) as live:
        return live.session(()).scan()


def purify(
    model: nn.Module, images: Any, labels: Any = None, *, defense: str = "mcldef", target: int | None = None,
    mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,), hold_out: float = 0.2, seed: int = 0,
    flip: bool = True, preset: str = "clean", budget: str = "full", precision: str = "auto",
    set: Mapping[str, Any] | None = None, runs: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Purified:  # fmt: skip
    """Repair a copy of a network and judge it on held-out images.

    Args:
        defense: any that is registered and can do without the attacker's secrets; one that learns from labels needs
            `labels`.
        target: the label that a trigger leads to; None to have it found by a scan.
        preset: "clean", "paper" or "authors".
        Others: as of `scan`.

    Returns:
        What was made. Where the scan does not find the network suspicious, `model` is an unchanged copy and `defense`
        is "".

    Raises:
        UserError: as `scan`; or the repair failed, with its reason.

    Example: `purify(model, images, defense="mcldef").model`
    """
    way = _Way(mean, std, hold_out, seed, flip, preset, budget, precision, set or {}, runs, log)
    with _Live(model, images, labels, way) as live:
        session = live.session((defense,))
        found, kind = None, None
        if target is None:
            found = session.scan()
            if found.call != "suspicious":
                return Purified(copy.deepcopy(model).eval(), "", None, Judgement(0), found)
            target, kind = found.target, found.kind
        elif not 0 <= target < live.handed.classes:
            raise UserError(f"target={target}: the model has the labels 0 to {live.handed.classes - 1}")
        assert target is not None
        chosen = repairing.suited(live.registry, defense, kind, live.how.overrides)
        if chosen != defense:
            session = live.session((chosen,))
        made = session.purify(chosen, target, session.trigger(target, kind))
        if made.folder is None:
            raise UserError(f"{chosen}: {made.reason}")
        return Purified(live.repaired(made), chosen, target, made.judgement, found)


@dataclass(frozen=True)
class _Way:
    """The arguments that both functions have in common."""

    mean: Sequence[float]
    std: Sequence[float]
    hold_out: float
    seed: int
    flip: bool
    preset: str
    budget: str
    precision: str
    set: Mapping[str, Any]
    runs: str | os.PathLike[str] | None
    log: Callable[[str], None]


class _Live:
    """What both functions need while they run."""

    def __init__(self, model: nn.Module, images: Any, labels: Any, way: _Way) -> None:
        x = _pixels(images)
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        device = str(self.device)
        channels, height, width = x.shape[1:]
        self.original = model
        self.network = wrapped(model, (channels, height, width), way.mean, way.std)
        with torch.no_grad():
            self.logits = self.network(torch.from_numpy(x[:PROBED]).float() / 255)
        self.classes = self.logits.shape[1]
        y = _labels(labels, len(x), self.classes)
        overrides = tuple(f"{name}={params.typed(value)}" for name, value in way.set.items())
        precision = request.resolve_precision(way.precision, device)
        self.how = How(way.preset, way.budget, overrides, device, precision, way.seed)
        self.registry = runner.registry(way.log)
        self.log = way.log
        self.work = WorkFolder()
        self.store: Store | None = None
        try:
            self.handed = self._handed(x, y, way.hold_out, way.flip)
            self.store = Store(self.work.path / "runs" if way.runs is None else Path(way.runs))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Live:
        return self

    def __exit__(self, *_: object) -> None:
        if self.store is not None:
            self.store.close()
        self.work.close()

    def _handed(self, x: Any, y: Any, hold_out: float, flip: bool) -> Handed:
        folder = self.work.path / "handed"
        folder.mkdir()
        weights = weights_of(self.network)
        save_file(weights, folder / "weights.safetensors")
        (folder / artefacts.META).write_text("{}")
        digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
        kind = f"{type(self.original).__module__}.{type(self.original).__qualname__}"
        mean, std = (values.flatten().tolist() * x.shape[1] for values in (self.network.mean, self.network.std))
        # what a network computes is more than its weights: its code, and what it keeps beside them
        told = hashlib.sha256(repr(self.original).encode() + self.logits.numpy().tobytes()).hexdigest()
        identity = {"name": kind, "computes": told}
        model = Described("model", kind, kind, "torch.nn:Module", "", {}, 1, kind, identity)
        repair, held = split(len(x), hold_out, self.how.seed)
        content, _ = datacache.content(x, y)
        channels = x.shape[1]
        return Handed(
            folder, model, digest, self.classes, tuple(x.shape[1:]), tuple(mean[:channels]), tuple(std[:channels]),
            flip, x, y, repair, held, content,
        )  # fmt: skip

    def session(self, defenses: Sequence[str]) -> Session:
        """Stages and what computes them, here and now."""
        assert self.store is not None
        using = Resources(1, torch.get_num_threads(), "inline")
        machine = Machine(Here(self.network), Here(self.network), using, using)
        return Session(self.handed, self.registry, self.how, machine, self.store, defenses, self.log)

    def repaired(self, made: Repair) -> nn.Module:
        """A copy of the original, on its device, with the repaired weights."""
        assert made.folder is not None
        weights = load_file(made.folder / "weights.safetensors")
        if not made.rebuild:
            model = copy.deepcopy(self.original)
            model.load_state_dict(weights)
            return model.eval()
        network = rebuilt(copy.deepcopy(self.network), made.rebuild["function"], made.rebuild["params"])
        network.load_state_dict(weights)
        inner = network.net if isinstance(network, Traced) else network
        return inner.to(self.device).eval()


def wrapped(
    model: nn.Module, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
) -> api.Classifier:
    """A copy of a network as a Classifier of pixels in [0, 1]. Raises UserError where it does not end in a linear
    layer, or does not take images of `shape`.
    """
    label = type(model).__name__
    if len(mean) not in (1, shape[0]) or len(std) != len(mean) or not all(value > 0 for value in std):
        raise UserError(f"mean={tuple(mean)}, std={tuple(std)}: expected 1 or {shape[0]} numbers each, std above 0")
    if isinstance(model, api.Classifier):
        return copy.deepcopy(model).cpu().eval()
    try:
        made = Traced(copy.deepcopy(model).cpu(), shape, label)
    except UserError:
        raise
    except Exception as error:  # a network may raise anything for images that are not its own
        size, why = "x".join(map(str, shape)), one_line(str(error), 200)
        raise UserError(f"{label}: no forward pass with images of {size}: {type(error).__name__}: {why}") from error
    made.set_normalisation(tuple(mean), tuple(std))
    return made.eval()


def _pixels(images: Any) -> Any:
    """uint8 (N, C, H, W) of a tensor or an array. Raises UserError."""
    x = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if x.ndim != 4 or len(x) < 2:
        raise UserError(f"images: expected at least 2 as (N, C, H, W), got {x.dtype} {x.shape}")
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    if x.dtype.kind != "f" or not (x.min() >= 0 and x.max() <= 1):
        raise UserError(f"images: expected uint8, or floats from 0 to 1, got {x.dtype} from {x.min():g} to {x.max():g}")
    return np.rint(x * 255).astype(np.uint8)


def _labels(labels: Any, count: int, classes: int) -> Any:
    """int64 (N,), -1 where there are none. Raises UserError."""
    if labels is None:
        return np.full(count, -1, np.int64)
    y = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if y.shape != (count,) or y.dtype.kind not in "iu" or int(y.min()) < 0 or int(y.max()) >= classes:
        raise UserError(f"labels: expected {count} integers from 0 to {classes - 1}, got {y.dtype} {y.shape}")
    return y.astype(np.int64)


__all__ = ["Purified", "purify", "scan", "wrapped"]
