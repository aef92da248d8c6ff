"""Changes what all code of a process shares, on import and at work."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext


def _spoil() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    os.environ["OMP_NUM_THREADS"] = "7"
    os.chdir("/")
    Defense.version = 99


_spoil()


class Offender(Defense):
    name = "globals"

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        _spoil()
        return model
