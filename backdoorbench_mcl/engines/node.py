"""What the engine `ray` runs on a node: the same child as the local engine, from what came with the job.

A job is refused before its child is started where this installation is not the driver's. Everything that leaves here is
a plain dict of text, numbers and bytes, and the driver believes none of it (`broker.Intake`). Free of torch.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import artefacts, caches, datacache, provenance
from ..errors import BbmclError
from ..plainfiles import PlainFile
from ..workdir import WorkFolder
from .base import Finished, Progress, named
from .local import Local

CORE = "backdoorbench_mcl"
PIECE = 32 << 20  # bytes that travel at once
FIRST = ("python", "backdoorbench-mcl", "torch")  # with every package that a job's methods come from

Message = dict[str, Any]


def wanted(spec: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What a job needs to run as it would here: versions of packages, and the code of its methods and of this package.

    Example: `{"packages": {"torch": "2.14.1", ...}, "code": {"bbmcl_defenses": "9f2c...", ...}}`
    """
    names = [str(part["name"]) for part in spec.values() if isinstance(part, dict) and "kind" in part]
    return _installed(
        tuple(sorted({name.rpartition("/")[0] for name in names} - {""})),
        tuple(sorted({where.partition(":")[0].partition(".")[0] for where in named(spec)} - {CORE})),
    )


def _installed(packages: Iterable[str], modules: Iterable[str]) -> dict[str, dict[str, str]]:
    found = {"python": platform.python_version(), **provenance.versions(packages)}
    code = {CORE: caches.own(), **{module: _code(module) for module in modules}}
    return {"packages": {name: found[name] for name in dict.fromkeys([*FIRST, *packages])}, "code": code}


@functools.cache
def _code(module: str) -> str:
    return caches.code(module, ())


def unlike(theirs: Mapping[str, Mapping[str, str]], node: str) -> str:
    """How this installation differs from what a job wants, in one line; "" where it does not."""
    ours = _installed(set(theirs["packages"]) - set(FIRST), set(theirs["code"]) - {CORE})
    for name, version in theirs["packages"].items():
        if (here := ours["packages"].get(name, "absent")) != version:
            has = f"lacks {name}" if here == "absent" else f"has {name} {here}"
            return f"node {node} {has}, the driver has {version}; install that version there and run again"
    for module, code in theirs["code"].items():
        if ours["code"].get(module) != code:
            return f"node {node} has other files of {module} than the driver; install the same there and run again"
    return ""


@functools.cache
def _origin() -> dict[str, Any]:
    return {name: value for name, value in provenance.collect().items() if name not in ("command", "time")}


def _made(device: str, packages: Iterable[str]) -> dict[str, Any]:
    """What the driver records in place of its own."""
    return {
        "machine": provenance.machine_class(device), "versions": provenance.versions(set(packages) - set(FIRST)),
        "origin": _origin(),
    }  # fmt: skip


# ---------------------------------------------------------------- the folder of a job


