"""What a pinned matrix computed, as a file that a later run is compared with: counts of cells, bytes of stages.

A stage's key is a hash of everything that ought to decide its result (methods with their versions and parameters, data,
seeds, precision, earlier stages), so an equal key with other bytes is a drift that nobody declared. Between machine
classes or versions of libraries bytes differ anyway; there the counts of cells are compared, within tolerances.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backdoorbench_mcl import evaluate, plan, provenance, request, runner
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.registry import cache_folder
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Stage, Store

COUNTS = ("asr_k", "ba_k", "tca_k", "ftr_k", "ra_k")
KERNELS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")  # variables that choose how numbers are added up


SHARES = ("asr", "ba", "tca")  # in percent, with counts `_k` of `_n`
RUNS = "BBMCL_REGRESS_RUNS"

Recording = Mapping[str, Any]  # "made", "stages", "cells": JSON-ready


def fresh(environment: Mapping[str, str], default: Path) -> Path:
    """The runs folder of a pinned matrix: what `RUNS` names, else `default`; never one that holds anything.

    A stored stage is not computed again, so that with stored ones a comparison says nothing. Raises UserError.
    """
    runs = Path(environment.get(RUNS) or default)
    if runs.is_file() or (runs.is_dir() and any(runs.iterdir())):
        raise UserError(f"{RUNS}={runs}: expected an empty or absent folder, for what is stored would not be computed")
    return runs


def record(options: request.Options, runs: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The stages and cells of a finished run of `options` in `runs`.

    environment: of the run's processes, of which `KERNELS` are kept.
    """
    known = runner.registry()
    graph = plan.build(request.resolve(options, known, runner.prepare_data(known, cache_folder())))
    store = Store(runs)
    try:
        rows = {row.key: row for row in store.rows()}
        stages = [_stage(node, found) for node in graph.nodes.values() if (found := store.stage(node.key)) is not None]
    finally:
        store.close()
    collected = provenance.collect()
    return {
        "made": {
            **{name: collected[name] for name in ("machine_class", "processor", "versions")},
            "kernels": {name: environment[name] for name in KERNELS if name in environment},
        },
        "stages": stages,
        "cells": [_cell(cell, rows[cell.key]) for cell in graph.cells],
    }


def _stage(node: plan.Node, stage: Stage) -> dict[str, Any]:
    methods = sorted({f"{method.full_name} version {method.version}" for method in node.methods.values()})
    return {"title": node.title, "kind": node.kind, "key": node.key, "artefact": stage.artefact, "methods": methods,
            "inputs": sorted(set(node.inputs.values()))}  # fmt: skip


def _cell(cell: plan.Cell, row: Row) -> dict[str, Any]:
    counts = {name: getattr(row, name) for name in (*COUNTS, *(f"{share}_n" for share in SHARES))}
    name = f"{row.attack} {row.victim_seed} x {row.defense}" + (f" {row.defense_seed}" if cell.after else "")
    return {"cell": name, "key": cell.key, "state": row.state, "reason": row.reason, "gate": row.gate, **counts,
            "stages": [cell.before, *([cell.after] if cell.after else [])]}  # fmt: skip


def exact(old: Recording, new: Recording) -> bool:
    """Whether the two must agree bit for bit: one machine class, the same kernels, the same libraries.

    With all `KERNELS` given, processors of one maker and architecture are one class, whatever their level: measured
    with AVX2 kernels, fp32, on AMD EPYC of the first and the fourth generation (badnets and ft on `shapes`, n = 1).
    """

    def where(recording: Recording) -> Any:
        made = recording["made"]
        versions = {name: number for name, number in made["versions"].items() if name != "backdoorbench-mcl"}
        machine = made["machine_class"]
        if set(made["kernels"]) == set(KERNELS):  # what else the processor could do is not used
            machine = re.sub(r"^(x86_64|amd64)-[^/]*", r"\1", machine)
        return machine, made["kernels"], versions

    return bool(where(old) == where(new))


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
        moved = [] if _values(was) == _values(now) else [f"{_shown(was)} -> {_shown(now)}"]
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
    parted = {key for key in before if key in after and before[key]["artefact"] != after[key]["artefact"]}
    for stage in _behind(now["stages"], after):
        if stage["key"] in parted and not parted & set(stage["inputs"]):
            methods = " or ".join(stage["methods"])
            yield f"{stage['title']}: other bytes under the same key, so the version should rise of {methods}"
    if was["key"] == now["key"] and not parted and _values(was) != _values(now):
        yield f"scored otherwise under evaluator version {evaluate.EVALUATOR_VERSION}, which should rise"


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


def _values(cell: Recording) -> list[Any]:
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
    moved = [(was, now, what) for was, now in both if (what := "; ".join(_far(was, now, points)))]
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


def _far(was: Recording, now: Recording, points: Mapping[str, float]) -> Iterator[str]:
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


__all__ = ["COUNTS", "KERNELS", "RUNS", "SHARES", "Recording", "drift", "exact", "fresh", "record"]
