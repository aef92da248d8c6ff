"""Freed memory is used again where a job asks for the same maps over and over; the numbers stay what they were."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from backdoorbench_mcl import jobs, memory
from backdoorbench_mcl.job import Job

# Counts page faults, which the kernel counts exactly; 32 MB are above what glibc keeps by itself.
SCRIPT = """
import json, resource, sys
import torch
from backdoorbench_mcl import kit, memory
from bbmcl_models.wrn import WRN
torch.set_num_threads(1)
model = WRN().build(10, (3, 32, 32)).to(memory_format=torch.channels_last).eval()
x = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
def logits(size):
    with torch.no_grad():
        return torch.cat([model(part.float().div_(255)) for part in x.split(size)])
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without, large, small = faults(), logits(512), logits(64)
kept = memory.keep()
torch.ones(8 << 20)
equal = torch.equal(large, logits(512)) and torch.equal(small, logits(64))
print(json.dumps({"kept": kept, "without": without, "with": faults(), "equal": equal}))
"""


def test_memory_that_is_kept_is_used_again_and_changes_no_bit() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["equal"]
    if not told["kept"]:
        pytest.skip("another C library than glibc")
    assert told["with"] < told["without"] / 4 or told["without"] < 5000  # a kernel with huge pages has few anyway


def test_a_c_library_without_the_switch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not memory.keep()


@pytest.mark.parametrize(
    "kind, isolation, kept",
    [("predict", "process", True), ("defend", "process", True), ("trial", "process", False),
     ("data", "process", False), ("predict", "inline", False)],
)  # fmt: skip
def test_jobs_that_run_networks_keep_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, isolation: str, kept: bool
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(memory, "keep", lambda: asked.append(True))
    monkeypatch.setattr(jobs, "watch", lambda read, write: [])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    spec = {"job": kind, "isolation": isolation, "seeds": {"init": 0}, "threads": 1, "device": "cpu",
            "readable": [], "snapshot": str(tmp_path / "snapshot")}  # fmt: skip
    jobs._settle(Job(tmp_path, spec, lambda done, total, images: None))
    assert bool(asked) is kept


def test_every_job_is_known() -> None:
    assert set(jobs.BODIES) > jobs._LOOPS
