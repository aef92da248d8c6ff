"""Has a method whose name another package uses too."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("same", "off_namesake_method:Same", "returns the victim")]
