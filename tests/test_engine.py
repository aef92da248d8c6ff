"""The local engine with real jobs: killed and resumed to the same bits, timed out, watched; and its snapshots."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import mmap
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small
import torch
from conftest import Bbmcl
from safetensors import SafetensorError
from safetensors.torch import save_file

from backdoorbench_mcl import artefacts, jobs, memory, plan, snapshots, standing
from backdoorbench_mcl.engines.base import Engine
from backdoorbench_mcl.engines.local import Finished, Local, Progress, _Reporter
from backdoorbench_mcl.grant import Grants
from backdoorbench_mcl.plan import Node
from backdoorbench_mcl.snapshots import Clock, FolderSnapshot
from backdoorbench_mcl.store import Store

EPOCH = 5  # steps: 320 images in batches of 64
STEPS = 100 * EPOCH


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])


@dataclasses.dataclass
class Bench:
    """Fills folders for the training jobs of a small plan."""

    tmp: Path
    graph: plan.Plan
    grants: Grants
    count: int = 0

    @property
    def trainings(self) -> list[Node]:
        return [node for node in self.graph.nodes.values() if node.kind == "train"]

    def job(self, node: Node | None = None, *, snapshot: str = "", steps: int = STEPS) -> Path:
        """A fresh folder for `node`, by default the first training; `snapshot`: another place than the store's."""
        self.count += 1
        folder = self.tmp / f"job-{self.count}"
        folder.mkdir()
        self.grants.fill(node or self.trainings[0], {}, folder)
        spec = json.loads((folder / "spec.json").read_text())
        spec["recipe"]["params"]["steps"] = steps
        if snapshot:
            spec["snapshot"] = str(self.tmp / snapshot)
        (folder / "spec.json").write_text(json.dumps(spec))
        return folder


@pytest.fixture
def bench(tmp_path: Path, toy: None) -> Bench:
    return made_bench(tmp_path)


def made_bench(tmp_path: Path) -> Bench:
    asked = small.resolve(small.options("badnets,blend", "same"))
    grants = Grants(
        asked.data, Store(tmp_path / "runs"), device="cpu", precision=asked.precision, threads=1,
        isolation="process", snapshot_every=0,
    )  # fmt: skip
    return Bench(tmp_path, plan.build(asked), grants)


Seen = dict[Path, list[Progress]]


def watch(
    engine: Engine, jobs: int, act: Callable[[Progress], None] = lambda event: None
) -> tuple[list[Finished], Seen]:
    """Run until `jobs` jobs have ended; `act` sees every progress. Returns how they ended, and their progress."""
    finished: list[Finished] = []
    seen: Seen = {}
    deadline = time.monotonic() + 120
    while len(finished) < jobs:
        assert time.monotonic() < deadline
        for event in engine.events():
            if isinstance(event, Finished):
                finished.append(event)
            else:
                seen.setdefault(event.folder, []).append(event)
                act(event)
    return finished, seen


def pid_of(engine: Local) -> int:
    """The process of the only running job."""
    (child,) = engine._running.values()
    assert child.process.pid is not None
    return child.process.pid


def run(folder: Path, kill_after: int | None = None) -> Finished:
    """The job in `folder` to its end, or to a SIGKILL once it has reported `kill_after` steps."""
    with Local(1) as engine:
        engine.start(folder)
        pid = pid_of(engine)

        def act(event: Progress) -> None:
            if kill_after is not None and event.done >= kill_after:
                os.kill(pid, signal.SIGKILL)

        (finished,), _ = watch(engine, 1, act)
    return finished


def weights(folder: Path) -> str:
    return artefacts.identify(folder / "out")


