"""Golden keys: stored results of users hang on them. A key that moves means that every store starts from nothing.

If one of these fails, either undo what moved it, or raise the `version` of the method whose results changed and say
so in the changelog; a parameter that is new names its old behaviour in `added` and moves nothing.
"""

from __future__ import annotations

import pytest
import small

from backdoorbench_mcl import plan
from backdoorbench_mcl.request import Options

GOLDEN = {
    ("train", 0): "51f28c23f15baa81449f12d9e12edcf6548f7b61f5849a768890920ff1539b83",
    ("invert", 0): "79cc7a9c216dea321bbcfa11cf084cc53d46ac24ee48fec5ae8fe2864b5daff1",
    ("defend", 0): "ff2fc2549f300ac72bf1687e59e47f5a9a1a645c15fcafa4c4a97e59f9ef3f4e",
    ("predict", 0): "0c95928898c53bea8ac0a1f53bc85f5fe0c87ed30a7d5090facd29a9f5374d59",
}


def test_keys_of_the_first_release(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    asked = small.resolve(Options("badnets", "mcldef", "shapes", "wrn-16-1", budget="full", precision="fp32"))
    nodes = plan.build(asked).nodes.values()
    found = {(node.kind, node.victim_seed): node.key for node in nodes if node.kind != "trial"}
    assert found == GOLDEN
