"""Adds a layer and does not say so."""

from __future__ import annotations

from torch import nn

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext


class Offender(Defense):
    name = "architecture"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        model.add_module("extra", nn.Linear(2, 2))
        return model
