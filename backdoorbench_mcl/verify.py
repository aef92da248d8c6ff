"""Whether a number can be had again: stored cells are computed anew, elsewhere, and compared. Free of torch.

Nothing is written to the runs folder that is verified. Bit-identity is promised for one machine class, set of library
versions, precision and threads per job; what was made under others is compared within `recording.POINTS`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.numpy import load_file

from . import evaluate, plan, provenance, recording, runner
from .artefacts import Damaged
from .errors import BbmclError, UserError
from .rebuilt import Rebuilt, rebuild
from .registry import cache_folder
from .rows import Row
from .runner import Resources, Settings
from .store import Stage, Store
from .text import one_line
from .workdir import WorkFolder

SAMPLE = 3
REUSED = ("surrogate", "train")  # the kinds of stages behind a victim: most of the seconds of a cell
LIBRARIES = ("python", *provenance.DISTRIBUTIONS)  # whose versions decide bits; a method's own version is in its key
BESIDE = (  # what a row has from stages beside its predictions
    "retuned_asr", "retuned_ftr", "retuned_ba", "inverter_success", "inverter_l1", "inverter_pixels_changed",
    "inverter_steps", "verdict", "clean_poisoned",
)  # fmt: skip
_TOLD = 4  # numbers of a row that are named where they are not what its predictions say

Verdict = Literal["identical", "same counts", "within tolerance", "different", "not run"]
GOOD: tuple[Verdict, ...] = ("identical", "same counts", "within tolerance")


@dataclass(frozen=True)
class Finding:
    """What became of one cell. text: the same in words; parted: titles of the earliest stages with other bytes; since:
    what of machine, libraries, threads, packages and commit is not as it was, where bytes differ.
    """

    key: str
    cell: str
    verdict: Verdict
    text: str
    parted: tuple[str, ...] = ()
    since: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether the number was had again, as far as that was promised."""
        return self.verdict in GOOD


@dataclass(frozen=True)
class Choice:
    """Which cells, and how they are computed. sample: None for all; reuse: victims are copied, not computed; device:
    None for that of each row.
    """

    sample: int | None = SAMPLE
    seed: int = 0
    reuse: bool = False
    data_root: Path | None = None
    device: str | None = None


