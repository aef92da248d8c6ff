"""What a stored result came from: program versions, machine, commit, command. Free of torch.

Nothing here enters a key (design 3.2): a victim trained elsewhere serves this machine too. It says for which
machines bit-identity is promised (`machine_class`) and lets a reader judge a number years later.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__

DISTRIBUTIONS = ("torch", "torchvision", "numpy", "pluggy", "pydantic", "safetensors")
KERNELS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")  # variables that choose how numbers are added up
CPUINFO = Path("/proc/cpuinfo")
GPUS = Path("/proc/driver/nvidia/gpus")

_X86 = {"x86_64", "amd64"}
_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "HygonGenuine": "hygon"}
# The levels of the x86-64 psABI, as /proc/cpuinfo spells what each adds to the one before.
_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("v2", frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"})),
    ("v3", frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"})),
    ("v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
)


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions by distribution, "absent" for what is not installed; read from metadata, nothing is imported.

    packages: distributions to name beside those that every result depends on. Example: `versions(["bbmcl-abl"])`
    """
    found = {"backdoorbench-mcl": __version__, "python": platform.python_version()}
    for name in (*DISTRIBUTIONS, *sorted(set(packages) - found.keys())):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def supports_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware: AVX512-BF16 or AMX-BF16 on Linux x86.

    Elsewhere bf16 is emulated and slower than fp32, so the answer is False. A property of the machine, never a
    timing: the precision changes numbers, so it must not depend on how busy the machine was.
    """
    return bool(_cpu(cpuinfo)[1] & {"avx512_bf16", "amx_bf16"})


def machine_class(device: str = "cpu", cpuinfo: Path = CPUINFO) -> str:
    """The class of machines within which equal precision and threads give equal bits.

    For `cpu`: architecture, instruction-set level, fast bf16, maker; numerical libraries choose their kernels by
    all four. For `cuda`: the model of the first GPU. Libraries must agree as well, see `versions`.

    Example: `"x86_64-v4-amx/intel/cpu"`, `"x86_64-v3/amd/cpu"`, `"cuda/NVIDIA H200"`.
    """
    if device.split(":")[0] == "cuda":
        return f"cuda/{(gpus() or ['unknown'])[0]}"
    machine = platform.machine() or "unknown"
    _, flags, vendor = _cpu(cpuinfo)
    words = [machine]
    if machine.lower() in _X86:
        level = "v1"
        for name, needed in _LEVELS:
            if not needed <= flags:
                break
            level = name
        words.append(level)
        words += ["amx"] if "amx_bf16" in flags else ["bf16"] if "avx512_bf16" in flags else []
    return "/".join(["-".join(words), _VENDORS.get(vendor, vendor.lower() or "unknown"), device])


def kernels(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables `KERNELS` that are set: with others, a machine of the same class gives other bits."""
    return {name: environment[name] for name in KERNELS if name in environment}


def gpus(root: Path = GPUS) -> list[str]:
    """Model names of the NVIDIA GPUs that the driver lists, in its order; empty without a driver."""
    names = []
    for card in sorted(root.glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", _read(card), re.MULTILINE)
        names.append(found[1].strip() if found else "unknown")
    return names


def collect() -> dict[str, Any]:
    """Everything worth keeping beside a result, JSON-ready.

    `git` is None when the package does not run from a checkout. The host name itself is left out: results are
    published, and a name may identify a person or an employer; `host` is a digest that says no more than whether
    two results came from one machine. `command` is what was typed: look at it before publishing paths.
    """
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _cpu(CPUINFO)[0] or platform.processor() or "unknown",
        "cores": cores(),
        "memory_mb": _memory_mb(),
        "gpus": gpus(),
        "machine_class": machine_class(),
        "bf16": supports_bf16(),
        "kernels": kernels(),
        "git": _git(Path(__file__).resolve().parent.parent),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": _host(),
    }


def cores() -> int:
    """Processor cores that this process may use, which a container or `taskset` may hold below the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu(cpuinfo: Path) -> tuple[str, frozenset[str], str]:
    """Model name, flags and maker of the first processor; empty where the file or the line is missing."""
    first = _read(cpuinfo).split("\n\n", 1)[0]
    table = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    return table.get("model name", ""), frozenset(table.get("flags", "").split()), table.get("vendor_id", "")


def _memory_mb() -> int | None:
    """Physical memory in MiB, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (AttributeError, OSError, ValueError):
        return None


def _git(root: Path) -> dict[str, Any] | None:
    """Commit and whether anything differs from it. None unless `root` itself is a checkout that git can read.

    A repository further up is somebody else's: an installed package often lies below one.
    """
    if not (root / ".git").exists():
        return None
    try:
        commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
        dirty = _output("git", "-C", str(root), "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(dirty.strip())}


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def _host() -> str:
    """12 hex digits; the machine's random id is mixed in, because a bare host name is easily guessed."""
    secret = _read(Path("/etc/machine-id")).strip() + "/" + platform.node()
    return hashlib.sha256(secret.encode()).hexdigest()[:12]


def _read(path: Path) -> str:
    """The text of a file that need not exist."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


__all__ = ["KERNELS", "collect", "cores", "gpus", "kernels", "machine_class", "supports_bf16", "versions"]
