"""Move results between machines: stages, rows and artefacts of a store as one tar file. Free of torch.

A stranger's archive is data: names are matched against what an archive may hold, sizes are bounded, every
artefact must have the content that its name says, and nothing is written before that was checked.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import artefacts
from .artefacts import Damaged
from .errors import UserError
from .plainfiles import PlainFile
from .rows import FINAL_STATES, Row
from .store import Stage, Store
from .text import one_line

INDEX = "bbmcl-archive.json"
FORMAT = 1
_MEMBER = re.compile(r"artefacts/[0-9a-f]{64}/(?:[a-z0-9-]+\.safetensors|meta\.json)")
_KEY = re.compile(r"[0-9a-f]{64}")
_LARGEST = 16 << 30
_INDEX_LARGEST = 256 << 20


def export(store: Store, file: Path, kinds: Collection[str] | None = None) -> tuple[int, int]:
    """Write the stages of `kinds` (by default all) and every row of `store` to `file`; returns their numbers.

    Raises UserError if that fails. Example: `export(store, file, ("surrogate", "train"))` shares victims, a megabyte
    each where a whole cell has the stamped test images.
    """
    stages, rows = [s for s in store.stages() if kinds is None or s.kind in kinds], store.rows()
    index = {"format": FORMAT, "stages": [asdict(s) for s in stages], "rows": [r.as_dict() for r in rows]}
    scratch = file.with_name(file.name + ".part")
    try:
        with tarfile.open(scratch, "w") as tar:
            content = json.dumps(index, sort_keys=True).encode()
            info = tarfile.TarInfo(INDEX)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            for name in sorted({stage.artefact for stage in stages}):
                for path in sorted(store.artefacts.open(name).iterdir()):
                    tar.add(path, f"artefacts/{name}/{path.name}", filter=_anonymous)
        scratch.replace(file)
    except Damaged as damage:
        raise UserError(f"not exported: {damage}; run the same matrix again, it computes what is damaged") from damage
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        scratch.unlink(missing_ok=True)
    return len(stages), len(rows)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    return info


def load(store: Store, file: Path) -> tuple[int, int]:
    """Add what `file` holds and `store` lacks; returns how many stages and rows were new.

    Raises UserError, and changes nothing, for a file that is no archive or whose content is not what it says.
    """
    with tempfile.TemporaryDirectory(prefix="bbmcl-import-") as scratch:
        try:
            with PlainFile(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                index = _unpack(tar, Path(scratch))
            stages = [_stage(item) for item in index["stages"]]
            rows = [Row.from_dict(item) for item in index["rows"]]
            json.dumps([*map(asdict, stages), *(row.as_dict() for row in rows)], allow_nan=False)  # or it is not stored
            for name in {stage.artefact for stage in stages}:
                artefacts.require_plain(Path(scratch, "artefacts", name))
                if artefacts.identify(Path(scratch, "artefacts", name)) != name:
                    raise UserError(f"{file}: artefact {name[:12]} is not what its name says; nothing was imported")
        except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, RecursionError, Damaged) as error:
            why = one_line(str(error), 300)
            raise UserError(f"{file} is no bbmcl archive that can be read: {why}; nothing was imported") from error
        known = {stage.key for stage in store.stages()}
        fresh = [stage for stage in stages if stage.key not in known]
        for stage in fresh:
            store.commit(stage, Path(scratch, "artefacts", stage.artefact))
        new_rows = [row for row in rows if _adds(row, store.row(row.key))]
        for row in new_rows:
            store.put_row(row)
    return len(fresh), len(new_rows)


def _adds(row: Row, stored: Row | None) -> bool:
    """A result takes the place of a failure, never the other way round."""
    return stored is None or (stored.state not in FINAL_STATES and row.state in FINAL_STATES)


def _unpack(tar: tarfile.TarFile, folder: Path) -> dict[str, Any]:
    index: dict[str, Any] | None = None
    for member in tar:
        most = _INDEX_LARGEST if member.name == INDEX else _LARGEST
        # a sparse file of a few bytes may be as large as it likes once it is unpacked
        plain = member.isreg() and not member.issparse() and member.size <= most
        source = tar.extractfile(member) if plain else None
        if source is None:
            raise ValueError(f"member {member.name[:80]!r} is no ordinary file of a sensible size")
        if member.name == INDEX and index is None:
            index = json.load(source)
            continue
        if not _MEMBER.fullmatch(member.name):
            raise ValueError(f"member {member.name[:80]!r} does not belong into an archive")
        target = folder / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:  # a name given twice is refused: who looks elsewhere may see the other file
            shutil.copyfileobj(source, out)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"it holds no {INDEX} of format {FORMAT}")
    if not all(isinstance(index[name], list) for name in ("stages", "rows")):
        raise ValueError(f"{INDEX} has no lists of stages and rows")
    return index


def _stage(item: Any) -> Stage:
    stage = Stage.from_dict(item)
    if not (_KEY.fullmatch(stage.key) and _KEY.fullmatch(stage.artefact)):
        raise ValueError(f"stage key {stage.key[:80]!r} or its artefact is no SHA-256")
    return stage


__all__ = ["export", "load"]
