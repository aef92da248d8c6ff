"""Takes memory without end; the test's limit is far below the end that it has all the same."""

from __future__ import annotations

import time

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext


class Offender(Defense):
    name = "greedy"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        held = []
        for _ in range(60):  # 3 GB
            held.append(bytearray(b"x") * 50_000_000)
            time.sleep(0.05)
        raise AssertionError(f"nobody stopped it at {len(held)}")
