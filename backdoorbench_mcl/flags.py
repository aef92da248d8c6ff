"""Options that several commands share: what they are called, what they say. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Runs = Annotated[Path, typer.Option(envvar="BBMCL_RUNS", metavar="DIR", help="Folder of results.", show_default=True)]
FormatName = Literal["table", "markdown", "latex", "csv", "json"]
Format = Annotated[FormatName, typer.Option("--format", help="How to print the rows.")]
PageFormat = Annotated[
    Literal["table", "markdown", "latex", "csv", "json", "html"],
    typer.Option("--format", help="How to print the rows; html writes a page."),
]
DataRoot = Annotated[Path | None, typer.Option(envvar="BBMCL_DATA", metavar="DIR", help="Where data sets lie.")]
Dataset = Annotated[str, typer.Option(help="Data set.")]
Seeds = Annotated[str, typer.Option(help="Victim seeds: 0-2,7.")]
DefenseSeeds = Annotated[str, typer.Option(help="Defense seeds.")]
Preset = Annotated[str, typer.Option(help="What is done: paper, authors or clean.")]
Budget = Annotated[str | None, typer.Option(help="How much: full, mid or quick; the data set names the default.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="NAME.PARAM=VALUE", help="One parameter; repeatable.")]
Retune = Annotated[
    int, typer.Option(metavar="N", help="Also teach each repaired model N (10-50) triggered images, and judge it.")
]
CleanModel = Annotated[
    bool, typer.Option("--clean-model", help="Also run every defense on a clean model (the attack none).")
]
Device = Annotated[
    str,
    typer.Option("--device", "--devices", help="auto, cpu, cuda, cuda:N; several GPUs, a worker each: cuda:0,cuda:1."),
]
Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16 (network forwards only).")]


def _workers(text: str) -> int | None:
    """`auto`, or a number. Raises typer.BadParameter."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected auto or a number of jobs") from None


Workers = Annotated[
    int | None,
    typer.Option(parser=_workers, metavar="N|auto", help="Jobs at once; auto: one per core, or per GPU."),
]
Threads = Annotated[int | None, typer.Option(help="Default: 1 with several workers, else all cores.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that one job may take.")]
Memory = Annotated[
    float | None, typer.Option(envvar="BBMCL_MEMORY", metavar="GB", help="Memory that one job may hold.")
]
Isolation = Annotated[str, typer.Option(help="auto, landlock, process or inline.")]
Engine = Annotated[str, typer.Option(help="Where jobs run: local, or ray (on the nodes of a Ray cluster).")]
Address = Annotated[
    str | None,
    typer.Option(metavar="auto|HOST:PORT", help="Of the Ray cluster; default: Ray is started on this machine."),
]
Gpus = Annotated[float, typer.Option("--gpus-per-job", help="Share of a GPU that a job on Ray gets.")]
Retry = Annotated[bool, typer.Option("--retry/--no-retry", help="Try again what failed in an earlier run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be computed, and stop.")]
DEFAULT_RUNS = Path("bbmcl-runs")
