"""Checks of inverters and defenses: what they return, what they read, how they bear little data and a restart."""

from __future__ import annotations

import math

import torch

from .. import api
from ..errors import AccessDenied, BbmclError
from . import running, toys
from .core import CheckFailed, Skipped, Subject, check, differing, label_of, require, state_of

FOUND = 90.0  # % of the images that an inverted trigger has to send to the planted label
KEPT = 15.0  # points of BA that a repair may cost a clean model
LEAST = 60.0  # % BA of a working classifier of four classes


def _run(subject: Subject, **settings: object) -> dict[str, torch.Tensor]:
    if subject.kind == "defense":
        return state_of(running.repair(subject, **settings))  # type: ignore[arg-type]
    return running.fit_trigger(subject, **settings).tensors()  # type: ignore[arg-type]


@check("inverter", "defense")
def check_reads_only_what_it_declared(subject: Subject) -> None:
    """It runs on what `knows`, `needs` and `uses_labels` declare, and `knows` holds words that there are."""
    who = label_of(subject)
    method = subject.make()
    words = {"target", "location", "trigger"} if subject.kind == "inverter" else {"target", "suspect"}
    unknown = sorted(set(method.knows) - words)
    require(
        not unknown, f"{who}: knows {', '.join(unknown)}, which no {subject.kind} is granted; there are {sorted(words)}"
    )
    try:
        _run(subject)
    except AccessDenied as error:
        raise CheckFailed(str(error)) from error
    except KeyError as error:
        raise CheckFailed(
            f"{who}: KeyError {error}; where that is a name of ctx.needs, return it from needs()"
        ) from error


@check("inverter", "defense")
def check_survives_one_clean_image(subject: Subject) -> None:
    """One clean image is enough to end well, or with one clear line: UserError, NotApplicable, Diverged."""
    try:
        _run(subject, clean=1)
    except BbmclError:
        return
    except CheckFailed:
        raise
    except Exception as error:  # whatever a method raises is what this check is about
        raise CheckFailed(
            f"{label_of(subject)}: with one clean image it raised {type(error).__name__}: {error}; cope with it or "
            "raise api.UserError with one line (batch norm in train mode needs two images)"
        ) from error


@check("inverter", "defense")
def check_survives_a_restart(subject: Subject) -> None:
    """Killed right after a snapshot and started again it gives the same result to the last bit."""
    whole = toys.MemorySnapshot()
    expected = _run(subject, snapshot=whole)
    if not whole.saves:
        raise Skipped("it saves no snapshot: a restart begins anew")
    torn = toys.MemorySnapshot(die_at=math.ceil(whole.saves / 2))
    try:
        _run(subject, snapshot=torn)
    except toys.Killed:
        changed = differing(expected, _run(subject, snapshot=torn))
        require(
            not changed,
            f"{label_of(subject)}: {', '.join(changed[:3])} differ after a restart from a snapshot; save all that the "
            "loop goes on from, ctx.rng.get_state() included (kit.fit keeps ctx.rng and torch's generator, no other)",
        )
        return
    raise CheckFailed(f"{label_of(subject)}: caught the end of its process; catch no BaseException")


# ---------------------------------------------------------------- inverters


@check("inverter")
def check_returns_a_trigger(subject: Subject) -> None:
    """invert() returns a Trigger that keeps shape and type, is finite, leaves its input alone and survives a file."""
    who = label_of(subject)
    trigger = running.fit_trigger(subject)
    x = toys.make_images(8, 2).x.float() / 255
    given = x.clone()
    rng = torch.Generator().manual_seed(0)
    out = trigger.apply(given, rng)
    require(
        isinstance(out, torch.Tensor) and out.shape == x.shape and out.dtype == x.dtype and bool(out.isfinite().all()),
        f"{who}: apply() did not return finite {x.dtype} {tuple(x.shape)}",
    )
    require(torch.equal(given, x), f"{who}: apply() wrote to its input; return a new tensor")
    kept = running.stored(api.State(trigger.tensors()), f"{who}: tensors()").tensors
    again = type(trigger).from_tensors(kept).apply(x, torch.Generator().manual_seed(0))
    require(
        torch.equal(again, out), f"{who}: the trigger is another one after tensors() and from_tensors(); keep all of it"
    )


@check("inverter")
def check_finds_a_planted_patch(subject: Subject) -> None:
    """On a network with a planted patch its trigger sends nine of ten other images to the planted label."""
    trigger = running.fit_trigger(subject)
    test = toys.make_images(toys.TEST, 2)
    model = toys.victim()
    others = test.y != toys.TARGET
    with torch.no_grad():
        shown = trigger.apply(test.x[others].float() / 255, torch.Generator().manual_seed(0)).clamp(0, 1)
        hit = 100 * float((model(shown).argmax(1) == toys.TARGET).float().mean())
    require(
        hit >= FOUND,
        f"{label_of(subject)}: its trigger sends {hit:.1f} % of the images to the planted label, expected {FOUND:g}; "
        "on such toys every search should get there, so look at its length and at its learning rate",
    )


@check("inverter")
def check_verdict_covers_every_label(subject: Subject) -> None:
    """detect() gives every label a finite anomaly index and a norm, and flags labels of the data set."""
    if type(subject.make()).detect is api.Inverter.detect:
        raise Skipped("it is no detector")
    who = label_of(subject)
    found = running.judge(subject)
    require(
        len(found.index) == toys.CLASSES,
        f"{who}: detect() judged {len(found.index)} labels, expected all {toys.CLASSES} of the data set (ctx.classes)",
    )
    finite = all(math.isfinite(value) for value in (*found.index, *found.norms))
    require(finite, f"{who}: detect() gave an index or a norm that is not finite")


# ---------------------------------------------------------------- defenses


@check("defense")
def check_returns_a_working_classifier(subject: Subject) -> None:
    """defend() returns a classifier that weights, or weights and a rebuild, tell in full, and that still classifies."""
    repaired = running.repair(subject)
    ba = toys.accuracy(repaired, toys.make_images(toys.TEST, 2))
    require(
        ba >= LEAST,
        f"{label_of(subject)}: the repaired toy network has BA {ba:.1f} %, expected at least {LEAST:g}",
    )


@check("defense")
def check_keeps_a_clean_model_clean(subject: Subject) -> None:
    """A network without a backdoor loses little of its accuracy to the repair."""
    model, test = toys.clean_model(), toys.make_images(toys.TEST, 2)
    before = toys.accuracy(model, test)
    after = toys.accuracy(running.repair(subject, model=model), test)
    require(
        after >= before - KEPT,
        f"{label_of(subject)}: took a clean toy network from BA {before:.1f} to {after:.1f} %, expected to keep all "
        f"but {KEPT:g} points",
    )


__all__ = [
    "check_finds_a_planted_patch", "check_keeps_a_clean_model_clean",
    "check_reads_only_what_it_declared", "check_returns_a_trigger", "check_returns_a_working_classifier",
    "check_survives_a_restart", "check_survives_one_clean_image", "check_verdict_covers_every_label",
]  # fmt: skip
