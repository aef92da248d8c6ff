"""The command `bbmcl`: parse, call, print. What it calls is imported when it is called, so that --help is instant."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__, auditing, keeping
from .errors import BbmclError, UserError
from .flags import (
    DEFAULT_RUNS,
    Address,
    Budget,
    CleanModel,
    DataRoot,
    Dataset,
    DefenseSeeds,
    Device,
    DryRun,
    Engine,
    Format,
    FormatName,
    Gpus,
    Isolation,
    Memory,
    PageFormat,
    Precision,
    Preset,
    Retry,
    Retune,
    Runs,
    Seeds,
    Set,
    Threads,
    Timeout,
    Workers,
)  # fmt: skip
from .text import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .report.sheets import Sheet
    from .rows import Row

app = typer.Typer(
    help="Measure whether a backdoor defense works: attack x defense matrices with ASR and BA.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    help="Data sets: list them, check the prepared copies.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")
app.add_typer(keeping.store_app, name="store")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _config(ctx: typer.Context, file: Path | None) -> Path | None:
    """`--config FILE.toml`: the file's keys are the options' names; what is typed beats the file."""
    if file is None:
        return None
    from . import presets

    known = {name for p in ctx.command.params for o in p.opts if (name := o.lstrip("-")) not in ("config", "help", "h")}
    ctx.default_map = {**(ctx.default_map or {}), **presets.read_config(file, known)}
    return file


def _print_rows(rows: list[Row], fmt: FormatName, below: Sequence[Sheet] = ()) -> None:
    from . import report

    print(report.render(rows, fmt, color=_colour(), below=below))


def _colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


@app.command()
def matrix(
    attacks: Annotated[str, typer.Option(metavar="LIST|all", help="Attacks, separated by commas.")],
    defenses: Annotated[str, typer.Option(metavar="LIST|all", help="Defenses, separated by commas.")],
    dataset: Dataset = "shapes",
    model: Annotated[str, typer.Option(help="Network.")] = "wrn-16-1",
    seeds: Seeds = "0",
    defense_seeds: DefenseSeeds = "0",
    clean_rate: Annotated[float, typer.Option(help="Share of the training set given to the defenses.")] = 0.05,
    exclude_poisoned: Annotated[
        bool, typer.Option("--exclude-poisoned", help="Keep clean copies of poisoned images out of the clean set.")
    ] = False,
    preset: Preset = "paper",
    budget: Budget = None,
    set_: Set = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME.PARAM=V1,V2,...", help="A column per value; also clean-rate=...; repeatable."),
    ] = None,
    retune: Retune = 0,
    clean_model: CleanModel = False,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    threads_per_job: Threads = None,
    timeout: Timeout = None,
    memory: Memory = None,
    isolation: Isolation = "auto",
    engine: Engine = "local",
    address: Address = None,
    gpus_per_job: Gpus = 1.0,
    retry: Retry = True,
    runs: Runs = DEFAULT_RUNS,
    data_root: DataRoot = None,
    fmt: Format = "table",
    config: Annotated[
        Path | None, typer.Option(is_eager=True, callback=_config, metavar="FILE.toml", help="Options from a file.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train backdoored models, repair them, print the grid. The same line again goes on where it stopped."""
    from . import runner
    from .request import CONTROL, Options

    if clean_model:
        attacks = f"{attacks},{CONTROL}"
    options = Options(
        attacks, defenses, dataset, model, seeds, defense_seeds, clean_rate, preset, budget, tuple(set_ or ()), device,
        precision, data_root, exclude_poisoned, tuple(sweep or ()), retune,
    )  # fmt: skip
    settings = runner.Settings(
        runs, workers, threads_per_job, timeout, isolation, retry, memory=memory, engine=engine, address=address,
        gpus=gpus_per_job,
    )  # fmt: skip
    if dry_run:
        print("\n".join(runner.dry_run(options, settings)))
        return
    rows = runner.run_matrix(options, settings, announce=_say)
    _print_rows(rows, fmt)
    raise typer.Exit(runner.exit_status(rows))


