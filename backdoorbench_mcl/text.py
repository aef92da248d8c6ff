"""Text that others wrote (labels, reasons, plugin messages), made safe to print. Free of torch."""

from __future__ import annotations

import re
import traceback
import unicodedata
from pathlib import Path

# ECMA-48: OSC and friends up to their terminator, CSI up to its final byte, any other two-character escape. Without a
# terminator only the introducer goes, so that a name in a message cannot hide what the message says. 500 characters at
# most are searched for one: a text of many introducers would take the square of its length.
_ESCAPE = re.compile(
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).{0,500}?(?:\x07|\x1b\\|\x9c)|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[ -~]",
    re.S,
)
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def one_line(text: str, limit: int | None = None) -> str:
    """`text` on one line, without terminal escapes, control, bidi or surrogate characters; cut at `limit` with `...`.

    Example: `one_line("\\x1b[31mout of\\nmemory")` -> `"out of memory"`
    """
    text = _ESCAPE.sub("", text)
    spaced = ("" if unicodedata.category(c) in _UNPRINTABLE and not c.isspace() else c for c in text)
    text = " ".join("".join(spaced).split())
    if limit is not None and len(text) > limit:
        text = text[: max(0, limit - 3)].rstrip() + "..."
    return text


def raised_at(error: BaseException) -> str:
    """Where an error was raised, or the call that led into torch. Example: `"method.py:28"`"""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "torch" not in Path(frame.filename).parts] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "an unknown place"
