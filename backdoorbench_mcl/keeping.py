"""The commands that look after a runs folder: carry its results elsewhere. Parse, call, print, as `cli` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from .errors import UserError
from .flags import DEFAULT_RUNS, Runs


def export(
    file: Annotated[Path, typer.Argument(help="The archive to write.")],
    runs: Runs = DEFAULT_RUNS,
    only: Annotated[
        str | None,
        typer.Option(metavar="KINDS", help="Only stages of these kinds, as in surrogate,train: the victims."),
    ] = None,
) -> None:
    """Write all results of a runs folder into one archive."""
    from . import archive, plan, runner
    from .store import Store

    kinds = None if only is None else [part.strip() for part in only.split(",")]
    unknown = [kind for kind in kinds or () if kind not in get_args(plan.Kind)]
    if unknown:
        raise UserError(
            f"--only {only!r}: {unknown[0]!r} is no kind of stage; there are {', '.join(get_args(plan.Kind))}"
        )
    runner.stored_rows(runs)
    stages, rows = archive.export(Store(runs), file, kinds)
    print(f"{file}: {stages} stages, {rows} rows")


def import_(
    file: Annotated[Path, typer.Argument(help="An archive of bbmcl export.")], runs: Runs = DEFAULT_RUNS
) -> None:
    """Add the results of an archive to a runs folder."""
    from . import archive
    from .store import Store

    if not file.is_file():
        raise UserError(f"{file}: no such file; expected an archive written by bbmcl export")
    stages, rows = archive.load(Store(runs), file)
    print(f"{runs}: {stages} new stages, {rows} new rows")
