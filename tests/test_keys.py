"""Golden keys: stored results of users hang on them. A key that moves means that every store starts from nothing.

If one of these fails, either undo what moved it, or raise the `version` of the method whose results changed and say
so in the changelog; a parameter that is new names its old behaviour in `added` and moves nothing.
"""

from __future__ import annotations

import pytest
import small

from backdoorbench_mcl import plan
from backdoorbench_mcl.request import Options

FORMER = ("defend.batch=64", "nc-box.batch=64")  # on `shapes`: what a preset sets may move, what is set may not
GOLDEN = {
    ("train", 0): "51f28c23f15baa81449f12d9e12edcf6548f7b61f5849a768890920ff1539b83",
    ("invert", 0): "79cc7a9c216dea321bbcfa11cf084cc53d46ac24ee48fec5ae8fe2864b5daff1",
    ("defend", 0): "ff2fc2549f300ac72bf1687e59e47f5a9a1a645c15fcafa4c4a97e59f9ef3f4e",
    ("predict", 0): "0c95928898c53bea8ac0a1f53bc85f5fe0c87ed30a7d5090facd29a9f5374d59",
}


def test_keys_of_the_first_release(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    asked = small.resolve(
        Options("badnets", "mcldef", "shapes", "wrn-16-1", budget="full", precision="fp32", overrides=FORMER)
    )
    nodes = plan.build(asked).nodes.values()
    found = {(node.kind, node.victim_seed): node.key for node in nodes if node.kind != "trial"}
    assert found == GOLDEN


NEEDED = [  # of nc(target=detect), mcldef+ with the mcldef behind it, and mcldef(inverter=true), all on trojan
    ("surrogate", "691a35e35bb25f5ac311d349a94b8850a08d100e17a69b918fd4f5d27a73694b"),
    ("train", "a5654245dc22a0e6890c29128bd82371118147370eaa53c68c2060244c438a2b"),
    ("verdict", "bd460b4a52fbcee3cfe2dc6afbeb43c9cb04df0743ad1d4ec816ad9f4984cbf9"),
    ("invert", "2a1da88ad145f41685a491ab750948666d4f130fa4dffde0c117dc2fd3a153fd"),
    ("defend", "f24e41c1c5956374a12844a77fe5211e888de05028753bf31f9aa3b0d4f9b8d5"),
    ("invert", "7cc2b1eb9f74162bd03dd8b1a2605144d3ccdcf5e208a6f078114592898e8332"),
    ("defend", "618d9bd7baef2919413320893283b2e8fa8211c1ae2a137dd1afa451377d4ecb"),
    ("defend", "58fceb0b09a85052f9be60567525ddd073b00a781df5f02f5e28d50a7929c153"),
    ("invert", "efe149a25783de3c8de1de993b00c535936f2866b6d19f65deebb5a58aceb5a8"),
    ("defend", "826e7ed57183d37f25b97e7ccfb9b5ac731849362de26dd0f5d9173962d50690"),
]


def test_keys_of_stages_that_methods_need(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    defenses = "nc(target=detect),mcldef+,mcldef(inverter=true)"
    asked = small.resolve(
        Options("trojan", defenses, "shapes", "wrn-16-1", budget="full", precision="fp32", overrides=FORMER)
    )
    nodes = plan.build(asked).nodes.values()
    found = [(node.kind, node.key) for node in nodes if node.kind not in ("trial", "predict")]
    assert found == NEEDED
