"""The engine `ray` on a real cluster of two raylets: the same bits as the local engine, whatever is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
from conftest import Bbmcl
from nodes import ABSENT, HERE, Two, cluster_of_two
from processes import Process, below, processes, wait_until
from test_engine import EPOCH, Bench, made_bench, watch, weights

from backdoorbench_mcl import artefacts, datacache, plan, provenance, runner
from backdoorbench_mcl.engines import ray as engine_ray
from backdoorbench_mcl.engines.base import Engine, Finished, Progress
from backdoorbench_mcl.engines.local import Local
from backdoorbench_mcl.engines.ray import Ray
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.grant import Grants
from backdoorbench_mcl.matrix import Matrix
from backdoorbench_mcl.progress import Progress as Display
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Store

pytest.importorskip("ray", reason=ABSENT)
from backdoorbench_mcl.engines import broker

LIMIT = 6.0  # seconds that a job of these tests may take


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])


@pytest.fixture(scope="module")
def two(toy_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with pytest.MonkeyPatch.context() as patch, cluster_of_two(toy_env, tmp_path_factory.mktemp("nodes")) as made:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        yield made


@pytest.fixture
def bench(tmp_path: Path, toy: None) -> Bench:
    return made_bench(tmp_path)


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def engine(two: Two, notes: list[str], place: Path) -> Iterator[Ray]:
    """One for all that need no other: its Ray workers have their fork servers from then on."""
    Store(place / "runs").close()
    with Ray(place / "runs", two.address, timeout=LIMIT, say=notes.append) as made:
        yield made


# ---------------------------------------------------------------- the matrix


@dataclasses.dataclass(frozen=True)
class Here:
    """What the local engine makes of the matrix of these tests."""

    runs: Path
    rows: list[Row]
    artefacts: dict[str, str]


ASKED = ("badnets,blend", "mcldef")


@pytest.fixture(scope="module")
def here(two: Two, tmp_path_factory: pytest.TempPathFactory) -> Here:
    runs = tmp_path_factory.mktemp("here") / "runs"
    rows = runner.run_matrix(small.options(*ASKED), runner.Settings(runs, workers=2, threads=1), live=False)
    store = Store(runs)
    found = {stage.key: stage.artefact for stage in store.stages()}
    store.close()
    return Here(runs, rows, found)


class Spy(Ray):
    """Kills the second node while a job is under way there, and remembers which nodes had jobs."""

    two: Two
    said: list[str]
    nodes: frozenset[str] = frozenset()
    job: int = 0  # the process of that job
    lost: tuple[Process, ...] = ()  # all that the node had started
    goes_on: bool = False

    def events(self, patience: float = 0.1) -> list[Progress | Finished]:
        found = super().events(patience if self.job else 0.01)
        self.nodes |= {place["node"] for place in self.where.values()}
        for job in [] if self.job else self.two.jobs(self.two.second)[:1]:
            os.kill(job.pid, signal.SIGSTOP)  # it would be done before its Ray worker learns that the raylet is gone
            self.job, self.lost = job.pid, tuple(self.two.kill_second())
        if self.said and not self.goes_on:
            os.kill(self.job, signal.SIGCONT)  # orphaned by now
            self.goes_on = True
        return found


def test_a_node_that_is_killed_costs_nothing(two: Two, here: Here, tmp_path: Path) -> None:
    """Same rows and the same artefacts as the local engine; the second node has the data set sent along."""
    cache = two.cache / "second" / "arrays"
    assert not cache.exists()
    asked = small.resolve(small.options(*ASKED))
    graph, store, said = plan.build(asked), Store(tmp_path / "runs"), list[str]()
    grants = Grants(asked.data, store, device="cpu", precision=asked.precision, threads=1, isolation="landlock")
    spy = Spy(tmp_path / "runs", two.address, say=said.append)
    spy.two, spy.said = two, said
    second = two.second.node_id
    with Display(len(graph.cells), live=False) as display:
        rows = Matrix(graph, store, grants, spy, display).run()
    stages = store.stages()
    store.close()
    try:
        assert small.essence(rows) == small.essence(here.rows)
        assert {stage.key: stage.artefact for stage in stages} == here.artefacts
        assert len(said) == 1 and " lost a job (" in said[0] and said[0].endswith("it is run again, attempt 2 of 3")
        assert spy.nodes == {second, two.cluster.head_node.node_id}
        assert [path.name for path in cache.iterdir()] == [asked.data.hash]
        assert not datacache.check(dataclasses.replace(asked.data, folder=cache / asked.data.hash))
        gone = {process.pid for process in spy.lost}
        assert spy.job in gone
        assert wait_until(lambda: not gone & {process.pid for process in processes()}, 20)
        assert spy._broker.poll() is not None
    finally:
        two.add_second()


def test_the_command_on_a_cluster_gives_the_same_rows(two: Two, here: Here, process: Bbmcl) -> None:
    done = process(
        *small.command("badnets", "none"), "--engine", "ray", "--address", two.address, "--format", "json",
        "--workers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)  # nothing else on standard output
    (expected,) = (one for one in here.rows if one.key == row["key"])
    known = json.loads(json.dumps(expected.as_dict()))
    assert {k: row[k] for k in known.keys() - small.VARYING} == {k: known[k] for k in known.keys() - small.VARYING}
    assert "engine ray, up to 1 worker x 1 thread, isolation landlock" in done.stderr
    assert "WARNING" not in done.stderr and "raylet" not in done.stderr


# ---------------------------------------------------------------- jobs


def test_a_job_ends_as_it_does_on_the_local_engine(engine: Ray, bench: Bench, tmp_path: Path) -> None:
    ways = ("hang", "raise", "segfault", "kill", "print", "same")
    victim = bench.job(steps=EPOCH, snapshot="victim")
    ended: dict[str, dict[str, Finished]] = {}
    with Local(2, timeout=LIMIT) as local:
        local.start(victim)
        assert watch(local, 1)[0][0].state == "ok"
        names = ",".join(way if way == "same" else f"offender(how={way})" for way in ways)
        graph = plan.build(small.resolve(small.options("badnets", names)))
        both: tuple[tuple[str, Engine], ...] = (("ray", engine), ("local", local))
        for name, runs in both:
            for one in graph.nodes.values():
                if one.kind == "defend":
                    folder = tmp_path / name / str(one.methods["defense"].params.get("how", "same"))
                    folder.mkdir(parents=True)
                    bench.grants.fill(one, {"victim": victim / "out"}, folder)
                    runs.start(folder)
        for name, runs in both[::-1]:
            ended[name] = {event.folder.name: event for event in watch(runs, len(ways))[0]}
    assert set(ended["ray"]) == set(ended["local"]) == set(ways)
    for way in ways:
        there, at_home = ended["ray"][way], ended["local"][way]
        assert (there.state, there.reason) == (at_home.state, at_home.reason)
        assert there.log.splitlines()[-1:] == at_home.log.splitlines()[-1:]
        assert there.made["machine"] == provenance.machine_class("cpu")
        assert there.made["versions"]["torch"] and there.made["origin"]["host"]
        assert "command" not in there.made["origin"] and at_home.made == {}
    assert ended["ray"]["hang"].state == "timeout"
    assert ended["ray"]["segfault"].reason == "its process ended without a result (SIGSEGV)"
    assert ended["ray"]["print"].log == "noise on standard output\n"
    assert ended["ray"]["same"].result["isolation"] == "process"
    assert artefacts.identify(tmp_path / "ray" / "same" / "out") == artefacts.identify(tmp_path / "local/same/out")
    assert not (tmp_path / "ray" / "raise" / "out").exists()


def test_a_job_that_loses_its_ray_worker_goes_on_from_its_snapshot(engine: Ray, place: Path, notes: list[str]) -> None:
    """In the runs folder, which the node sees. To the weights of the local engine; progress is told all along."""
    notes.clear()
    bench = made_bench(place)
    straight, folder = bench.job(snapshot="straight"), bench.job()
    killed: list[str] = []

    def strike(event: Progress) -> None:
        if not killed and event.total // 5 <= event.done < event.total:
            killed.append(engine.where[event.folder]["pid"])
            os.kill(int(killed[0]), signal.SIGKILL)

    engine.start(folder)
    (finished,), seen = watch(engine, 1, strike)
    assert finished.state == "ok" and len(killed) == len(notes) == 1
    assert "resumed at step" in finished.log
    assert {event.total for event in seen[folder]} == {100 * EPOCH} and all(event.rate > 0 for event in seen[folder])
    with Local(1) as local:
        local.start(straight)
        assert watch(local, 1)[0][0].state == "ok"
    assert weights(folder) == weights(straight)


def test_a_node_with_other_packages_refuses_and_others_do_the_work(
    engine: Ray,
    notes: list[str],
    bench: Bench,
    two: Two,
    tmp_path: Path,
) -> None:
    odd = two.add(3, HERE / "other")
    try:
        with Ray(tmp_path / "runs", two.address, threads=3) as large:  # only the odd node has three cores
            assert large.free == 1
            large.start(bench.job(steps=EPOCH, snapshot="large"))
            (alone,), _ = watch(large, 1)
        assert alone.state == "failed"
        assert alone.reason.startswith("node ")
        assert alone.reason.endswith("has bbmcl-toy 2.0, the driver has 1.0; install that version there and run again")
        assert wait_until(lambda: bool(engine.events(0.2)) or engine.free == 5, 20)
        notes.clear()
        started, finished = 0, list[Finished]()

        def refused() -> bool:
            """Keeps all five slots busy until the odd node has had its turn."""
            nonlocal started
            while engine.free > 0 and not notes:
                started += 1
                engine.start(bench.job(steps=EPOCH, snapshot=f"refused-{started}"))
            finished.extend(event for event in engine.events() if isinstance(event, Finished))
            return bool(notes) and len(finished) == started

        assert wait_until(refused, 60)
        assert {event.state for event in finished} == {"ok"}
        assert set(notes) == {alone.reason}
    finally:
        two.cluster.remove_node(odd, allow_graceful=False)


def test_a_job_that_loses_its_ray_worker_again_and_again_is_killed(
    engine: Ray,
    notes: list[str],
    bench: Bench,
) -> None:
    notes.clear()
    folder = bench.job(steps=4000 * EPOCH, snapshot="again")
    engine.start(folder)
    killed: list[int] = []
    finished: list[Progress | Finished] = []

    def strikes() -> bool:
        finished.extend(event for event in engine.events(0.01) if isinstance(event, Finished))
        pid = int(engine.where.get(folder, {}).get("pid", 0))
        if pid and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return bool(finished)

    assert wait_until(strikes, 60)
    (event,) = finished
    assert isinstance(event, Finished) and (event.state, event.result) == ("killed", {})
    assert event.reason.startswith("its node or Ray worker was lost 3 times (")
    assert len(killed) == broker.ATTEMPTS and len(notes) == broker.ATTEMPTS - 1


# ---------------------------------------------------------------- ends


def test_drivers_that_end_leave_no_job(two: Two, here: Here, tmp_path: Path) -> None:
    """One by SIGTERM, one by SIGKILL, each while a job of its hangs on a node."""
    assert wait_until(lambda: not two.jobs(), 20)
    ways = (signal.SIGTERM, signal.SIGKILL)
    drivers: dict[signal.Signals, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory(prefix="rk-") as temporary:
        try:
            for way in ways:
                runs, errors = tmp_path / str(way) / "runs", tmp_path / f"{way}.err"
                shutil.copytree(here.runs, runs)
                (Path(temporary) / str(way)).mkdir()
                command = [
                    sys.executable,
                    "-m",
                    "backdoorbench_mcl.cli",
                    *small.command(ASKED[0], "offender(how=hang)"),
                ]
                command += ["--runs", str(runs), "--engine", "ray", "--address", two.address, "--workers", "1"]
                with errors.open("wb") as err:
                    drivers[way] = subprocess.Popen(
                        command, env={**two.env, "TMPDIR": f"{temporary}/{way}"}, stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE, stderr=err,
                    )  # fmt: skip
            assert wait_until(lambda: len(two.jobs()) == 2, 120)
            started = {process.pid for one in drivers.values() for process in below(one.pid)}
            assert len(started) >= 2  # the brokers
            for way, one in drivers.items():
                one.send_signal(way)
            status = {way: one.wait(40) for way, one in drivers.items()}
        finally:
            for one in drivers.values():
                one.kill()
                one.wait()
        assert wait_until(lambda: not two.jobs(), 30)
        assert wait_until(lambda: not started & {process.pid for process in processes()}, 30)
        assert list(Path(temporary, str(signal.SIGTERM)).glob("bbmcl-*")) == []
    assert status == {signal.SIGTERM: 143, signal.SIGKILL: -9}
    said = (tmp_path / f"{signal.SIGTERM}.err").read_text()
    assert said.splitlines()[-1] == (
        "bbmcl: terminated; what was finished is stored, the same command goes on from there"
    )
    assert "Traceback" not in said
    assert all(one.stdout is not None and one.stdout.read() == b"" for one in drivers.values())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--engine", "rya"), "--engine 'rya': expected local or ray"),
        (("--address", "auto"), "--address auto: the local engine has none; add --engine ray"),
        (("--engine", "ray", "--address", "nonsense"), "--address 'nonsense': expected auto or HOST:PORT"),
        (("--engine", "ray", "--address", "127.0.0.1:9"), "no Ray cluster at 127.0.0.1:9: Connection refused; start"),
        (("--engine", "ray", "--isolation", "inline"), "--isolation inline: runs jobs in the driver"),
        (("--engine", "ray", "--gpus-per-job", "0"), "--gpus-per-job 0.0: expected a share above 0"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_one_line(process: Bbmcl, options: tuple[str, ...], line: str) -> None:
    done = process(*small.command("badnets", "none"), *options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"bbmcl: {line}")
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_an_address_where_nobody_answers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ray, "CONNECT", 3.0)
    Store(tmp_path / "runs").close()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no Ray cluster answers at {address} within 3 s"):
            Ray(tmp_path / "runs", address)


def test_without_ray_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'backdoorbench-mcl\[ray\]'"):
        runner.check(runner.Settings(engine="ray"))


def test_the_driver_imports_no_ray() -> None:
    code = "import sys, backdoorbench_mcl.cli, backdoorbench_mcl.runner; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---------------------------------------------------------------- last, for it ends the cluster


def test_a_head_node_that_is_killed_is_one_line(two: Two, tmp_path: Path) -> None:
    Store(tmp_path / "runs").close()
    with Ray(tmp_path / "runs", two.address) as engine:
        os.kill(two.raylet(two.cluster.head_node), signal.SIGKILL)

        def lost() -> bool:
            try:
                return engine.events(0.1) is None
            except UserError as error:
                return str(error).startswith("the connection to Ray was lost (the Ray node of this machine has ended);")

        assert wait_until(lost, 40)
