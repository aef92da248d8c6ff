"""Every way in which a plugin can go wrong, all installed at once: each is named once, and nobody else is hurt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import small
from typed import typed

from backdoorbench_mcl.rows import Row

OFFENDERS = Path(__file__).parent / "offenders"
LISTED = {  # what `bbmcl plugins` says of it
    "dies": "ended its process with SIGSEGV",
    "exits": "bbmcl_defenses raised SystemExit: 0",
    "hanging-hook": "did not answer in 10 s",
    "hook": "unknown hook 'bbmcl_defences', did you mean 'bbmcl_defenses'?",
    "import": "cannot import 'off_import': ModuleNotFoundError",
    "newer": "requires backdoorbench-mcl>=9, but backdoorbench-mcl 0.1.0 is installed",
    "raising-hook": "bbmcl_defenses raised LookupError: nothing to offer",
    "twice": "offers inverter 'twin' a second time",
    "type": "bbmcl_defenses returned list, expected a list of Entry",
}
NOTICED = {
    "prints": "prints while it is listed ('noise on import')",
    "slow": "s to list, expected at most 2 s",
    "namesake": "defense 'same' is the name of another package's too; write off-namesake/same or bbmcl-toy/same",
}
FAILED = {  # state and reason of its cell
    "abstract": ("failed", "off_abstract_method:Offender lacks defend()"),
    "broken-class": ("failed", "off_broken_class_method:Offender ended its process with status 4"),
    "raises": ("failed", "ValueError at off_raises_method.py:12: no idea how to repair this"),
    "hangs": ("timeout", "took longer than --timeout 20 s"),
    "segfaults": ("killed", "SIGSEGV"),
    "greedy": ("killed", "GB of memory, more than --memory 1.5"),
    "nan": ("diverged", "weights are not finite"),
    "architecture": ("failed", "changed the architecture"),
}
HONEST = {"before", "ft", "ibau", "mcldef", "mcldef+", "nad", "nc", "bbmcl-toy/same", "off-namesake/same", "globals"}
SET = ("badnets.target=1", "badnets.rate=0.2", "train.steps=200", "defend.steps=10", "nc-box.steps=20", "ibau.rounds=1")


@dataclass(frozen=True)
class Site:
    """Where all offenders are installed, beside the toy and, as always, the shipped plugins."""

    folder: Path
    env: dict[str, str]

    def bbmcl(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return typed(*arguments, folder=self.folder.parent, env={**self.env, **env})

    def process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """As `bbmcl`, in a process of its own, whose streams are those of its jobs too."""
        command = [sys.executable, "-m", "backdoorbench_mcl", *arguments]
        return subprocess.run(
            command, cwd=self.folder.parent, env=self.env, capture_output=True, text=True, timeout=280, check=False
        )

    def matrix(
        self, defenses: str, *more: str, settings: tuple[str, ...] = SET, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return self.bbmcl(*self.words(defenses, *more, settings=settings), **env)

    def words(self, defenses: str, *more: str, settings: tuple[str, ...] = SET) -> tuple[str, ...]:
        sets = [part for line in settings for part in ("--set", line)]
        base = ["--dataset", "tiny", "--model", "tiny-net", "--clean-rate", "0.2", "--format", "json"]
        limits = ["--timeout", "20", "--memory", "1.5", "--workers", "2", "--precision", "fp32"]
        return ("matrix", "--attacks", "badnets", "--defenses", defenses, *base, *limits, *sets, *more)


@pytest.fixture(scope="module")
def site(toy_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = Path(shutil.copytree(OFFENDERS, tmp_path_factory.mktemp("site") / "offenders"))  # one of them writes there
    path = os.pathsep.join([str(folder), toy_env["PYTHONPATH"]])
    return Site(folder, {**toy_env, "PYTHONPATH": path})


Finished = tuple["subprocess.CompletedProcess[str]", dict[str, Row]]


@pytest.fixture(scope="module")
def matrix(site: Site) -> Finished:
    """All offenders and everything else against badnets: the process, and its rows by defense."""
    done = site.process(*site.words("all", "--runs", "runs"))
    return done, {row.defense: row for row in map(Row.from_dict, json.loads(done.stdout))}


def lines_about(name: str, text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"{start}plugin off-{name}/off-{name} (")]


def test_plugins_names_every_offender_once(site: Site) -> None:
    done = site.bbmcl("plugins")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    for name, told in {**LISTED, **NOTICED}.items():
        (line,) = lines_about(name, done.stderr, "note: " if name in NOTICED else "")
        file = site.folder / f"off_{name.replace('-', '_')}.py"
        assert line.removeprefix("note: ").startswith(f"plugin off-{name}/off-{name} (off-{name} 1.0, {file}): ")
        assert told in line
        assert line.endswith(f"; skip it with BBMCL_DISABLE=off-{name}")
    assert len(done.stderr.splitlines()) == len(LISTED) + len(NOTICED) + 1  # the other `same`, of the toy
    for name in ("mcldef", "badnets", "tiny", "twin", "raises"):
        assert f"\n  {name} " in done.stdout
    assert "noise on" not in done.stdout and "noise in" not in done.stdout


def test_an_offender_can_be_skipped_as_its_line_says(site: Site) -> None:
    skipped = ",".join(f"off-{name}" for name in (*LISTED, *NOTICED))
    done = site.bbmcl("plugins", BBMCL_DISABLE=skipped)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_honest_cell_is_filled_and_each_offender_is_named(matrix: Finished) -> None:
    done, rows = matrix
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "noise on" not in done.stdout and "noise in" not in done.stdout
    for defense in HONEST:
        assert rows[defense].state == "ok", (defense, rows[defense].reason)
        assert rows[defense].asr is not None
    assert rows["ft"].blame == rows["before"].blame == ""
    for name, told in LISTED.items():
        (line,) = lines_about(name, done.stderr, "")
        assert told in line
    (line,) = lines_about("observer", done.stderr, "")
    assert "(off-observer 1.0, " in line
    assert "off_observer.py): bbmcl_cell_finished called sys.exit(0); skip it with BBMCL_DISABLE=off-observer" in line
    for name, (state, reason) in FAILED.items():
        assert (rows[name].state, rows[name].asr) == (state, None)
        assert reason in rows[name].reason
        assert_blamed(name, done.stderr, rows[name])


def assert_blamed(name: str, shown: str, row: Row) -> None:
    """The cell's line, the only one with a way out, names package, version and file."""
    file = f"off_{name.replace('-', '_')}_method.py"
    assert row.blame == f"off-{name} 1.0, {file}; skip it with BBMCL_DISABLE=off-{name}"
    (line,) = [line for line in shown.splitlines() if line.endswith(f"; {row.blame}")]
    assert f"] badnets / {name}, seed 0/0: " in line


