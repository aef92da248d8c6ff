"""Lets a job open its own files and nothing else: Linux Landlock, by three system calls. Free of torch.

`confine` binds the calling process for good, together with every process that it starts. What it cannot keep in
is listed in ADR 0007. Where the kernel has no Landlock, `watch` at least notes what was opened.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import stat
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

# Numbers are the same on every architecture but alpha (include/uapi/asm-generic/unistd.h).
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_PR_SET_NO_NEW_PRIVS = 38
_VERSION_QUERY = 1
_RULE_PATH_BENEATH = 1

# Access rights (include/uapi/linux/landlock.h), grouped by what they are granted for here.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_CHANGE_TREE = sum(1 << bit for bit in range(4, 13))  # remove and make files, folders, nodes, sockets, links
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15  # since version 2, 3 and 5
_NET_TCP = 0b11  # bind and connect, since version 4
_SCOPES = 0b11  # abstract sockets and signals to processes outside, since version 6

_READ = _EXECUTE | _READ_FILE | _READ_DIR
_WRITE = _READ | _WRITE_FILE | _CHANGE_TREE | _REFER | _TRUNCATE
_DEVICE = _READ_FILE | _WRITE_FILE | _IOCTL_DEV
_FOR_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV  # the others make sense on folders only
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}  # absent, switched off, filtered by a container

_SYSTEM = (
    "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64",  # shared libraries
    "/etc/ld.so.cache", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd",  # loader, clock, expanduser
    "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom",
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/sys/devices/system",  # cores, caches, vector units
)  # fmt: skip
_NVIDIA = (
    "/proc/driver", "/proc/devices", "/proc/modules", "/proc/sys/vm", "/sys/bus", "/sys/class", "/sys/devices",
    "/usr/local/cuda", "/usr/local/nvidia", "/usr/share/nvidia", "/run/nvidia-persistenced", "/dev/nvidia-caps",
)  # fmt: skip


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi_version() -> int:
    """The Landlock version of this kernel, 0 where there is none or it is switched off."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, _call(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_QUERY)))


def confine(read: Sequence[Path], write: Sequence[Path]) -> Literal["landlock", "process"]:
    """Bind this process, and all that it starts, to some files and folders (with all below them). No way back.

    read: may be read and executed; a device node among them may be written too. write: may be read and changed.
    The first of them becomes the folder for temporary files: without one, importing torch can fail. Files that are
    already open stay open. TCP (version 4 on), and signals and abstract sockets to processes
    outside (version 6 on), are cut off as well.

    Returns "landlock", or "process" where the kernel lacks it: then every path stays open. Raises FileNotFoundError
    for a path that does not exist, and RuntimeError when other Python threads run, since they would stay free.

    Example: `confine([*interpreter_paths(["bbmcl_mydef"]), inputs], [workdir])`
    """
    if threading.active_count() > 1:
        raise RuntimeError(f"confine binds the calling thread, but {threading.active_count()} run; call it first")
    version = abi_version()
    rules = [(path, _READ) for path in read] + [(path, _WRITE) for path in write]
    for path, _ in rules:
        path.stat()
    if write:
        tempfile.tempdir = os.environ["TMPDIR"] = str(write[0])
    if version == 0:
        return "process"

    handled = _handled(version)
    size = 8 if version < 4 else 16 if version < 6 else 24  # older kernels know a shorter struct
    net, scoped = (_NET_TCP if version >= 4 else 0), (_SCOPES if version >= 6 else 0)
    ruleset = _call(_CREATE, ctypes.byref(_Ruleset(handled, net, scoped)), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return _give_up("create a ruleset")
    try:
        for path, access in rules:
            _allow(ruleset, path, access & handled, handled)
        if _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            return _give_up("renounce new privileges")
        if _call(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0)) < 0:
            return _give_up("enforce the ruleset")
    finally:
        os.close(ruleset)
    return "landlock"


def _handled(version: int) -> int:
    """Every file-system right that a kernel of this Landlock version can withhold."""
    rights = _READ | _WRITE_FILE | _CHANGE_TREE
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        rights |= right if version >= since else 0
    return rights


