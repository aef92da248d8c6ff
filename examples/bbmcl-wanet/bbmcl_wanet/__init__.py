"""The door of the package: what it offers. Free of torch, so that `bbmcl plugins` answers at once."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_attacks() -> list[Entry]:
    return [Entry("wanet", "bbmcl_wanet.method:Wanet", "a grey square in the corner")]
