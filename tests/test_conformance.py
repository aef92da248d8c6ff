"""The shipped methods under the conformance suite, through the decorator that plugin authors use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from tiny import one_thread

from backdoorbench_mcl import plugins
from backdoorbench_mcl.registry import DIST
from backdoorbench_mcl.testing import Subject, check_finds_a_planted_patch, parametrize_with_checks

__all__ = ["one_thread"]

POISON = {"target": 1, "rate": 0.2}
ON_THE_TOYS: dict[str, dict[str, Any]] = {  # 400 images of four classes, 32x32, instead of what the defaults are for
    "badnets": POISON, "cl": POISON, "trojan": {**POISON, "steps": 200}, "blend": {**POISON, "alpha": 0.9},
    "sig": {"target": 1, "rate": 0.25, "delta": 120}, "none": {"target": 1},
    "nc-box": {"steps": 20}, "pixel": {"steps": 20}, "uap": {"steps": 20}, "mesa": {"steps": 20, "width": 16},
    "nc-full": {"steps": 20, "coarse_steps": 10, "images_per_step": 80, "patience": 2}, "ibau": {"rounds": 1},
    "mcldef+": {"epochs": 2},
}  # fmt: skip
PLANTED = "check_finds_a_planted_patch"
LONG_ENOUGH: dict[str, dict[str, Any]] = {  # to find a planted patch, for which the steps above are too few
    "nc-box": {"steps": 200}, "pixel": {"steps": 200}, "uap": {"steps": 200}, "mesa": {"steps": 400, "width": 32},
    "nc-full": {"steps": 60, "coarse_steps": 20, "images_per_step": 160, "patience": 2},
}  # fmt: skip
FAMILIES = {
    "wrn": "-16-1", "torchvision": ":resnet18", "timm": ":resnet10t", "folder": ":absent", "parquet": ":absent",
}  # fmt: skip
SLOW = {  # and which faster test would see it as well
    "preactresnet18-check_can_be_trained": "wrn, torchvision and timm here; gradients in test_resnet.py",
    "resnet18-check_can_be_trained": "the same",
    "shapes-check_deterministic": "its hashes in test_shapes.py",
    "shapes-check_leaves_global_state_alone": "it draws from a generator of its own: its hashes in test_shapes.py",
    "mesa": "test_mesa.py finds a planted family",
}


def shipped(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[Subject]:
    """Every method of this distribution."""
    for offer in plugins.load({}).offers:
        name = offer.entry.name
        if offer.plugin.dist == DIST:
            yield Subject(offer.kind, offer.entry.target, settings.get(name, {}), FAMILIES.get(name, ""), name)


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if name in SLOW else []


EXPECTED = {
    f"random:{PLANTED}": "a control: the pixels of another inversion, shuffled",
    f"zero:{PLANTED}": "a control: no trigger at all",
}
ALL = Subject("attack", "bbmcl_attacks.badnets:BadNets", {"targets": "all", "rate": 0.5}, label="badnets-all-to-all")
_, CASES = parametrize_with_checks([*shipped(ON_THE_TOYS), ALL], EXPECTED).args


@pytest.mark.parametrize("check", [
    pytest.param(*case.values, id=case.id, marks=[*case.marks, *marks(case.id)]) for case in CASES
    if case.id not in [f"{name}-{PLANTED}" for name in LONG_ENOUGH]
])  # fmt: skip
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in LONG_ENOUGH])
def test_finds_a_planted_patch(name: str) -> None:
    (found,) = [subject for subject in shipped(LONG_ENOUGH) if subject.label == name]
    check_finds_a_planted_patch(found)
