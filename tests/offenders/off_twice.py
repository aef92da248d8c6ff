"""Offers two methods of one name."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_inverters() -> list[Entry]:
    return [Entry("twin", "off_twice_method:Twin"), Entry("twin", "off_twice_method:Other")]
