"""Never comes back from a hook."""

from __future__ import annotations

import time

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    while True:
        time.sleep(1)
