"""Returns weights that are no numbers."""

from __future__ import annotations

import torch

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext


class Offender(Defense):
    name = "nan"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model
