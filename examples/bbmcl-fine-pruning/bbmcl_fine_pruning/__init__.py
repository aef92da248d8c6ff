"""The door of the package: what it offers. Free of torch, so that `bbmcl plugins` answers at once."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [
        Entry(
            "fine-pruning", "bbmcl_fine_pruning.method:FinePruning", "cut dormant channels, then fine-tune",
            "Liu et al., Fine-Pruning, RAID 2018, arXiv 1805.12185",
        )
    ]  # fmt: skip
