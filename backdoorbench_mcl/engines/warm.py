"""Imported by the fork server before it forks: everything slow that every child needs, and no data.

Building a first optimiser makes torch import its compiler, 1.3 s on a quiet core: once here, not in every job.
"""

from __future__ import annotations

import torch

from .. import jobs

torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

__all__ = ["jobs"]
