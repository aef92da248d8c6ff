"""Names and writes of what reports leave on disk."""

from __future__ import annotations

import os
import re
from pathlib import Path


def stem(*parts: str) -> str:
    """A file name of labels, safe on every file system. Example: `stem("fig4", "folder:a/b")` is "fig4_folder-a-b"."""
    return "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.")[:48] for part in parts)


def write(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all, in place of an earlier one; folders are made. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


__all__ = ["stem", "write"]
