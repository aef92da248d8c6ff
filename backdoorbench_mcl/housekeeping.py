"""What a runs folder holds, how large it is, and what of it no row needs: `bbmcl store du` and `gc`. Free of torch."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artefacts import META
from .errors import UserError
from .ledger import DATABASE, JOURNAL
from .store import Stage, Store

DAY = 86400.0
OTHER = "figures, pages and other files"


@dataclass(frozen=True)
class Item:
    """One thing in a runs folder. what: the kind of stage that made it, or what else it is; size: bytes; why: it can
    go, "" where it cannot; keys: the stages whose records go with it.
    """

    what: str
    path: Path
    size: int
    why: str = ""
    keys: tuple[str, ...] = ()


def survey(store: Store, days: float = 7.0) -> list[Item]:
    """Everything in the folder of `store`. days: what an interrupted run may go on from is kept for so long."""
    now = time.time()
    folder, stages = store.folder, store.stages()
    created = {str(key): float(when) for key, when in store.ledger.read("SELECT key, created FROM stage")}
    young = {key for key, when in created.items() if now - when < days * DAY}
    finished = {stage.key for stage in stages}
    paused = [path for path in _listed(folder / "snapshots") if path.name not in finished and not _old(path, now, days)]
    needed = {stage.artefact for stage in stages} if paused else _needed(store, stages, young)  # by what, is not known
    by_artefact: dict[str, list[Stage]] = {}
    for stage in stages:
        by_artefact.setdefault(stage.artefact, []).append(stage)
    items = []
    for path in _artefacts(folder / "artefacts"):
        users = by_artefact.get(path.name, [])
        what = users[0].kind if users else "artefacts of no stage"
        why = "" if path.name in needed or not _old(path, now, days) else "no row needs it"
        items.append(Item(what, path, _size(path), why, tuple(stage.key for stage in users) if why else ()))
    for path in sorted((folder / "artefacts").glob("tmp-*")):
        items.append(Item("half-written", path, _size(path), "unless a run is writing it"))
    for path in _listed(folder / "snapshots"):
        why = "its stage is finished" if path.name in finished else "nobody went on from it"
        items.append(Item("snapshots", path, _size(path), "" if path in paused else why))
    items += [
        Item("damaged databases", path, _size(path), "it was made again from the journal")
        for path in sorted(folder.glob(f"{DATABASE}.damaged-*"))
    ]
    items += [Item("database and journal", folder / name, _size(folder / name)) for name in (DATABASE, JOURNAL)]
    counted = {item.path for item in items} | {folder / name for name in ("artefacts", "snapshots", "locks")}
    items += [Item(OTHER, path, _size(path)) for path in sorted(folder.iterdir()) if path not in counted]
    return items


def reclaim(store: Store, days: float = 7.0) -> list[Item]:
    """Remove what `survey` says can go, and return it; the database is compacted.

    Raises UserError while another process uses the folder.
    """
    if not store.ledger.alone():
        raise UserError(
            f"{store.folder} is in use by another bbmcl, or may not be written; run this when that has ended"
        )
    gone = [item for item in survey(store, days) if item.why]
    with store.ledger.transaction() as change:  # first the records: a record without its artefact is computed again
        for key in (key for item in gone for key in item.keys):
            change.change("forget", key)
    for item in gone:
        _remove(item.path)
    store.ledger.compact()
    return gone


def _remove(path: Path) -> None:
    """A link goes itself, not what it names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def lines(items: Sequence[Item], folder: Path) -> list[str]:
    """A table of `items` by what they are, largest first, and what can go."""
    kinds: dict[str, list[Item]] = {}
    for item in items:
        kinds.setdefault(item.what, []).append(item)
    width = max(map(len, kinds), default=0)
    out = []
    for what, group in sorted(kinds.items(), key=lambda pair: -_total(pair[1])):
        idle = [item for item in group if item.why]
        can = f"  {human(_total(idle))} can go: {idle[0].why}" if idle else ""
        out.append(f"{what:{width}} {len(group):6} {human(_total(group)):>9}{can}")
    idle = [item for item in items if item.why]
    free = f"; bbmcl store gc frees {human(_total(idle))}" if idle else ""
    return [*out, f"{folder}: {human(_total(items))}{free}"]


def human(size: float) -> str:
    """Bytes in a unit that a person reads. Example: `human(2_500_000)` is "2.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _total(items: Iterable[Item]) -> int:
    return sum(item.size for item in items)


def _needed(store: Store, stages: Sequence[Stage], young: Collection[str]) -> set[str]:
    """Names of the artefacts that rows were scored from, and those of `young` stages, however far back."""
    by_key = {stage.key: stage for stage in stages}
    unseen = {key for row in store.rows() for key in row.stages.values()} & by_key.keys() | set(young)
    reached: set[str] = set()
    while unseen:
        key = unseen.pop()
        reached.add(key)
        unseen |= set(_texts(by_key[key].spec)) & by_key.keys() - reached  # a spec names the stages that it builds on
    needed = {by_key[key].artefact for key in reached}
    return needed.union(*(set(_texts(by_key[key].numerics.get("inputs", {}))) for key in reached))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _artefacts(root: Path) -> Iterator[Path]:
    """Folders of artefacts; a link that somebody put in their place is none, for what it names lies elsewhere."""
    for path in sorted(root.glob("??/*")):
        if not path.is_symlink() and not path.parent.is_symlink() and path.is_dir():
            yield path


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _old(path: Path, now: float, days: float) -> bool:
    """Whether nothing was written to a folder for `days`."""
    file = path / META
    try:
        return now - os.lstat(file if file.exists() else path).st_mtime >= days * DAY
    except FileNotFoundError:  # a run has just removed it
        return False


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as themselves."""
    if path.is_dir() and not path.is_symlink():
        return sum(_size(Path(at, name)) for at, _, names in os.walk(path) for name in names)
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:  # files come and go beside a run
        return 0


__all__ = ["Item", "human", "lines", "reclaim", "survey"]
