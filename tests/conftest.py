"""What all tests share: one thread per process, the toy plugin, a cache of this session's own."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small
from typed import typed

from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Store

# Tensors of the tests are small, and threads that wait for each other on a busy machine made a suite of 5 seconds
# take 54 (measured, 2 cores, load 5). Read when torch is first imported, and inherited by children.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Jobs set their own number of threads, and one that waits for another keeps a core busy unless it is told to sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TOY = Path(__file__).parent / "toy"
FIRST = (  # files of half a minute and more, begun first, so that no worker is left alone with one at the end
    "test_verify.py", "test_conformance.py", "test_authoring.py", "test_kill.py", "test_offenders.py", "test_audit.py",
    "test_scan_command.py", "test_reproduce.py", "test_html.py", "test_matrix.py", "test_faults.py", "test_docs.py",
    "test_engine.py", "test_frames.py", "test_contracts.py", "test_memory.py", "test_needs.py",
)  # fmt: skip
pytest_plugins = ["pytester"]
Bbmcl = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take files in the order in which they come (`--no-loadscope-reorder`); `slow` ones are skipped."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))
    if "BBMCL_SLOW" not in os.environ:
        later = pytest.mark.skip(reason="slow, and a faster test covers its path; run it with: tox -e slow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(later)


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "together"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def toy_env(together: Path) -> dict[str, str]:
    """The environment of a `bbmcl` that finds the toy plugin and keeps its cache to this session."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("BBMCL_")}
    env["PYTHONPATH"] = os.pathsep.join([str(TOY), *filter(None, [env.get("PYTHONPATH")])])
    env["BBMCL_CACHE"] = str(together / "cache")
    return env


@dataclass(frozen=True)
class Reference:
    """The 2x2 toy matrix, run once without interruption: for reading only. seconds: what that took."""

    runs: Path
    rows: list[Row]
    artefacts: dict[str, str]
    seconds: float


@pytest.fixture(scope="session")
def reference(toy_env: dict[str, str], together: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """`small.command()` with two workers of one thread, finished: run by one worker, copied by each."""
    made, told = together / "reference", together / "reference.json"
    with (together / "reference.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            told.write_text(json.dumps(_run_reference(made, toy_env)))
    runs = Path(shutil.copytree(made, tmp_path_factory.mktemp("reference") / "runs"))
    found = json.loads(told.read_text())
    store = Store(runs)
    artefacts = {stage.key: stage.artefact for stage in store.stages()}
    store.close()
    return Reference(runs, [Row.from_dict(item) for item in found["rows"]], artefacts, found["seconds"])


def _run_reference(runs: Path, env: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "backdoorbench_mcl.cli", *small.command(), "--runs", str(runs)]
    command += ["--workers", "2", "--threads-per-job", "1", "--format", "json"]
    subprocess.run([*command, "--dry-run"], env=env, capture_output=True, timeout=240, check=True)  # fills the cache
    started = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return {"rows": json.loads(done.stdout), "seconds": time.monotonic() - started}


@pytest.fixture
def sigint_heeded() -> Iterator[None]:
    """A shell that runs the tests in the background has them, and so their children, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def bbmcl(toy_env: dict[str, str], tmp_path: Path) -> Bbmcl:
    """`bbmcl("plugins")` answers as the command in a folder of its own does, with the toy plugin installed."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return typed(*arguments, folder=tmp_path, env={**toy_env, **env})

    return run


@pytest.fixture
def process(toy_env: dict[str, str], tmp_path: Path) -> Bbmcl:
    """As `bbmcl`, in a process of its own, with a fork server of its own."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "backdoorbench_mcl.cli", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env={**toy_env, **env}, capture_output=True, text=True, timeout=240, check=False
        )

    return run
