"""What was done to a model, as JSON: kept beside the repaired weights, so that they can be traced and made again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__, provenance
from ..report import files
from .handed import Handed
from .purify import Repair
from .scan import Scan
from .stages import How

FORMAT = 1


def card(
    about: Mapping[str, Any], handed: Handed, how: How, found: Scan | None, repairs: tuple[Repair, ...] = (),
    output: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """JSON-ready. about: how model and images were found, as `opened.Opened.about`; repairs: the chosen one first;
    output: file and SHA-256 of the weights that were written.
    """
    return {
        "bbmcl_card": FORMAT,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "bbmcl": __version__,
        "versions": provenance.versions(),
        "machine": provenance.machine_class(how.device),
        "options": {
            "preset": how.preset, "budget": how.budget, "set": list(how.overrides), "device": how.device,
            "precision": how.precision, "seed": how.seed,
        },
        **about,
        "images": {"total": len(handed.x), "searched": len(handed.repair), "held_out": len(handed.held),
                   "labelled": handed.labelled, "sha256": handed.images},
        "scan": None if found is None else found.as_dict(),
        "repairs": [one.as_dict() for one in repairs],
        "output": None if output is None else dict(output),
    }  # fmt: skip


def write(file: Path, content: Mapping[str, Any]) -> Path:
    """The card as a file, whole or not at all."""
    return files.write(file, (json.dumps(content, indent=1, sort_keys=False) + "\n").encode())


__all__ = ["FORMAT", "card", "write"]
