"""Measure whether a backdoor defense works: attack x defense matrices with ASR and BA, judged by the harness.

For notebooks and scripts: `run` and `load_results` return tidy pandas frames; `scan` and `purify` look at one network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audit.live import Purified, purify, scan
    from .audit.scan import Scan
    from .frames import load_results, run

__version__ = "0.1.0"
__all__ = ["Purified", "Scan", "__version__", "load_results", "purify", "run", "scan"]
_HOMES = {
    "Purified": "audit.live", "Scan": "audit.scan", "load_results": "frames", "purify": "audit.live", "run": "frames",
    "scan": "audit.live",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What is offered is imported when it is first asked for: pandas alone takes half a second."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
