"""A third-party plugin for the memory test: a network that hardly computes, and an attack whose gate is open."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_models() -> list[Entry]:
    return [Entry("stem", "bbmcl_large_methods:Stem", "patches of 32x32 averaged, one convolution")]


@hookimpl
def bbmcl_attacks() -> list[Entry]:
    return [Entry("ghost", "bbmcl_large_methods:Ghost", "a white corner, of which no image counts")]
