"""The shipped methods under the conformance suite, through the decorator that plugin authors use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tiny import one_thread

from backdoorbench_mcl import plugins
from backdoorbench_mcl.registry import DIST
from backdoorbench_mcl.testing import Subject, check_finds_a_planted_patch, parametrize_with_checks

__all__ = ["one_thread"]

POISON = {"target": 1, "rate": 0.2}
ON_THE_TOYS: dict[str, dict[str, Any]] = {  # 400 images of four classes, 32x32, instead of what the defaults are for
    **dict.fromkeys(("badnets", "trojan", "cl"), POISON), "blend": {**POISON, "alpha": 0.9},
    "sig": {"target": 1, "rate": 0.25, "delta": 120}, "none": {"target": 1},
    "nc-box": {"steps": 200}, "pixel": {"steps": 200}, "uap": {"steps": 200}, "mesa": {"steps": 40, "width": 16},
    "nc-full": {"steps": 60, "coarse_steps": 20, "images_per_step": 160, "patience": 2}, "ibau": {"rounds": 1},
    "mcldef+": {"epochs": 2},
}  # fmt: skip
FAMILIES = {
    "wrn": "-16-1", "torchvision": ":resnet18", "timm": ":resnet10t", "folder": ":absent", "parquet": ":absent",
}  # fmt: skip


def shipped() -> Iterator[Subject]:
    """Every method of this distribution."""
    for offer in plugins.load({}).offers:
        name = offer.entry.name
        if offer.plugin.dist == DIST:
            yield Subject(offer.kind, offer.entry.target, ON_THE_TOYS.get(name, {}), FAMILIES.get(name, ""), name)


EXPECTED = {
    "random:check_finds_a_planted_patch": "a control: the pixels of another inversion, shuffled",
    "zero:check_finds_a_planted_patch": "a control: no trigger at all",
    "mesa:check_finds_a_planted_patch": "40 steps, to save minutes; with 400 it does, below",
}


ALL = Subject("attack", "bbmcl_attacks.badnets:BadNets", {"targets": "all", "rate": 0.5}, label="badnets-all-to-all")


@parametrize_with_checks([*shipped(), ALL], EXPECTED)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_mesa_finds_a_planted_patch() -> None:
    check_finds_a_planted_patch(Subject("inverter", "bbmcl_inverters.mesa:MESA", {"steps": 400, "width": 32}))
