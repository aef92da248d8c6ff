"""Imported by the fork server before it forks: everything slow that every child needs, and no data.

Building a first optimiser makes torch import its compiler, 1.3 s on a quiet core: once here, not in every job.
"""

from __future__ import annotations

import signal

_before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides

import torch  # noqa: E402

from .. import jobs  # noqa: E402

torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
signal.signal(signal.SIGINT, _before)

__all__ = ["jobs"]
