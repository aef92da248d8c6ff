"""Which GPU a job gets: one at a time, or several that were measured to fit."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_mcl import devices, request, runner
from backdoorbench_mcl.devices import CONTEXT, ROOM, Devices
from backdoorbench_mcl.engines.local import Local
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.runner import Settings


def test_a_gpu_without_a_job_takes_any_and_one_with_a_job_only_what_fits() -> None:
    two = Devices(["cuda:0", "cuda:1"], {"cuda:0": 10_000, "cuda:1": 10_000})
    assert [two.place(None), two.place(None)] == ["cuda:0", "cuda:1"]
    assert two.place(1.0) is None  # what runs was not measured
    two.release("cuda:1", None)
    assert two.place(6000) == "cuda:1"
    assert two.place(2000) is None  # 8000 + two contexts are more than nine tenths
    assert two.place(1500) == "cuda:1"
    assert two.place(None) is None
    two.release("cuda:0", None)
    assert two.place(None) == "cuda:0"


def test_a_job_that_takes_nothing_of_a_gpu_waits_for_none_and_keeps_none() -> None:
    one = Devices(["cuda:0"], {"cuda:0": 10_000})
    assert one.place(None) == "cuda:0"
    assert one.place(0.0) == "cuda:0"
    one.release("cuda:0", None)
    assert one.place(9900.0) == "cuda:0"  # alone but for the one that takes nothing
    assert one.place(0.0) == "cuda:0"
    assert one.place(1.0) is None


@given(st.lists(st.one_of(st.none(), st.just(0.0), st.floats(1, 20_000)), max_size=30), st.randoms())
def test_no_gpu_is_asked_for_more_than_it_has(needs: list[float | None], rng: random.Random) -> None:
    names = ["cuda:0", "cuda:1", "cuda:2"]
    memory = {"cuda:0": 16_000.0, "cuda:1": 40_000.0}  # the third's is not known
    some = Devices(names, memory)
    placed: list[tuple[str, float | None]] = []
    for need in needs:
        if placed and rng.random() < 0.5:
            some.release(*placed.pop(rng.randrange(len(placed))))
        if (name := some.place(need)) is not None:
            placed.append((name, need))
        for name in names:
            held = [size for place, size in placed if place == name and size != 0]
            if len(held) > 1:
                assert sum(size + CONTEXT for size in held if size) <= ROOM * memory[name]
                assert None not in held
    assert some.empty().held == {name: [] for name in names}


def test_a_processor_takes_what_the_workers_allow() -> None:
    assert [Devices(["cpu"], {}).place(None) for _ in range(5)] == ["cpu"] * 5
    assert devices.measure(["cpu"]) == {}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that are found first."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def program(file: Path, line: str) -> None:
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)


@pytest.mark.parametrize(
    "line,expected",
    [
        ("printf '81559\\n40960\\n'", {"cuda:0": 40960.0, "cuda:1": 40960.0}),
        ("printf '81559\\n'", {"cuda:0": 81559.0, "cuda:1": 81559.0}),
        ("echo 'No devices were found'; exit 6", {}),
        ("echo '[N/A]'", {}),
    ],
)
def test_memory_is_what_the_tool_of_the_driver_says(machine: Path, line: str, expected: dict[str, float]) -> None:
    program(machine / "nvidia-smi", line)
    assert devices.measure(["cuda:0", "cuda:1"]) == expected


class Torch:
    """A machine with GPUs of these names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
        monkeypatch.setattr(request.os.path, "exists", lambda path: str(path) == "/dev/nvidia0")  # type: ignore[attr-defined]
        monkeypatch.setattr(request.sys, "executable", str(folder / "python"))  # type: ignore[attr-defined]
        program(folder / "python", f"printf '{''.join(name + chr(92) + 'n' for name in names)}'")


def test_several_gpus_of_one_model(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Torch(monkeypatch, machine, "NVIDIA H100", "NVIDIA H100", "NVIDIA T4")
    assert request.resolve_device("auto") == "cuda"
    assert request.resolve_device("cuda:0, cuda:1") == "cuda:0,cuda:1"
    assert request.resolve_device("cuda:2") == "cuda:2"
    for text, why in {
        "cuda:0,cuda:2": "these are NVIDIA H100 and NVIDIA T4, whose numbers differ",
        "cuda:0,cuda:3": "torch sees 3 CUDA devices",
        "cuda,cuda:0": "names a GPU twice",
        "cuda:0,cpu": "several GPUs as in cuda:0,cuda:1",
        "cuda:": "several GPUs as in",
    }.items():
        with pytest.raises(UserError, match=why):
            request.resolve_device(text)


def test_a_worker_for_each_gpu() -> None:
    assert runner.resources(Settings(), "cuda:0,cuda:1").workers == 2
    assert runner.resources(Settings(), "cuda:0,cuda:1").threads == 1
    assert runner.resources(Settings(workers=5), "cuda:0,cuda:1").workers == 5
    assert runner.resources(Settings(), "cuda").workers == 1


def test_jobs_are_spread_over_the_devices_of_a_run(
    monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str], tmp_path: Path
) -> None:
    """With two "devices" that are this processor: every job is told one of them, and both are used at once."""
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    monkeypatch.setattr(request, "resolve_device", lambda text: "cpu:0,cpu:1")
    told: list[str] = []
    start = Local.start

    def look(self: Local, folder: Path) -> None:
        spec = json.loads((folder / "spec.json").read_text())
        if spec["job"] != "data":
            told.append(spec["device"])
        start(self, folder)

    monkeypatch.setattr(Local, "start", look)
    asked = small.options("badnets", "ft", seeds="0-1")
    rows = runner.run_matrix(asked, Settings(runs=tmp_path / "runs", workers=2, threads=1), live=False)
    assert {row.state for row in rows} == {"ok"}
    assert set(told) == {"cpu:0", "cpu:1"}
    assert {row.device for row in rows} <= {"cpu:0", "cpu:1"}
