"""Never comes back."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("hangs", "off_hangs_method:Offender")]
