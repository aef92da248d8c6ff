"""Takes memory without end; the test's limit is far below the end that it has all the same."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [Entry("greedy", "off_greedy_method:Offender")]
