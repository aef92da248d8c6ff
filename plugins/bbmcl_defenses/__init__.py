"""Defenses shipped with the toolkit, one file per paper. Free of torch."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    """The defenses of this package."""
    return [
        Entry("ft", "bbmcl_defenses.ft:FT", "fine-tune all layers on the clean images"),
        Entry(
            "mcldef",
            "bbmcl_defenses.mcldef:MCLDef",
            "pull triggered features to their clean ones, away from the backdoor's",
            "Yue et al. 2023",
            may_know=("target",),
        ),
    ]
