"""Wheel and sdist, built from a copy of the sources and installed where nothing of this project is.

The dependencies (torch: 5.5 GB) are lent by the environment that runs the tests; its site-packages go to the end of
the path of an otherwise empty virtual environment, where `.pth` files, and so an editable install, have no effect.
"""

from __future__ import annotations

import base64
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import backdoorbench_mcl

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = {"bbmcl_attacks", "bbmcl_datasets", "bbmcl_defenses", "bbmcl_inverters", "bbmcl_models"}
SHIPPED = ("backdoorbench_mcl", "plugins", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE",
           "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "constraints.txt", "tox.ini", "docs",
           "tests")  # fmt: skip
KINDS = {".py", ".toml", ".typed", ".csv", ".html", ".css", ".js", ".txt"}  # no image, no array, no weights

pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").exists(), reason="needs a checkout")


class Built(NamedTuple):
    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


def call(*command: str | Path, cwd: Path | None = None) -> str:
    """Standard output; a failure shows everything. No BBMCL_ or Python setting of the caller leaks in."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("BBMCL_", "PYTHON"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built in a copy: setuptools leaves folders behind, which must not lie in the checkout."""
    copy, first, second = (tmp_path_factory.mktemp(name) for name in ("copy", "first", "second"))
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy / name)
    build = (sys.executable, "-I", "-m", "build", "--no-isolation")
    call(*build, "--outdir", first, copy)  # the sdist, and a wheel from what is in it
    call(*build, "--wheel", "--outdir", second, copy)
    return Built(next(first.glob("*.tar.gz")), next(second.glob("*.whl")), next(first.glob("*.whl")))


@pytest.fixture(scope="module", params=["wheel", "wheel_of_sdist"])
def python(request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the distribution alone, with borrowed dependencies."""
    home = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-I", "-m", "venv", "--without-pip", home)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    call(sys.executable, "-I", "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
         "--disable-pip-version-check", getattr(built, request.param))  # fmt: skip
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    lent = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (site / "lent.pth").write_text("\n".join(lent))
    return python


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def sources() -> set[str]:
    """Everything below the packages that a wheel has to hold, by its name in there."""
    files = [path.relative_to(ROOT) for path in (ROOT / "backdoorbench_mcl").rglob("*")]
    files += [path.relative_to(ROOT / "plugins") for path in (ROOT / "plugins").rglob("*")]
    return {path.as_posix() for path in files if path.suffix in KINDS}


def strange(packages: Path) -> list[str]:
    """Files below a folder in which somebody's trigger could lie: of another kind than ours, no text, or text that
    holds pictures as base64 or as rows of numbers.
    """
    found = []
    for path in packages.rglob("*"):
        if not path.is_file() or "__pycache__" in path.parts or any(part.endswith(".egg-info") for part in path.parts):
            continue
        content = path.read_bytes()
        numbers = re.search(rb"([-+.xa-f\d]+[,\s]+){48}", content) and path.name != "paper_tables.csv"
        text = b"\0" not in content and not re.search(rb"[\w+/=-]{150}", content)
        if path.suffix not in KINDS or not text or numbers:
            found.append(path.name)
    return sorted(found)


def test_no_file_of_the_packages_holds_anyone_s_trigger(tmp_path: Path) -> None:
    """Spec 13. Triggers are drawn or optimised by code; the wheel holds the kinds of `KINDS` alone, as told below."""
    assert strange(ROOT / "backdoorbench_mcl") + strange(ROOT / "plugins") == []
    art = bytes(range(256)) * 3
    rows = ",\n".join(", ".join(map(str, art[i : i + 16])) for i in range(0, 256, 16))
    for name, content in {
        "cat.png": b"made up", "masks.npy": b"made up", "model.pt": b"made up", "trigger": b"made up",
        "raw.txt": art, "word.py": b'X = "' + base64.b64encode(art) + b'"', "rows.py": f"X = [{rows}]".encode(),
        "plain.py": b"PATCH = [[255, 0, 255], [0, 255, 0], [255, 0, 0]]",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    assert strange(tmp_path) == ["cat.png", "masks.npy", "model.pt", "raw.txt", "rows.py", "trigger", "word.py"]


def test_the_wheel_holds_every_source_file_and_nothing_else(built: Built) -> None:
    assert members(built.wheel) == sources()
    assert {name.split("/")[0] for name in members(built.wheel)} == {"backdoorbench_mcl"} | PLUGINS
    assert any(name.startswith("backdoorbench_mcl/presets/") for name in members(built.wheel))


def test_the_sdist_builds_the_same_wheel(built: Built) -> None:
    assert members(built.wheel_of_sdist) == members(built.wheel)
    assert built.wheel.name == built.wheel_of_sdist.name
    with tarfile.open(built.sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "tox.ini", "docs/adr/README.md"} <= inside
    assert "tests/test_packaging.py" in inside


def test_installed_into_an_empty_environment(python: Path, tmp_path: Path) -> None:
    where = call(python, "-c", "import backdoorbench_mcl, bbmcl_models; print(bbmcl_models.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parent.parent), "the checkout was imported, not the wheel"
    bbmcl = python.with_name("bbmcl")
    assert backdoorbench_mcl.__version__ in call(bbmcl, "--version", cwd=tmp_path)
    text = call(bbmcl, "plugins", "--json", cwd=tmp_path)
    assert json.loads(text)
    for name in ("badnets", "blend", "none", "ft", "mcldef", "nc-box", "wrn", "shapes", "cifar10"):
        assert f'"{name}"' in text, f"{name} is missing from `bbmcl plugins --json`"


def test_entry_points_and_types_are_declared(python: Path, tmp_path: Path) -> None:
    code = (
        "import json; from importlib import metadata as m, resources as r;"
        "d = m.distribution('backdoorbench-mcl');"
        "print(json.dumps([[e.value for e in d.entry_points if e.group == 'bbmcl'], d.metadata['License-Expression'],"
        " r.files('backdoorbench_mcl').joinpath('py.typed').is_file()]))"
    )
    values, licence, typed = json.loads(call(python, "-c", code, cwd=tmp_path))
    assert set(values) == PLUGINS
    assert licence == "MIT"
    assert typed


def test_tested_versions_satisfy_the_declared_bounds() -> None:
    """Every dependency has a tested version; a bound raised above it would break the documented install line."""
    from packaging.requirements import Requirement

    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    declared = [config["options"]["install_requires"], *(extras[name] for name in ("docs", "test", "dev"))]
    wanted = [Requirement(line) for block in declared for line in block.splitlines() if line and line[0] != "%"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {r.name: r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    for requirement in wanted:
        if requirement.name == "tomli":
            continue  # only for Pythons older than the tested one
        pins = [spec.version for spec in tested[requirement.name].specifier]
        assert len(pins) == 1
        assert requirement.specifier.contains(pins[0]), f"{requirement} excludes the tested {pins[0]}"
    assert set(tested) == {requirement.name for requirement in wanted} - {"tomli"}
