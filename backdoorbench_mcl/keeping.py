"""The commands that look after a runs folder: carry its results elsewhere, have them again, tidy up. They parse, call
and print, as those of `cli`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from .errors import UserError
from .flags import DEFAULT_RUNS, Address, DataRoot, Engine, Gpus, Isolation, Memory, Runs, Workers

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

    print("\n".join(housekeeping.lines(housekeeping.survey(runner.opened(runs), days), runs)))


@store_app.command()
def gc(
    runs: Runs = DEFAULT_RUNS,
    days: Days = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and stop.")] = False,
) -> None:
    """Remove what no row needs: unused artefacts, old snapshots, what killed processes left. Rows stay."""
    from . import housekeeping, runner

    store = runner.opened(runs)
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

    kinds = None if only is None else [part.strip() for part in only.split(",")]
    unknown = [kind for kind in kinds or () if kind not in get_args(plan.Kind)]
    if unknown:
        raise UserError(
            f"--only {only!r}: {unknown[0]!r} is no kind of stage; there are {', '.join(get_args(plan.Kind))}"
        )
    stages, rows = archive.export(runner.opened(runs), file, kinds)
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


def verify(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUNS]", help="Folder of results; default: --runs.")] = None,
    runs: Runs = DEFAULT_RUNS,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cells to draw, of many attacks and defenses; default: 3."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All finished cells.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    reuse_victims: Annotated[
        bool,
        typer.Option("--reuse-victims", help="Copy the victims: far faster, and they are not verified."),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N; default: as each cell was computed.")
    ] = None,
    workers: Workers = None,
    threads_per_job: Annotated[int | None, typer.Option(help="Default: as each cell was computed.")] = None,
    memory: Memory = None,
    isolation: Isolation = "auto",
    engine: Engine = "local",
    address: Address = None,
    gpus_per_job: Gpus = 1.0,
    data_root: DataRoot = None,
    fmt: Annotated[Literal["table", "json"], typer.Option("--format", help="How to print what was found.")] = "table",
) -> None:
    """Compute some stored cells again, in a temporary folder, and say whether they came out the same."""
    from . import verify as again
    from .runner import Settings

    if every and sample is not None:
        raise UserError(f"--all and --sample {sample}: give one of them")
    choice = again.Choice(
        None if every else again.SAMPLE if sample is None else sample, seed, reuse_victims, data_root, device
    )
    settings = Settings(
        folder or runs, workers, threads_per_job, isolation=isolation, memory=memory, engine=engine, address=address,
        gpus=gpus_per_job,
    )  # fmt: skip
    findings = again.verify(settings, choice, lambda line: print(line, file=sys.stderr))
    if fmt == "json":
        print(json.dumps([again.as_dict(finding) for finding in findings], indent=1))
    else:
        print("\n".join([*(f"{finding.cell}: {finding.text}" for finding in findings), again.summary(findings)]))
    raise typer.Exit(again.status(findings))
