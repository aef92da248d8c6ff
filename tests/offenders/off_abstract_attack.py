"""Leaves out what makes an attack."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_attacks() -> list[Entry]:
    return [Entry("abstract", "off_abstract_attack_method:Offender")]
