"""Cannot be imported where the class is."""

from __future__ import annotations

import os

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext

os._exit(4)


class Offender(Defense):
    name = "broken-class"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        return model
