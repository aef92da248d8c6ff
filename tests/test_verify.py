"""`bbmcl verify`: what can be had again, what is found, what cannot be compared; the folder stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small
from conftest import Bbmcl, Reference
from made import make
from safetensors.numpy import load_file, save_file

from backdoorbench_mcl import cells, evaluate, rebuilt, runner
from backdoorbench_mcl.engines.local import Local
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.rebuilt import rebuild
from backdoorbench_mcl.registry import cache_folder
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Stage, Store
from backdoorbench_mcl.verify import Choice, Finding, draw, status, summary, verify

Files = dict[str, str]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])


@pytest.fixture
def runs(reference: Reference, tmp_path: Path) -> Path:
    """A copy of the finished toy matrix that the test may change."""
    return Path(shutil.copytree(reference.runs, tmp_path / "runs"))


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory, toy_env: dict[str, str]) -> Path:
    """Repairs of the toy plugin, re-tuned beside their score, computed with two threads a job: for reading only."""
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        folder = tmp_path_factory.mktemp("repaired") / "runs"
        runner.run_matrix(small.options("badnets", "same,masker", retune=10), Settings(folder, 1, 2), live=False)
        return folder


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The specs of all jobs that are started."""
    seen: list[dict[str, Any]] = []
    start = Local.start

    def spy(self: Local, folder: Path) -> None:
        seen.append(json.loads((folder / "spec.json").read_text()))
        start(self, folder)

    monkeypatch.setattr(Local, "start", spy)
    return seen


