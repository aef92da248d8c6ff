"""Any network that ends in a linear layer as a Classifier: its parts are found by watching one forward pass.

Head: the last linear layer that is called; its output must be the logits. Embedding: its input, (B, D).
Stages: what modules return at up to four resolutions, the deepest ones. A map is an output (B, C, h, w) or (B, h, w, C)
with the aspect of the image and more than one pixel; (B, h, w, C) is handed out as (B, C, h, w). Looked at are the
modules that the network itself calls and, where one is an nn.Sequential that passes through more than two resolutions,
those in it; the last map of a resolution counts. Resolutions fall strictly in the order of the computation: a map
larger than one before it is none (VGG's pooling to 7x7). The output of the first layer alone is none either, so that
a network which cuts the image into tokens has no stages. No network is known by name here.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .api import Classifier
from .errors import PluginError, UserError

PROBE = 2  # images
STAGES = 4

Shape = tuple[int, int, int]
Size = tuple[int, int]


class Stage(NamedTuple):
    """A stage is the output of `module`. last: its channels come last; copy: a later step overwrites it in place."""

    module: str
    last: bool
    copy: bool


class Anatomy(NamedTuple):
    """head: the name of the linear layer; stages: in the order of the computation."""

    head: str
    stages: tuple[Stage, ...]


@dataclass
class _Call:
    """One call of a module. entered, size: of the map that it got and gave; inside: of the maps given within it."""

    name: str
    module: nn.Module
    parent: _Call | None
    entered: Size | None
    inside: set[Size] = field(default_factory=set)
    size: Size | None = None
    last: bool = False
    out: Tensor | None = None
    version: int = 0  # of `out` when the module returned: steps in place raise it
    layers: int = 0  # layers with weights that had been called by then

    @property
    def open(self) -> bool:
        """Whether the calls in it count: it is the network, or a sequence that passes through resolutions."""
        if self.parent is None:
            return True
        if not (isinstance(self.module, nn.Sequential) and self.entered and self.size and self.parent.open):
            return False
        return any(math.prod(self.size) < math.prod(size) < math.prod(self.entered) for size in self.inside)


class ExactPool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling as two matrix products, because PyTorch's has no deterministic backward on CUDA.

    To 1x1 PyTorch's own is a mean, which has one.
    """

    def forward(self, input: Tensor) -> Tensor:
        size = self.output_size if isinstance(self.output_size, tuple) else (self.output_size,) * 2
        before = tuple(input.shape[2:])
        after = tuple(old if new is None else new for old, new in zip(before, size, strict=True))
        if after == (1, 1):
            return super().forward(input)
        if after == before:
            return input
        rows, columns = (pooling(*sides, input.device).to(input.dtype) for sides in zip(before, after, strict=True))
        return rows @ input @ columns.T  # (h, H) (B, C, H, W) (W, w)


