"""The contract of backdoorbench_mcl, one test per sentence; what is special about the method is tested below it."""

from bbmcl_wanet.method import Wanet

from backdoorbench_mcl.testing import parametrize_with_checks


@parametrize_with_checks([Wanet()])
def test_conformance(check):
    check()
