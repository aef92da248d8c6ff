"""What a check is, what it is run on, and how it says what is wrong."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch

from .. import api
from ..describe import BASES, construct
from ..method import Method
from ..plugins import Kind

KINDS: tuple[str, ...] = get_args(Kind)


class CheckFailed(AssertionError):
    """A method breaks the contract; the message says what was found, what was expected, what to do."""


class Skipped(Exception):
    """A check has nothing to look at; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A configured method under test: how it is constructed, as often as a check needs a fresh one."""

    kind: str
    target: str
    params: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ""
    label: str = ""

    @classmethod
    def of(cls, method: Method) -> Subject:
        """The subject behind an instance. Raises TypeError for what is no method of `KINDS`."""
        kind = next((kind for kind in KINDS if isinstance(method, BASES[kind])), None)
        if kind is None:
            raise TypeError(f"{method!r} is none of {', '.join(KINDS)}")
        where = f"{type(method).__module__}:{type(method).__qualname__}"
        return cls(kind, where, method.params, label=method.name)

    def make(self) -> Any:
        """A fresh instance."""
        return construct(self.target, self.kind, self.suffix, self.params)


@dataclass(frozen=True)
class Check:
    """One sentence of the contract. Called with a method or a `Subject`: returns None, raises CheckFailed where the
    method breaks the sentence and Skipped where the sentence does not concern it.
    """

    name: str
    kinds: tuple[str, ...]
    sentence: str
    body: Callable[[Subject], None]

    def __call__(self, method: Method | Subject) -> None:
        self.body(method if isinstance(method, Subject) else Subject.of(method))


def check(*kinds: str) -> Callable[[Callable[[Subject], None]], Check]:
    """Make a function a check of methods of `kinds`; the first line of its docstring is the sentence."""

    def mark(body: Callable[[Subject], None]) -> Check:
        sentence = (body.__doc__ or "").strip().splitlines()[0]
        return Check(body.__name__, kinds, sentence, body)

    return mark


def require(condition: object, message: str) -> None:
    """Raise CheckFailed with `message` unless `condition` holds."""
    if not condition:
        raise CheckFailed(message)


@contextlib.contextmanager
def seeded(seed: int | None = 0) -> Iterator[None]:
    """The global generators as a job finds them, seeded by the harness; afterwards they are what they were. With None
    nothing is seeded and nothing put back.
    """
    if seed is None:
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not equal to the last bit, or that only one side has."""
    names = sorted(one.keys() | other.keys())
    return [n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n])]


def label_of(subject: Subject) -> str:
    """How a message calls the subject."""
    return subject.label or subject.target


def as_api(value: object, kind: type, what: str) -> None:
    """Require that `what` returned an instance of `kind`, one of the classes of `api`."""
    hint = "; end with `return model`, or with Repaired(model, rebuild, params)" if kind is api.Classifier else ""
    require(
        isinstance(value, kind),
        f"{what} returned {type(value).__name__}, expected {kind.__name__} of backdoorbench_mcl.api{hint}",
    )


__all__ = [
    "KINDS", "Check", "CheckFailed", "Skipped", "Subject", "as_api", "check", "differing", "label_of", "require",
    "seeded", "state_of",
]  # fmt: skip
