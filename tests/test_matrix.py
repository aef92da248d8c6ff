"""The matrix on real processes and a toy: what is shared, what resumes, what fails alone, what is bit-identical."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import small
from conftest import Bbmcl

from backdoorbench_mcl import runner
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.plugins import Plugin
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_env: dict[str, str]) -> tuple[Path, list[Row]]:
    """A finished 2x2 matrix: its runs folder and its rows."""
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        runs = tmp_path_factory.mktemp("finished") / "runs"
        return runs, runner.run_matrix(small.options(), Settings(runs=runs, workers=2, threads=1), live=False)


def artefacts(runs: Path) -> dict[str, str]:
    return {stage.key: stage.artefact for stage in Store(runs).stages()}


def by_label(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.attack, row.defense): row for row in rows}


def test_large_images_without_a_table_of_their_own_are_pointed_out() -> None:
    asked, using = small.resolve(small.options()), runner.Resources(1, 1, "process")
    large = replace(asked, data=replace(asked.data, shape=(3, 96, 128)))
    told = [line for line in runner.summary(large, using) if line.startswith("note: ")]
    assert told == [
        "note: images of 96x128, for which preset paper has no table: what you do not set is meant for 32x32. "
        "At 224x224 (imagenet20) this preset has badnets.size=32, blend.alpha=0.2, defend.augment=resized-crop+flip, "
        "nc-box.lam=0.001, train.augment=resized-crop+flip, train.batch=32, train.epochs=100, "
        "train.milestones=[0.2, 0.7]"
    ]
    signs = replace(large, dataset=replace(asked.dataset, label="gtsrb(size=224)"))  # its table has no such sizes
    assert any("note: " in line for line in runner.summary(signs, using))
    named = replace(large, dataset=replace(asked.dataset, label="imagenet20"), preset="authors")
    for other in (asked, named):  # 8x8; a data set that has its table
        assert not any("note: " in line for line in runner.summary(other, using))


@pytest.mark.parametrize(
    ("preset", "budget", "there", "absent"),
    [
        ("paper", "full", {"nad.schedule=shared", "robust.batch=32", "train.epochs=100"}, {"resnet18.stem", "trojan."}),
        ("authors", "full", {"resnet18.feature=grid", "resnet18.stem=cifar", "badnets.margin=11"}, {"blend.alpha"}),
        ("clean", "mid", {"badnets.size=32", "blend.alpha=0.2", "nc-box.lam=0.001"}, {"train.epochs", "mesa."}),
    ],
)
def test_the_parameters_that_large_images_ask_for_are_named(
    preset: str, budget: str, there: set[str], absent: set[str]
) -> None:
    """Those of the run's own methods for which preset and budget have another value at 224x224."""
    asked = small.resolve(
        small.options(
            "badnets,blend,cl", "nad,mcldef", model="resnet18", preset=preset, budget=budget,
            overrides=("badnets.target=1", "blend.target=1", "cl.target=1"),
        )
    )  # fmt: skip
    large = replace(asked, data=replace(asked.data, shape=(3, 96, 96)))
    (told,) = [line for line in runner.summary(large, runner.Resources(1, 1, "process")) if line.startswith("note: ")]
    assert there <= set(told.partition(" this preset has ")[2].split(", "))
    assert not [name for name in absent if name in told]


def test_every_cell_is_filled(finished: tuple[Path, list[Row]]) -> None:
    _, rows = finished
    assert [(r.attack, r.defense) for r in rows] == [
        (attack, defense) for attack in ("badnets", "blend") for defense in ("before", "ft", "mcldef")
    ]
    assert {row.state for row in rows} == {"ok"}
    for row in rows:
        assert row.asr is not None
        assert row.ba is not None
        assert row.asr_k is not None
        assert row.asr_n == 75
        assert row.ba_n == 100
        assert row.asr == 100 * row.asr_k / 75
        assert (row.asr_k or 0) + (row.ra_k or 0) <= 75
        assert row.toy
    table = by_label(rows)
    assert (table["badnets", "before"].asr or 0) > 95
    assert table["badnets", "ft"].asr_before == table["badnets", "before"].asr
    assert table["badnets", "mcldef"].knows == ("target",)
    assert table["badnets", "mcldef"].uses_labels is False
    assert (table["badnets", "mcldef"].inverter or "").startswith("nc-box")
    assert table["badnets", "mcldef"].inverter_success is not None
    assert table["badnets", "ft"].clean_n == 64
    # the inversion is charged to its user on top of the cell's own time
    assert (table["badnets", "mcldef"].seconds_shared or 0) > (table["badnets", "mcldef"].seconds or 0)