def test_a_killed_training_resumes_to_the_same_weights(bench: Bench) -> None:
    straight = bench.job(snapshot="straight")
    assert run(straight).state == "ok"
    expected = weights(straight)
    for kill_after in (STEPS // 4, STEPS // 2):  # killed twice, each time in a fresh folder
        killed = run(bench.job(), kill_after=kill_after)
        assert (killed.state, killed.result) == ("killed", {})
        assert "SIGKILL" in killed.reason
    last = bench.job()
    finished = run(last)
    assert finished.state == "ok"
    assert weights(last) == expected
    resumed_at = [int(line.split()[3]) for line in finished.log.splitlines() if line.startswith("resumed at step")]
    assert len(resumed_at) == 1
    assert STEPS // 2 - EPOCH <= resumed_at[0] < STEPS
    assert resumed_at[0] % EPOCH == 0  # the end of an epoch


@pytest.mark.slow  # test_power_loss.py tears the snapshots of a whole matrix
def test_a_training_killed_once_and_a_torn_snapshot(bench: Bench) -> None:
    killed = run(bench.job(), kill_after=STEPS // 4)
    assert killed.state == "killed"
    folder = Store(bench.tmp / "runs").snapshots(bench.trainings[0].key)
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    (bench.tmp / "torn").mkdir()
    (bench.tmp / "torn" / file.name).write_bytes(content[: len(content) // 2])
    resumed, restarted = bench.job(), bench.job(snapshot="torn")
    with Local(2) as engine:
        engine.start(resumed)
        engine.start(restarted)
        assert engine.free == 0
        finished, _ = watch(engine, 2)
    logs = {event.folder: event.log for event in finished}
    assert {event.state for event in finished} == {"ok"}
    assert "resumed at step" in logs[resumed]
    assert "resumed" not in logs[restarted]
    assert weights(resumed) == weights(restarted)


def test_two_jobs_at_once_tell_of_their_progress(bench: Bench) -> None:
    folders = [bench.job(node) for node in bench.trainings]
    assert len(folders) == 2
    with Local(2) as engine:
        assert engine.free == 2
        for folder in folders:
            engine.start(folder)
        assert engine.free == 0
        finished, seen = watch(engine, 2)
        assert engine.free == 2
    assert {event.folder for event in finished} == set(folders) == set(seen)
    for events in seen.values():
        done = [event.done for event in events]
        assert done == sorted(set(done))
        assert {event.total for event in events} == {STEPS}
        assert all(event.rate > 0 for event in events)
    for event in finished:
        assert event.state == "ok"
        assert event.result["isolation"] == "process"
        assert 0 < event.result["seconds"] < 120
        assert event.result["peak_mb"] > 50
    assert weights(folders[0]) != weights(folders[1])


class _Payload:
    """What a hostile job could send: unpickled, it calls what it likes in the driver, which nothing confines."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_what_a_job_sends_is_read_as_numbers_and_nothing_else(tmp_path: Path) -> None:
    receive, send = multiprocessing.Pipe(duplex=False)
    job: Any = SimpleNamespace(folder=tmp_path, messages=receive)
    tell = _Reporter(send)
    with Local(1) as engine:
        for done in (1, 2):  # the first message only starts the clock
            tell(done, 2, 10)
        newest = engine._drain(job)
        assert newest is not None
        assert (newest.folder, newest.done, newest.total) == (tmp_path, 2, 2)
        send.send(_Payload(tmp_path / "mark"))
        assert engine._drain(job) is None
        assert not (tmp_path / "mark").exists()
        for nonsense in (b"", b"x", b"x" * 10_000, struct.pack("<qqd", 1, 2, math.nan)):
            send.send_bytes(nonsense)
            assert engine._drain(job) is None


def test_a_job_that_takes_too_long_is_killed(bench: Bench) -> None:
    with Local(1, timeout=0.5) as engine:
        engine.start(bench.job())
        pid = pid_of(engine)
        started = time.monotonic()
        (finished,), _ = watch(engine, 1)
        assert time.monotonic() - started < 20
        assert (finished.state, finished.result) == ("timeout", {})
        assert finished.reason == "took longer than --timeout 0.5 s"
        assert not Path(f"/proc/{pid}").exists()


def test_a_job_that_takes_too_much_memory_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with Local(1, memory=0.001) as engine:  # less than any has
        engine.start(bench.job())
        (finished,), _ = watch(engine, 1)
    assert (finished.state, finished.result) == ("killed", {})
    assert finished.reason.startswith("held 0.")
    assert finished.reason.endswith(" GB of memory, more than --memory 0.001")


def test_where_the_machine_s_memory_runs_out_only_the_largest_job_is_killed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_one, large_one = bench.job(steps=10 * EPOCH), bench.job()
    with Local(2) as engine:
        engine.start(small_one)
        engine.start(large_one)
        pids = {run.process.pid: folder for folder, run in engine._running.items()}
        engine.room = 100.0
        held = {small_one: 40, large_one: 70}
        monkeypatch.setattr(memory, "held", lambda pid: held[pids[pid]])
        finished, _ = watch(engine, 2)
    states = {event.folder: (event.state, event.reason) for event in finished}
    assert states[small_one] == ("ok", "")
    assert states[large_one][0] == "killed"
    assert "the most when this machine's ran out; try fewer --workers" in states[large_one][1]


def test_mapped_files_do_not_count_as_memory(tmp_path: Path) -> None:
    kind_of_disk = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True)
    if kind_of_disk.stdout.strip() == "tmpfs":
        pytest.skip("files lie in memory here: they do count, and nothing can be said of those on a disk")
    (tmp_path / "zeros").write_bytes(bytes(64 << 20))
    before = memory.held(os.getpid())
    mapped = np.memmap(tmp_path / "zeros", np.uint8, "r")
    assert int(mapped.sum()) == 0  # every page was read
    after = memory.held(os.getpid())
    assert after - before < 32 << 20
    for kind in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
        # from the kernel: an allocator may use again what an earlier test freed
        with mmap.mmap(-1, 64 << 20, flags=kind | mmap.MAP_ANONYMOUS) as own:
            own.write(b"1" * len(own))
            assert memory.held(os.getpid()) - after > 32 << 20
    assert memory.total() > 64 << 20
    assert memory.held(2**22 + 1) == 0  # no such process


def test_leaving_the_engine_ends_its_jobs(bench: Bench) -> None:
    with Local(1) as engine:
        engine.start(bench.job())
        pid = pid_of(engine)
    assert not Path(f"/proc/{pid}").exists()
    assert engine.free == 1


@pytest.mark.slow  # test_matrix.py computes cells inline to the same bits
def test_inline_gives_the_same_weights(bench: Bench) -> None:
    """In a process of its own: a job seeds, sets threads and so on for the process that it runs in."""
    child, inline = bench.job(snapshot="a", steps=10 * EPOCH), bench.job(snapshot="b", steps=10 * EPOCH)
    assert run(child).state == "ok"
    code = (
        "import sys; from pathlib import Path; from backdoorbench_mcl.engines.local import Local\n"
        "engine = Local(4, inline=True); assert engine.workers == 1; engine.start(Path(sys.argv[1]))\n"
        "assert engine.free == 0; (event,) = engine.events(); print(event.state); assert engine.events(0) == []"
    )
    done = subprocess.run([sys.executable, "-c", code, str(inline)], capture_output=True, text=True, check=True)
    assert done.stdout == "ok\n"
    assert weights(inline) == weights(child)
    assert (inline / "log.txt").exists()


def test_what_jobs_print_goes_to_their_logs(bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = {
        "raise": ("failed", "ValueError at bbmcl_toy_methods.py:282: first line", "second line"),
        "print": ("ok", "", "noise on standard output"),
        "exit": ("failed", "SystemExit at bbmcl_toy_methods.py:284: 3", "SystemExit"),
    }
    victim = bench.job(steps=EPOCH)
    assert run(victim).state == "ok"
    graph = plan.build(small.resolve(small.options("badnets", ",".join(f"offender(how={how})" for how in expected))))
    capfd.readouterr()
    with Local(3) as engine:
        for node in graph.nodes.values():
            if node.kind == "defend":
                folder = tmp_path / node.methods["defense"].params["how"]
                folder.mkdir()
                bench.grants.fill(node, {"victim": victim / "out"}, folder)
                engine.start(folder)
        finished, _ = watch(engine, 3)
    assert {event.folder.name for event in finished} == set(expected)
    for event in finished:
        state, reason, printed = expected[event.folder.name]
        assert (event.state, event.reason) == (state, reason)
        assert printed in event.log
        assert event.log == (event.folder / "log.txt").read_text()
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


# ---------------------------------------------------------------- snapshots


def test_a_snapshot_comes_back_as_it_went_in(tmp_path: Path) -> None:
    tensors = {
        "w": torch.arange(6.0).reshape(2, 3).t(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "n": torch.tensor(3),
    }
    meta = {"step": 7, "start": "ä", "rate": 0.1}
    assert FolderSnapshot(tmp_path / "s").load() is None
    assert not (tmp_path / "s").exists()  # made when first needed
    FolderSnapshot(tmp_path / "s").save(tensors, meta)
    found = FolderSnapshot(tmp_path / "s").load()
    assert found is not None
    assert found[1] == meta
    assert set(found[0]) == set(tensors)
    for name, tensor in tensors.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor)


def test_a_snapshot_knows_what_it_took_over_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]

    def live(*saves: float) -> float:
        """A process that loads what is there and saves after so many seconds; what it knows of the earlier ones."""
        clock, began = Clock(), now[0]
        now[0] += 3.0  # the first part of the job, without a snapshot
        mine = FolderSnapshot(tmp_path / "s", every=2.0, clock=clock)
        mine.load()
        for seconds in saves:
            now[0] = began + seconds
            mine.save({}, {"step": 1})
            assert mine.load() == ({}, {"step": 1})  # a method that trains twice looks at its own: not spent twice
        now[0] += 50.0  # after the last save, so lost
        return clock.earlier

    assert [live(10.0, 11.0, 60.0), live(), live(5.0), live()] == [0.0, 60.0, 60.0, 65.0]


@pytest.mark.parametrize("spent", ["NaN", "Infinity", "-5", "9" * 400, '"long"', "[1]", "true", None])
def test_a_snapshot_whose_time_is_nonsense_is_a_snapshot_still(tmp_path: Path, spent: str | None) -> None:
    meta = '{"step": 1' + (f', "harness.seconds": {spent}}}' if spent is not None else "}")
    save_file({"w": torch.ones(2)}, tmp_path / "snapshot.safetensors", {"meta": meta})
    clock = Clock()
    found = FolderSnapshot(tmp_path, clock=clock).load()
    assert found is not None
    assert found[1] == {"step": 1}
    assert clock.earlier in (0.0, 1.0)  # JSON's true is the number 1


def test_parts_of_a_job_share_its_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    first = Clock()
    for seconds, part in ((40.0, "prepare"), (70.0, "fit")):
        now[0] = seconds
        FolderSnapshot(tmp_path / part, clock=first).save({}, {})
    second = Clock()
    for part in ("prepare", "fit"):
        FolderSnapshot(tmp_path / part, clock=second).load()
    assert second.earlier == 70.0


def test_a_stage_took_what_all_its_attempts_took(tmp_path: Path) -> None:
    node = Node("k", "train", "t", {}, {}, {}, 0)
    result = {"seconds": 5.0, "earlier": 60.0, "peak_mb": 1.0}
    common = {"precision": "fp32", "threads": 1, "isolation": "inline"}
    made = standing.finished(node, common, "cpu", {}, result, {}, 7.0)
    assert made.cost == {"seconds": 65.0, "wall": 67.0, "peak_mb": 1.0}


def test_a_snapshot_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = FolderSnapshot(tmp_path, every=0)
    snapshot.save({"w": torch.zeros(3)}, {"step": 1})

    def dies(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", dies)  # between writing and renaming
    with pytest.raises(OSError, match="No space"):
        snapshot.save({"w": torch.ones(3)}, {"step": 2})
    monkeypatch.undo()
    found = snapshot.load()
    assert found is not None
    assert found[1] == {"step": 1}
    snapshot.save({"w": torch.ones(3)}, {"step": 3})
    found = snapshot.load()
    assert found is not None
    assert found[1] == {"step": 3}
    assert bool((found[0]["w"] == 1).all())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_torn_snapshot_is_none(tmp_path: Path, keep: int) -> None:
    FolderSnapshot(tmp_path).save({"w": torch.zeros(100)}, {"step": 1})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    assert FolderSnapshot(tmp_path).load() is None


def test_a_disk_that_fills_up_under_a_snapshot_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FolderSnapshot(tmp_path).save({"w": torch.ones(2)}, MappingProxyType({"step": 1}))

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(snapshots, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        FolderSnapshot(tmp_path).save({"w": torch.zeros(2)}, {"step": 2})
    assert caught.value.errno == errno.ENOSPC
    assert jobs._reason(caught.value)[1].startswith("no space left on the device")
    found = FolderSnapshot(tmp_path).load()
    assert found is not None and found[1] == {"step": 1}  # the one before is still there


def test_snapshots_are_not_written_more_often_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    snapshot = FolderSnapshot(tmp_path, every=2.0)

    def kept(step: int) -> int:
        snapshot.save({"w": torch.zeros(1)}, {"step": step})
        found = snapshot.load()
        assert found is not None
        return int(found[1]["step"])

    assert kept(1) == 1  # the first at once
    now[0] += 1.9
    assert kept(2) == 1
    now[0] += 0.2
    assert kept(3) == 3
    now[0] += 1.9
    assert kept(4) == 3


def test_a_temporary_folder_too_deep_for_a_socket_is_one_line(process: Bbmcl, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    done = process(*small.command("badnets", "none"), TMPDIR=str(deep))
    assert done.returncode == 2
    assert "has too long a path for a socket" in done.stderr.splitlines()[-1]
    assert "set TMPDIR to a shorter one" in done.stderr.splitlines()[-1]
