"""What all tests share: one thread per process, the toy plugin, a cache of this session's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import small

from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Store

# Tensors of the tests are small, and threads that wait for each other on a busy machine made a suite of 5 seconds
# take 54 (measured, 2 cores, load 5). Read when torch is first imported, and inherited by children.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TOY = Path(__file__).parent / "toy"
SLOW = (  # files of a minute and more, begun first, so that no worker is left alone with one at the end
    "test_reproduce.py", "test_verify.py", "test_conformance.py", "test_offenders.py", "test_html.py", "test_matrix.py",
    "test_authoring.py", "test_kill.py", "test_needs.py", "test_docs.py", "test_scan_command.py",
)  # fmt: skip
pytest_plugins = ["pytester"]
Bbmcl = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take files in the order in which they come (`--no-loadscope-reorder`)."""
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.name, len(SLOW)))


@pytest.fixture(scope="session")
def toy_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a `bbmcl` that finds the toy plugin and keeps its cache to this session."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("BBMCL_")}
    env["PYTHONPATH"] = os.pathsep.join([str(TOY), *filter(None, [env.get("PYTHONPATH")])])
    env["BBMCL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return env


@dataclass(frozen=True)
class Reference:
    """The 2x2 toy matrix, run once without interruption: for reading only. seconds: what that took."""

    runs: Path
    rows: list[Row]
    artefacts: dict[str, str]
    seconds: float


@pytest.fixture(scope="session")
def reference(toy_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """`small.command()` with two workers of one thread, finished."""
    runs = tmp_path_factory.mktemp("reference") / "runs"
    command = [sys.executable, "-m", "backdoorbench_mcl.cli", *small.command(), "--runs", str(runs)]
    command += ["--workers", "2", "--threads-per-job", "1", "--format", "json"]
    subprocess.run(
        [*command, "--dry-run"], env=toy_env, capture_output=True, timeout=240, check=True
    )  # fills the cache
    started = time.monotonic()
    done = subprocess.run(command, env=toy_env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    seconds = time.monotonic() - started
    store = Store(runs)
    artefacts = {stage.key: stage.artefact for stage in store.stages()}
    store.close()
    return Reference(runs, [Row.from_dict(item) for item in json.loads(done.stdout)], artefacts, seconds)


@pytest.fixture
def sigint_heeded() -> Iterator[None]:
    """A shell that runs the tests in the background has them, and so their children, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def bbmcl(toy_env: dict[str, str], tmp_path: Path) -> Bbmcl:
    """`bbmcl("plugins")` runs the command in a folder of its own, with the toy plugin installed."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "backdoorbench_mcl.cli", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env={**toy_env, **env}, capture_output=True, text=True, timeout=240, check=False
        )

    return run
