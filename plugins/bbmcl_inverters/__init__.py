"""Trigger inverters shipped with the toolkit, one file per paper. Free of torch."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_inverters() -> list[Entry]:
    """The inverters of this package."""
    return [
        Entry(
            "nc-box",
            "bbmcl_inverters.nc_box:NCBox",
            "mask and pattern by Adam, clamped to a box",
            "Yue et al. 2023, after Wang et al. 2019",
            may_know=("target",),
        )
    ]
