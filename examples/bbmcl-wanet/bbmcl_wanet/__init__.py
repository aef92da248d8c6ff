"""The door of the package: what it offers. Free of torch, so that `bbmcl plugins` answers at once."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_attacks() -> list[Entry]:
    return [
        Entry(
            "wanet", "bbmcl_wanet.method:WaNet", "a smooth warp of the whole image; trains the victim itself",
            "Nguyen and Tran, WaNet, ICLR 2021, arXiv 2102.10369",
        )
    ]  # fmt: skip
