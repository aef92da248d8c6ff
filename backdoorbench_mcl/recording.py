"""What cells came to, in a form that a later computation is compared with: counts of cells, bytes of stages.

`bbmcl verify` compares stored cells, `tox -e regress` those of a pinned matrix with a file. Free of torch.

A stage's key is a hash of everything that ought to decide its result (methods with their versions and parameters, data,
seeds, precision, earlier stages), so an equal key with other bytes is a drift that nobody declared. Between machine
classes or versions of libraries bytes differ anyway; there the counts of cells are compared, within tolerances.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import evaluate, plan, provenance, request, runner
from .registry import DIST, cache_folder
from .rows import Row
from .store import Stage, Store

COUNTS = ("asr_k", "ba_k", "tca_k", "ftr_k", "ra_k")
SHARES = ("asr", "ba", "tca")  # in percent, with counts `_k` of `_n`
# by how many points another machine class may move a share; TCA of the regression matrix is of 100 images
POINTS: Mapping[str, float] = {"asr": 10.0, "ba": 5.0, "tca": 15.0}

Recording = Mapping[str, Any]  # "made", "stages", "cells": JSON-ready


def record(options: request.Options, runs: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The stages and cells of a finished run of `options` in `runs`.

    environment: of the run's processes, of which `provenance.KERNELS` are kept.
    """
    known = runner.registry()
    graph = plan.build(request.resolve(options, known, runner.prepare_data(known, cache_folder())))
    store = Store(runs)
    try:
        rows = {row.key: row for row in store.rows()}
        stages = [
            of_stage(node, found) for node in graph.nodes.values() if (found := store.stage(node.key)) is not None
        ]
    finally:
        store.close()
    collected = provenance.collect()
    return {
        "made": {
            **{name: collected[name] for name in ("machine_class", "processor", "versions")},
            "kernels": provenance.kernels(environment),
        },
        "stages": stages,
        "cells": [of_cell(cell, rows[cell.key]) for cell in graph.cells],
    }


def of_stage(node: plan.Node, stage: Stage) -> dict[str, Any]:
    """A finished stage: what it is, what it was made from, the name of what it made."""
    methods = sorted({f"{method.full_name} version {method.version}" for method in node.methods.values()})
    return {"title": node.title, "kind": node.kind, "key": node.key, "artefact": stage.artefact, "methods": methods,
            "inputs": sorted(set(node.inputs.values()))}  # fmt: skip


def of_cell(cell: plan.Cell, row: Row) -> dict[str, Any]:
    """A finished cell: its counts, and the stages that it and what stands beside its score rest on."""
    counts = {name: getattr(row, name) for name in (*COUNTS, *(f"{share}_n" for share in SHARES))}
    kept = {name: getattr(row, name) for name in ("state", "reason", "gate")}
    return {"cell": cell_name(row), "key": cell.key, **kept, **counts,
            "stages": [cell.before, *([cell.after] if cell.after else []), *cell.extras.values()]}  # fmt: skip


def cell_name(row: Row) -> str:
    """Example: `badnets 0 x ft 0`"""
    draw = "" if row.defense_seed is None else f" {row.defense_seed}"
    return f"{row.attack} {row.victim_seed} x {row.defense}{draw}"


def where(made: Recording) -> dict[str, Any]:
    """What decides the last bits: machine class, kernels, libraries; equal ones must agree bit for bit.

    made: "machine_class", "kernels" and "versions". With all `provenance.KERNELS` given, processors of one maker and
    architecture are one class, whatever their level: measured with AVX2 kernels, fp32, on AMD EPYC of the first and the
    fourth generation (badnets and ft on `shapes`, n = 1).
    """
    machine = made["machine_class"]
    if set(made["kernels"]) == set(provenance.KERNELS):  # what else the processor could do is not used
        machine = re.sub(r"^(x86_64|amd64)-[^/]*", r"\1", machine)
    libraries = {library: number for library, number in made["versions"].items() if library != DIST}
    return {"machine": machine, "kernels": made["kernels"], **libraries}


def exact(old: Recording, new: Recording) -> bool:
    """Whether the two must agree bit for bit."""
    return where(old["made"]) == where(new["made"])


def drift(old: Recording, new: Recording, points: Mapping[str, float]) -> list[str]:
    """One line for each thing that is not as recorded; none is what one hopes for.

    points: by how many each of `SHARES` may differ where the recordings are not `exact`.
    """
    names = {cell["cell"]: cell for cell in new["cells"]}
    lines = [f"{cell['cell']}: recorded, and no longer a cell" for cell in old["cells"] if cell["cell"] not in names]
    recorded = {cell["cell"]: cell for cell in old["cells"]}
    lines += [f"{name}: a cell, and not recorded" for name in names if name not in recorded]
    both = [(cell, names[cell["cell"]]) for cell in old["cells"] if cell["cell"] in names]
    before, after = _by_key(old), _by_key(new)
    if not exact(old, new):
        return lines + _far_apart(both, before, after, points)
    for was, now in both:
        moved = [] if values(was) == values(now) else [f"{_shown(was)} -> {_shown(now)}"]
        causes = list(_causes(was, now, before, after))
        if causes or moved:
            lines.append(f"{was['cell']}: {'; '.join([*(moved or ['the same counts']), *causes])}")
    return lines


def _by_key(recording: Recording) -> dict[str, Mapping[str, Any]]:
    return {stage["key"]: stage for stage in recording["stages"]}


