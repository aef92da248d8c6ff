"""Raises."""

from __future__ import annotations

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext


class Offender(Defense):
    name = "raises"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        raise ValueError("no idea how to repair this")
