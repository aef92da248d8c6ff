"""The door of the package: what it offers. Free of torch, so that `bbmcl plugins` answers at once."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("abl", "bbmcl_abl.method:Abl", "fine-tune with smoothed labels")]
