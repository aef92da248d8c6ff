"""The commands that look after a runs folder: carry its results elsewhere, tidy up. Parse, call, print, as in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from .errors import UserError
from .flags import DEFAULT_RUNS, Runs

store_app = typer.Typer(
    help="The runs folder: what it takes, what can go.", no_args_is_help=True, rich_markup_mode=None
)
Days = Annotated[
    float, typer.Option(min=0, help="Keep what no row needs for so long: an interrupted run goes on from it.")
]


@store_app.command()
def du(runs: Runs = DEFAULT_RUNS, days: Days = 7.0) -> None:
    """Show what a runs folder holds, how large it is, and what no row needs."""
    from . import housekeeping, runner
    from .store import Store

    runner.stored_rows(runs)
    print("\n".join(housekeeping.lines(housekeeping.survey(Store(runs), days), runs)))


@store_app.command()
def gc(
    runs: Runs = DEFAULT_RUNS,
    days: Days = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and stop.")] = False,
) -> None:
    """Remove what no row needs: unused artefacts, old snapshots, what killed processes left. Rows stay."""
    from . import housekeeping, runner
    from .store import Store

    runner.stored_rows(runs)
    store = Store(runs)
    if dry_run:
        found = [item for item in housekeeping.survey(store, days) if item.why]
    else:
        found = housekeeping.reclaim(store, days)
    for item in found:
        print(f"{item.path.relative_to(runs)}  {housekeeping.human(item.size)}  ({item.what}: {item.why})")
    print(f"{'would free' if dry_run else 'freed'} {housekeeping.human(sum(item.size for item in found))}")


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