@app.command()
def reproduce(
    target: Annotated[str, typer.Argument(help="table1, table2, table4, table5, fig1, ..., or all.")],
    dataset: Dataset = "cifar10",
    model: Annotated[str, typer.Option(help="Network; default: the paper's.", show_default=False)] = "",
    seeds: Seeds = "0",
    defense_seeds: DefenseSeeds = "0",
    preset: Preset = "paper",
    budget: Budget = None,
    set_: Set = None,
    retune: Retune = 0,
    clean_model: CleanModel = False,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    threads_per_job: Threads = None,
    timeout: Timeout = None,
    memory: Memory = None,
    isolation: Isolation = "auto",
    engine: Engine = "local",
    address: Address = None,
    gpus_per_job: Gpus = 1.0,
    retry: Retry = True,
    runs: Runs = DEFAULT_RUNS,
    data_root: DataRoot = None,
    fmt: PageFormat = "table",
    dry_run: DryRun = False,
) -> None:
    """Run the paper's tables and figures, beside the printed numbers. What is stored is not computed again."""
    from . import reproduce as pinned
    from . import runner
    from .request import CONTROL, Options

    base = Options(
        CONTROL if clean_model else "", "", dataset, model, seeds, defense_seeds, preset=preset, budget=budget,
        overrides=tuple(set_ or ()), device=device, precision=precision, data_root=data_root, retune=retune,
    )  # fmt: skip
    settings = runner.Settings(
        runs, workers, threads_per_job, timeout, isolation, retry, memory=memory, engine=engine, address=address,
        gpus=gpus_per_job,
    )  # fmt: skip
    if dry_run:
        for one, options in pinned.planned(target, base, _say):
            print("\n".join([one.title, *(f"  {line}" for line in runner.dry_run(options, settings))]))
        return
    status = 0
    every: list[pinned.Reproduced] = []
    for found in pinned.reproduce(target, base, settings, fmt, color=_colour(), announce=_say):
        every.append(found)
        if fmt not in ("json", "csv", "html"):
            closing = ["", found.closing] if found.closing else []
            print("\n".join([found.text, "", *map(str, found.files), *closing]), flush=True)
        for problem in found.problems:
            _say(one_line(f"bbmcl: {problem}"))
        status |= runner.exit_status(found.rows)
    if fmt == "html":
        print(pinned.write_page(target, every, runs))
    elif fmt in ("json", "csv"):
        _print_rows(list({row.key: row for found in every for row in found.rows}.values()), fmt)
    raise typer.Exit(status)


@app.command()
def report(
    runs: Runs = DEFAULT_RUNS,
    fmt: PageFormat = "table",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Of --format html; default: in the runs folder.")
    ] = None,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Add spread and tests below the tables (html always has them).")
    ] = False,
    against: Annotated[
        str | None, typer.Option(metavar="DEFENSE", help="The defense that the tests compare with; default: mcldef.")
    ] = None,
    printed: Annotated[
        int | None, typer.Option("--paper", metavar="1|2|4|5", help="Add the numbers that the paper's table printed.")
    ] = None,
    attacks: Annotated[str | None, typer.Option(help="Only these attacks.")] = None,
    defenses: Annotated[str | None, typer.Option(help="Only these defenses (Before stays).")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only this data set.")] = None,
    preset: Annotated[str | None, typer.Option(help="Only this preset.")] = None,
    budget: Annotated[str | None, typer.Option(help="Only this budget.")] = None,
    latest: Annotated[
        bool, typer.Option("--latest", help="Without rows that an edited or updated method has left behind.")
    ] = False,
) -> None:
    """Print the stored results again, in any format."""
    from . import documents, params, runner
    from .request import BEFORE

    def wanted(row: Row) -> bool:
        one = all(
            given in (None, value)
            for given, value in ((dataset, row.dataset), (preset, row.preset), (budget, row.budget))
        )
        attack = attacks is None or row.attack in params.split(attacks)
        defense = defenses is None or row.defense in (BEFORE, *params.split(defenses))
        return one and attack and defense

    rows = runner.stored_rows(runs, wanted, latest=latest)
    if not rows and fmt in ("table", "html"):
        _say("no stored row fits")
    if fmt == "html":
        print(documents.write_page(runs, rows, out or runs / "report.html", printed, against))
        return
    below = documents.below(runs, rows, fmt, statistics or against is not None, against, printed)
    _print_rows(rows, fmt, below)