def _localised(spec: dict[str, Any], request: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The spec with paths of this node; None where it lacks the data set, which has to be sent along."""
    device = "cuda" if str(spec["device"]).startswith("cuda") else spec["device"]  # Ray shows a job its own GPU only
    local = {**spec, "device": device, "snapshot": _snapshot(spec["snapshot"], request, folder)}
    if not spec["readable"]:
        return local
    name, arrays = spec["data"]["hash"], Path(spec["data"]["folder"])
    if not datacache.intact(arrays, name):
        arrays = caches.cache_folder().absolute() / "arrays" / name
    if not datacache.intact(arrays, name):
        if not request["data"]:
            return None
        arrays = _received(arrays, name, request["data"])
    return {**local, "data": {**spec["data"], "folder": str(arrays)}, "readable": [str(arrays)]}


def _received(arrays: Path, name: str, data: Mapping[str, Iterable[Any]]) -> Path:
    """The data set in this node's cache; of jobs that begin together one takes it in."""
    cache = caches.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if datacache.intact(arrays, name):
            return arrays
        return datacache.receive(cache, name, {file: _pieces(refs) for file, refs in data.items()})


def _snapshot(given: str, request: Mapping[str, Any], folder: Path) -> str:
    """Where snapshots go: to the driver's runs folder if this node sees it, which a token in it tells, not its path."""
    runs = Path(request["runs"])
    try:
        shared = (runs / request["token"][0]).read_text() == request["token"][1]
    except (OSError, ValueError):
        shared = False
    inside = Path(given).is_relative_to(runs)
    return given if shared and inside and os.access(runs, os.W_OK | os.X_OK) else str(folder / "snapshots")


def _pieces(refs: Iterable[Any]) -> Iterator[bytes]:
    import ray

    for ref in refs:
        yield ray.get(ref)


def _fill(folder: Path, spec: Mapping[str, Any], files: Mapping[str, Iterable[Any]]) -> None:
    (folder / "in").mkdir()
    for name, refs in files.items():
        with (folder / "in" / name).open("wb") as file:
            file.writelines(_pieces(refs))
    (folder / "spec.json").write_text(json.dumps(spec))


def outputs(out: Path) -> Iterator[Message]:
    """The files of a result in pieces. Raises Damaged where a job left a link, or OSError."""
    artefacts.require_plain(out)
    for path in sorted([*out.glob("*.safetensors"), *out.glob(artefacts.META)]):
        with PlainFile(path, follow=False) as file:
            piece = file.read(PIECE)
            yield {"file": path.name, "part": piece}
            while len(piece) == PIECE:
                piece = file.read(PIECE)
                yield {"file": path.name, "part": piece}


# ---------------------------------------------------------------- one job


def run(request: Mapping[str, Any]) -> Iterator[Message]:
    """A job from its spec and inputs to its outputs, told in messages; one of "refused", "lacks", "ended" is the last.

    request: "spec" as JSON; "files" of its `in/` and "data", the files of the prepared data set or {}, as references to
    pieces; what is `wanted`; "runs" and "token", a file in that folder and its content; "timeout" and "memory".
    """
    import ray

    context = ray.get_runtime_context()
    node = ray.util.get_node_ip_address()
    yield {"node": context.get_node_id(), "address": node, "host": socket.gethostname(), "pid": str(os.getpid())}
    if problem := unlike(request["wanted"], node):
        yield {"refused": problem}
        return
    spec = json.loads(request["spec"])
    work = WorkFolder()
    try:
        folder = work.path / "job"
        folder.mkdir()
        local = _localised(spec, request, folder)
        if local is None:
            yield {"lacks": spec["data"]["hash"]}
            return
        yield {"made": json.dumps(_made(local["device"], request["wanted"]["packages"]))}
        _fill(folder, local, request["files"])
        yield from _child(folder, request)
    except BbmclError as error:
        yield _ended(Finished(Path(), "failed", str(error), ""))
    except OSError as error:
        why = f"{error.strerror or error}: {Path(str(error.filename or 'work folder')).name}"
        yield _ended(Finished(Path(), "failed", f"node {node}: {why}; make room there and run again", ""))
    finally:
        work.close()


def _child(folder: Path, request: Mapping[str, Any]) -> Iterator[Message]:
    ended: Finished | None = None
    raylet = os.getppid()
    with Local(1, request["timeout"], memory=request["memory"]) as engine:
        engine.start(folder)
        while ended is None:
            if os.getppid() != raylet:  # Ray lets an orphan run on, and its driver wait for it, until it next speaks
                os._exit(1)  # the child ends itself; what runs the job again shall not share its snapshots
            for event in engine.events():
                if isinstance(event, Progress):
                    yield {"progress": [event.done, event.total, event.rate]}
                else:
                    ended = event
    if ended.state == "ok":
        try:
            yield from outputs(folder / "out")
        except artefacts.Damaged as error:
            ended = Finished(folder, "failed", f"left a result of no use: {error}", ended.log)
    yield _ended(ended)


def _ended(event: Finished) -> Message:
    told = {"state": event.state, "reason": event.reason, "log": event.log}
    return {"ended": {**told, "result": json.dumps(dict(event.result))}}


__all__ = ["CORE", "PIECE", "outputs", "run", "unlike", "wanted"]
