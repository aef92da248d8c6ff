"""Modules of the working directory that a function of the user's rests on: found by reading them, not by importing.

A job may read the files that it was granted, and those of a user's network are what its module imports from the folder
beside it, directly or by way of another. What a function imports by a name made up at run time is not seen. Free of
torch.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from . import caches


def modules(module: str, folder: Path) -> dict[str, ModuleSpec]:
    """The top-level modules in `folder` that `module` rests on, its own first; none where that lies elsewhere.

    They win over installed modules of their name, but for the standard library's; a folder without `__init__.py` does
    not. Example: `list(modules("nets.small", Path.cwd()))` is `["nets", "layers"]`
    """
    found: dict[str, ModuleSpec] = {}
    waiting = [module.partition(".")[0]]
    while waiting:
        name = waiting.pop(0)
        spec = None if name in found else _spec(name, folder)
        if spec is not None:
            found[name] = spec
            waiting += sorted({top for file in _python(spec) for top in _imports(file)})
    return found


def _spec(name: str, folder: Path) -> ModuleSpec | None:
    """By the names of files alone: Python's own search keeps what it saw, and lists folders that a job may not list."""
    place = folder / name
    if name in sys.stdlib_module_names:
        return None
    if (place / "__init__.py").is_file():
        return spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
    if (file := folder / f"{name}.py").is_file():
        return spec_from_file_location(name, file)
    if place.is_dir() and caches.source(name) is None:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(place)]
        return spec
    return None


def _python(spec: ModuleSpec) -> list[Path]:
    """The Python files of a top-level module, the packages below it included."""
    if spec.submodule_search_locations is None:
        return [Path(str(spec.origin))]
    return sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.py"))


def _imports(file: Path) -> set[str]:
    """The top-level modules that a file names; none where it is no Python: importing it will say so."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def digest(module: str, folder: Path) -> str:
    """SHA-256 (hex) over the Python files that `module` rests on in `folder`, or of the installed package that it is
    in; "" where there is no such module.
    """
    found = modules(module, folder)
    files = [file for spec in found.values() for file in _python(spec)]
    if not found:
        source = caches.source(module)
        top = caches.source(module.partition(".")[0])
        inside = top is not None and top.name == "__init__.py"
        files = sorted(top.parent.rglob("*.py")) if top and inside else [source] if source else []
    if not files:
        return ""
    content = hashlib.sha256()
    for file in files:
        content.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return content.hexdigest()


class Finder(MetaPathFinder):
    """Imports modules from where they were found, without a look at the folder that they lie in."""

    def __init__(self, found: Mapping[str, ModuleSpec]) -> None:
        self.found = found

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return self.found.get(name)


def reach(module: str, folder: Path) -> list[Path]:
    """Make what `module` rests on in `folder` importable in this process, before all else of those names.

    Returns the files, and the folders of packages, that importing it will read.
    """
    found = modules(module, folder)
    sys.meta_path.insert(0, Finder(found))
    return [Path(place) for spec in found.values() for place in spec.submodule_search_locations or [str(spec.origin)]]


__all__ = ["Finder", "digest", "modules", "reach"]