@app.command()
def gallery(
    runs: Runs = DEFAULT_RUNS,
    attacks: Annotated[str | None, typer.Option(metavar="LIST", help="Only these attacks.")] = None,
    images: Annotated[int, typer.Option(min=1, max=100, help="Test images on a sheet.")] = 4,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to write; default: gallery/ in the runs.")
    ] = None,
) -> None:
    """Draw the stored attacks: a PNG and an SVG per data set, attack and victim, with the triggers found."""
    from . import params, runner
    from .registry import cache_folder
    from .report.gallery import sheets

    rows = runner.stored_rows(runs, lambda row: attacks is None or row.attack in params.split(attacks))
    drawn = list(sheets(runs, rows, cache_folder(), runs / "gallery" if out is None else out, images))
    problems = [item for item in drawn if isinstance(item, UserError)]
    if len(problems) == len(drawn):
        raise problems[0]
    for item in drawn:
        if isinstance(item, Path):
            print(item)
    for problem in problems:
        _say(f"bbmcl: {problem}")
    raise typer.Exit(int(bool(problems)))


@app.command()
def plugins(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List every method, where it comes from, and what is wrong with plugins that could not be used, or odd."""
    from . import plugins as door
    from .text import one_line

    found = door.load()
    kinds = ("dataset", "model", "attack", "inverter", "defense")
    table = [
        {
            "kind": kind, "name": o.entry.name, "summary": o.entry.summary, "paper": o.entry.paper,
            "may_know": list(o.entry.may_know), "dist": o.plugin.dist, "version": o.plugin.version,
            "target": o.entry.target,
        }
        for kind in kinds
        for o in found.of(kind)  # type: ignore[arg-type]
    ]  # fmt: skip
    if as_json:
        told = {"problems": [str(p) for p in found.problems], "notices": [str(p) for p in found.notices]}
        print(json.dumps({"methods": table, **told}, indent=1))
        return
    width = max((len(str(line["name"])) for line in table), default=0)
    for kind in kinds:
        print(f"{kind}s")
        for line in table:
            if line["kind"] == kind:
                knows = f" [may know: {', '.join(line['may_know'])}]" if line["may_know"] else ""
                text = one_line(f"{line['summary']}{knows} ({line['dist']} {line['version']})")
                print(f"  {line['name']:{width}}  {text}")
    for problem in found.problems:
        _say(one_line(str(problem)))
    for notice in found.notices:
        _say(one_line(f"note: {notice}"))


@app.command()
def show(name: Annotated[str, typer.Argument(help="A method, as bbmcl plugins lists it.")]) -> None:
    """Print a method's card: what it is, and its parameters with bounds and defaults."""
    from . import plugins as door
    from .registry import Registry, cache_folder
    from .report import card

    print(card.render(Registry(door.load(), cache_folder()), name))


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A method, with parameters if need be: 'sig(delta=60)'.")],
    kind: Annotated[str | None, typer.Option(help="attack, model, inverter, defense or dataset.")] = None,
    only: Annotated[str | None, typer.Option(metavar="LIST", help="Only these checks, separated by commas.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one check may take.")] = 120.0,
) -> None:
    """Check a method against the contract of plugins, check by check, on toys that take seconds."""
    from . import authoring, checking, runner

    names = [part.strip() for part in (only or "").split(",") if part.strip()]
    well = True
    for subject in authoring.subjects(runner.registry(jobs=False), name, kind):
        print(f"{subject['kind']} {subject['label']}", flush=True)
        results = checking.run(subject, names, timeout)
        well &= checking.lines(results, lambda line: print(line, flush=True))
    raise typer.Exit(int(not well))


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="attack, model, inverter, defense or dataset.")],
    name: Annotated[str, typer.Argument(help="Its name: lower-case words joined by '-'.")],
    into: Annotated[Path, typer.Option(metavar="DIR", help="Where the package's folder is made.")] = Path(),
) -> None:
    """Write a package with a working method: change it, install it, and it is a column of the matrix."""
    from . import authoring

    for file in authoring.new(kind, name, into):
        print(file)
    print(f"next: pip install -e '{into / f'bbmcl-{name}'}[test]' && bbmcl check {name}")