def _allow(ruleset: int, path: Path, access: int, handled: int) -> None:
    """Add one rule. Rights that make no sense for the kind of file are left out, else the kernel refuses the rule."""
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISCHR(mode):
            access = _DEVICE & handled
        elif not stat.S_ISDIR(mode):
            access &= _FOR_FILES
        rule = _PathBeneath(access, handle)
        if _call(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), ctypes.byref(rule), 0) < 0:
            raise OSError(ctypes.get_errno(), f"Landlock refuses a rule: {os.strerror(ctypes.get_errno())}", str(path))
    finally:
        os.close(handle)


def _give_up(what: str) -> Literal["process"]:
    """ "process" when the last call failed for lack of support; any other failure is a fault of this module."""
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return "process"
    raise OSError(code, f"Landlock: could not {what}: {os.strerror(code)}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    """One raw system call: its result, -1 with errno set on failure."""
    syscall = _libc().syscall
    syscall.restype = ctypes.c_long
    return int(syscall(ctypes.c_long(number), *arguments))


# ---------------------------------------------------------------- what an interpreter needs


def interpreter_paths(packages: Iterable[str] = ()) -> list[Path]:
    """What a Python process with torch must be able to read, without double entries; all of it exists.

    Standard library, site-packages, shared libraries, a few files of the system, the GPU's device nodes where there
    are any; and the folders of those packages that lie elsewhere (editable installs, PYTHONPATH): the ones already
    imported and, by name, `packages`. Never a whole entry of `sys.path`, for a checkout may hold the runs folder.
    Temporary folders and /dev/shm are left out: other jobs leave things there.
    """
    wanted = [Path(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)]
    wanted += [Path(p) for p in sysconfig.get_paths().values()]
    wanted += [Path(p) for p in sys.path if Path(p).name in {"site-packages", "dist-packages"}]
    wanted += [Path(p) for p in _SYSTEM]
    wanted += [Path(p) for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p]
    if nodes := sorted(Path("/dev").glob("nvidia*")):
        wanted += [*nodes, *(Path(p) for p in _NVIDIA)]
    loaded = {name.partition(".")[0] for name in sys.modules} - {"__main__", "__mp_main__"}
    for name in sorted(loaded | {name.partition(".")[0] for name in packages}):
        wanted += _homes(name)
    return _outermost(wanted)


def _homes(package: str) -> list[Path]:
    """Folders of a top-level package, or the file of a top-level module; nothing for what is built in or unknown."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(p) for p in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.has_location and spec.origin else []


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """Existing paths, resolved, less those that lie below another one."""
    kept: list[Path] = []
    for path in sorted(
        {path.resolve() for path in paths if os.path.exists(path)}
    ):  # a folder sorts before what is in it
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


# ---------------------------------------------------------------- where there is no Landlock


_CHANGES: Mapping[str, tuple[tuple[int, int], ...]] = {  # audit event -> places of each path and of its folder
    "os.mkdir": ((0, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.truncate": ((0, -1),),
    "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),), "os.symlink": ((1, 2),),
}  # fmt: skip


def watch(read: Sequence[Path], write: Sequence[Path]) -> list[str]:
    """Note every file that Python code opens outside `read` and `write` from now on, or changes outside `write`; the
    list that is returned grows.

    For processes that `confine` could not bind. It prevents nothing and does not see what C code opens; a method
    that reaches for other files by accident is found, one that hides it is not.
    """
    changed = [os.path.realpath(path) for path in write]
    opened = [*changed, *(os.path.realpath(path) for path in read)]
    seen: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            names, changes = [arguments[0]], bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        else:  # a name that is relative to an open folder was noted when that was opened
            names = [arguments[i] for i, handle in _CHANGES.get(event, ()) if (*arguments, -1)[handle] == -1]
            changes = True
        for name in names:
            if not isinstance(name, (str, bytes)):
                continue
            path = os.path.realpath(os.fsdecode(name))
            if f"{os.sep}__pycache__{os.sep}" in path:  # the interpreter's own doing
                continue
            if not changes and not os.path.isabs(name) and not os.path.exists(path):
                continue  # relative to an open folder, which the event does not tell: `shutil.rmtree` does that
            roots = changed if changes and not path.startswith("/dev/") else opened
            if path not in seen and not any(path == root or path.startswith(root + os.sep) for root in roots):
                seen.append(path)

    sys.addaudithook(note)
    return seen


__all__ = ["abi_version", "confine", "interpreter_paths", "watch"]
