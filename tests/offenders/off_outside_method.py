"""Writes beside its own code."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext


class Offender(Defense):
    name = "outside"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        Path(__file__).with_name("written.txt").write_text("x")
        return model
