"""One run of the matrix from options to rows: what `bbmcl matrix` and scripts call. Free of torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, get_args

from . import artefacts, cells, confine, costs, datacache, devices, params, plan, plugins, presets, provenance, request
from .agenda import Agenda
from .devices import Devices
from .engines import ray
from .engines.base import Engine, Isolation
from .engines.local import Local
from .engines.single import run_one
from .errors import UserError
from .grant import Grants
from .matrix import Matrix
from .progress import Progress
from .registry import Described, Registry, Wanted, cache_folder
from .request import Options
from .rows import FINAL_STATES, Row
from .store import Store
from .text import one_line

LARGE = 64  # pixels: from here on the constants for 32x32 fit images badly (spec 4.1, 5.1)
LIKE = "imagenet20"  # whose tables in the presets tell which constants these are
_FOREIGN = (
    "note: images of {height}x{width}, for which preset {preset} has no table: what you do not set is meant for 32x32. "
    "At 224x224 ({like}) this preset has {settings}"
)
MAX_WORKERS = 8  # the default on large machines: memory, not cores, is what several trainings run out of


@dataclass(frozen=True)
class Settings:
    """How to run, whatever is run. workers, threads: None for the default rule; timeout: seconds per job; memory: GB
    per job. engine: "local" or "ray"; address: of a Ray cluster, None to start Ray here; gpus: the share of a GPU that
    a job gets there.
    """

    runs: Path = Path("bbmcl-runs")
    workers: int | None = None
    threads: int | None = None
    timeout: float | None = None
    isolation: str = "auto"
    retry: bool = True
    snapshot_every: float = 2.0
    memory: float | None = None
    engine: str = "local"
    address: str | None = None
    gpus: float = 1.0


@dataclass(frozen=True)
class Resources:
    """workers: jobs at once, None where the cluster has the say; threads: cores of each; isolation: how a job is kept
    in; engine: what runs them.
    """

    workers: int | None
    threads: int
    isolation: Isolation
    engine: str = "local"


def check(settings: Settings) -> None:
    """Raises UserError for numbers out of range: before data are prepared, which may take minutes."""
    for name, given in (("--workers", settings.workers), ("--threads-per-job", settings.threads)):
        if given is not None and not 1 <= given <= 1024:
            raise UserError(f"{name} {given}: expected a number from 1 to 1024")
    if settings.timeout is not None and not settings.timeout > 0:  # nan as well
        raise UserError(f"--timeout {settings.timeout}: expected seconds above 0")
    if settings.memory is not None and not settings.memory > 0:
        raise UserError(f"--memory {settings.memory}: expected GB (1e9 bytes) above 0")
    if settings.isolation not in ("auto", "landlock", "process", "inline"):
        raise UserError(f"--isolation {settings.isolation!r}: expected auto, landlock, process or inline")
    if settings.isolation == "landlock" and confine.abi_version() == 0:
        raise UserError("--isolation landlock: this kernel has none; use auto, and the rows say what was reached")
    if settings.engine not in ("local", "ray"):
        raise UserError(f"--engine {settings.engine!r}: expected local or ray")
    if settings.engine == "local" and settings.address is not None:
        raise UserError(f"--address {settings.address}: the local engine has none; add --engine ray")
    if settings.engine == "ray":
        if settings.isolation == "inline":
            raise UserError("--isolation inline: runs jobs in the driver, which --engine ray cannot; leave one out")
        if not 0 < settings.gpus <= 1:
            raise UserError(f"--gpus-per-job {settings.gpus}: expected a share above 0, at most 1")
        ray.check(settings.address)


def resources(settings: Settings, device: str) -> Resources:
    """The static rules of design 3.3: on a CPU one worker per core with one thread each (up to MAX_WORKERS), else one
    per GPU; with more of them a GPU gets several jobs where their memory was measured and fits. A single worker gets
    every core. On Ray one thread a job. Raises UserError for numbers out of range.
    """
    check(settings)
    if settings.engine == "ray" and device.startswith("cuda") and device != "cuda":
        raise UserError(f"--device {device}: on a Ray cluster a job gets the GPU that Ray gives it; use --device cuda")
    if settings.engine == "ray":  # every node does what it can, and the rows say what that was
        wanted: Any = settings.isolation
        if wanted == "auto":
            wanted = "landlock" if device == "cpu" else "process"
        return Resources(settings.workers, settings.threads or 1, wanted, "ray")
    cores = provenance.cores()
    inline = settings.isolation == "inline"
    gpus = len(device.split(",")) if device.startswith("cuda") else 0
    default = 1 if inline else gpus or min(cores, MAX_WORKERS)
    workers = 1 if inline else settings.workers or default
    threads = settings.threads or (1 if workers > 1 else cores)
    if settings.isolation != "auto":
        return Resources(workers, threads, settings.isolation)  # type: ignore[arg-type]
    held = not device.startswith("cuda") and confine.abi_version() > 0  # not yet tried with the driver of a GPU
    return Resources(workers, threads, "landlock" if held else "process")


def prepare_data(registry: Registry, cache: Path) -> request.PrepareData:
    """A function that finds a data set in the cache, or prepares it in a child."""

    def prepare(dataset: Described, root: Path | None, key: str) -> datacache.DataInfo:
        code = registry.code(dataset.target)
        full = f"{key}-{code[:16]}"
        found = datacache.lookup(cache, full, root)
        if found is None:
            registry.say(f"preparing data set {dataset.label} (once: the copy in {cache} is used from then on)")
            found = _prepare(dataset, root, full, cache)
        return found

    return prepare


def _prepare(dataset: Described, root: Path | None, key: str, cache: Path) -> datacache.DataInfo:
    spec = {
        "job": "data", "isolation": "process", "dataset": dataset.spec, "cache": str(cache), "key": key,
        "root": None if root is None else str(root),
    }  # fmt: skip
    with run_one(spec, about=f"data set {dataset.label}: ") as out:
        return datacache.DataInfo.from_dict(artefacts.read_meta(out))


def check_data(text: str, root: Path | None) -> list[str]:
    """Prepare a data set if need be, verify the prepared copy byte by byte; lines that say what it holds.

    Raises UserError where the data are missing, or where the copy is damaged.
    """
    known = registry(jobs=False)
    dataset = known.describe([Wanted("dataset", params.selection(text))])[0]
    info = prepare_data(known, cache_folder())(dataset, root, cells.key({"dataset": dataset.identity}))
    problems = datacache.check(info)
    if problems:
        raise UserError(
            f"the prepared copy of {text} is damaged: {'; '.join(problems)}; remove {info.folder} and run again"
        )
    return [
        f"{text}: {info.n_train} train + {info.n_test} test images, {info.shape}, {info.classes} classes, {info.note}",
        f"train images per class: {', '.join(map(str, info.class_counts_train))}",
        f"mean {info.mean}, std {info.std}",
        f"hash {info.hash}; prepared copy in {info.folder}: verified",
    ]


def registry(say: Callable[[str], None] = lambda line: None, jobs: bool = True) -> Registry:
    """The methods of this installation, with the user's cache; `say` is told of what takes seconds.

    jobs: some will be run, so that their fork server may as well read classes.
    """
    return Registry(plugins.load(), cache_folder(), say=say, warm=jobs)


def summary(asked: request.Request, using: Resources) -> list[str]:
    """What `all` stood for and every default that decides numbers: printed before a run."""
    height, width = asked.data.shape[1:]
    name = params.selection(asked.dataset.label).name
    table = presets.settings(asked.preset, "full", name)  # type: ignore[arg-type]
    foreign = min(height, width) >= LARGE and "lam" not in table.get("nc-box", {})
    return [
        f"data set {asked.dataset.label} ({asked.data.note}), model {asked.model.label}",
        *([_foreign(asked)] if foreign else []),
        f"attacks {_names(asked.attacks)}; defenses {_names(asked.defenses)}",
        *(
            [f"note: `all` leaves out {', '.join(asked.left_out)}, told the trigger or its place"]
            if asked.left_out
            else []
        ),
        f"preset {asked.preset}, budget {asked.budget}, precision {asked.precision}, device {asked.device}, "
        f"{_room(using)}, isolation {using.isolation}",
    ]


def _foreign(asked: request.Request) -> str:
    """What the preset sets otherwise for images of 224x224, of the methods in this run."""
    large, usual = (presets.settings(asked.preset, asked.budget, name) for name in (LIKE, ""))  # type: ignore[arg-type]
    methods = (asked.train, asked.defend, asked.model, *asked.attacks, *asked.defenses, *asked.needed.values())
    names = {m.label if m.kind == "recipe" else m.full_name.rpartition("/")[2] for m in methods}
    found = ", ".join(
        f"{method}.{name}={params.typed(value)}"
        for method in sorted(names & set(large)) for name, value in sorted(large[method].items())
        if value != usual.get(method, {}).get(name)
    )  # fmt: skip
    height, width = asked.data.shape[1:]
    return _FOREIGN.format(height=height, width=width, preset=asked.preset, like=LIKE, settings=found)


def _room(using: Resources) -> str:
    threads = f"{using.threads} thread{'s' if using.threads > 1 else ''}"
    if using.workers is None:
        return f"engine {using.engine}, {threads} a job"
    how = "" if using.engine == "local" else f"engine {using.engine}, up to "
    return f"{how}{using.workers} worker{'s' if using.workers > 1 else ''} x {threads}"


def _names(methods: Sequence[Described]) -> str:
    return ", ".join(method.label for method in methods) or "none"


def dry_run(options: Options, settings: Settings) -> list[str]:
    """What a run would do, in lines: cells, missing and stored stages. Computes nothing but the data cache."""
    check(settings)
    known = registry(jobs=False)
    asked = request.resolve(options, known, prepare_data(known, cache_folder()))
    using = resources(settings, asked.device)
    graph = plan.build(asked)
    stored, time = set[str](), costs.Forecast(None, len(graph.nodes), len(graph.nodes))
    if Store.exists(settings.runs):
        store = Store(settings.runs)
        stored = store.keys() & set(graph.nodes)
        time = _forecast(graph, store, stored, asked, using)
        store.close()
    kinds = Counter(node.kind for node in graph.nodes.values())
    missing = Counter(node.kind for key, node in graph.nodes.items() if key not in stored)
    lines = [*summary(asked, using), f"{len(graph.cells)} cells in {settings.runs}"]
    for kind in get_args(plan.Kind):
        if kinds[kind] or kind not in ("surrogate", "suspect", "verdict", "retune", "embed"):
            lines.append(f"  {kind:9} {missing[kind]:5} to compute, {kinds[kind] - missing[kind]:5} stored")
    return [*lines, f"time: {time}"]


def _forecast(
    graph: plan.Plan, store: Store, stored: set[str], asked: request.Request, using: Resources
) -> costs.Forecast:
    """What the stages take that rows lack: some that are missing only finished rows once needed."""
    known = costs.of(graph, store, asked.device, using.threads)
    ahead = costs.ahead(graph, set(graph.nodes) - stored, known)
    left = Agenda(graph, ahead)
    for i, cell in enumerate(graph.cells):
        row = store.row(cell.key)
        if row is not None and row.state in FINAL_STATES:
            left.close(i)
    missing = [key for key in graph.nodes if key not in stored and left.waiting[key]]
    names, spreads = asked.device.split(","), using.engine == "ray"
    room = Devices(names, {} if spreads else devices.measure(names), spreads)
    # a cluster is not asked for what is only planned: None, unless the user said how many
    return costs.forecast(graph, missing, known, using.workers, lambda key: left.rank(graph.nodes[key]), devices=room)


def _require_room_for(runs: Path) -> None:
    """Raise UserError where a runs folder plainly cannot be made; makes nothing itself."""
    nearest = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "cannot be written" if nearest.is_dir() else "is a file"
        raise UserError(f"the runs folder {runs} cannot be used: {nearest} {why}; name another one with --runs")


def run_matrix(
    options: Options, settings: Settings, announce: Callable[[str], None] = lambda line: None,
    live: bool | None = None, stream: TextIO | None = None,
) -> list[Row]:  # fmt: skip
    """Run a matrix; one row per cell in the order of the table.

    `announce` receives the lines of `summary` and every plugin problem; progress goes to `stream` (default: stderr).
    Raises UserError for a request that cannot be met; a cell that fails is a row with its reason instead.
    """
    check(settings)
    known = registry(announce)
    observers = plugins.observers(known.plugins)
    for problem in known.plugins.problems:
        announce(one_line(str(problem)))
    find = prepare_data(known, cache_folder())

    def prepare(dataset: Described, root: Path | None, key: str) -> datacache.DataInfo:
        _require_room_for(settings.runs)  # said before minutes of preparation, not after
        return find(dataset, root, key)

    asked = request.resolve(options, known, prepare)
    using = resources(settings, asked.device)
    for line in summary(asked, using):
        announce(line)
    return compute(plan.build(asked), asked, using, settings, observers, live, stream)


def compute(
    graph: plan.Plan, asked: request.Request, using: Resources, settings: Settings,
    observers: Sequence[tuple[plugins.Plugin, Callable[[Row], object]]] = (), live: bool | None = None,
    stream: TextIO | None = None,
) -> list[Row]:  # fmt: skip
    """Compute what a plan lacks; one row per cell. asked: any of the requests that the plan was built from, which must
    have data, device, precision and `exclude_poisoned` in common. Raises UserError where the store cannot be written.
    """
    store = Store(settings.runs)
    try:
        grants = Grants(
            asked.data, store, device=asked.device, precision=asked.precision,
            threads=using.threads, isolation=using.isolation, snapshot_every=settings.snapshot_every,
            exclude_poisoned=asked.exclude_poisoned,
        )  # fmt: skip
        with Progress(len(graph.cells), stream, live) as display:
            engine = _engine(asked.device, using, settings, display.note)
            try:
                return Matrix(graph, store, grants, engine, display, retry=settings.retry, observers=observers).run()
            finally:
                engine.close()
    finally:
        store.close()


def _engine(device: str, using: Resources, settings: Settings, say: Callable[[str], None]) -> Engine:
    if using.engine == "ray":
        return ray.Ray(
            settings.runs, settings.address, workers=using.workers, threads=using.threads, timeout=settings.timeout,
            gpus=settings.gpus if device.startswith("cuda") else 0, memory=settings.memory, say=say,
        )  # fmt: skip
    inline = using.isolation == "inline"
    return Local(using.workers or 1, settings.timeout, inline=inline, memory=settings.memory)


def opened(runs: Path, readonly: bool = False) -> Store:
    """The store of a runs folder. readonly: as of `Store`. Raises UserError where there is none."""
    if not Store.exists(runs):
        raise UserError(
            f"no results in {runs}: expected a runs folder; name it with --runs, or make one with bbmcl matrix"
        )
    return Store(runs, readonly=readonly)


def stored_rows(
    runs: Path, keep: Callable[[Row], bool] = lambda row: True, readonly: bool = False, latest: bool = False
) -> list[Row]:
    """The rows of a runs folder that `keep` admits, by name and seed: not in the order in which they were finished.

    readonly: as of `Store`. latest: without those that an edited or updated method has left behind.
    Raises UserError where there is no such folder.
    """
    store = opened(runs, readonly)
    try:
        found = list(filter(keep, store.rows()))
        return sorted(newest(found) if latest else found, key=_by_name)
    finally:
        store.close()


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of rows, the oldest first, those that can stand in one table: where a label was given two settings or versions,
    or a cell two results, those of the newest row.
    """
    settings: dict[tuple[Any, ...], Any] = {}
    kept: dict[tuple[Any, ...], Row] = {}
    for row in reversed(rows):
        block = (row.dataset, row.model, row.preset, row.budget, row.precision)
        labels = {"model": row.model, "attack": row.attack, "defense": row.defense}
        own = {(*block, name, labels.get(name, (row.attack, row.defense))): value for name, value in row.params.items()}
        cell = (*block, row.attack, row.defense, row.victim_seed, row.defense_seed, row.clean_rate)
        if cell not in kept and all(settings.get(place, value) == value for place, value in own.items()):
            settings |= own
            kept[cell] = row
    return list(kept.values())


def _by_name(row: Row) -> tuple[Any, ...]:
    undefended_first = row.defense != request.BEFORE
    cell = (row.attack, row.victim_seed, undefended_first, row.defense, row.defense_seed or 0)
    return (row.dataset, row.model, row.preset, row.budget, *cell)


def exit_status(rows: Sequence[Row]) -> int:
    """0 when every cell is ok or n/a, 1 when one failed."""
    return int(any(row.state in ("failed", "killed", "timeout", "diverged") for row in rows))


__all__ = [
    "MAX_WORKERS", "Resources", "Settings", "check", "check_data", "compute", "dry_run", "exit_status", "newest",
    "opened", "prepare_data", "registry", "resources", "run_matrix", "stored_rows", "summary",
]  # fmt: skip
