"""The contract of backdoorbench_mcl, one test per sentence; what is special about the method is tested below it."""

from bbmcl_abl.method import Abl

from backdoorbench_mcl.testing import parametrize_with_checks


@parametrize_with_checks([Abl()])
def test_conformance(check):
    check()
