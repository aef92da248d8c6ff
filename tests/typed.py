"""The command `bbmcl` as it is typed, in the process of the tests.

That spares each command a start of Python and of a fork server, whose import of torch takes longer than most matrices
of the tests. What a job prints is not seen here: where that matters, the fixture `process` starts a real one.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from backdoorbench_mcl import children, cli, forks, registry

Answers = Callable[[str, Path, str], "int | None"]
_GIVEN = os.environ.get("PYTHONPATH", "").split(os.pathsep)
_PATH = [part for part in sys.path if part not in _GIVEN]  # before any test has added to it


def _sooner(cold: Answers, module: str, folder: Path, path: str) -> int | None:
    """Classes are read by a child of the fork server, which has torch, as by every command that runs jobs."""
    warm = module == "backdoorbench_mcl.describe" and forks.ours()
    return (children._warm if warm else cold)(module, folder, path)


def typed(*arguments: str, folder: Path, env: Mapping[str, str]) -> CompletedProcess[str]:
    """What `bbmcl ARGUMENTS` answers in `folder` where the environment is `env`, PYTHONPATH included."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name in os.environ.keys() - env.keys():
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["bbmcl", *arguments])
        patch.setattr(sys, "path", [str(folder), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *_PATH])
        patch.setattr(tempfile, "tempdir", None)  # which is looked up in `env` then
        patch.setattr(children, "_cold", partial(_sooner, children._cold))
        registry._code.cache_clear()  # a process reads the files of a plugin once; those of the tests change
        importlib.invalidate_caches()
        status = cli._run()
    return CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
