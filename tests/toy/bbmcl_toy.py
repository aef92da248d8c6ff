"""A third-party plugin for the tests: data and a network that train in a blink, and defenses that misbehave."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_attacks() -> list[Entry]:
    return [Entry("takeover", "bbmcl_toy_methods:Takeover", "trains the victim itself")]


@hookimpl
def bbmcl_datasets() -> list[Entry]:
    return [Entry("tiny", "bbmcl_toy_methods:Tiny", "four colours, 3x8x8")]


@hookimpl
def bbmcl_models() -> list[Entry]:
    return [Entry("tiny-net", "bbmcl_toy_methods:TinyNet", "one convolution")]


@hookimpl
def bbmcl_inverters() -> list[Entry]:
    return [
        Entry(
            "oracle", "bbmcl_toy_methods:Oracle", "repeats what it was told", may_know=("target", "location", "trigger")
        )
    ]


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    return [
        Entry("same", "bbmcl_toy_methods:Same", "returns the victim"),
        Entry("needy", "bbmcl_toy_methods:Needy", "looks at what it needs", may_know=("target",)),
        Entry("masker", "bbmcl_toy_methods:Masker", "cuts channels"),
        Entry("wary", "bbmcl_toy_methods:Wary", "looks at the suspect training set", may_know=("suspect",)),
        Entry("snoop", "bbmcl_toy_snoop:Snoop", "searches for what it should not have"),
        Entry("offender", "bbmcl_toy_methods:Offender", "fails in the way that it is told"),
    ]
