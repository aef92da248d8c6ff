"""The packages in `examples/`, and what their READMEs tell to type."""

from __future__ import annotations

import shlex
from pathlib import Path

from test_docs import FENCE, typed

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
METHODS = {"bbmcl-abl": "abl", "bbmcl-fine-pruning": "fine-pruning", "bbmcl-wanet": "wanet"}


def commands(package: str) -> list[list[str]]:
    """The command lines of `bbmcl` in the shell blocks of its README, as words without `bbmcl`."""
    text = (EXAMPLES / package / "README.md").read_text(encoding="utf-8")
    return [shlex.split(line) for kind, block in FENCE.findall(text) if kind == "sh" for line in typed(block)]
