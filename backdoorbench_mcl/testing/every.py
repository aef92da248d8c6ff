"""Checks of every kind of method: construction, identity, determinism, manners."""

from __future__ import annotations

import random
import sys

import numpy as np
import torch

from .. import globalstate
from ..describe import jsonable, load_class
from ..errors import BbmclError
from ..method import Method, schema
from . import running
from .core import KINDS, CheckFailed, Skipped, Subject, check, differing, label_of, require, seeded


@check(*KINDS)
def check_constructs_without_arguments(subject: Subject) -> None:
    """It can be constructed without arguments; every parameter is keyword-only, typed and has a default."""
    who = label_of(subject)
    cls = load_class(subject.target, subject.kind)
    try:
        columns = schema(cls)
    except BbmclError as error:
        raise CheckFailed(f"{who}: {error}") from error
    if cls.parse.__func__ is not Method.parse.__func__:  # type: ignore[attr-defined]
        raise Skipped("the member of a family is named by its suffix")
    needed = [name for name, field in columns.model_fields.items() if field.is_required()]
    require(not needed, f"{who}: {', '.join(needed)} must be given, expected a default; the table needs one to run it")
    cls()


@check(*KINDS)
def check_rebuilds_from_its_spec(subject: Subject) -> None:
    """Class and parameters, written as JSON and read again, construct the same object."""
    who = label_of(subject)
    method = subject.make()
    try:
        params = jsonable(method.params)
    except BbmclError as error:
        raise CheckFailed(f"{who}: {error}") from error
    again = type(method)(**params)
    require(
        repr(again) == repr(method),
        f"{who}: {method!r} became {again!r} on the way through JSON; annotate what it stores",
    )
    unknown = sorted(set(method.added) - set(method.params))
    require(not unknown, f"{who}: `added` names {', '.join(unknown)}, no parameter of the constructor")


@check(*KINDS)
def check_has_a_card(subject: Subject) -> None:
    """Its module opens with a docstring: `bbmcl show` prints it."""
    cls = load_class(subject.target, subject.kind)
    text = (sys.modules[cls.__module__].__doc__ or "").strip()
    require(
        text,
        f"{label_of(subject)}: the module {cls.__module__} has no docstring; say what the method does, from which "
        "paper, and what differs here",
    )


@check(*KINDS)
def check_deterministic(subject: Subject) -> None:
    """Run twice with equal seeds it gives the same result to the last bit."""
    first, second = (running.outcome(subject) for _ in range(2))
    changed = differing(first, second)
    require(
        not changed,
        f"{label_of(subject)}: {', '.join(changed[:3])} differ between two runs with equal seeds; draw from ctx.rng "
        "and from torch's global generator only, keep nothing between calls",
    )


@check(*KINDS)
def check_leaves_global_state_alone(subject: Subject) -> None:
    """It seeds nothing and leaves settings of the process as they were."""
    who = label_of(subject)
    before, paths = globalstate.taken(), list(sys.path)
    for_seeds = [_drawn_after(subject, seed) for seed in (0, 1)]
    changed = [name for name in globalstate.changed(before) if name != "seed"]  # which `seeded` itself sets
    changed += ["sys.path"] if paths != sys.path else []
    require(
        not changed,
        f"{who}: changed {', '.join(changed)} for the whole process; set it back, or do without (a job may share its "
        "process with others in --isolation inline)",
    )
    same = [name for name, one, other in zip(("random", "numpy", "torch"), *for_seeds, strict=True) if one == other]
    require(
        not same,
        f"{who}: seeded the global generator of {', '.join(same)}; the harness does that, draw from ctx.rng instead",
    )


def _drawn_after(subject: Subject, seed: int) -> tuple[float, float, float]:
    """What the three global generators give after a run that started from `seed`: equal for two seeds if it seeded."""
    with seeded(seed):
        running.outcome(subject, global_seed=None)
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: S311 (it is the one that is watched)


__all__ = [
    "check_constructs_without_arguments", "check_deterministic", "check_has_a_card", "check_leaves_global_state_alone",
    "check_rebuilds_from_its_spec",
]  # fmt: skip
