"""Leaves out what makes a defense."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("abstract", "off_abstract_method:Offender")]
