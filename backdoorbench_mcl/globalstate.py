"""What all code of a process shares and a method must leave alone (CONTRIBUTING, rule 6)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch


def taken() -> dict[str, Any]:
    """The state now, by name."""
    try:
        folder = os.getcwd()
    except OSError:  # removed under us
        folder = ""
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "seed": torch.initial_seed(),
        "working directory": folder,
        "environment": dict(os.environ),
    }


def changed(before: Mapping[str, Any]) -> list[str]:
    """Names of what is no longer as it was; variables that a library adds to the environment are its own business."""
    after = taken()
    after["environment"] = {name: after["environment"].get(name) for name in before["environment"]}
    return [name for name, value in before.items() if after[name] != value]


__all__ = ["changed", "taken"]
