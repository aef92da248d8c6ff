"""The door of the package: what it offers. Free of torch, so that `bbmcl plugins` answers at once."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [
        Entry(
            "abl", "bbmcl_abl.method:ABL", "train anew on suspect data: isolate, learn, unlearn",
            "Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571", may_know=("suspect",),
        )
    ]  # fmt: skip
