"""Measure whether a backdoor defense works: attack x defense matrices with ASR and BA, judged by the harness.

For notebooks and scripts, two functions return tidy pandas frames: `run` and `load_results`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .frames import load_results, run

__version__ = "0.1.0"
__all__ = ["__version__", "load_results", "run"]


def __getattr__(name: str) -> Any:
    """`run` and `load_results` are imported when they are first asked for: pandas alone takes half a second."""
    if name in ("load_results", "run"):
        from importlib import import_module

        return getattr(import_module(f"{__name__}.frames"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
