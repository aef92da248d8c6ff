"""Real drivers, real SIGKILLs at seeded random instants: nothing finished is lost, doubled, torn or different.

BBMCL_TEST_KILLS: how many kills (default 3, one of each target); BBMCL_TEST_SEED: the instants (default 0).
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import small
from conftest import Reference
from processes import members, wait_until

from backdoorbench_mcl import artefacts
from backdoorbench_mcl.store import Stage, Store

KILLS = int(os.environ.get("BBMCL_TEST_KILLS", "3"))
SEED = int(os.environ.get("BBMCL_TEST_SEED", "0"))
JOBS_DIE = 3.0  # seconds: an orphaned job ends at once, but has to get a core for it
ALL_DIE = 60.0  # a fork server that is still importing torch learns of its driver's death when it has done so
TARGETS = ("driver", "worker", "group")


def workers(session: int) -> list[int]:
    """The jobs of a driver: grandchildren, because the fork server is their parent."""
    found = members(session)
    children = {process.pid for process in found if process.parent == session}
    return sorted(process.pid for process in found if process.parent in children)


@dataclass
class Driver:
    """`bbmcl matrix` as the leader of a session of its own, its output in files."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    @property
    def session(self) -> int:
        return self.process.pid

    def lives(self) -> bool:
        return self.process.poll() is None

    def assert_ended(self, jobs: list[int]) -> None:
        """That `jobs` are gone soon, and whatever else the driver has started a little later."""

        def alive() -> set[int]:
            return {process.pid for process in members(self.session)}

        assert wait_until(lambda: not alive() & set(jobs), JOBS_DIE), f"jobs outlive their driver: {alive()}"
        assert wait_until(lambda: not alive(), ALL_DIE), f"alive after the driver's death: {members(self.session)}"