def files(folder: Path) -> Files:
    """Every file and folder below `folder`, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def keep(folder: Path, defense: str, attack: str = "badnets") -> Row:
    """Forget the rows of all other cells; returns the one that is left."""
    (row,) = [row for row in Store(folder).rows() if (row.attack, row.defense) == (attack, defense)]
    change(folder, "DELETE FROM row WHERE key != ?", row.key)
    return row


def change(folder: Path, line: str, *values: object) -> None:
    with sqlite3.connect(folder / "store.sqlite") as db:
        db.execute(line, values)
    db.close()


def rewrite(folder: Path, row: Row, **fields: object) -> None:
    """Change fields of a stored row by hand."""
    change(folder, "UPDATE row SET data = ? WHERE key = ?", json.dumps({**row.as_dict(), **fields}), row.key)


def numerics(folder: Path, key: str, **fields: object) -> None:
    """Change what a stored stage says of how it was made."""
    stage = Store(folder).stage(key)
    assert stage is not None
    change(folder, "UPDATE stage SET numerics = ? WHERE key = ?", json.dumps({**stage.numerics, **fields}), key)


def clone(folder: Path, key: str, edit: Callable[[dict[str, Any]], None]) -> str:
    """Store a stage once more, hashed from something else; returns its key."""
    stage = Store(folder).stage(key)
    assert stage is not None
    spec = json.loads(json.dumps(stage.spec))
    edit(spec)
    other = cells.key(spec)
    change(folder, "INSERT INTO stage SELECT ?, kind, ?, artefact, numerics, cost, created FROM stage WHERE key = ?",
           other, json.dumps(spec), key)  # fmt: skip
    return other


def one(folder: Path, **choice: Any) -> Finding:
    """What is found of a folder with one row, its victim taken as it is."""
    (finding,) = verify(Settings(folder, 1), Choice(None, reuse=True, **choice), live=False)
    return finding


# ---------------------------------------------------------------- had again


def test_a_store_is_had_again_and_left_as_it_was(
    runs: Path, bbmcl: Bbmcl, tmp_path: Path, reference: Reference
) -> None:
    before = files(runs)
    (tmp_path / "t").mkdir()
    done = bbmcl("verify", str(runs), "--all", TMPDIR=str(tmp_path / "t"))
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert lines == [
        f"{row.attack} 0 x {row.defense}{'' if row.defense == 'before' else ' 0'} (tiny, tiny-net"
        f"{'' if row.defense == 'before' else ', 20 % clean'}): bit for bit" for row in reference.rows
    ]  # fmt: skip
    assert last == "6 cells: 6 identical"
    assert f"verifying 6 of 6 finished cells of {runs} (all)" in done.stderr
    assert files(runs) == before
    assert list((tmp_path / "t").glob("bbmcl-*")) == []


def test_what_stands_beside_the_score_and_threads_are_as_they_were(repaired: Path, jobs: list[dict[str, Any]]) -> None:
    found = verify(Settings(repaired), Choice(sample=3), live=False)
    assert [finding.text for finding in found] == ["bit for bit"] * 3
    assert {job["job"] for job in jobs} == {"train", "trial", "predict", "defend", "retune"}
    assert [job["job"] for job in jobs].count("train") == 1
    assert {job["threads"] for job in jobs} == {2}


def test_reused_victims_are_not_computed_again(repaired: Path, jobs: list[dict[str, Any]]) -> None:
    before = files(repaired)
    found = verify(Settings(repaired, 1), Choice(None, reuse=True), live=False)
    assert {finding.verdict for finding in found} == {"identical"}
    assert jobs
    assert "train" not in {job["job"] for job in jobs}
    assert files(repaired) == before


def test_other_threads_void_the_promise_and_are_named(repaired: Path) -> None:
    (finding,) = verify(Settings(repaired, 1, 1), Choice(1), live=False)
    if finding.verdict != "identical":  # whether the bits of so small a network differ, and how far, is the machine's
        assert finding.since == ("threads 2 -> 1",)
        told = "since then" if finding.verdict == "different" else "as expected after"
        assert f"{told} threads 2 -> 1" in finding.text
    assert status([finding]) == (finding.verdict == "different")


# ---------------------------------------------------------------- found


def test_a_count_changed_by_hand_is_found(runs: Path) -> None:
    row = keep(runs, "ft")
    assert row.asr_k is not None and row.asr is not None
    rewrite(runs, row, asr_k=row.asr_k + 3)
    finding = one(runs)
    assert finding.verdict == "different"
    assert finding.text == (
        f"differs: asr_k {row.asr_k + 3} in the row, {row.asr_k} by its stored predictions, "
        f"ASR {100 * (row.asr_k + 3) / 75:.2f} -> {row.asr:.2f}"
    )
    assert status([finding]) == 1


def test_a_percentage_changed_by_hand_is_found(runs: Path) -> None:
    row = keep(runs, "before")
    rewrite(runs, row, ba=12.5)
    assert one(runs).text == f"differs: ba 12.5 in the row, {row.ba} by its stored predictions"


def test_the_model_of_another_cell_is_found(runs: Path, bbmcl: Bbmcl) -> None:
    other = next(row for row in Store(runs).rows() if (row.attack, row.defense) == ("badnets", "ft"))
    row = keep(runs, "mcldef")
    swapped = Store(runs).stage(other.stages["defend"])
    judged = Store(runs).stage(row.stages["predict"])
    assert swapped is not None and judged is not None
    change(runs, "UPDATE stage SET artefact = ? WHERE key = ?", swapped.artefact, row.stages["defend"])
    numerics(runs, judged.key, inputs={**judged.numerics["inputs"], "weights": swapped.artefact})
    done = bbmcl("verify", "--runs", str(runs), "--reuse-victims", "--format", "json")
    assert done.returncode == 1, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["verdict"], found["good"], found["since"]) == ("different", False, [])
    assert found["parted"] == ["mcldef on badnets 0"]
    assert found["key"] == row.key
    assert found["text"] == (
        "same counts; other bytes from mcldef on badnets 0 on; machine class, libraries and threads are as they were"
    )


def test_swapped_files_are_found(runs: Path) -> None:
    row = keep(runs, "ft")
    stages = [Store(runs).stage(row.stages[kind]) for kind in ("model", "defend")]
    victim, repair = (Store(runs).artefacts.path(stage.artefact) for stage in stages if stage is not None)
    shutil.copyfile(victim / "weights.safetensors", repair / "weights.safetensors")
    before = files(runs)
    finding = one(runs)
    assert finding.verdict == "different"
    assert "differs: what is stored of ft on badnets 0 is damaged (artefact " in finding.text
    assert files(runs) == before


# ---------------------------------------------------------------- not promised


def shift(folder: Path, row: Row, images: int) -> dict[str, Any]:
    """Other predictions of a row: the clean labels of some images that were right; the row follows."""
    store = Store(folder)
    judged = store.stage(row.stages["predict"])
    assert judged is not None
    made = folder.parent / "made"
    shutil.copytree(store.open(judged), made)
    stored = load_file(made / "predictions.safetensors")
    right = np.flatnonzero((stored["clean"] == stored["y"]) & (stored["y"] == 0))[:images]
    stored["clean"][right] = 3
    save_file(stored, made / "predictions.safetensors")
    change(folder, "UPDATE stage SET artefact = ? WHERE key = ?", store.artefacts.add(made), judged.key)
    scored = evaluate.predicted(stored)
    assert row.asr_before is not None and row.ba_before is not None
    der = evaluate.der(row.asr_before, row.asr, row.ba_before, scored["ba"])
    rewrite(folder, row, **scored, der=der)
    return scored


@pytest.mark.parametrize(("images", "verdict"), [(2, "within tolerance"), (12, "different")])
def test_elsewhere_counts_are_compared_within_tolerances(runs: Path, images: int, verdict: str) -> None:
    row = keep(runs, "ft")
    scored = shift(runs, row, images)
    numerics(runs, row.stages["predict"], machine="elsewhere")
    finding = one(runs)
    assert finding.verdict == verdict
    assert f"BA {scored['ba']:.2f} -> {row.ba:.2f}" in finding.text
    assert "other bytes from judge ft on badnets 0 on" in finding.text
    assert f"{'since then' if images == 12 else 'as expected after'} machine elsewhere -> " in finding.text
    assert status([finding]) == int(images == 12)


def test_here_the_same_difference_is_one(runs: Path) -> None:
    row = keep(runs, "ft")
    shift(runs, row, 2)
    finding = one(runs)
    assert finding.verdict == "different"
    assert "machine class, libraries and threads are as they were" in finding.text


def test_elsewhere_other_bytes_with_the_same_counts_are_no_difference(runs: Path) -> None:
    other = next(row for row in Store(runs).rows() if (row.attack, row.defense) == ("badnets", "ft"))
    row = keep(runs, "mcldef")
    swapped, own = (Store(runs).stage(key) for key in (other.stages["defend"], row.stages["defend"]))
    assert swapped is not None and own is not None
    change(runs, "UPDATE stage SET artefact = ? WHERE key = ?", swapped.artefact, own.key)
    old = {**own.numerics["versions"], "torch": "1.0", "bbmcl-x": "1"}
    git = {**own.numerics["origin"], "git": {"commit": "f" * 40, "dirty": False}}
    numerics(runs, own.key, versions=old, origin=git)
    finding = one(runs)
    assert finding.verdict == "same counts"
    assert "same counts; other bytes from mcldef on badnets 0 on; as expected after torch 1.0 -> " in finding.text
    assert "bbmcl-x 1 -> unknown" in finding.since  # told, and no excuse
    numerics(runs, own.key, versions={**own.numerics["versions"], "bbmcl-x": "1"})
    assert one(runs).verdict == "different"


def test_stages_that_are_not_stored_are_told(runs: Path) -> None:
    row = keep(runs, "ft")
    change(runs, "DELETE FROM stage WHERE key = ?", row.stages["defend"])
    finding = one(runs)
    assert finding.verdict == "same counts"
    assert "1 of its stages are not stored any more" in finding.text


# ---------------------------------------------------------------- not to be compared


def test_cells_of_other_methods_cannot_be_run_again(
    repaired: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bbmcl: Bbmcl
) -> None:
    before = files(repaired)
    changed = Path(shutil.copytree(small.TOY, tmp_path / "toy"))
    door, methods = changed / "bbmcl_toy.py", changed / "bbmcl_toy_methods.py"
    door.write_text(door.read_text().replace('Entry("same", "bbmcl_toy_methods:Same", "returns the victim"),', ""))
    methods.write_text(methods.read_text().replace('    name = "masker"\n', '    name = "masker"\n    version = 2\n'))
    path = os.pathsep.join([str(changed), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = bbmcl("verify", str(repaired), "--all", "--reuse-victims", "--threads-per-job", "2", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    before_it, masker, same, last = done.stdout.splitlines()
    assert before_it == "badnets 0 x before (tiny, tiny-net): bit for bit"
    assert masker.endswith("x masker 0 (tiny, tiny-net, 20 % clean): cannot be re-run: bbmcl-toy/masker version 1 -> 2")
    assert "x same 0 (tiny, tiny-net, 20 % clean): cannot be re-run: unknown defense 'bbmcl-toy/same'; " in same
    assert last == "3 cells: 1 identical, 2 not run"
    assert files(repaired) == before
    change_one = Path(shutil.copytree(repaired, tmp_path / "copy"))
    keep(change_one, "masker")
    none = bbmcl("verify", str(change_one), PYTHONPATH=path)
    assert none.returncode == 1
    assert "1 cell: 1 not run" in none.stdout


def test_why_a_cell_cannot_be_run_again_is_said_exactly(reference: Reference, runs: Path) -> None:
    known = runner.registry()
    prepare = runner.prepare_data(known, cache_folder())
    row = next(row for row in reference.rows if (row.attack, row.defense) == ("badnets", "mcldef"))

    def why(**fields: Any) -> str:
        store = Store(runs, readonly=True)
        try:
            with pytest.raises(UserError) as told:
                rebuild(Row.from_dict({**row.as_dict(), **fields}), store, known, prepare, None, None)
        finally:
            store.close()
        return str(told.value)

    shorter = [line.replace("defend.steps=20", "defend.steps=30") for line in row.overrides]
    assert why(overrides=shorter) == "backdoorbench-mcl/recipe steps 20 -> 30"
    assert why(overrides=[line.replace("rate=0.2", "rate=0.1") for line in row.overrides]) == (
        "backdoorbench-mcl/badnets rate 0.2 -> 0.1"
    )
    assert why(key="0" * 64) == f"scored by another version of the evaluator, which is {evaluate.EVALUATOR_VERSION} now"
    assert "--device cuda" in why(device="cuda:7")
    change(runs, 'UPDATE stage SET spec = replace(spec, \'"hash": "\', \'"hash": "9\')')
    older = clone(runs, row.stages["model"], lambda spec: spec["data"].update(hash="9" * 64))
    judged = clone(runs, row.stages["before"], lambda spec: spec.update(weights=older))
    told = why(key="0" * 64, stages={**row.stages, "before": judged})
    assert re.search(r"^data hash 999999999999 -> [0-9a-f]{12}$", told)
    away = {**row.params, "defense": {**row.params["defense"], "name": "bbmcl-gone/mcldef"}}
    assert why(params=away, versions={"bbmcl-gone": "1.2"}) == (
        "package bbmcl-gone (1.2 then), which brings mcldef, is missing"
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "sweeps": {"sweeps": ("ft.lr=0.1,0.01", "clean-rate=0.1,0.25"), "defenses": "ft"},
    "seeds": {"seeds": "1-2", "defense_seeds": "3,5"},
    "exclusion": {"exclude_poisoned": True, "precision": "fp32"},
    "protocol": {"preset": "authors", "budget": "full", "retune": 12},
    "typed": {
        "attacks": "backdoorbench-mcl/badnets(target=2), none(target=1)",
        "defenses": "ft(lr=0.05), needy(kind=result)",
        "overrides": ("train.steps=7",),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_leads_back_to_its_cell(name: str, reference: Reference) -> None:
    known = runner.registry()
    prepare = runner.prepare_data(known, cache_folder())
    store = Store(reference.runs, readonly=True)
    graph = small.build(small.options(**VARIANTS[name]))
    assert graph.cells
    for cell in graph.cells:
        row = Row.from_dict(json.loads(json.dumps(cell.row.as_dict())))
        found = rebuild(row, store, known, prepare, None, None)
        assert found.cell.key == cell.key
        assert small.essence([found.cell.row]) == small.essence([row])
    store.close()


# ---------------------------------------------------------------- the draw, usage, interruption


def test_the_draw_spreads_over_attacks_and_defenses() -> None:
    rows = [make(f"a{i}", f"d{j}") for i in range(4) for j in range(3)]
    for seed in range(20):
        drawn = draw(rows, 3, seed)
        assert len({row.attack for row in drawn}) == len({row.defense for row in drawn}) == 3
        assert drawn == [row for row in rows if row in drawn]
        assert drawn == draw(rows, 3, seed)
    assert len({tuple(row.key for row in draw(rows, 3, seed)) for seed in range(20)}) > 5
    assert draw(rows, 99, 0) == rows


def test_nothing_compared_is_no_success() -> None:
    not_run, same = (Finding("k", "c", verdict, "") for verdict in ("not run", "identical"))
    assert status([not_run]) == 1
    assert status([not_run, same]) == 0
    assert summary([same, not_run, same]) == "3 cells: 2 identical, 1 not run"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["absent"], "no results in absent: expected a runs folder"),
        (["--sample", "0"], "--sample 0: expected a number of cells from 1 on, or --all"),
        (["--sample", "2", "--all"], "--all and --sample 2: give one of them"),
        (["--workers", "0"], "--workers 0: expected a number from 1 to 1024"),
        (["--isolation", "none"], "--isolation 'none': expected auto, landlock, process or inline"),
        (["--sample", "many"], "for '--sample': "),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], told: str, reference: Reference, bbmcl: Bbmcl) -> None:
    done = bbmcl("verify", *arguments, BBMCL_RUNS=str(reference.runs))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("bbmcl: ")
    assert told in line


def test_a_folder_without_a_finished_cell(tmp_path: Path) -> None:
    Store(tmp_path / "runs").close()
    with pytest.raises(UserError, match="no finished cell to verify; make some with bbmcl matrix"):
        verify(Settings(tmp_path / "runs"), Choice(), live=False)
    (tmp_path / "store.sqlite").touch()
    with pytest.raises(UserError, match="holds no results"):
        verify(Settings(tmp_path), Choice(), live=False)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Not below pytest's folder: the path of a socket may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bv-") as folder:
        yield Path(folder)


@pytest.mark.usefixtures("sigint_heeded")
def test_an_interrupted_check_leaves_nothing(runs: Path, toy_env: dict[str, str], temporary: Path) -> None:
    before = files(runs)
    command = [sys.executable, "-m", "backdoorbench_mcl.cli", "verify", str(runs), "--all"]
    env = {**toy_env, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while ": ok" not in (line := process.stderr.readline()):
            assert line, "it ended before a stage was finished"
        assert list(temporary.glob("bbmcl-run-*/runs-0/store.sqlite"))
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "bbmcl: stopped"
    assert out == ""
    assert list(temporary.glob("bbmcl-*")) == []
    assert files(runs) == before


def test_numbers_of_the_data_that_differ_are_named(tmp_path: Path) -> None:
    """Lists in a spec are no keys of stages; looking one up ended the whole check."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "meta.json").write_text("{}")
    store = Store(tmp_path / "runs")
    store.commit(Stage("a" * 64, "train", {"data": {"mean": [0.5], "flip_ok": True}}, ""), out)
    graph = SimpleNamespace(nodes={"b" * 64: SimpleNamespace(spec={"data": {"mean": [0.4], "flip_ok": True}})})
    (line,) = rebuilt._parted("a" * 64, "b" * 64, store, graph)  # type: ignore[arg-type]
    assert "[0.5]" in line and "[0.4]" in line
