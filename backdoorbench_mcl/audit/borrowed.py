"""Jobs of a handed model in the process that holds it: a network in memory need be no file, nor its class importable.

It is copied for every job, so that the caller's object stays as it is, and so do random states and threads.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import api, jobs
from ..engines.base import LOG, RESULT, Finished, Progress
from ..engines.local import sound
from ..errors import PluginError
from ..job import Job


@dataclass(frozen=True)
class BorrowedJob(Job):
    """A job whose network is a copy of one in memory. network: always given."""

    network: api.Classifier | None = None

    def classifier(self) -> api.Classifier:
        """The network with the weights that it was handed over with."""
        assert self.network is not None
        made = copy.deepcopy(self.network)
        made.precision = self.spec["precision"]
        torch.manual_seed(self.spec["seeds"]["init"])
        return made.to(self.device).to(memory_format=torch.channels_last).eval()

    def fresh(self) -> api.Classifier:
        """The same network with weights drawn anew. Raises PluginError where a part does not say how."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            made = self.classifier()
            for module in made.modules():
                if next(module.parameters(recurse=False), None) is None:
                    continue
                if not callable(getattr(module, "reset_parameters", None)):
                    raise PluginError(
                        f"{type(module).__name__} has no reset_parameters(), so that no fresh network can be made of it"
                    )
                module.reset_parameters()  # type: ignore[operator]
            return made


class Here:
    """An engine of one job at a time, in this process; `start` returns when the job has ended."""

    spreads = False

    def __init__(self, network: api.Classifier) -> None:
        self.network = network
        self._done: list[Finished] = []

    @property
    def free(self) -> int:
        """Jobs that may be started now."""
        return 1 - len(self._done)

    def start(self, folder: Path) -> None:
        """Run the job in `folder`."""

        def job(folder: Path, spec: Any, tick: Callable[[int, int, int], None]) -> Job:
            return BorrowedJob(folder, spec, tick, network=self.network)

        with (folder / LOG).open("w") as log, contextlib.redirect_stdout(log), _kept():
            jobs.run(folder, lambda done, total, images: None, lambda: None, job)
        result = sound(json.loads((folder / RESULT).read_text()))
        self._done.append(Finished(folder, result["state"], result["reason"], (folder / LOG).read_text(), result))

    def events(self, patience: float = 0.1) -> list[Progress | Finished]:
        """The job that has ended, if it was not told yet."""
        done, self._done = self._done, []
        return list(done)

    def close(self) -> None:
        """Nothing runs on."""


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Random states, threads and settings of the caller come back."""
    state, numbers, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


__all__ = ["BorrowedJob", "Here"]