@dataclass
class Launcher:
    """Starts drivers on one runs folder; what they leave in the temporary folder stays in this test's."""

    folder: Path
    env: dict[str, str]
    count: Iterator[int] = field(default_factory=itertools.count)
    # not below `folder`: the path of a socket may have 107 bytes, and pytest's folders are deep
    temporary: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="bk-")
    )

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @contextmanager
    def driver(self, attacks: str = "badnets,blend", defenses: str = "ft,mcldef") -> Iterator[Driver]:
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / f"driver-{next(self.count)}"
        command = [sys.executable, "-m", "backdoorbench_mcl.cli", *small.command(attacks, defenses)]
        command += ["--runs", str(self.runs), "--workers", "2", "--threads-per-job", "1", "--format", "json"]
        out, err = stem.with_suffix(".out"), stem.with_suffix(".err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**self.env, "TMPDIR": self.temporary.name},
                start_new_session=True,
            )
        try:
            yield Driver(process, out, err)
        finally:
            for member in members(process.pid):
                os.kill(member.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def launcher(tmp_path: Path, toy_env: dict[str, str]) -> Launcher:
    return Launcher(tmp_path, toy_env)


class Ledger:
    """What was finished so far; every look at the store must find all of it again, unchanged."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.rows: dict[str, dict[str, Any]] = {}
        self.stages: dict[str, Stage] = {}

    def check(self) -> None:
        if not (self.runs / "store.sqlite").exists():
            assert not self.rows
            return
        store = Store(self.runs)
        rows, stages = store.rows(), {stage.key: stage for stage in store.stages()}
        assert len({(row.attack, row.defense, row.victim_seed, row.defense_seed) for row in rows}) == len(rows)
        finished = {row.key: row.as_dict() for row in rows if row.state in ("ok", "n/a")}
        assert self.rows.items() <= finished.items()
        assert all(stages.get(key) == stage for key, stage in self.stages.items())
        for stage in stages.values():
            store.open(stage)  # verified against its name; Damaged otherwise
        complete = [path for path in (self.runs / "artefacts").glob("*/*") if not path.parent.name.startswith("tmp-")]
        assert all(artefacts.identify(path) == path.name for path in complete)  # those without a stage as well
        store.close()
        self.rows, self.stages = finished, stages

    def assert_equals(self, reference: Reference) -> None:
        store = Store(self.runs)
        assert small.essence(store.rows()) == small.essence(reference.rows)
        assert {s.key: s.artefact for s in store.stages()} == reference.artefacts
        store.close()


def strike(driver: Driver, target: str, rng: random.Random) -> bool:
    """Kill; False if there was nothing left to kill."""
    if target == "worker":
        wait_until(lambda: not driver.lives() or bool(workers(driver.session)), 60)
        alive = workers(driver.session)
        if not alive:
            return False
        try:
            os.kill(rng.choice(alive), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True
    if not driver.lives():
        return False
    jobs = workers(driver.session)
    if target == "group":
        os.killpg(driver.session, signal.SIGKILL)
    else:
        driver.process.kill()
    driver.process.wait()
    driver.assert_ended(jobs)
    return True


def history(folder: Path, env: dict[str, str], reference: Reference, kills: int, rng: random.Random) -> Counter[str]:
    """Matrices that are killed `kills` times in all and started again until they are done; returns what was killed."""
    done: Counter[str] = Counter()
    targets = itertools.cycle(rng.sample(TARGETS, len(TARGETS)))
    target = next(targets)
    for matrix in itertools.count():
        if done.total() >= kills:
            return done
        launcher = Launcher(folder / str(matrix), env)
        ledger = Ledger(launcher.runs)
        status: int | None = None
        while status != 0:
            with launcher.driver() as driver:
                while driver.lives() and done.total() < kills:
                    time.sleep(rng.uniform(0, 0.6 * reference.seconds))
                    if strike(driver, target, rng):
                        done[target] += 1
                        target = next(targets)
                    ledger.check()
                status = driver.process.wait()
                said = driver.stderr.read_text()
            assert status in (0, 1, -signal.SIGKILL), said
            assert status < 0 or "Traceback" not in said
        ledger.check()
        ledger.assert_equals(reference)
    raise AssertionError("unreachable")


@pytest.mark.timeout(360 + 30 * KILLS)
@pytest.mark.parametrize("kills", [KILLS, pytest.param(8, marks=pytest.mark.slow)])
def test_kills_at_any_moment_cost_nothing_that_was_finished(
    tmp_path: Path, toy_env: dict[str, str], reference: Reference, kills: int
) -> None:
    chains = range(2 if kills >= 2 * len(TARGETS) else 1)  # at once: a driver that starts up keeps one core busy
    with ThreadPoolExecutor(len(chains)) as pool:
        running = [
            pool.submit(
                history, tmp_path / f"chain-{i}", toy_env, reference, kills // len(chains) + (kills % len(chains)) * i,
                random.Random(2 * SEED + i),
            )
            for i in chains
        ]  # fmt: skip
    done = sum((future.result() for future in running), Counter[str]())
    assert done.total() == kills
    assert set(done) == set(TARGETS) or len(TARGETS) > kills // len(chains), done


def test_a_job_that_hangs_dies_with_its_driver(launcher: Launcher, reference: Reference) -> None:
    shutil.copytree(reference.runs, launcher.runs)
    with launcher.driver("badnets", "offender(how=hang)") as driver:
        assert wait_until(lambda: b"isolation " in driver.stderr.read_bytes(), 120)  # all methods have been read
        assert wait_until(lambda: bool(workers(driver.session)), 120)  # victim and trigger are there: it is the defense
        time.sleep(0.5)
        (job,) = workers(driver.session)
        driver.process.kill()
        driver.process.wait()
        driver.assert_ended([job])


@pytest.mark.usefixtures("sigint_heeded")
@pytest.mark.parametrize("way", [pytest.param("SIGTERM", marks=pytest.mark.slow), "SIGINT"])
def test_a_signal_ends_the_run_cleanly(launcher: Launcher, reference: Reference, way: str) -> None:
    ledger = Ledger(launcher.runs)
    with launcher.driver() as driver:
        assert wait_until(lambda: b"victim 0: ok" in driver.stderr.read_bytes() or not driver.lives(), 120)
        assert wait_until(lambda: bool(workers(driver.session)) or not driver.lives(), 60)
        jobs = workers(driver.session)
        os.kill(driver.session, getattr(signal, way))
        status = driver.process.wait(20)
        driver.assert_ended(jobs)
        said = [line for line in driver.stderr.read_text().splitlines() if line.startswith("bbmcl:")]
        word = "terminated" if way == "SIGTERM" else "stopped"
        assert said == [f"bbmcl: {word}; what was finished is stored, the same command goes on from there"]
        assert status == (143 if way == "SIGTERM" else 130)
        assert "Traceback" not in driver.stderr.read_text()
        assert driver.stdout.read_bytes() == b""
    ledger.check()
    assert ledger.stages
    assert all(reference.artefacts[key] == stage.artefact for key, stage in ledger.stages.items())
    assert list(Path(launcher.temporary.name).glob("bbmcl-*")) == []  # and its work folder is gone


@pytest.mark.usefixtures("sigint_heeded")
@pytest.mark.parametrize("way", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_while_classes_are_read_ends_the_run_cleanly(
    tmp_path: Path, toy_env: dict[str, str], way: str
) -> None:
    """To the whole group, as Ctrl-C goes, at a time when the fork server imports torch."""
    launcher = Launcher(tmp_path, {**toy_env, "BBMCL_CACHE": str(tmp_path / "empty-cache")})
    with launcher.driver() as driver:
        said = b"reading methods"
        assert wait_until(lambda: said in driver.stderr.read_bytes() or not driver.lives(), 60)
        time.sleep(0.7)
        os.killpg(driver.session, getattr(signal, way))
        assert driver.process.wait(30) == (143 if way == "SIGTERM" else 130)
        assert wait_until(lambda: list(Path(launcher.temporary.name).glob("bbmcl-*")) == [], 10)
        assert "Traceback" not in driver.stderr.read_text()