def pooling(old: int, new: int, device: torch.device | str = "cpu") -> Tensor:
    """(new, old): row i averages the entries floor(i old / new) to ceil((i + 1) old / new), the end not included.

    Example: `pooling(4, 2)` is [[1/2, 1/2, 0, 0], [0, 0, 1/2, 1/2]].
    """
    i, j = torch.arange(new, device=device)[:, None], torch.arange(old, device=device)
    taken = ((j >= i * old // new) & (j < -(-(i + 1) * old // new))).float()
    return taken / taken.sum(1, keepdim=True)


def map_size(out: tuple[int, ...], image: Size) -> tuple[int, int, bool] | None:
    """(h, w, channels last) of an output's shape (B, ...) where it is a map of an image (H, W), else None.

    Example: `map_size((2, 96, 8, 8), (32, 32))` is (8, 8, False), and (2, 8, 8, 96) gives (8, 8, True).
    """
    if len(out) != 4 or out[0] != PROBE:
        return None
    for h, w, last in ((out[2], out[3], False), (out[1], out[2], True)):
        # the same aspect, but for the rounding of either side
        if h <= image[0] and w <= image[1] and abs(h * image[1] - w * image[0]) < max(image):
            return h, w, last
    return None


def choose_stages(calls: list[_Call]) -> tuple[Stage, ...]:
    """The stages among all calls of a forward pass, which come in the order in which they returned."""
    times = Counter(call.name for call in calls)
    seen = [call for call in calls if call.parent and call.parent.open and times[call.name] == 1]
    last = {call.size: call for call in seen if call.size and call.size != (1, 1)}
    falling: list[_Call] = []
    smallest = math.inf
    for call in seen:
        if call.size and last.get(call.size) is call and math.prod(call.size) < smallest:
            smallest = math.prod(call.size)
            falling.append(call)
    chosen = [call for call in falling if call.layers > 1][-STAGES:]
    return tuple(Stage(c.name, c.last, c.out is not None and c.out._version != c.version) for c in chosen)


def watch(net: nn.Module, x: Tensor) -> tuple[list[_Call], Any]:
    """One forward pass in eval mode: its calls, in the order in which they returned, and its result.

    Weights, statistics and the global generator stay as they are.
    """
    calls: list[_Call] = []
    stack: list[_Call] = []
    layers = 0
    image = (x.shape[2], x.shape[3])

    def enter(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            entered = map_size(tuple(given[0].shape), image) if given and isinstance(given[0], Tensor) else None
            parent = stack[-1] if stack else None
            stack.append(_Call(name, module, parent, entered[:2] if entered else None))

        return hook

    def leave(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        nonlocal layers
        call = stack.pop()
        calls.append(call)
        layers += next(module.parameters(recurse=False), None) is not None
        call.layers = layers
        if isinstance(out, Tensor):
            call.out, call.version = out, out._version
            found = map_size(tuple(out.shape), image)
            if found is not None:
                call.size, call.last = found[:2], found[2]
                for above in stack:
                    above.inside.add(call.size)

    handles: list[RemovableHandle] = []
    for name, module in net.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            return calls, net(x)
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()


def anatomy(net: nn.Module, shape: Shape, label: str) -> Anatomy:
    """Head and stages of `net` for images of `shape` (C, H, W).

    Raises UserError, which starts with `label`, where the network has no last linear layer on a vector.
    """
    calls, logits = watch(net, torch.randn(PROBE, *shape, generator=torch.Generator().manual_seed(0)))
    linear = [call for call in calls if isinstance(call.module, nn.Linear)]
    if linear:
        name, out = linear[-1].name, linear[-1].out
        once = sum(call.name == name for call in linear) == 1
        if once and out is not None and out.ndim == 2 and isinstance(logits, Tensor) and torch.equal(out, logits):
            return Anatomy(name, choose_stages(calls))
    raise UserError(
        f"{label}: its logits are not what one last linear layer makes of a vector, so that it has no embedding; "
        "use a network that ends in a linear layer"
    )


class Traced(Classifier):
    """`net` with pixels in [0, 1] as input, its embedding and its stages. shape: (C, H, W) of an image; label: how
    messages call the network.

    State-dict names are those of `net`; `named_parameters` puts `net.` before them. While `features` runs, hooks on
    the modules found collect what they return: none outlives the call, so that copies are independent, but two
    threads must not share one object. Outputs besides the logits (auxiliary classifiers) are ignored. A `net` whose
    forward counts, or decides in Python by more than shapes, says so by `net.steady = False`, as a Classifier does.
    Raises UserError where `net` does not end in a linear layer on a vector.

    Example (the `build` of a Model): `return Traced(MyNet(classes), shape, "mynet")`
    """

    def __init__(self, net: nn.Module, shape: Shape, label: str) -> None:
        super().__init__()
        for module in net.modules():
            if type(module) is nn.AdaptiveAvgPool2d:
                module.__class__ = ExactPool
        self.net = net
        self.steady = bool(getattr(net, "steady", True))
        self.label = label
        self.anatomy = anatomy(net, shape, label)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        embeds: list[Tensor] = []
        maps: dict[str, Tensor] = {}

        def enter(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            embeds.append(given[0])

        def collect(stage: Stage) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, given: Any, out: Tensor) -> None:
                held = out.clone() if stage.copy else out
                maps[stage.module] = held.permute(0, 3, 1, 2) if stage.last else held

            return hook

        head, stages = self.anatomy
        handles: list[RemovableHandle] = [self.net.get_submodule(head).register_forward_pre_hook(enter)]
        try:
            for stage in stages:
                handles.append(self.net.get_submodule(stage.module).register_forward_hook(collect(stage)))
            self.net(x)
        finally:
            for handle in handles:
                handle.remove()
        if len(embeds) != 1 or len(maps) != len(stages):
            mode = "train" if self.training else "eval"
            raise PluginError(f"{self.label}: in {mode} mode the forward pass takes another way than it did when built")
        return embeds[0], tuple(maps[stage.module] for stage in stages)

    def head(self, z: Tensor) -> Tensor:
        logits: Tensor = self.net.get_submodule(self.anatomy.head)(z)
        return logits

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own: the normalisation is not part of it."""
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `state_dict` gives it, which is also how the network's library stores it.

        The versions of the modules, which a file loses and some networks ask for, are taken to be those of this one.
        """
        given: Any = OrderedDict(state_dict)
        own: Any = self.net.state_dict()
        given._metadata = getattr(state_dict, "_metadata", own._metadata)
        return self.net.load_state_dict(given, strict=strict, assign=assign)
