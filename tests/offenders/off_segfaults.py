"""Is killed by the processor."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("segfaults", "off_segfaults_method:Offender")]
