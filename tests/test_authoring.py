"""What `bbmcl new` writes works at once, and `bbmcl check` says what does not hold the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Bbmcl
from tiny import one_thread

from backdoorbench_mcl import authoring, checking
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.testing import Subject, parametrize_with_checks

__all__ = ["one_thread"]
KINDS = authoring.KINDS
SETTINGS: dict[str, dict[str, Any]] = {
    "attack": {"rate": 0.2},
    "inverter": {"steps": 150},
}  # half of the steps still find a planted patch
TEMPLATES = [
    Subject(kind, f"backdoorbench_mcl.templates.{kind}:MyMethod", SETTINGS.get(kind, {}), label=kind) for kind in KINDS
]


@parametrize_with_checks(TEMPLATES)
def test_templates_hold_the_contract(check: Callable[[], None]) -> None:
    check()


def installed(folder: Path, name: str) -> dict[str, str]:
    """The environment in which a package of `bbmcl new` is found without pip: its folder and what pip would write."""
    package = folder / f"bbmcl-{name}"
    info = package / f"bbmcl_{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bbmcl-{name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[bbmcl]\n{name} = bbmcl_{name.replace('-', '_')}\n")
    return {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize(
    "kind", [kind if kind in ("attack", "dataset") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_new_package_is_a_method_at_once(kind: str, bbmcl: Bbmcl, tmp_path: Path) -> None:
    made = bbmcl("new", kind, "two-words")
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == "next: pip install -e 'bbmcl-two-words[test]' && bbmcl check two-words"
    files = {str(path.relative_to(tmp_path)) for path in (tmp_path / "bbmcl-two-words").rglob("*") if path.is_file()}
    assert files == {f"bbmcl-two-words/{name}" for name in (
        "pyproject.toml", "README.md", "bbmcl_two_words/__init__.py", "bbmcl_two_words/method.py",
        "tests/test_two_words.py",
    )}  # fmt: skip
    assert not any("mymethod" in (tmp_path / file).read_text().lower() for file in files)
    assert not any("@" in line and "@hookimpl" not in line and "@param" not in line
                   for file in files for line in (tmp_path / file).read_text().splitlines())  # fmt: skip
    env = installed(tmp_path, "two-words")
    shown = bbmcl("show", "two-words", **env)
    assert "from bbmcl-two-words 0.1.0, class bbmcl_two_words.method:TwoWords, version 1" in shown.stdout
    listed = bbmcl("plugins", **env)
    assert (listed.stderr, "(bbmcl-two-words 0.1.0)" in listed.stdout) == ("", True)


def test_a_new_defense_passes_its_own_tests_and_is_a_column(bbmcl: Bbmcl, tmp_path: Path) -> None:
    assert bbmcl("new", "defense", "mine").returncode == 0
    env = installed(tmp_path, "mine")
    own = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "card or rebuilds or working", "tests"],
        cwd=tmp_path / "bbmcl-mine", env={**os.environ, **env}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert "3 passed" in own.stdout, own.stdout
    checked = bbmcl("check", "mine", "--only", "has_a_card,check_deterministic", **env)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert [line.split() for line in checked.stdout.splitlines()] == [
        ["defense", "mine"], ["ok", "check_has_a_card"], ["ok", "check_deterministic"], ["2", "ok"],
    ]  # fmt: skip
    toy = Path(__file__).parent / "toy"
    both = os.pathsep.join([env["PYTHONPATH"], str(toy)])
    table = bbmcl(
        "matrix", "--dataset", "tiny", "--model", "tiny-net", "--clean-rate", "0.2", "--attacks", "badnets",
        "--defenses", "mine,mine(smoothing=0.5)", "--set", "badnets.target=1", "--set", "badnets.rate=0.2",
        "--set", "train.steps=200", "--set", "defend.steps=10", "--format", "csv", PYTHONPATH=both,
    )  # fmt: skip
    assert table.returncode == 0, table.stderr
    rows = [line.split(",") for line in table.stdout.splitlines()]
    assert [row[rows[0].index("state")] for row in rows[1:]] == ["ok", "ok", "ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("new", "defence", "x"), "unknown kind 'defence'; expected one of attack, model, inverter, defense, dataset"),
        (("new", "defense", "My Name"), "method name 'My Name': expected lower-case words joined by '-'"),
        (("new", "defense", "a.b"), "name 'a.b': for a package expected letters, digits and '-' alone"),
        (("new", "attack", "none"), "name 'none' means something to bbmcl; choose another"),
        (("new", "defense", "ft"), "there is a defense 'ft' already (bbmcl show ft); choose another name"),
        (("check", "nothing"), "unknown method 'nothing'; there are: "),
        (("check", "mcldfe"), "unknown method 'mcldfe'; did you mean 'mcldef'? See: bbmcl plugins"),
        (("check", "ft", "--kind", "attack"), "unknown attack 'ft'; there are: "),
        (("check", "ft", "--timeout", "nan"), "--timeout nan: expected a number of seconds above 0"),
        (("check", "ft", "--only", "stamps"), "no check 'check_stamps' of a defense; there are: check_"),
        (("check", "ft(lrr=1)"), "no parameter 'lrr'; did you mean 'lr'?"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, bbmcl: Bbmcl) -> None:
    done = bbmcl(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("kind", "name"), [("defense", "rate"), ("model", "network"), ("dataset", "source")])
def test_a_name_that_the_template_imports_is_no_clash(kind: str, name: str, tmp_path: Path) -> None:
    authoring.new(kind, name, tmp_path)
    text = (tmp_path / f"bbmcl-{name}" / f"bbmcl_{name}" / "method.py").read_text()
    assert f"class {name.capitalize()}{kind.capitalize()}(" in text
    for file in (tmp_path / f"bbmcl-{name}").rglob("*.py"):
        assert f':{name.capitalize()}"' not in file.read_text()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    authoring.new("defense", "mine", tmp_path)
    (tmp_path / "bbmcl-mine" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="bbmcl-mine exists; choose another name"):
        authoring.new("attack", "mine", tmp_path)
    assert (tmp_path / "bbmcl-mine" / "README.md").read_text() == "mine"


BAD = '''"""A card."""
import os, time
from backdoorbench_mcl.api import Defense
class Bad(Defense):
    name = "bad"
    def __init__(self, *, how: str = "exit") -> None:
        self.how = how
    def defend(self, model, ctx):
        if self.how == "exit":
            print("last words")
            os._exit(7)
        if self.how == "hang":
            time.sleep(600)
        raise ZeroDivisionError("by nothing")
'''


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("exit", "its process ended with status 7 after saying 'last words'"),
        ("hang", "took longer than 2 s; see --timeout"),
        pytest.param("raise", "raised ZeroDivisionError at bad_defense.py:14: by nothing", marks=pytest.mark.slow),
    ],
)
def test_a_check_that_dies_costs_that_check_alone(
    how: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_defense.py").write_text(BAD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    spec = {"kind": "defense", "target": "bad_defense:Bad", "params": {"how": how}, "label": "bad"}
    names = ["check_has_a_card", "check_returns_a_working_classifier", "check_rebuilds_from_its_spec"]
    seconds = 2 if how == "hang" else 30  # less than it takes to import torch: that is not on the check's clock
    told = {result.check: result for result in checking.run(spec, names, seconds=seconds)}
    assert {name: told[name].state for name in names} == dict(zip(names, ("ok", "failed", "ok"), strict=True))
    assert told[names[1]].message == message
