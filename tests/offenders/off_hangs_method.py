"""Never comes back."""

from __future__ import annotations

import time

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext


class Offender(Defense):
    name = "hangs"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        while True:
            time.sleep(1)
