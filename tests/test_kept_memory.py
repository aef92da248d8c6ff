"""What jobs that run networks switch on for speed, and that the numbers stay what they were: freed memory is used
again, numbers too small to matter are zero.
"""

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


# ---------------------------------------------------------------- numbers below 1e-38

SURE = """
import json, sys, torch
from backdoorbench_mcl import api, kit
from bbmcl_inverters.nc_box import NCBox
from bbmcl_models.wrn import WRN
torch.set_num_threads(1)
torch.set_flush_denormal(sys.argv[1] == "flush")
torch.manual_seed(0)
model = WRN(depth=10).build(4, (3, 8, 8)).eval()
x = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
with torch.no_grad():  # sure of everything: probabilities go from 1 down to 1e-40
    spread = model(x.float() / 255)
    model.fc.weight.mul_(92 / float((spread.amax(1) - spread.amin(1)).mean()))
class No:
    load = staticmethod(lambda: None)
    save = staticmethod(lambda tensors, meta: None)
tiny = torch.softmax(model(x.float() / 255), 1)
context = api.InverterContext(
    rng=torch.Generator().manual_seed(2), device=torch.device("cpu"), workdir=None, classes=4, log=lambda line: None,
    tick=lambda *a: None, snapshot=No(), recipe=api.Recipe(), augment=None, clean=api.Images(x, torch.full((64,), -1)),
)
found = NCBox(steps=20).invert(model, 1, context)
print(json.dumps({"tiny": int(((tiny > 0) & (tiny < 1e-38)).sum()), "mask": found.mask.tolist(),
                  "pattern": found.pattern.tolist()}))
"""


def test_numbers_that_are_too_small_to_matter_change_no_bit() -> None:
    def told(how: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", SURE, how], capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    plain, flushed = told("plain"), told("flush")
    assert plain["tiny"] > 0, "there are such numbers"
    assert flushed["tiny"] == 0, "they are zero"
    assert (plain["mask"], plain["pattern"]) == (flushed["mask"], flushed["pattern"])


@pytest.mark.parametrize("kind, isolation, flushed", [("predict", "process", True), ("data", "process", False)])
def test_jobs_that_run_networks_flush_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, isolation: str, flushed: bool
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch, "set_flush_denormal", asked.append)
    monkeypatch.setattr(memory, "keep", lambda: True)
    monkeypatch.setattr(jobs, "confine", lambda read, write: "landlock")
    spec = {"job": kind, "isolation": isolation, "threads": torch.get_num_threads(), "device": "cpu", "readable": [],
            "seeds": {"init": 0}, "snapshot": str(tmp_path / "s")}  # fmt: skip
    jobs._settle(Job(tmp_path, spec, lambda *a: None))
    assert asked == [True] * flushed


def test_a_job_in_the_callers_process_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state: list[bool] = []
    monkeypatch.setitem(jobs.BODIES, "predict", lambda job: state.append(_tiny() == 0))
    spec = {"job": "predict", "isolation": "inline", "threads": torch.get_num_threads(), "device": "cpu",
            "seeds": {"init": 0}}  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    jobs.run(tmp_path, lambda *a: None, lambda: None)
    assert state == [True] and _tiny() > 0


def _tiny() -> float:
    """1e-39, or 0 where such numbers are flushed."""
    return float(torch.tensor(1e-20) * torch.tensor(1e-19))
