"""What all tests share: one thread per process, the toy plugin, a cache of this session's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Tensors of the tests are small, and threads that wait for each other on a busy machine made a suite of 5 seconds
# take 54 (measured, 2 cores, load 5). Read when torch is first imported, and inherited by children.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TOY = Path(__file__).parent / "toy"
Bbmcl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def toy_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a `bbmcl` that finds the toy plugin and keeps its cache to this session."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("BBMCL_")}
    env["PYTHONPATH"] = os.pathsep.join([str(TOY), *filter(None, [env.get("PYTHONPATH")])])
    env["BBMCL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return env


@pytest.fixture
def bbmcl(toy_env: dict[str, str], tmp_path: Path) -> Bbmcl:
    """`bbmcl("plugins")` runs the command in a folder of its own, with the toy plugin installed."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "backdoorbench_mcl.cli", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env={**toy_env, **env}, capture_output=True, text=True, timeout=240, check=False
        )

    return run
