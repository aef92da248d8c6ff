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
        Entry(
            "mcldef+",
            "bbmcl_defenses.mcldef_plus:MCLDefPlus",
            "mcldef, then pull triggered features on to their clean ones",
            "Yue et al. 2023",
            may_know=("target",),
        ),
        Entry("nc", "bbmcl_defenses.nc:NC", "unlearn the inverted trigger", "Wang et al. 2019", may_know=("target",)),
        Entry("nad", "bbmcl_defenses.nad:NAD", "distil the attention of a fine-tuned teacher", "Li et al. 2021"),
        Entry("ibau", "bbmcl_defenses.ibau:IBAU", "unlearn a perturbation by hypergradients", "Zeng et al. 2022"),
    ]
