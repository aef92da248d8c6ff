"""Changes what all code of a process shares, on import and at work."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("globals", "off_globals_method:Offender")]
