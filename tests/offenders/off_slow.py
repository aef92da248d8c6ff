"""Takes its time on import."""

from __future__ import annotations

import time

from backdoorbench_mcl.hooks import hookimpl

time.sleep(2.5)


@hookimpl
def bbmcl_inverters() -> list[object]:
    return []
