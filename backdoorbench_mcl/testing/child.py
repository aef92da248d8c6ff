"""The child behind `bbmcl check`: `python -m backdoorbench_mcl.testing.child ASKED.json TOLD.jsonl`."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

from ..errors import BbmclError
from .core import CheckFailed, Skipped, Subject
from .suite import CHECKS


def verdict(name: str, subject: Subject) -> dict[str, object]:
    """One result, ready for JSON."""
    check = next(check for check in CHECKS if check.name == name)
    started = time.perf_counter()
    state, message = "ok", ""
    try:
        check(subject)
    except Skipped as reason:
        state, message = "skipped", str(reason)
    except (CheckFailed, BbmclError) as error:
        state, message = "failed", str(error)
    except (Exception, SystemExit) as error:  # whatever a method raises is its result
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        state, message = "failed", f"raised {type(error).__name__} at {where}: {error}"
    return {"check": name, "state": state, "message": message, "seconds": time.perf_counter() - started}


def main() -> None:
    """Run what was asked, one line each."""
    asked, told = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    subject = Subject(**asked["subject"])
    for name in asked["checks"]:
        line = json.dumps(verdict(name, subject)) + "\n"
        with told.open("a") as file:
            file.write(line)


if __name__ == "__main__":
    main()
