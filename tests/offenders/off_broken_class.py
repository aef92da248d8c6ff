"""Cannot be imported where the class is."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("broken-class", "off_broken_class_method:Offender")]