def _causes(
    was: Recording, now: Recording, before: Mapping[str, Recording], after: Mapping[str, Recording]
) -> Iterator[str]:
    """The earliest stages behind a cell in which two recordings part."""
    if was["stages"] != now["stages"]:
        yield from _declared(was, now, before, after)
        return
    if was["key"] != now["key"]:
        yield f"scored otherwise (evaluator version {evaluate.EVALUATOR_VERSION}): record the baseline again"
    first = parted(now, before, after)
    for stage in first:
        methods = " or ".join(stage["methods"])
        yield f"{stage['title']}: other bytes under the same key, so the version should rise of {methods}"
    if was["key"] == now["key"] and not first and values(was) != values(now):
        yield f"scored otherwise under evaluator version {evaluate.EVALUATOR_VERSION}, which should rise"


def parted(cell: Recording, before: Mapping[str, Recording], after: Mapping[str, Recording]) -> list[Recording]:
    """The earliest stages behind a cell that have other bytes under the same key. before, after: stages by key."""
    other = {key for key in before if key in after and before[key]["artefact"] != after[key]["artefact"]}
    behind = _behind(cell["stages"], after)
    return [stage for stage in behind if stage["key"] in other and not other & set(stage["inputs"])]


def _declared(
    was: Recording, now: Recording, before: Mapping[str, Recording], after: Mapping[str, Recording]
) -> Iterator[str]:
    """The earliest stages behind a cell that have other keys than the recorded ones."""
    titles = {stage["title"]: stage for stage in _behind(was["stages"], before)}
    for stage in _behind(now["stages"], after):
        earlier = titles.get(stage["title"])
        if stage["key"] in before or any(key not in before for key in stage["inputs"]):
            continue
        versions = "versions as before, so parameters, seeds or data moved"
        if earlier is None:
            versions = "a stage that was not there"
        elif earlier["methods"] != stage["methods"]:
            versions = f"{', '.join(earlier['methods'])} -> {', '.join(stage['methods'])}"
        yield f"{stage['title']}: declared by its key ({versions}): record the baseline again"


def _behind(keys: list[str], stages: Mapping[str, Recording]) -> list[Recording]:
    """The stages of a cell, the earliest first."""
    out: dict[str, Recording] = {}

    def visit(key: str) -> None:
        if key in stages and key not in out:
            for other in stages[key]["inputs"]:
                visit(other)
            out[key] = stages[key]

    for key in keys:
        visit(key)
    return list(out.values())


def values(cell: Recording) -> list[Any]:
    """What two computations of a cell must agree in."""
    return [cell[name] for name in ("state", "reason", "gate", *COUNTS)]


def _percent(cell: Recording, name: str) -> float | None:
    count, total = cell[f"{name}_k"], cell[f"{name}_n"]
    return None if count is None or not total else 100 * count / total


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _shown(cell: Recording) -> str:
    if cell["state"] != "ok":
        return f"{cell['state']} ({cell['reason']})"
    others = " ".join(f"{name}={cell[name]}" for name in COUNTS[2:])
    return f"ASR {_text(_percent(cell, 'asr'))} BA {_text(_percent(cell, 'ba'))} {others}"


def _far_apart(
    both: list[tuple[Recording, Recording]], before: Mapping[str, Recording], after: Mapping[str, Recording],
    points: Mapping[str, float],
) -> list[str]:  # fmt: skip
    """A line for each cell that differs by more than another machine class explains, with what may be its cause."""
    moved = [(was, now, what) for was, now in both if (what := "; ".join(far(was, now, points)))]
    victims = {now["stages"][0] for _, now, _ in moved if len(now["stages"]) == 1}  # those that moved themselves
    lines = []
    for was, now, what in moved:
        causes = list(_declared(was, now, before, after)) if was["stages"] != now["stages"] else []
        if not causes:
            victim = _behind(now["stages"][:1], after)
            own = (
                victim if now["stages"][0] in victims else [s for s in _behind(now["stages"], after) if s not in victim]
            )
            methods = " or ".join(sorted({method for stage in own for method in stage["methods"]}))
            causes = [f"if this is no rounding, the version should rise of {methods}"]
        lines.append("; ".join([f"{was['cell']}: {what}", *causes]))
    return lines


def far(was: Recording, now: Recording, points: Mapping[str, float]) -> Iterator[str]:
    """What differs by more than another machine class explains."""
    if was["state"] != now["state"]:
        yield f"{_shown(was)} -> {_shown(now)}"
        return
    if was["gate"] != now["gate"]:
        yield f"gate {was['gate']!r} -> {now['gate']!r}"
    for name in SHARES:
        old, new = _percent(was, name), _percent(now, name)
        if (old is None) != (new is None):
            yield f"{name.upper()} {_text(old)} -> {_text(new)}"
        elif old is not None and new is not None and abs(old - new) > points[name]:
            yield f"{name.upper()} {old:.2f} -> {new:.2f}, more than {points[name]:g} points apart"


def moved(was: Recording, now: Recording) -> Iterator[str]:
    """What differs between two computations of a cell, however little. Example: `ASR 3.21 -> 3.40`"""
    if was["state"] != now["state"]:
        yield f"{was['state']} -> {_shown(now)}"
        return
    if was["gate"] != now["gate"]:
        yield f"gate {was['gate']!r} -> {now['gate']!r}"
    for count in COUNTS:
        share = count.removesuffix("_k")
        if was[count] != now[count] and share in SHARES:
            yield f"{share.upper()} {_text(_percent(was, share))} -> {_text(_percent(now, share))}"
        elif was[count] != now[count]:
            yield f"{count} {was[count]} -> {now[count]}"


__all__ = [
    "COUNTS", "POINTS", "SHARES", "Recording", "cell_name", "drift", "exact", "far", "moved", "of_cell", "of_stage",
    "parted", "record", "values", "where",
]  # fmt: skip
