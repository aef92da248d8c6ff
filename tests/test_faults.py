"""Faults that befall a run as a whole: real drivers on disks that fill up, go read-only or vanish, and beside others.

`docs/faults.md` lists every fault with its test. A disk of its own needs a mount namespace; where there is none, these
tests are skipped and say so.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import small
from conftest import Bbmcl, Reference

from backdoorbench_mcl import runner
from backdoorbench_mcl.artefacts import Damaged
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store

MATRIX = [sys.executable, "-m", "backdoorbench_mcl.cli", *small.command()]


def _namespaces() -> bool:
    trial = ["unshare", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    try:
        return subprocess.run(trial, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


own_disk = pytest.mark.skipif(not _namespaces(), reason="no mount namespaces here, so no disk of its own")


def mounted(script: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount what it likes."""
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], env=env, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip


def one_line(stderr: str) -> str:
    """The last line of the program's own, where it gave up; there is no traceback."""
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("bbmcl: ")][-1]


@own_disk
def test_a_full_disk_stops_the_run_and_more_room_lets_it_go_on(
    toy_env: dict[str, str], tmp_path: Path, reference: Reference
) -> None:
    """The runs folder is a disk of 300 kB; a tenth of what the matrix leaves."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    command = shlex.join([*MATRIX, "--runs", str(disk / "runs"), "--workers", "2", "--threads-per-job", "1"])
    script = (
        f"mount -t tmpfs -o size=300k none {disk} && ({command}; echo status $?) && "
        f"mount -o remount,size=64m {disk} && ({command}; echo status $?) && cp -r {disk}/runs {kept}"
    )
    done = mounted(script, toy_env)
    first, second = [line for line in done.stdout.splitlines() if line.startswith("status ")]
    assert first in ("status 1", "status 2"), done.stderr
    assert "No space left on device" in done.stderr or "database or disk is full" in done.stderr
    assert "make room" in done.stderr
    assert second == "status 0", done.stderr
    assert "Traceback" not in done.stderr
    store = Store(kept)
    assert small.essence(store.rows()) == small.essence(reference.rows)
    for stage in store.stages():
        assert store.open(stage).name == reference.artefacts[stage.key]
    store.close()


@own_disk
def test_a_read_only_runs_folder_reports_and_refuses_to_run(
    toy_env: dict[str, str], tmp_path: Path, reference: Reference
) -> None:
    runs = Path(shutil.copytree(reference.runs, tmp_path / "runs"))
    report = shlex.join([sys.executable, "-m", "backdoorbench_mcl.cli", "report", "--runs", str(runs)])
    more = small.command("badnets", "same")
    matrix = shlex.join([sys.executable, "-m", "backdoorbench_mcl.cli", *more, "--runs", str(runs)])
    done = mounted(
        f"mount --bind {runs} {runs} && mount -o remount,bind,ro {runs} && {report}; echo status $?; {matrix}; "
        "echo status $?",
        toy_env,
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("status ")] == ["status 0", "status 2"]
    assert "mcldef" in done.stdout
    assert "cannot be" in one_line(done.stderr)
    assert str(runs) in one_line(done.stderr)


def test_a_runs_folder_that_vanishes_ends_the_run_with_one_line(toy_env: dict[str, str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    process = subprocess.Popen([*MATRIX, "--runs", str(runs)], env=toy_env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any((runs / "locks").glob("?" * 64)) and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(runs)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr
    assert one_line(stderr).startswith(f"bbmcl: the runs folder {runs} cannot be written: No such file or directory")


def test_artefacts_that_changed_places_are_found_out(
    reference: Reference, tmp_path: Path, toy_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two victims: each is whole, and each is the other one."""
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    runs = Path(shutil.copytree(reference.runs, tmp_path / "runs"))
    store = Store(runs)
    one, two = (store.artefacts.path(stage.artefact) for stage in store.stages() if stage.kind == "train")
    one.rename(tmp_path / "third")
    two.rename(one)
    (tmp_path / "third").rename(two)
    for stage in store.stages():
        if stage.kind == "train":
            with pytest.raises(Damaged, match="holds the content of"):
                store.open(stage)
    store.close()
    rows = runner.run_matrix(
        small.options("badnets,blend", "same"), Settings(runs=runs, workers=2, threads=1), live=False
    )
    before = {row.attack: row.asr_k for row in reference.rows if row.defense == "before"}
    assert {row.attack: row.asr_k for row in rows if row.defense == "same"} == before
    store = Store(runs)
    found = {stage.key: stage.artefact for stage in store.stages() if stage.kind == "train"}
    assert found.items() <= reference.artefacts.items()
    store.close()


@pytest.mark.skipif("BBMCL_SOAK" not in os.environ, reason="two drivers do in every run; five in tox -e soak")
def test_five_drivers_on_one_store_share_the_work(
    toy_env: dict[str, str], tmp_path: Path, reference: Reference
) -> None:
    runs = tmp_path / "runs"
    command = [*MATRIX, "--workers", "1", "--threads-per-job", "1", "--format", "json", "--runs", str(runs)]
    drivers = [
        subprocess.Popen(command, env=toy_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    told = [driver.communicate(timeout=240) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0] * 5, told
    store = Store(runs, pytest.fail)
    assert small.essence(store.rows()) == small.essence(reference.rows)
    assert {stage.key: stage.artefact for stage in store.stages()} == reference.artefacts
    store.close()
    titles = Counter(
        line.rpartition(": ok")[0].strip() for _, stderr in told for line in stderr.splitlines()
        if ": ok, " in line and not line.startswith("[")
    )  # fmt: skip
    assert len(titles) == len(reference.artefacts)
    assert set(titles.values()) == {1}  # by one of them each


def test_a_method_that_was_uninstalled_leaves_its_rows(
    reference: Reference, bbmcl: Bbmcl, tmp_path: Path, toy_env: dict[str, str]
) -> None:
    """Rows are read without the code that made them; who asks for more is told that it is gone."""
    runs = shutil.copytree(reference.runs, tmp_path / "runs")
    without = {"PYTHONPATH": os.pathsep.join(toy_env["PYTHONPATH"].split(os.pathsep)[1:])}
    shown = bbmcl("report", "--runs", str(runs), "--format", "csv", **without)
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout.splitlines()) == 1 + len(reference.rows)
    again = bbmcl(*small.command(), "--runs", str(runs), **without)
    assert again.returncode == 2
    assert one_line(again.stderr).startswith("bbmcl: unknown model 'tiny-net'")
