"""The user's cache folder, and replies of children kept in it. Free of torch."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import platformdirs


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`BBMCL_CACHE`, or the user's cache folder: descriptions and prepared data sets, all of it rebuildable."""
    given = environ.get("BBMCL_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("bbmcl", appauthor=False))


def key(value: Any) -> str:
    """SHA-256 (hex) of `value` as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code(module: str, contracts: Iterable[str]) -> str:
    """SHA-256 (hex) over the Python, the files of the module's top-level package and some files of this one.

    `"absent"` where there is no such package.
    """
    top = module.partition(".")[0]
    files = [Path(__file__).with_name(name) for name in contracts]
    spec = _spec(top)
    if spec is None:
        return "absent"
    if top != __package__:
        for folder in spec.submodule_search_locations or ():
            files.extend(sorted(Path(folder).rglob("*.py")))
        if spec.has_location and spec.origin and not spec.submodule_search_locations:
            files.append(Path(spec.origin))
    digest = hashlib.sha256(sys.version.encode())
    for file in files:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@functools.cache
def own() -> str:
    """SHA-256 (hex) over all Python files of this package: equal ones run a job in the same way."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def source(module: str) -> Path | None:
    """The file of a module, found without importing anything; None where it cannot be told."""
    top, _, rest = module.partition(".")
    spec = _spec(top)
    if spec is None:
        return None
    inside = [Path(folder, *rest.split(".")) for folder in spec.submodule_search_locations or () if rest]
    found: Iterable[Path] = (p for path in inside for p in (path.with_suffix(".py"), path / "__init__.py"))
    return next((path for path in found if path.exists()), Path(spec.origin) if spec.origin else None)


def _spec(top: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):  # no name of a module
        return None


def beside(module: str, before: Iterable[str]) -> dict[str, str]:
    """Path -> SHA-256 of the files of modules that this process has imported since `before` (names), which `code` does
    not see: those outside the module's own top-level package. What is installed is told by its version, and left out.
    """
    tops = {module.partition(".")[0], __package__}
    known = set(before)
    found: dict[str, str] = {}
    for name, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None)
        if name in known or name.partition(".")[0] in tops or not str(file).endswith(".py"):
            continue
        if not {"site-packages", "dist-packages"} & set(Path(str(file)).parts) and not _standard(name):
            found[str(file)] = _hash(str(file))
    return found


def _standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _hash(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:  # gone: whoever kept it must ask again
        return ""


def read(file: Path) -> dict[str, Any] | None:
    """A reply that was kept, None where there is none or where a file beside it has changed."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # absent or damaged: ask again
        return None
    if not (isinstance(found, dict) and "ok" in found):
        return None
    return found if all(_hash(path) == known for path, known in found.get("beside", {}).items()) else None


def write(file: Path, reply: Mapping[str, Any]) -> None:
    """Keep a reply. A read-only cache costs seconds a run, not the run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f"{file.name}.{os.getpid()}")
        scratch.write_text(json.dumps(reply))
        scratch.replace(file)
    except OSError:
        return


__all__ = ["beside", "cache_folder", "code", "key", "own", "read", "source", "write"]
