"""Adds a layer and does not say so."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("architecture", "off_architecture_method:Offender")]
