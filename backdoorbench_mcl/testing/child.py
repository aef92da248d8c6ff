"""The child behind `bbmcl check`: `python -m backdoorbench_mcl.testing.child ASKED.json TOLD.jsonl`."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

from ..errors import BbmclError, NotApplicable, UserError
from ..text import raised_at
from .core import CheckFailed, Skipped, Subject
from .suite import CHECKS, checks_for


def verdict(name: str, subject: Subject) -> dict[str, object]:
    """One result, ready for JSON."""
    check = next(check for check in CHECKS if check.name == name)
    started = time.perf_counter()
    state, message = "ok", ""
    try:
        check(subject)
    except Skipped as reason:
        state, message = "skipped", str(reason)
    except NotApplicable as reason:
        state, message = "skipped", f"not applicable to the toys ({reason})"
    except (CheckFailed, BbmclError) as error:
        state, message = "failed", str(error)
    except (Exception, SystemExit) as error:  # whatever a method raises is its result
        traceback.print_exc()
        state, message = "failed", f"raised {type(error).__name__} at {raised_at(error)}: {error}"
    return {"check": name, "state": state, "message": message, "seconds": time.perf_counter() - started}


def chosen(kind: str, only: list[str]) -> list[str]:
    """The checks of a kind, or those of them in `only`, with or without `check_`. Raises UserError for another name."""
    names = [check.name for check in checks_for(kind)]
    wanted = [name if name.startswith("check_") else f"check_{name}" for name in only]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UserError(f"no check {unknown[0]!r} of a {kind}; there are: {', '.join(names)}")
    return wanted or names


def main() -> None:
    """Say what is going to be run, run it, one line each."""
    asked, told = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])

    def tell(what: dict[str, object]) -> None:
        with told.open("a") as file:
            file.write(json.dumps(what) + "\n")

    subject = Subject(**asked["subject"])
    try:
        names = chosen(subject.kind, asked["checks"])
    except UserError as error:
        tell({"error": str(error)})
        return
    tell({"checks": names})
    for name in names:
        tell(verdict(name, subject))


if __name__ == "__main__":
    main()
