"""Was written for a version that does not exist yet."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("newer", "off_newer_method:Offender")]
