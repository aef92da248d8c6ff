"""The request behind a stored row, resolved by this installation; or why there is none. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cells, evaluate, params, plan, remarks, request
from .errors import UserError
from .registry import Registry
from .request import BEFORE, NOTHING, Options
from .rows import Row
from .store import Store

_KEY = 64  # characters of a stage's key, of a hash of images


@dataclass(frozen=True)
class Rebuilt:
    """A cell as it would be computed now, under the key of its stored row. asked: for this cell alone."""

    row: Row
    asked: request.Request
    cell: plan.Cell
    nodes: Mapping[str, plan.Node]


def rebuild(
    row: Row, store: Store, known: Registry, prepare: request.PrepareData, data_root: Path | None, device: str | None
) -> Rebuilt:
    """The cell of a row of `store`. device: None for the row's own.

    Raises BbmclError where this installation cannot compute that cell, with what is missing or differs.
    """
    asked = request.resolve(_options(row, store, known, data_root, device or row.device), known, prepare)
    graph = plan.build(asked)
    cell = graph.cells[0 if row.defense == BEFORE else 1]
    if cell.key != row.key:
        reasons = list(dict.fromkeys(_reasons(row, cell, store, graph)))
        raise UserError("; ".join(reasons))
    return Rebuilt(row, asked, cell, graph.nodes)


def _options(row: Row, store: Store, known: Registry, data_root: Path | None, device: str) -> Options:
    """What to type for the cell of a row. Raises UserError where a package of its methods is not installed."""
    installed = {offer.plugin.dist for offer in known.plugins.offers}
    for label, package in remarks.origins(row).items():
        if package not in installed:
            version = row.versions.get(package, "")
            raise UserError(f"package {package}{version and f' ({version} then)'}, which brings {label}, is missing")
    undefended = row.defense == BEFORE
    return Options(
        _named(row, "attack", known), NOTHING if undefended else _named(row, "defense", known), row.dataset, row.model,
        str(row.victim_seed), str(row.defense_seed or 0), 1.0 if row.clean_rate is None else row.clean_rate, row.preset,
        row.budget, row.overrides, device, row.precision, data_root, bool(row.params.get("exclude_poisoned")),
        retune=_retuned(row, store),
    )  # fmt: skip


def _named(row: Row, kind: Any, known: Registry) -> str:
    """The selection of a row, under its full name where the short one does not mean the method of that time alone."""
    label = str(getattr(row, kind))
    then = row.params.get(kind, {}).get("name")
    short = params.selection(label).name
    offers = [offer.full_name for offer in known.plugins.of(kind) if offer.entry.name == short]
    return label if then is None or "/" in short or offers == [then] else str(then) + label[len(short) :]


def _retuned(row: Row, store: Store) -> int:
    """How many triggered images a repaired model was taught beside its score, 0 for none."""
    judged = store.stage(row.stages["retuned"]) if "retuned" in row.stages else None
    tuned = None if judged is None else store.stage(judged.spec["weights"])
    return 0 if tuned is None else int(tuned.spec["images"])


def _reasons(row: Row, cell: plan.Cell, store: Store, graph: plan.Plan) -> Iterator[str]:
    """Why a cell has another key now: what its stages were hashed from, then and now; else its parameters."""
    if cell.undefined:
        yield cell.undefined
        return
    pairs = [(row.stages.get("before", ""), cell.before)]
    if cell.after is not None:
        pairs.append((row.stages.get("predict", ""), cell.after))
    if all(then == now for then, now in pairs):
        yield f"scored by another version of the evaluator, which is {evaluate.EVALUATOR_VERSION} now"
        return
    told = [line for then, now in pairs for line in _parted(then, now, store, graph)]
    if not told:
        told = [_leaf(row.params, path, *values) for path, *values in _leaves(row.params, _plain(cell.row.params))]
    yield from told or ["its stages are not stored any more, so that what differs is not known"]


def _parted(then: str, now: str, store: Store, graph: plan.Plan) -> Iterator[str]:
    """The leaves in which what two stages were hashed from differs, down to the stages that they rest on."""
    stage = store.stage(then)
    if then == now or stage is None:
        return
    for path, old, new in _leaves(stage.spec, _plain(graph.nodes[now].spec)):
        keys = isinstance(old, str) and isinstance(new, str) and new in graph.nodes
        if not keys or store.stage(old) is None:
            yield _leaf(stage.spec, path, old, new)
        else:
            yield from _parted(old, new, store, graph)


def _plain(spec: Mapping[str, Any]) -> Any:
    """As it is read back from a store."""
    return json.loads(cells.canonical(spec))


def _leaves(then: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in sorted({*then, *now}):
            yield from _leaves(then.get(name), now.get(name), (*path, name))
    elif then != now:
        yield path, then, now


def _leaf(spec: Mapping[str, Any], path: tuple[str, ...], then: Any, now: Any) -> str:
    """Example: `backdoorbench-mcl/ft version 1 -> 2`"""
    holder: Any = spec
    who = path[0]
    for name in path[:-1]:
        holder = holder.get(name) or {}
        who = str(holder.get("name", who)) if isinstance(holder, Mapping) else who
    what = ".".join(name for name in path[1:] if name not in ("params", "name"))
    return f"{f'{who} {what}'.rstrip()} {_short(then)} -> {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == _KEY:
        return value[:12]
    return "unset" if value is None else params.typed(value)


__all__ = ["Rebuilt", "rebuild"]
