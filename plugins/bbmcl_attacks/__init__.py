"""Attacks shipped with the toolkit, one file per paper. Free of torch."""

from __future__ import annotations

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_attacks() -> list[Entry]:
    """The attacks of this package."""
    return [
        Entry("badnets", "bbmcl_attacks.badnets:BadNets", "3x3 grid in the bottom right corner", "Gu et al. 2017"),
        Entry("blend", "bbmcl_attacks.blend:Blend", "faint 3x3 colour patch near the centre", "Chen et al. 2017"),
        Entry("trojan", "bbmcl_attacks.trojan:Trojan", "patch that excites a clean model's neurons", "Liu et al. 2018"),
        Entry("cl", "bbmcl_attacks.cl:CL", "hard images of the target class carry a 3x3 grid", "Turner et al. 2019"),
        Entry("sig", "bbmcl_attacks.sig:Sig", "stripes over images of the target class", "Barni et al. 2019"),
        Entry("none", "bbmcl_attacks.none:NoAttack", "no poison: a clean victim, without ASR"),
    ]