def verify(
    settings: Settings, choice: Choice, announce: Callable[[str], None] = lambda line: None, live: bool | None = None
) -> list[Finding]:
    """Compute cells of `settings.runs` again in a temporary folder; one finding each, by name and seed.

    threads None: as many as each row was computed with. Raises UserError where there is nothing to verify.
    """
    runner.check(settings)
    if choice.sample is not None and choice.sample < 1:
        raise UserError(f"--sample {choice.sample}: expected a number of cells from 1 on, or --all")
    finished = runner.stored_rows(settings.runs, lambda row: row.state == "ok", readonly=True)
    if not finished:
        raise UserError(f"{settings.runs}: no finished cell to verify; make some with bbmcl matrix")
    drawn = finished if choice.sample is None else draw(finished, choice.sample, choice.seed)
    how = "all" if choice.sample is None else f"drawn with --seed {choice.seed}"
    announce(f"verifying {len(drawn)} of {len(finished)} finished cells of {settings.runs} ({how})")
    store = Store(settings.runs, readonly=True)
    work = WorkFolder()
    try:
        found = {finding.key: finding for finding in _verify(drawn, store, work.path, settings, choice, announce, live)}
    finally:
        work.close()
        store.close()
    return [found[row.key] for row in drawn]


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` of `rows`, or all, in their order: those whose attack and defense were drawn least come first.

    Example: three of a grid of 3 x 3 defended cells share neither attack nor defense.
    """
    waiting = random.Random(seed).sample(rows, len(rows))  # noqa: S311 (a draw that can be had again)
    drawn: list[Row] = []
    used: Counter[tuple[str, str]] = Counter()
    while waiting and len(drawn) < count:
        best = min(waiting, key=lambda row: used["attack", row.attack] + used["defense", row.defense])
        waiting.remove(best)
        drawn.append(best)
        used.update([("attack", best.attack), ("defense", best.defense)])
    chosen = {row.key for row in drawn}
    return [row for row in rows if row.key in chosen]


def status(findings: Sequence[Finding]) -> int:
    """0 where every cell that could be computed was had again, 1 where one was not or none could be computed."""
    run = [finding for finding in findings if finding.verdict != "not run"]
    return int(not run or not all(finding.good for finding in run))


def summary(findings: Sequence[Finding]) -> str:
    """Example: `3 cells: 2 identical, 1 not run`"""
    counts = Counter(finding.verdict for finding in findings)
    parts = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return f"{len(findings)} cell{'s' if len(findings) > 1 else ''}: {parts}"


def as_dict(finding: Finding) -> dict[str, Any]:
    """JSON-ready."""
    return {**asdict(finding), "good": finding.good, "parted": list(finding.parted), "since": list(finding.since)}


def _verify(
    rows: Sequence[Row], store: Store, folder: Path, settings: Settings, choice: Choice,
    announce: Callable[[str], None], live: bool | None,
) -> Iterator[Finding]:  # fmt: skip
    known = runner.registry(announce)
    for problem in known.plugins.problems:
        announce(one_line(str(problem)))
    prepare = runner.prepare_data(known, cache_folder())
    groups: dict[tuple[Any, ...], list[Rebuilt]] = {}
    for row in rows:
        try:
            one = rebuild(row, store, known, prepare, choice.data_root, choice.device)
        except BbmclError as error:
            yield Finding(row.key, _name(row), "not run", f"cannot be re-run: {error}")
            continue
        asked, using = one.asked, _resources(settings, row, one.asked.device)
        alike = (asked.data.folder, asked.device, asked.precision, asked.exclude_poisoned, using)
        groups.setdefault(alike, []).append(one)
    for number, ((*_, using), cells) in enumerate(groups.items()):
        # a folder each: victims of other threads are other victims
        yield from _compared(cells, store, replace(settings, runs=folder / f"runs-{number}"), using, choice, live)


def _name(row: Row) -> str:
    rate = "" if row.clean_rate is None else f", {100 * row.clean_rate:g} % clean"
    return f"{recording.cell_name(row)} ({row.dataset}, {row.model}{rate})"


def _resources(settings: Settings, row: Row, device: str) -> Resources:
    """Threads as the row has them; as many workers as that leaves room for on this machine."""
    threads, workers = settings.threads or row.threads, settings.workers
    if workers is None and threads is not None and settings.engine == "local" and not device.startswith("cuda"):
        workers = max(1, min(provenance.cores() // threads, runner.MAX_WORKERS))
    return runner.resources(replace(settings, threads=threads, workers=workers), device)


def _compared(
    group: Sequence[Rebuilt], store: Store, settings: Settings, using: Resources, choice: Choice, live: bool | None
) -> Iterator[Finding]:
    """Compute the cells of requests that have data, device and the like in common, and compare them."""
    nodes = {key: node for one in group for key, node in one.nodes.items()}
    graph = plan.Plan(nodes, [one.cell for one in group])
    if choice.reuse:
        _copy_victims(store, settings.runs, nodes)
    rows = runner.compute(graph, group[0].asked, using, settings, live=live)
    fresh = Store(settings.runs, readonly=True)
    try:
        for one, row in zip(group, rows, strict=True):
            yield _finding(one, row, store, fresh)
    finally:
        fresh.close()


def _copy_victims(store: Store, runs: Path, nodes: Mapping[str, plan.Node]) -> None:
    into = Store(runs)
    try:
        for key, node in nodes.items():
            stage = store.stage(key) if node.kind in REUSED else None
            if stage is None:
                continue
            try:
                into.commit(stage, store.open(stage))
            except Damaged:  # told of its cells; computed like one that is not stored
                continue
    finally:
        into.close()


# ---------------------------------------------------------------- one cell


def _finding(one: Rebuilt, row: Row, store: Store, fresh: Store) -> Finding:
    """Stored cell against the same one computed again."""
    then, now = _stages(one, store), _stages(one, fresh)
    before, after = ({key: recording.of_stage(one.nodes[key], stage) for key, stage in s.items()} for s in (then, now))
    was, became = recording.of_cell(one.cell, one.row), recording.of_cell(one.cell, row)
    wrong = [*_damaged(one, then, store), *_misread(one, then, store)]
    moved, apart = list(recording.moved(was, became)), list(recording.far(was, became, recording.POINTS))
    first = [stage["key"] for stage in recording.parted(became, before, after)]
    gone = len(now.keys() - then.keys())
    if not first and not gone:  # all bytes are the same, and so must be what was read from them
        wrong += [
            f"{name} {was_there} -> {is_there}" for name in BESIDE
            if (was_there := getattr(one.row, name)) != (is_there := getattr(row, name)) and was_there not in (None, "")
        ]  # fmt: skip
    unlike = {key: list(_arrows(_circumstances(then[key]), _circumstances(now[key]))) for key in first}
    # other bytes made of what was there before are a difference; made elsewhere, or of what nobody knows, they are none
    unknown = {key for key in first if not then.keys() >= set(one.nodes[key].inputs.values())}
    excused = bool(first or gone) and all(unlike[key] or key in unknown for key in first)
    since = tuple(dict.fromkeys(line for key in first for line in (*unlike[key], *_newer(then[key], now[key]))))
    titles = tuple(one.nodes[key].title for key in first)

    verdict: Verdict
    if wrong or (moved and (apart or not excused)):
        verdict, text = "different", f"differs: {', '.join([*wrong, *moved])}"
    elif moved:
        verdict, text = "within tolerance", f"within tolerance: {', '.join(moved)}"
    elif first or gone:
        verdict, text = "same counts" if excused else "different", "same counts"
    else:
        verdict, text = "identical", "bit for bit"
    parts = [text]
    if titles:
        parts.append(f"other bytes from {' and '.join(titles)} on")
    if gone:
        parts.append(f"{gone} of its stages are not stored any more, so where they were made is not known")
    if since:
        parts.append(f"{'as expected after' if verdict != 'different' else 'since then'} {', '.join(since)}")
    elif titles:
        parts.append("machine class, libraries and threads are as they were")
    return Finding(one.row.key, _name(one.row), verdict, "; ".join(parts), titles, since)


def _stages(one: Rebuilt, store: Store) -> dict[str, Stage]:
    """The stages behind a cell, as a store has them."""
    waiting = [one.cell.before, *filter(None, [one.cell.after]), *one.cell.extras.values()]
    behind: dict[str, Stage | None] = {}
    while waiting:
        key = waiting.pop()
        if key not in behind:
            behind[key] = store.stage(key)
            waiting += one.nodes[key].inputs.values()
    return {key: stage for key, stage in behind.items() if stage is not None}


def _circumstances(stage: Stage) -> dict[str, Any]:
    """Under which equal ones equal bits are promised."""
    made = stage.numerics
    versions = {name: number for name, number in made.get("versions", {}).items() if name in LIBRARIES}
    found = recording.where({"machine_class": made.get("machine", "unknown"), "versions": versions,
                             "kernels": made.get("origin", {}).get("kernels", {})})  # fmt: skip
    return {**found, "threads": made.get("threads")}


def _newer(then: Stage, now: Stage) -> Iterator[str]:
    """What else is new: packages that bring methods, and the commit of this one. It excuses nothing."""
    packages = [{name: number for name, number in stage.numerics.get("versions", {}).items() if name not in LIBRARIES}
                for stage in (then, now)]  # fmt: skip
    yield from _arrows(*packages)
    old, new = ((stage.numerics.get("origin", {}).get("git") or {}).get("commit", "") for stage in (then, now))
    if old and new and old != new:
        yield f"commit {old[:12]} -> {new[:12]}"


def _arrows(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            yield f"{name} {_said(then.get(name))} -> {_said(now.get(name))}"


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={text}" for name, text in value.items()) or "none"
    return "unknown" if value is None else str(value)


def _damaged(one: Rebuilt, stages: Mapping[str, Stage], store: Store) -> Iterator[str]:
    for key, stage in stages.items():
        try:
            store.open(stage)
        except Damaged as damage:
            yield f"what is stored of {one.nodes[key].title} is damaged ({damage})"


def _misread(one: Rebuilt, stages: Mapping[str, Stage], store: Store) -> Iterator[str]:
    """Numbers of the stored row that its own stored predictions do not give."""
    keys = [one.cell.before, one.cell.after or one.cell.before]
    if not stages.keys() >= set(keys):
        return
    try:
        folders = [store.open(stages[key]) for key in keys]
        before, after = (evaluate.predicted(load_file(folder / "predictions.safetensors")) for folder in folders)
    except Damaged:  # told already
        return
    except (BbmclError, KeyError, OSError, ValueError) as error:
        yield f"its stored predictions cannot be scored ({one_line(str(error))})"
        return
    wanted = {**after, **{f"{name}_before": before[name] for name in ("asr", "ba", "tca", "ftr")}}
    if one.cell.after is not None:
        der = evaluate.der(before["asr"], after["asr"], before["ba"], after["ba"])
        wanted["der"] = der
    found = {name: getattr(one.row, name) for name in wanted}
    wrong = [name for name in wanted if found[name] != wanted[name]
             and (found[name] is not None or not name.endswith("_before"))]  # fmt: skip
    for name in wrong[:_TOLD]:
        yield f"{name} {found[name]} in the row, {wanted[name]} by its stored predictions"
    if len(wrong) > _TOLD:
        yield f"and {len(wrong) - _TOLD} more of its numbers"


__all__ = [
    "GOOD", "LIBRARIES", "SAMPLE", "Choice", "Finding", "Verdict", "as_dict", "draw", "status", "summary", "verify",
]  # fmt: skip
