"""The commands for a model that somebody was handed, `scan` and `purify`. They parse, call and print, as in `cli`.

Their many options are passed on by name, from the context: `_asked` and `_wishes` say which go where.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import UserError
from .flags import DEFAULT_RUNS, DataRoot, Device, Isolation, Memory, Precision, Runs, Set, Timeout, Workers
from .text import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .audit.front import Front, Wishes
    from .audit.opened import Asked

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A file of weights: safetensors, or of torch.save.")]
Arch = Annotated[
    str, typer.Option(metavar="NAME", help="wrn-16-1, resnet18, torchvision:NAME, timm:NAME, module:function.")
]
CleanData = Annotated[
    str, typer.Option(metavar="DATA", help="Clean images: a folder, a .parquet file, or a data set as in cifar10@0.05.")
]
Entry = Annotated[str | None, typer.Option(metavar="NAME", help="Which state dict, where the file holds several.")]
Classes = Annotated[int | None, typer.Option(metavar="N", help="Default: as the file has it.")]
Size = Annotated[
    int | None, typer.Option(metavar="PIXELS", help="Resize images to a square; default: as the arch needs.")
]
Numbers = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Of the network's normalisation; default: tried out.")
]
Norm = Annotated[str | None, typer.Option(metavar="NAME", help="Of the data set, imagenet or none, for --mean --std.")]
Names = Annotated[
    str | None, typer.Option(metavar="FILE|LIST", help="The model's class names, in the order of its labels.")
]
HoldOut = Annotated[
    float, typer.Option(metavar="SHARE", help="Of the images, only for judging; 0: all are worked with.")
]
Most = Annotated[int | None, typer.Option(metavar="N", help="Draw so many images of a folder or file.")]
ThreadsOfOne = Annotated[
    int | None, typer.Option(help="Of a job that runs alone; fewer than all cores beside other work. Default: all.")
]
Flip = Annotated[bool, typer.Option("--flip/--no-flip", help="Whether a mirrored image keeps its label.")]
Seed = Annotated[int, typer.Option(help="Of every draw.")]
Preset = Annotated[str, typer.Option(help="What repairs are: clean, paper or authors.")]
Budget = Annotated[str, typer.Option(help="How much is done: full, mid or quick.")]
Format = Annotated[Literal["table", "json", "html"], typer.Option("--format", help="How to tell; html writes a page.")]
STATUS = {"clean": 0, "suspicious": 3, "undecided": 4}
NOTHING = 4  # of purify: no repaired model was written


def _say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r}: expected numbers separated by commas, as in 0.5,0.5,0.5") from None


def scan(
    ctx: typer.Context, model: Model, arch: Arch, clean: CleanData, classes: Classes = None, entry: Entry = None,
    size: Size = None, mean: Numbers = None, std: Numbers = None, norm: Norm = None, names: Names = None,
    hold_out: HoldOut = 0.2, most: Most = None, flip: Flip = True, seed: Seed = 0, budget: Budget = "full",
    set_: Set = None, device: Device = "auto", precision: Precision = "auto", workers: Workers = None,
    threads_per_job: ThreadsOfOne = None, timeout: Timeout = None, memory: Memory = None,
    isolation: Isolation = "auto", runs: Runs = DEFAULT_RUNS, data_root: DataRoot = None, fmt: Format = "table",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Of --format html; default: MODEL.html.")
    ] = None,
) -> None:  # fmt: skip
    """Look for a backdoor in a model. Exit status: 0 clean, 3 suspicious, 4 undecided, 2 wrong usage."""
    from .audit.front import Front

    if out is not None and fmt != "html":
        raise UserError(f"--out {out}: is for --format html; other formats are printed")
    with Front(_asked(ctx.params), _wishes(ctx.params), (), _say) as view:
        found = view.scan()
        _tell(view, fmt, out or Path(f"{model.name}.html"))
    raise typer.Exit(STATUS[found.call])


def purify(
    ctx: typer.Context, model: Model, arch: Arch, clean: CleanData,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT.safetensors", help="The repaired weights.")],
    defense: Annotated[
        str | None, typer.Option(metavar="NAME", help="A defense, as bbmcl plugins lists it; default: mcldef.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Try every defense that can be used, and keep the best.")] = False,
    target: Annotated[str, typer.Option(metavar="LABEL|detect", help="What the trigger leads to.")] = "detect",
    classes: Classes = None, entry: Entry = None, size: Size = None, mean: Numbers = None, std: Numbers = None,
    norm: Norm = None, names: Names = None, hold_out: HoldOut = 0.2, most: Most = None, flip: Flip = True,
    seed: Seed = 0, preset: Preset = "clean", budget: Budget = "full", set_: Set = None,
    device: Device = "auto", precision: Precision = "auto", workers: Workers = None,
    threads_per_job: ThreadsOfOne = None, timeout: Timeout = None,
    memory: Memory = None, isolation: Isolation = "auto", runs: Runs = DEFAULT_RUNS, data_root: DataRoot = None,
    fmt: Format = "table",
) -> None:  # fmt: skip
    """Repair a model: OUT.safetensors, and a card beside it, OUT.json. Exit status 4: nothing was to be repaired."""
    from .audit.front import Front

    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: expected a name that ends in .safetensors")
    if target != "detect" and not target.isdecimal():
        raise UserError(f"--target {target!r}: expected a label (a number from 0 on) or detect")
    if all_ and defense is not None:
        raise UserError(f"--all --defense {defense}: give one of them")
    tried = None if all_ else (defense or "mcldef",)
    with Front(_asked(ctx.params), _wishes(ctx.params), tried, _say, out) as view:
        repairs = view.purify(None if target == "detect" else int(target))
        if repairs and repairs[0].folder is not None:
            view.write(repairs[0], out)
        _tell(view, fmt, out.with_suffix(".html"))
    raise typer.Exit(NOTHING if not repairs else int(repairs[0].folder is None))


def _asked(given: Mapping[str, Any]) -> Asked:
    """What to open, of the options by their names."""
    from .audit.opened import Asked

    own = {field.name: given[field.name] for field in fields(Asked)}
    return Asked(**{**own, **{name: _numbers(f"--{name}", given[name]) for name in ("mean", "std")}})


def _wishes(given: Mapping[str, Any]) -> Wishes:
    """How to compute it."""
    from .audit.front import Wishes

    named = {"overrides": tuple(given["set_"] or ()), "threads": given["threads_per_job"], "preset": "clean"}
    return Wishes(**{field.name: {**named, **given}[field.name] for field in fields(Wishes)})


def _tell(view: Front, fmt: str, page: Path) -> None:
    if fmt == "html":
        print(view.write_page(page))
    else:
        print(view.as_json() if fmt == "json" else view.as_text())
