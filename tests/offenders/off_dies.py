"""Ends its process on import."""

from __future__ import annotations

import os
import signal

os.kill(os.getpid(), signal.SIGSEGV)
