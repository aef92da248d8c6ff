"""Prints on import and in a hook."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl

print("noise on import")


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    print("noise in a hook")
    return []
