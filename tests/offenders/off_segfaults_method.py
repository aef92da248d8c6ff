"""Is killed by the processor."""

from __future__ import annotations

import os
import signal

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext


class Offender(Defense):
    name = "segfaults"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        os.kill(os.getpid(), signal.SIGSEGV)
        return model
