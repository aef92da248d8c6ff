"""Steps that are recorded once on a GPU and replayed: CUDA graphs, with the bits of the steps that they stand for."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

WARM = 5  # steps on a shape before it is recorded: libraries have made their plans by then
WAITS = "synchronizing CUDA operation"  # as torch words its warning
Body = Callable[..., tuple[Tensor, ...]]
Plain = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


class Repeated:
    """Loss and gradients of a step that does the same work on each batch of one shape.

    A small network leaves a large GPU idle while Python asks for one kernel after the other. There, a step on inputs
    of a shape that came `WARM` times is recorded as a CUDA graph, and from then on asked for as a whole: the same
    kernels in the same order, hence the same bits. On a CPU each call runs as it is, and so it does where the body
    makes Python wait for the GPU or draws from a generator on the CPU, as far as torch and the generators tell.

    body: tensors -> scalars, the first of which is differentiated. It must not count, or decide by anything but shapes:
    what Python does in it is done once. State outside is updated in place, never bound anew; modes of modules and
    `requires_grad` stay as they are between calls. leaves: those whose `grad` is wanted; no other leaf in the graph may
    take a gradient. able: False runs each call as it is. say: is told, once, why nothing is recorded.

    Example: `Repeated(lambda x, y: (F.cross_entropy(model(x), y),), list(model.parameters()))(x, y)`.
    """

    def __init__(
        self, body: Body, leaves: Sequence[Tensor], *, able: bool = True, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.body = body
        self.leaves = list(leaves)
        self.able = able
        self.say = say
        self._seen: dict[tuple[object, ...], int] = {}
        self._recorded: dict[tuple[object, ...], _Recording] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The scalars, without a graph, valid until the next call; sets the leaves' `grad`, None where unused."""
        if not self.able or inputs[0].device.type != "cuda":
            return self._plain(inputs)
        shape = tuple((one.device, tuple(one.shape), one.stride(), one.dtype) for one in inputs)
        if shape not in self._recorded:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= WARM:
                return self._watched(inputs) if self._seen[shape] == WARM else self._plain(inputs)
            self._recorded[shape] = _Recording(self._plain, self.leaves, inputs)
        return self._recorded[shape].replay(inputs)

    def _watched(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A plain step, and whether it can be recorded: a recording that fails half-way cannot be undone."""
        mode, drawn = torch.cuda.get_sync_debug_mode(), _generators()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                out = self._plain(inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for one in told:  # of torch's own, one says that this way of asking is new
            if "ynchroni" not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if any(WAITS in str(one.message) for one in told):
            self._give_up("waits for the GPU")
        elif _generators() != drawn:
            self._give_up("draws from a generator on the CPU")
        return out

    def _give_up(self, reason: str) -> None:
        self.able = False
        self.say(f"steps run one kernel at a time: the network or the loss {reason}, which is not recorded")

    def _plain(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for leaf in self.leaves:
            leaf.grad = None
        told = self.body(*inputs)
        torch.autograd.backward(told[0])
        return tuple(value.detach() for value in told)  # no graph outlives the step: a recording needs one of its own


def _generators() -> tuple[bytes, object, bytes]:
    """The states of torch's, Python's and NumPy's global generators on the CPU."""
    numbers = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(numbers).encode()


@functools.cache
def _side(index: int) -> torch.cuda.Stream:
    """The stream that a GPU's steps are recorded on; one, because libraries keep room for each stream for good."""
    return torch.cuda.Stream(index)


class _Recording:
    """One shape's graph, with the places that its inputs are copied to and its results are found at."""

    def __init__(self, plain: Plain, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self.leaves = leaves
        self.inputs = [one.detach().clone() for one in inputs]
        device = inputs[0].device
        index = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(index):
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=_side(index)):  # nothing is computed yet
                self.told = plain(self.inputs)
        self.grads = [leaf.grad for leaf in leaves]

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for place, given in zip(self.inputs, inputs, strict=True):
            place.copy_(given)
        self.graph.replay()
        for leaf, grad in zip(self.leaves, self.grads, strict=True):
            leaf.grad = grad
        return self.told


__all__ = ["Repeated"]