app.command()(auditing.scan)
app.command()(auditing.purify)
app.command()(keeping.verify)
app.command()(keeping.export)
app.command(name="import")(keeping.import_)


@data_app.command(name="list")
def data_list() -> None:
    """The data sets that plugins offer and the copies that are prepared."""
    from . import datacache, registry
    from . import plugins as door

    for offer in door.load().of("dataset"):
        print(f"{offer.entry.name:12} {offer.entry.summary}")
    for info in datacache.entries(registry.cache_folder()):
        print(
            f"prepared: {info.classes} classes, {info.shape[0]}x{info.shape[1]}x{info.shape[2]}, {info.note}, "
            f"hash {info.hash[:12]}"
        )


@data_app.command(name="check")
def data_check(
    dataset: Annotated[str, typer.Argument(help="A data set, as for --dataset.")], data_root: DataRoot = None
) -> None:
    """Prepare a data set if need be, verify the prepared copy byte by byte, and print what it holds."""
    from . import runner

    for line in runner.check_data(dataset, data_root):
        print(line)


def _version(value: bool) -> None:
    if value:
        print(f"bbmcl {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    pass


class _Stopped(BaseException):
    """SIGTERM or Ctrl-C: unwinds, so that children are ended and locks released.

    No KeyboardInterrupt, of which typer makes an exit without a word.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped(signum)


# The root of all that typer raises for a line it cannot parse; click's own, or in newer versions a copy that it brings.
USAGE_ERROR: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _command(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return "bbmcl" if context is None else str(context.command_path)


def _run() -> int:
    try:
        status: Any = app(standalone_mode=False, prog_name="bbmcl")
        return status if isinstance(status, int) else 0
    except typer.Exit as done:
        return int(done.exit_code)
    except USAGE_ERROR as error:
        message = str(error.format_message())
        helpful = message.startswith("Usage:")  # a bare `bbmcl` or `bbmcl data` is answered with its help
        _say(message if helpful else one_line(f"bbmcl: {message.rstrip('.')}; see: {_command(error)} --help"))
        return 2
    except BbmclError as error:
        _say(one_line(f"bbmcl: {error}"))
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that may not be written: named by its file, of no use as a trace
        where = error.filename or "a file"
        _say(one_line(f"bbmcl: {error.strerror or error}: {where}; make room, or see to its permissions"))
        return 2
    except _Stopped as stopped:
        how = "terminated" if stopped.signum == signal.SIGTERM else "stopped"
        stores = {"matrix", "reproduce", "scan", "purify"} & set(sys.argv[1:2])
        _say(f"bbmcl: {how}" + ("; what was finished is stored, the same command goes on from there" if stores else ""))
        return 128 + stopped.signum


def main() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell has its background jobs ignore Ctrl-C
        signal.signal(signal.SIGINT, _stop)
    try:
        status = _run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has left: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
