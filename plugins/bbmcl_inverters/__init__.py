"""Trigger inverters shipped with the toolkit, one file per paper. Free of torch."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_inverters() -> list[Entry]:
    """The inverters of this package."""
    return [
        Entry(
            "nc-box",
            "bbmcl_inverters.nc_box:NCBox",
            "mask and pattern by Adam, clamped to a box",
            "Yue et al. 2023, after Wang et al. 2019",
            may_know=("target",),
        ),
        Entry(
            "mesa",
            "bbmcl_inverters.mesa:MESA",
            "a generator of patches at the known place",
            "Qiao et al. 2019",
            may_know=("target", "location"),
        ),
        Entry(
            "nc-full",
            "bbmcl_inverters.nc_full:NCFull",
            "mask and pattern by tanh variables and a dynamic weight; detects the target",
            "Wang et al. 2019",
            may_know=("target",),
        ),
        Entry(
            "pixel",
            "bbmcl_inverters.pixel:Pixel",
            "two-sided additive pattern in few pixels",
            "Tao et al. 2022",
            may_know=("target",),
        ),
        Entry(
            "uap",
            "bbmcl_inverters.uap:UAP",
            "additive perturbation of small L2, for global triggers",
            may_know=("target",),
        ),
        Entry(
            "true",
            "bbmcl_inverters.controls:TrueInverter",
            "control: the attacker's own trigger",
            "Yue et al. 2023",
            may_know=("target", "trigger"),
        ),
        Entry(
            "random",
            "bbmcl_inverters.controls:RandomInverter",
            "control: another inverter's mask at random places, with noise",
            may_know=("target",),
        ),
        Entry("zero", "bbmcl_inverters.controls:ZeroInverter", "control: no trigger", may_know=("target",)),
    ]
