"""Has a method whose name another package uses too."""

from __future__ import annotations

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext


class Same(Defense):
    name = "same"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        return model
