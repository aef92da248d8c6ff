"""Returns names instead of entries."""

from __future__ import annotations

from backdoorbench_mcl.hooks import hookimpl


@hookimpl
def bbmcl_defenses() -> list[str]:
    return ["off"]
