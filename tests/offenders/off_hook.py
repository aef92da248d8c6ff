"""Misspells a hook."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defences() -> list[Entry]:
    return [Entry("unheard", "off_hook:Offender")]