def test_stages_are_shared(finished: tuple[Path, list[Row]]) -> None:
    kinds = [stage.kind for stage in Store(finished[0]).stages()]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "train": 2,
        "trial": 2,
        "invert": 2,
        "defend": 4,
        "predict": 6,
    }


def test_a_finished_matrix_computes_nothing(finished: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    runs, rows = finished

    def refuse(*_: object) -> None:
        raise AssertionError("a job was started")

    monkeypatch.setattr("backdoorbench_mcl.engines.local.Local.start", refuse)
    again = runner.run_matrix(small.options(), Settings(runs=runs, workers=2, threads=1), live=False)
    assert again == rows
    assert runner.stored_rows(runs) != []


def test_one_worker_gives_the_same_bits(finished: tuple[Path, list[Row]], tmp_path: Path) -> None:
    runs, rows = finished
    reverse = small.options(attacks="blend,badnets", defenses="mcldef,ft")
    alone = runner.run_matrix(reverse, Settings(runs=tmp_path / "runs", workers=1, threads=1), live=False)
    assert small.essence(alone) == small.essence(rows)
    assert artefacts(tmp_path / "runs") == artefacts(runs)


def test_inline_gives_the_same_bits(finished: tuple[Path, list[Row]], tmp_path: Path, toy_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "backdoorbench_mcl.cli", *small.command("badnets"), "--isolation", "inline"]
    command += ["--threads-per-job", "1", "--runs", str(tmp_path / "runs"), "--format", "json"]
    done = subprocess.run(command, env=toy_env, capture_output=True, text=True, timeout=200, check=True)
    rows = [Row.from_dict(item) for item in json.loads(done.stdout)]
    assert {row.isolation for row in rows} == {"inline"}
    expected = artefacts(finished[0])
    assert all(expected[key] == artefact for key, artefact in artefacts(tmp_path / "runs").items())
    isolated = [row for row in finished[1] if row.attack == "badnets"]
    assert small.essence([replace(row, isolation=isolated[0].isolation) for row in rows]) == small.essence(isolated)


@pytest.mark.slow  # the order of one worker, above, is another one too
def test_cells_computed_one_by_one_have_the_same_bits(finished: tuple[Path, list[Row]], tmp_path: Path) -> None:
    runs, rows = finished
    backwards = [(row.attack, row.defense) for row in reversed(rows) if row.defense != "before"]
    for attack, defense in (*backwards[::2], *backwards[1::2]):  # each by a run of its own
        runner.run_matrix(small.options(attack, defense), Settings(tmp_path / "runs", 1, 1), live=False)
    assert small.essence(runner.stored_rows(tmp_path / "runs")) == small.essence(rows)
    assert artefacts(tmp_path / "runs") == artefacts(runs)


@pytest.mark.usefixtures("toy")
def test_a_row_remembers_what_it_rests_on_after_the_cell_of_that_is_settled(tmp_path: Path) -> None:
    """mcldef+ begins with what mcldef made, whose own cell is settled, and let go, while mcldef+ still runs."""
    asked = small.options("badnets", "mcldef,mcldef+", overrides=(
        *small.overrides("badnets", "mcldef"), "mcldef+.inverter=nc-box(steps=20)", "mcldef+.steps=300",
    ))  # fmt: skip
    rows = runner.run_matrix(asked, Settings(runs=tmp_path / "runs", workers=2, threads=1), live=False)
    found = {row.defense: row for row in rows}
    assert {row.state for row in rows} == {"ok"}
    first, second = (found[name].seconds_shared for name in ("mcldef", "mcldef+"))
    assert first is not None and second is not None
    own = found["mcldef+"].seconds
    assert own is not None and second > own


def test_two_drivers_share_one_store(finished: tuple[Path, list[Row]], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "backdoorbench_mcl.cli", *small.command(), "--workers", "2", "--runs", str(runs)]
    drivers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [driver.communicate(timeout=240) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert (
        outputs[0][0].split("Details")[0].split("Isolation")[0]
        == outputs[1][0].split("Details")[0].split("Isolation")[0]
    )
    assert small.essence(runner.stored_rows(runs)) == small.essence(finished[1])
    assert artefacts(runs) == artefacts(finished[0])
    trained = [line for _, stderr in outputs for line in stderr.splitlines() if "victim 0: ok" in line]
    assert len(trained) == 2  # each victim by one driver only


def test_a_new_defense_reuses_the_victims(finished: tuple[Path, list[Row]]) -> None:
    runs, _ = finished
    before = set(artefacts(runs))
    rows = runner.run_matrix(small.options(attacks="badnets", defenses="same"), Settings(runs=runs), live=False)
    fresh = [stage.kind for stage in Store(runs).stages() if stage.key not in before]
    assert sorted(fresh) == ["defend", "predict"]
    assert by_label(rows)["badnets", "same"].asr == by_label(rows)["badnets", "before"].asr
    assert by_label(rows)["badnets", "same"].der == 50


def test_a_cell_is_judged_before_the_next_one_is_repaired(tmp_path: Path) -> None:
    """A run that is stopped half-way has half of its rows, not half of the work behind each."""
    runs = tmp_path / "runs"
    one = small.options(attacks="badnets", defenses="same", defense_seeds="0-3")
    runner.run_matrix(one, Settings(runs=runs, workers=1, threads=1), live=False)
    kinds = [stage.kind for stage in Store(runs).stages()]
    assert kinds == ["train", "trial", "predict", *["defend", "predict"] * 4]


def test_a_weak_victim_stops_its_line(tmp_path: Path) -> None:
    weak = small.options(attacks="badnets(rate=0.001)", defenses="ft,same")
    rows = runner.run_matrix(weak, Settings(runs=tmp_path / "runs"), live=False)
    assert [(row.state, row.reason, row.gate) for row in rows] == [
        ("ok", "", "weak"), ("n/a", "weak attack", "weak"), ("n/a", "weak attack", "weak"),
    ]  # fmt: skip
    assert "defend" not in {stage.kind for stage in Store(tmp_path / "runs").stages()}
    assert runner.exit_status(rows) == 0


def test_the_control_has_no_asr_and_no_gate(tmp_path: Path) -> None:
    control = small.options(attacks="none(target=1)", defenses="same", overrides=("train.steps=60",))
    rows = runner.run_matrix(control, Settings(runs=tmp_path / "runs"), live=False)
    assert [row.state for row in rows] == ["ok", "ok"]
    assert [(row.asr, row.asr_n, row.gate, row.der) for row in rows] == [(None, 0, "", None)] * 2
    assert rows[0].ftr is not None


OFFENCES = {
    "raise": ("failed", "ValueError at bbmcl_toy_methods.py:282: first line"),
    "exit": ("failed", "SystemExit at bbmcl_toy_methods.py:284: 3"),
    "segfault": ("killed", "SIGSEGV"),
    "kill": ("killed", "SIGKILL"),
    "nan": ("diverged", "weights are not finite"),
    "architecture": ("failed", "changed the architecture"),
    "hook": ("failed", "does more than the network with its weights"),
    "normalisation": ("failed", "does more than the network with its weights"),
    "nothing": ("failed", "returned NoneType, expected a Classifier"),
    "grant": ("failed", "did not declare; add 'trigger' to its `knows`"),
    "full-disk": ("failed", "no space left on the device"),
    "hang": ("timeout", "--timeout 12 s"),
}


def test_offenders_fail_alone(finished: tuple[Path, list[Row]], process: Bbmcl, bbmcl: Bbmcl) -> None:
    runs, _ = finished
    offenders = ",".join(f"offender(how={how})" for how in OFFENCES)
    done = process(
        *small.command("badnets", f"ft,{offenders},offender(how=print),offender(how=walk-memory),mcldef"),
        "--runs", str(runs), "--timeout", "12", "--format", "json", "--workers", "2",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    rows = by_label([Row.from_dict(item) for item in json.loads(done.stdout)])
    for how, (state, reason) in OFFENCES.items():
        row = rows["badnets", f"offender(how={how})"]
        assert row.state == state, row
        assert reason in row.reason
        assert "\n" not in row.reason
        assert row.asr is None
    for label in ("ft", "mcldef", "offender(how=print)", "offender(how=walk-memory)"):
        assert rows["badnets", label].state == "ok", rows["badnets", label].reason
    assert "noise on standard output" not in done.stdout + done.stderr
    # to diverge is a result and stays; what failed is tried again unless --no-retry
    bad = small.command("badnets", "offender(how=nan),offender(how=raise)")
    again = bbmcl(*bad, "--runs", str(runs), "--no-retry")
    assert again.returncode == 1
    assert "offender(how=raise) on badnets 0: failed" not in again.stderr  # not run
    retried = bbmcl(*bad, "--runs", str(runs))
    assert "offender(how=raise) on badnets 0: failed" in retried.stderr
    assert "offender(how=nan) on badnets 0: diverged" not in retried.stderr


def test_a_defense_cannot_open_the_stored_trigger(finished: tuple[Path, list[Row]]) -> None:
    runs, _ = finished
    secrets = sorted((runs / "artefacts").rglob("attack.safetensors"))
    assert secrets
    spy = small.options(attacks="badnets", defenses=f"offender(how=read-trigger, path='{secrets[0]}')")
    spied = by_label(runner.run_matrix(spy, Settings(runs=runs), live=False))
    row = next(row for (_, defense), row in spied.items() if defense != "before")
    if row.isolation != "landlock":
        pytest.skip("this kernel has no Landlock: nothing keeps a defense from other files")
    assert row.state == "failed"
    assert "PermissionError" in row.reason


def test_a_damaged_artefact_is_computed_again(finished: tuple[Path, list[Row]], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    one = small.options(attacks="badnets", defenses="same")
    first = runner.run_matrix(one, Settings(runs=runs), live=False)
    victim = next(stage for stage in Store(runs).stages() if stage.kind == "train")
    file = Store(runs).artefacts.path(victim.artefact) / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    both = small.options(attacks="badnets", defenses="same,ft")
    rows = runner.run_matrix(both, Settings(runs=runs), live=False)
    assert {row.state for row in rows} == {"ok"}
    assert small.essence(rows[:2]) == small.essence(first)
    assert Store(runs).open(victim).exists()


def test_observers_see_every_row_and_cannot_stop_the_run(
    finished: tuple[Path, list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    from backdoorbench_mcl.engines.local import Local
    from backdoorbench_mcl.grant import Grants
    from backdoorbench_mcl.matrix import Matrix
    from backdoorbench_mcl.progress import Progress

    runs, rows = finished
    store = Store(runs)
    with sqlite3.connect(store.folder / "store.sqlite") as db:
        db.execute("DELETE FROM row")
    asked = small.resolve(small.options())
    seen: list[Row] = []

    def good(row: Row) -> None:
        seen.append(row)

    calls: list[str] = []

    def bad(row: Row) -> None:
        raise RuntimeError("oops")

    def ends(row: Row) -> None:
        calls.append("ends")
        print("noise on standard output")
        raise SystemExit(0)

    grants = Grants(asked.data, store, device="cpu", precision=asked.precision, threads=1, isolation="process")
    from backdoorbench_mcl import plan

    graph = plan.build(asked)
    guests = [(Plugin(str(act.__name__), "a", "1.0", "m", "/m.py"), act) for act in (bad, ends, good)]
    with Progress(len(graph.cells), live=False) as display:
        again = Matrix(graph, store, grants, Local(2), display, observers=guests).run()
    assert [row.key for row in seen] == [row.key for row in again] == [row.key for row in rows]
    shown = capsys.readouterr()
    for name, told in (("bad", "raised RuntimeError: oops"), ("ends", "called sys.exit(0)")):
        line = f"plugin a/{name} (a 1.0, /m.py): bbmcl_cell_finished {told}; skip it with BBMCL_DISABLE={name}"
        assert shown.err.splitlines().count(line) == 1
    assert calls == ["ends"]
    assert shown.out == ""


def test_a_store_that_fills_up_stops_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = threading.Event()
    original = Store.commit

    def commit(self: Store, *arguments: object) -> object:
        if stored.is_set():
            raise UserError(self.ledger.unusable(OSError(28, "No space left on device")))
        stored.set()
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "commit", commit)
    one = small.options(attacks="badnets", defenses="same")
    with pytest.raises(UserError, match="No space left on device; make room"):
        runner.run_matrix(one, Settings(runs=tmp_path / "runs"), live=False)
    monkeypatch.undo()
    assert len(Store(tmp_path / "runs").stages()) == 1  # what was finished is kept


def test_without_landlock_a_stray_read_marks_the_row(finished: tuple[Path, list[Row]], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    spy = small.options(attacks="badnets", defenses=f"offender(how=read-trigger, path='{tmp_path / 'secret'}'),same")
    rows = runner.run_matrix(spy, Settings(runs=finished[0], isolation="process"), live=False)
    assert (rows[1].state, rows[1].isolation) == ("ok", "process")
    assert str((tmp_path / "secret").resolve()) in rows[1].strays
    assert rows[2].strays == ()


def test_a_repair_of_another_victim_is_not_compared_with_this_one(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    one = small.options(attacks="badnets", defenses="same")
    first = runner.run_matrix(one, Settings(runs=runs), live=False)
    store = Store(runs)
    victim, repair = (next(s for s in store.stages() if s.kind == kind) for kind in ("train", "defend"))
    other = dict(repair.numerics["inputs"], victim="0" * 64)  # as if it came from a machine whose victim differs
    with sqlite3.connect(store.folder / "store.sqlite") as db:
        db.execute("DELETE FROM row")
        db.execute(
            "UPDATE stage SET numerics = ? WHERE key = ?",
            (json.dumps({**repair.numerics, "inputs": other}), repair.key),
        )
    again = runner.run_matrix(one, Settings(runs=runs), live=False)
    assert small.essence(again) == small.essence(first)
    made = Store(runs).stage(repair.key)
    assert made is not None
    assert made.numerics["inputs"] == {"victim": victim.artefact}