def test_who_asks_for_a_broken_method_by_name_is_told_at_once(site: Site) -> None:
    done = site.matrix("ft,abstract", settings=(), BBMCL_PLUGINS="off-abstract,toy,attacks,defenses")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        f"bbmcl: plugin off-abstract/off-abstract (off-abstract 1.0, {site.folder / 'off_abstract.py'}): "
        "off_abstract_method:Offender lacks defend(); skip it with BBMCL_DISABLE=off-abstract"
    )
    shown = site.bbmcl("show", "abstract", BBMCL_PLUGINS="off-abstract")
    assert (shown.returncode, shown.stderr) == (2, done.stderr.splitlines()[-1] + "\n")


def test_a_broken_attack_that_nobody_named_costs_its_cells(site: Site) -> None:
    only = "off-abstract-attack,toy,defenses"
    done = site.bbmcl(
        "matrix", "--attacks", "all", "--defenses", "bbmcl-toy/same", "--dataset", "tiny", "--model", "tiny-net",
        "--runs", "attacks", "--format", "json", BBMCL_PLUGINS=only,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    rows = [row for item in json.loads(done.stdout) if (row := Row.from_dict(item)).attack == "abstract"]
    assert [row.defense for row in rows] == ["before", "bbmcl-toy/same"]
    for row in rows:
        assert row.state == "failed"
        assert row.reason.endswith("off_abstract_attack_method:Offender lacks poison(), stamp()")
        assert row.blame.startswith("off-abstract-attack 1.0, off_abstract_attack_method.py; skip it with")
    stored = site.bbmcl("report", "--runs", "attacks", "--format", "json")
    assert stored.returncode == 0
    kept = {item["attack"] for item in json.loads(stored.stdout)}
    assert kept == {"takeover"}  # the toy's own; once the other is repaired, its failures would stay


def test_writing_outside_fails_or_marks_the_cell(site: Site, matrix: Finished) -> None:
    done, rows = matrix
    if rows["outside"].isolation == "landlock":
        assert rows["outside"].state == "failed"
        assert "PermissionError" in rows["outside"].reason
        assert not (site.folder / "written.txt").exists()
        assert_blamed("outside", done.stderr, rows["outside"])
    marked = site.matrix("outside", "--isolation", "process", "--runs", "process", settings=SET[:4])
    assert marked.returncode == 0, marked.stderr
    (row,) = [row for row in map(Row.from_dict, json.loads(marked.stdout)) if row.defense == "outside"]
    assert (row.state, row.strays) == ("ok", (str((site.folder / "written.txt").resolve()),))
    assert_blamed("outside", marked.stderr, row)


def test_what_one_changes_moves_no_number_of_another(site: Site, matrix: Finished, toy_env: dict[str, str]) -> None:
    done, rows = matrix
    assert {"default dtype", "threads", "working directory", "environment"} <= set(rows["globals"].changed)
    assert_blamed("globals", done.stderr, rows["globals"])
    kept = ["bbmcl-toy/same", "ft", "mcldef", "nad", "nc"]
    path = toy_env["PYTHONPATH"]
    alone = site.matrix(",".join(kept), "--runs", "alone", settings=SET[:5], PYTHONPATH=path)
    assert alone.returncode == 0, alone.stderr
    assert "off-" not in alone.stderr
    without = {row.defense: row for row in map(Row.from_dict, json.loads(alone.stdout))}
    kept = ["before", *kept]
    assert small.essence([rows[name] for name in kept]) == small.essence([without[name] for name in kept])
