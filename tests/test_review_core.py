"""Promises of the core that nothing else holds it to: what a job is told, what survives a broken guest or artefact."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from safetensors.numpy import save_file

from backdoorbench_mcl import archive, cells, evaluate, plan, runner
from backdoorbench_mcl.artefacts import Damaged
from backdoorbench_mcl.datacache import DataInfo
from backdoorbench_mcl.engines.local import Finished, Local
from backdoorbench_mcl.errors import NotApplicable, PluginError, UserError
from backdoorbench_mcl.grant import Grants
from backdoorbench_mcl.matrix import Matrix
from backdoorbench_mcl.needed import check_declarations
from backdoorbench_mcl.plan import Plan
from backdoorbench_mcl.plugins import Offer
from backdoorbench_mcl.progress import Progress
from backdoorbench_mcl.registry import Described
from backdoorbench_mcl.request import Request
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store

TINY = small.options(attacks="badnets", defenses="mcldef")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_env: dict[str, str]) -> Path:
    """The runs folder of a finished cell; for reading only."""
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        runs = tmp_path_factory.mktemp("review") / "runs"
        rows = runner.run_matrix(TINY, Settings(runs=runs, workers=1, threads=1), live=False)
        assert {row.state for row in rows} == {"ok"}
        return runs


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def again(runs: Path) -> list[Row]:
    return runner.run_matrix(TINY, Settings(runs=runs, workers=1, threads=1), live=False)


def forget_rows(runs: Path) -> None:
    store = Store(runs)
    with sqlite3.connect(store.folder / "store.sqlite") as db:
        db.execute("DELETE FROM row")
    store.close()


# ---------------------------------------------------------------- what a job is told


@pytest.fixture
def specs(finished: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """spec.json of one job of each kind."""
    asked = small.resolve(TINY)
    graph = plan.build(asked)
    store = Store(finished)
    grants = Grants(asked.data, store, device="cpu", precision="fp32", threads=1, isolation="process")
    found: dict[str, dict[str, Any]] = {}
    for node in graph.nodes.values():
        folder = tmp_path / f"{node.kind}-{node.gated_by is None}"
        folder.mkdir()
        inputs = {role: store.open(stage) for role, key in node.inputs.items() if (stage := store.stage(key))}
        grants.fill(node, inputs, folder)
        found[node.kind] = json.loads((folder / "spec.json").read_text())
    store.close()
    return found


def test_only_the_attacker_is_told_the_seeds_of_the_attack(specs: dict[str, dict[str, Any]]) -> None:
    assert {kind: set(spec["seeds"]) for kind, spec in specs.items()} == {
        "train": {"init", "trigger", "poison", "order"}, "trial": {"init", "stamp"},
        "invert": {"init", "invert", "stamp"}, "defend": {"init", "order"}, "predict": {"init"},
    }  # fmt: skip
    secret = {specs["train"]["seeds"][role] for role in ("trigger", "poison", "order")}
    for kind in ("invert", "defend", "predict"):
        assert not secret & set(specs[kind]["seeds"].values())


def test_the_judge_is_not_told_how_its_images_were_shuffled(specs: dict[str, dict[str, Any]], finished: Path) -> None:
    text = json.dumps(specs["predict"])
    keys = plan.build(small.resolve(TINY)).nodes  # the order is drawn from the key of the stage
    assert not [key for key in keys if key in text]
    assert str(finished) not in text


def test_an_inversion_without_a_target_label_is_one_line(finished: Path, tmp_path: Path) -> None:
    asked = small.resolve(TINY)
    store = Store(finished)
    grants = Grants(asked.data, store, device="cpu", precision="fp32", threads=1, isolation="process")
    node = next(node for node in plan.build(asked).nodes.values() if node.kind == "invert")
    victim = store.stage(node.inputs["victim"])
    assert victim is not None
    with pytest.raises(NotApplicable, match=r"nc-box.*: the attack has no single target label"):
        grants.fill(dataclasses.replace(node, target=None), {"victim": store.open(victim)}, tmp_path)
    store.close()


def test_a_child_does_not_inherit_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bbmcl", "matrix", "--attacks", "badnets(target=7)"])
    asked = small.options(attacks="none(target=1)", defenses="offender(how=tell)", overrides=("train.steps=5",))
    rows = runner.run_matrix(asked, Settings(runs=tmp_path / "runs", workers=1, threads=1), live=False)
    told = json.loads(rows[1].reason.partition(": ")[2])
    assert len(told["argv"]) == 1
    assert told["environ"] == []


def described(**changes: Any) -> Described:
    base = Described(
        kind="defense", label="mydef", full_name="pkg/mydef", target="a:B", suffix="",
        params={}, version=1, repr="", identity={"name": "pkg/mydef", "version": 1, "params": {}},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def offer(*may_know: str) -> Offer:
    from backdoorbench_mcl.hooks import Entry
    from backdoorbench_mcl.plugins import Plugin

    return Offer("defense", Entry("mydef", "a:B", may_know=may_know), Plugin("mydef", "pkg", "1", "a"))


def test_knowledge_by_way_of_a_need_is_declared() -> None:
    needs = {"trigger": {"kind": "trigger", "method": "nc-box", "verdict": None}}
    told: dict[str, Any] = {"needs": needs, "told": ("target",)}
    with pytest.raises(PluginError, match="add 'target' to its `knows`"):
        check_declarations(described(**told), offer("target"))
    check_declarations(described(**told, knows=("target",)), offer("target"))


def test_knowledge_that_the_entry_hides_is_refused() -> None:
    with pytest.raises(PluginError, match=r"told target, which its Entry does not list in may_know=\(\)"):
        check_declarations(described(knows=("target",)), offer())


# ---------------------------------------------------------------- one failure never stops it


class Script:
    """An engine whose jobs end as they are told."""

    spreads = False

    def __init__(self, write: Any) -> None:
        self.write = write
        self.done: list[Finished] = []

    @property
    def free(self) -> int:
        return 1 - len(self.done)

    def start(self, folder: Path) -> None:
        (folder / "out").mkdir()
        state = self.write(folder)
        self.done.append(Finished(folder, "ok", "", "", {"state": "ok", "seconds": 1.0, "peak_mb": 1.0, **state}))

    def events(self, patience: float = 0.5) -> list[Finished]:
        done, self.done = self.done, []
        return done

    def close(self) -> None:
        self.done.clear()


def run_with(engine: Any, runs: Path, graph: Plan | None = None) -> list[Row]:
    asked = small.resolve(TINY)
    store = Store(runs)
    grants = Grants(asked.data, store, device="cpu", precision="fp32", threads=1, isolation="process")
    graph = plan.build(asked) if graph is None else graph
    try:
        with Progress(len(graph.cells), live=False) as display:
            return Matrix(graph, store, grants, engine, display).run()
    finally:
        store.close()


def no_files(folder: Path) -> dict[str, Any]:
    return {}


def garbage(folder: Path) -> dict[str, Any]:
    (folder / "out" / "meta.json").write_text("{}")
    (folder / "out" / "weights.safetensors").write_bytes(b"garbage")
    return {}


def no_number(folder: Path) -> dict[str, Any]:
    (folder / "out" / "meta.json").write_text("{}")
    return {"seconds": "long"}


@pytest.mark.parametrize("write", [no_files, garbage, no_number])
def test_a_useless_result_is_a_failed_cell(write: Any, tmp_path: Path) -> None:
    rows = run_with(Script(write), tmp_path / "runs")
    assert {row.state for row in rows} == {"failed"}
    assert all("left a result of no use" in row.reason for row in rows)


def test_too_few_labels_are_a_failed_cell(copied: Path) -> None:
    def write(folder: Path) -> dict[str, Any]:
        save_file({"labels": np.zeros(3, np.int64)}, folder / "out" / "labels.safetensors")
        (folder / "out" / "meta.json").write_text("{}")
        return {}

    forget_rows(copied)
    store = Store(copied)
    with sqlite3.connect(store.folder / "store.sqlite") as db:
        db.execute("DELETE FROM stage WHERE kind = 'predict'")
    store.close()
    rows = run_with(Script(write), copied)
    assert {row.state for row in rows} == {"failed"}


def test_predictions_that_cannot_be_scored_fail_their_cell(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> dict[str, Any]:
        raise PluginError("the attack counts 3 images whose goal is their own label")

    forget_rows(copied)
    monkeypatch.setattr(evaluate, "measure", broken)
    rows = again(copied)
    assert [row.state for row in rows] == ["failed", "failed"]
    assert "cannot be scored: the attack counts 3 images" in rows[0].reason


@pytest.mark.parametrize("text", ["[]", '{"state": "banana", "reason": ""}', '{"state": "ok"}'])
def test_a_result_that_is_none_reads_as_a_death(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    assert Local(1)._conclude(tmp_path, 0, None).state == "killed"


# ---------------------------------------------------------------- damage


def damage(runs: Path, kind: str, name: str) -> None:
    store = Store(runs)
    stage = next(stage for stage in store.stages() if stage.kind == kind)
    file = store.artefacts.path(stage.artefact) / name
    store.close()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_row_outlives_the_inversion_behind_it(copied: Path) -> None:
    forget_rows(copied)
    damage(copied, "invert", "trigger.safetensors")
    rows = again(copied)
    assert [row.state for row in rows] == ["ok", "ok"]
    assert rows[1].inverter_success is None


def test_seconds_of_a_lost_stage_are_unknown_not_nought(copied: Path) -> None:
    forget_rows(copied)
    store = Store(copied)
    with sqlite3.connect(store.folder / "store.sqlite") as db:
        db.execute("DELETE FROM stage WHERE kind = 'defend'")
    store.close()
    rows = again(copied)
    assert (rows[1].state, rows[1].seconds, rows[1].seconds_shared) == ("ok", None, None)


def test_two_drivers_may_drop_one_damaged_artefact(copied: Path) -> None:
    damage(copied, "train", "weights.safetensors")
    one, two = Store(copied), Store(copied)
    stage = next(stage for stage in one.stages() if stage.kind == "train")
    for store in (one, two):
        with pytest.raises(Damaged, match=r"holds the content of|No such file"):
            store.open(stage)
        store.close()


# ---------------------------------------------------------------- rows


def test_what_an_inverter_opened_marks_the_rows_that_rely_on_it(copied: Path) -> None:
    forget_rows(copied)
    store = Store(copied)
    with sqlite3.connect(store.folder / "store.sqlite") as db:
        for key, numerics in db.execute("SELECT key, numerics FROM stage WHERE kind = 'invert'").fetchall():
            loose = {**json.loads(numerics), "isolation": "inline", "strays": ["/secret"]}
            db.execute("UPDATE stage SET numerics = ? WHERE key = ?", (json.dumps(loose), key))
    store.close()
    rows = again(copied)
    assert (rows[1].isolation, rows[1].strays) == ("inline", ("/secret",))
    assert rows[0].strays == ()


def test_a_failure_never_replaces_a_result(finished: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    good = Store(finished).rows()[0]
    store.put_row(good)
    store.put_row(dataclasses.replace(good, state="timeout", asr=None))
    assert store.rows() == [good]
    store.close()


def test_an_imported_result_replaces_a_failure(finished: Path, tmp_path: Path) -> None:
    source, target = Store(finished), Store(tmp_path / "runs")
    archive.export(source, tmp_path / "all.tar")
    bad = [dataclasses.replace(row, state="failed", reason="no power", asr=None) for row in source.rows()]
    for row in bad:
        target.put_row(row)
    archive.load(target, tmp_path / "all.tar")
    assert small.essence(target.rows()) == small.essence(source.rows())
    assert archive.load(target, tmp_path / "all.tar") == (0, 0)
    source.close()
    target.close()


def test_a_stored_row_takes_the_preset_and_budget_that_were_asked_for(finished: Path) -> None:
    assert [row.budget for row in again(finished)] == ["quick", "quick"]
    other = dataclasses.replace(
        TINY, budget="full", overrides=(*TINY.overrides, "nc-box.steps=20"),
    )  # fmt: skip
    rows = runner.run_matrix(other, Settings(runs=finished, workers=1, threads=1), live=False)
    assert [row.budget for row in rows] == ["full", "full"]
    assert [row.key for row in rows] == [row.key for row in again(finished)]


# ---------------------------------------------------------------- small doors


def test_a_dry_run_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    runner.dry_run(TINY, Settings(runs=tmp_path / "notes"))
    assert list((tmp_path / "notes").iterdir()) == []


def test_landlock_asked_for_is_landlock_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backdoorbench_mcl.confine.abi_version", lambda: 0)
    with pytest.raises(UserError, match="this kernel has none"):
        runner.run_matrix(TINY, Settings(runs=tmp_path / "runs", isolation="landlock"), live=False)


# ---------------------------------------------------------------- cost

LIMIT = 15.0  # seconds; 2 on a quiet core, so that only another order of growth fails on a busy one


def large(attacks: int, defenses: int, seeds: int) -> Request:
    info = DataInfo(
        "k", "h" * 64, "a" * 64, "b" * 64, 50000, 10000, 10, (3, 32, 32), (0.5,) * 3, (0.2,) * 3, True, False, "full",
        "lossless", (5000,) * 10, Path("nowhere"),
    )  # fmt: skip

    def one(kind: str, name: str, **rest: Any) -> Described:
        identity = {"name": f"pkg/{name}", "version": 1, "params": {"target": 5, "rate": 0.1}}
        return described(kind=kind, label=name, identity=identity, params={"augment": "none"}, **rest)

    needs = {"trigger": {"kind": "trigger", "method": "nc", "verdict": None}}
    return Request(
        one("dataset", "cifar10"), info, one("model", "wrn"),
        [one("attack", f"a{i}", attack_target=5) for i in range(attacks)],
        [one("defense", f"d{i}", knows=("target",), needs=needs) for i in range(defenses)],
        {("inverter", "nc"): one("inverter", "nc")}, one("recipe", "train"), one("recipe", "defend"), range(seeds), [0],
        [0.05], "paper", "full", "cpu", "fp32",
    )  # fmt: skip


@pytest.fixture
def clock() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < LIMIT


@pytest.mark.usefixtures("clock")
def test_ten_thousand_cells_are_planned_at_once() -> None:
    graph = plan.build(large(10, 99, 10))
    assert len({cell.key for cell in graph.cells}) == 10_000


class CountingStore(Store):
    """Counts what is asked of it."""

    asked = 0

    def stage(self, key: str) -> Any:
        self.asked += 1
        return super().stage(key)


def test_looking_again_asks_the_store_nothing(tmp_path: Path) -> None:
    """Otherwise every message of a job would cost a query a cell, and the driver a core."""
    asked = large(10, 9, 10)
    store = CountingStore(tmp_path / "runs")
    grants = Grants(asked.data, store, device="cpu", precision="fp32", threads=1, isolation="process")
    graph = plan.build(asked)
    with Progress(1000, live=False) as display:
        matrix = Matrix(graph, store, grants, Local(1), display)
        matrix._look()
        once = store.asked
        assert 0 < once <= len(graph.nodes)
        for _ in range(3):
            matrix._look()
        assert store.asked == once
        matrix.agenda.touch([matrix.plan.cells[0].victim])  # a message of a job costs looks, no query
        matrix._look()
        assert store.asked == once
        other = Store(tmp_path / "runs")
        other.attempt("k", "failed", "by another driver", "")
        matrix._look()
        assert store.asked > once
        other.close()
    matrix.work.close()
    store.close()


def test_a_count_is_the_length_of_its_split() -> None:
    for total, rate in ((50000, 0.05), (60, 0.05), (26640, 0.05), (7, 1.0)):
        assert cells.clean_count(total, rate) == len(cells.clean_index(total, rate, 1))
