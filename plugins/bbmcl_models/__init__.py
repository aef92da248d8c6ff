"""Network families shipped with the toolkit. Free of torch: a class is imported when it is used."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_models() -> list[Entry]:
    return [
        Entry(
            "wrn",
            "bbmcl_models.wrn:WRN",
            "wide residual networks wrn-DEPTH-WIDEN, as in wrn-16-1",
            "Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016",
        )
    ]
