"""Checks of attacks: what they poison, what they stamp, and that a network learns it."""

from __future__ import annotations

from fractions import Fraction

import torch

from .. import api, kit
from . import running, toys
from .core import Skipped, Subject, as_api, check, label_of, require

LEARNT = 90.0  # ASR in %: the gate of the harness, below which no defense is run
LEARNT_ALL = 50.0  # of all-to-all, twice as much as chance: for a rule per class the toy network is too small


@check("attack")
def check_stamp_keeps_dtype_range_and_shape(subject: Subject) -> None:
    """stamp() turns uint8 images into uint8 images of the same shape, one or many, changes them, and not its input."""
    who = label_of(subject)
    planted = running.plant(subject)
    for count in (1, 20):
        test = toys.make_images(toys.TEST, 2).subset(torch.arange(count))
        x, y = test.x.clone(), test.y.clone()
        out = running.stamp(planted, x, y)
        require(
            isinstance(out, torch.Tensor) and out.dtype == torch.uint8 and out.shape == test.x.shape,
            f"{who}: stamp() turned uint8 {tuple(test.x.shape)} into {_what(out)}; return uint8 of the same shape",
        )
        require(
            torch.equal(x, test.x) and torch.equal(y, test.y),
            f"{who}: stamp() wrote to its input; work on x.clone()",
        )
    require(
        not torch.equal(out, test.x) or not _counts(planted, test.y),
        f"{who}: stamp() changed no pixel of 20 images, expected the trigger",
    )


def _what(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _counts(planted: running.Planted, y: torch.Tensor) -> bool:
    """Whether the attack counts any image: one that plants nothing does not."""
    return bool(planted.attack.goal(y, planted.attack.lasting(planted.state)).counted.any())


@check("attack")
def check_poison_touches_exactly_rate(subject: Subject) -> None:
    """poison() lays `rate` of the training images over, each once, with labels that there are, and no other."""
    who = label_of(subject)
    train = toys.make_images()
    before = train.x.clone(), train.y.clone()
    planted = running.plant(subject, train=train)
    if planted.poisoned is None:
        raise Skipped("the attacker trains the model")
    index, x, y = planted.poisoned
    fits = index.dtype == torch.int64 and x.dtype == torch.uint8 and y.dtype == torch.int64
    require(
        fits and x.shape == (len(index), *train.x.shape[1:]) and y.shape == index.shape,
        f"{who}: poison() returned {_what(index)}, {_what(x)}, {_what(y)}; expected int64 (P,), uint8 (P, C, H, W) and "
        "int64 (P,)",
    )
    require(
        len(index.unique()) == len(index) and bool(((index >= 0) & (index < len(train))).all()),
        f"{who}: poison() returned indices that are no distinct places among the {len(train)} training images",
    )
    require(
        bool(((y >= 0) & (y < toys.CLASSES)).all()), f"{who}: poison() returned labels outside 0..{toys.CLASSES - 1}"
    )
    require(
        torch.equal(train.x, before[0]) and torch.equal(train.y, before[1]),
        f"{who}: poison() wrote to the training set; return an overlay, stamped copies and their places",
    )
    rate = planted.attack.params.get("rate")
    if rate is None:
        raise Skipped("the attack has no parameter `rate`; the overlay is well formed")
    _require_rate(who, float(rate), train, planted.poisoned)


def _require_rate(who: str, rate: float, train: api.Images, poisoned: api.Poisoned) -> None:
    """floor or round of rate * N (spec 4.6); an attack that keeps the labels cannot take more than one class has, and
    one that also stamps images whose labels it keeps (covers) is judged by those that it relabels.
    """
    exact = Fraction(str(rate)) * len(train)
    wanted = {int(exact), round(exact)}
    kept = bool((poisoned.y == train.y[poisoned.index]).all()) and len(poisoned.index)
    if kept:
        most = int(train.y.bincount().max())
        wanted = {min(count, most) for count in wanted}
    relabelled = int((poisoned.y != train.y[poisoned.index]).sum())
    covers = not kept and len(poisoned.index) > max(wanted) and max(wanted) / 2 <= relabelled <= max(wanted)
    require(
        len(poisoned.index) in wanted or covers,
        f"{who}: rate={rate:g} of {len(train)} images poisoned {len(poisoned.index)}, expected {min(wanted)}; the rate "
        "is a share of the whole training set",
    )


@check("attack")
def check_goal_fits_its_labels(subject: Subject) -> None:
    """goal() gives every image a label of the data set, and counts none whose goal is its own label."""
    who = label_of(subject)
    planted = running.plant(subject)
    y = toys.make_images(40, 2).y
    goal = planted.attack.goal(y, planted.attack.lasting(planted.state))
    as_api(goal, api.Goal, f"{who}: goal()")
    require(
        goal.y.shape == y.shape and goal.counted.shape == y.shape and goal.counted.dtype == torch.bool,
        f"{who}: goal() returned {_what(goal.y)} and {_what(goal.counted)}, expected a label and a bool for each image",
    )
    require(
        bool(((goal.y >= 0) & (goal.y < toys.CLASSES)).all()), f"{who}: goal() has labels outside 0..{toys.CLASSES - 1}"
    )
    own = int((goal.counted & (goal.y == y)).sum())
    require(not own, f"{who}: goal() counts {own} images whose goal is their own label; they hit it without a backdoor")


@check("attack")
def check_state_can_be_stored(subject: Subject) -> None:
    """What lasting() keeps survives a file, and is all that stamp() and goal() read."""
    who = label_of(subject)
    planted = running.plant(subject)
    test = toys.make_images(20, 2)
    back = running.stored(planted.attack.lasting(planted.state), who)
    fresh = planted._replace(attack=subject.make())  # nothing may hide in the object
    require(
        torch.equal(running.stamp(fresh, test.x, test.y, back), running.stamp(planted, test.x, test.y, planted.state)),
        f"{who}: stamp() does something else once its state was stored and the attack constructed anew; keep all "
        "that it reads in the State that prepare() or train() returns",
    )


@check("attack")
def check_trigger_is_learnable(subject: Subject) -> None:
    """A toy network trained on the poison obeys the trigger: ASR of at least 90 % (all-to-all: 50), BA kept."""
    who = label_of(subject)
    planted = running.plant(subject)
    test = toys.make_images(toys.TEST, 2)
    goal = planted.attack.goal(test.y, planted.attack.lasting(planted.state))
    if not bool(goal.counted.any()):
        raise Skipped("the attack counts no image: it plants nothing")
    model = planted.model
    if model is None:
        assert planted.poisoned is not None
        steps = 400 if planted.attack.target is None else 150
        model = toys.learn(toys.fresh(), running.laid_over(toys.make_images(), planted.poisoned), steps)
    hit = kit.predict(model, running.stamp(planted, test.x, test.y)) == goal.y
    asr = 100 * float(hit[goal.counted].float().mean())
    ba = toys.accuracy(model, test)
    bar, least = (LEARNT_ALL, 50) if planted.attack.target is None else (LEARNT, 60)
    require(
        asr >= bar and ba >= least,
        f"{who}: a toy network trained on its poison has ASR {asr:.1f} % and BA {ba:.1f} %, expected at least "
        f"{bar:g} and {least}; give it parameters that suit 400 images of 32x32 (rate, strength), or see whether the "
        "labels of poison() and the trigger of stamp() are those of goal()",
    )


__all__ = [
    "check_goal_fits_its_labels", "check_poison_touches_exactly_rate", "check_stamp_keeps_dtype_range_and_shape",
    "check_state_can_be_stored", "check_trigger_is_learnable",
]  # fmt: skip
