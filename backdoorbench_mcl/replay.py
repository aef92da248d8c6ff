"""Steps that are recorded once on a GPU and replayed: CUDA graphs, with the bits of the steps that they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

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
    makes Python wait for the GPU, because the network asks a tensor for its value, say: that cannot be recorded.

    body: tensors -> scalars, the first of which is differentiated. It must not draw from a generator on the CPU, count,
    or decide by anything but shapes: what Python does in it is done once. leaves: those whose `grad` is wanted; no
    other leaf in the graph may take a gradient. say: is told, once, why nothing can be recorded.

    Example: `Repeated(lambda x, y: (F.cross_entropy(model(x), y),), list(model.parameters()))(x, y)`.
    """

    def __init__(self, body: Body, leaves: Sequence[Tensor], say: Callable[[str], None] = lambda line: None) -> None:
        self.body = body
        self.leaves = list(leaves)
        self.say = say
        self.able = True
        self._seen: dict[tuple[object, ...], int] = {}
        self._recorded: dict[tuple[object, ...], _Recording] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The scalars, without a graph, valid until the next call; sets the leaves' `grad`, None where unused."""
        if not self.able or inputs[0].device.type != "cuda":
            return self._plain(inputs)
        shape = tuple((tuple(one.shape), one.stride(), one.dtype) for one in inputs)
        if shape not in self._recorded:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= WARM:
                return self._watched(inputs) if self._seen[shape] == WARM else self._plain(inputs)
            self._recorded[shape] = _Recording(self._plain, self.leaves, inputs)
        return self._recorded[shape].replay(inputs)

    def _watched(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A plain step, and whether it waits for the GPU: a recording that fails half-way cannot be undone."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                out = self._plain(inputs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        if any(WAITS in str(one.message) for one in told):
            self.able = False
            self.say("steps run one kernel at a time: the network or the loss waits for the GPU, which is not recorded")
        return out

    def _plain(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for leaf in self.leaves:
            leaf.grad = None
        told = self.body(*inputs)
        torch.autograd.backward(told[0])
        return tuple(value.detach() for value in told)  # no graph outlives the step: a recording needs one of its own


class _Recording:
    """One shape's graph, with the places that its inputs are copied to and its results are found at."""

    def __init__(self, plain: Plain, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self.leaves = leaves
        self.inputs = [one.detach().clone() for one in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # nothing is computed yet
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
