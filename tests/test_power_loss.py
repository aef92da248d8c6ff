"""Any one file of a runs folder torn, zeroed or with a hole, at any place: what was finished is there, or made again.

BBMCL_TEST_LOSSES: how many places in each kind of file (default 6); BBMCL_TEST_SEED: which.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest
import small
from conftest import Reference
from test_ledger import harm

from backdoorbench_mcl import remarks, runner
from backdoorbench_mcl.artefacts import Damaged
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store

LOSSES = int(os.environ.get("BBMCL_TEST_LOSSES", "6"))
SEED = int(os.environ.get("BBMCL_TEST_SEED", "0"))
KINDS = ("store.sqlite", "store.journal", "meta.json", "safetensors")
HOW = ("truncate", "zero", "hole")


def damage(runs: Path, kind: str, rng: random.Random) -> tuple[Path, str, int]:
    """Harm one file of a kind; returns which, how, and at which byte."""
    while True:
        file = rng.choice(sorted(path for path in runs.rglob("*") if path.name.endswith(kind)))
        how, at = rng.choice(HOW), rng.randrange(file.stat().st_size)
        before = file.read_bytes()
        harm(file, how, at)
        if file.read_bytes() != before:  # zeros in place of zeros are no harm
            return file, how, at


@pytest.fixture
def copied(reference: Reference, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference.runs, tmp_path / "runs"))


@pytest.mark.parametrize("kind", KINDS)
def test_no_finished_cell_is_lost_and_nothing_torn_is_read(kind: str, reference: Reference, copied: Path) -> None:
    rng = random.Random(f"{SEED} {kind}")
    for _ in range(LOSSES):
        where = damage(copied, kind, rng)
        store = Store(copied, lambda line: None)
        assert small.essence(store.rows()) == small.essence(reference.rows), where
        for stage in store.stages():
            try:
                opened = store.open(stage)
            except Damaged:
                assert store.stage(stage.key) is None, where  # forgotten, so that it is made again
            else:
                assert opened.name == stage.artefact
        store.close()
        shutil.rmtree(copied)
        shutil.copytree(reference.runs, copied)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_run_makes_again_what_it_needs(
    kind: str, reference: Reference, copied: Path, toy_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rows and predictions, victims and repairs are needed: what was harmed of them is computed again."""
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    rng = random.Random(f"{SEED} {kind} again")
    for _ in range(max(1, LOSSES // 6)):
        where = damage(copied, kind, rng)
        store = Store(copied, lambda line: None)
        stored = store.stages()
        for stage in stored:
            if stage.kind == "predict":
                store.forget(stage.key)
        store.close()
        with sqlite3.connect(copied / "store.sqlite") as db:
            db.execute("DELETE FROM row")
        rows = runner.run_matrix(small.options(), Settings(runs=copied, workers=2, threads=1), live=False)
        # where the repair is there, its trigger is not searched for again, and how good it was is not known any more
        torn = {stage.key for stage in stored if stage.kind == "invert" and stage.artefact == where[0].parent.name}
        wanted = [
            {**row, **remarks.inversion({})} if row["stages"].get("invert") in torn else row
            for row in small.essence(reference.rows)
        ]
        assert small.essence(rows) == wanted, where
        store = Store(copied, pytest.fail)
        for stage in store.stages():
            assert stage.artefact == reference.artefacts[stage.key], where
            if stage.kind != "invert":  # it had served its purpose
                store.open(stage)
        store.close()
        shutil.rmtree(copied)
        shutil.copytree(reference.runs, copied)


def test_a_torn_snapshot_costs_its_own_steps_only(
    reference: Reference, tmp_path: Path, toy_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    runs = tmp_path / "runs"
    store = Store(runs)
    for key in reference.artefacts:  # as if each long job had been killed and its snapshot torn in another way
        folder = store.snapshots(key)
        folder.mkdir(parents=True)
        (folder / "snapshot.safetensors").write_bytes(random.Random(key).randbytes(500))
    store.close()
    rows = runner.run_matrix(small.options(), Settings(runs=runs, workers=2, threads=1), live=False)
    assert small.essence(rows) == small.essence(reference.rows)
