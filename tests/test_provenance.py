"""Provenance: JSON, free of torch, and right about processors that this machine does not have."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import backdoorbench_mcl
from backdoorbench_mcl import provenance

V2 = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
V3 = V2 + " abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"
V4 = V3 + " avx512f avx512bw avx512cd avx512dq avx512vl"


def cpuinfo(tmp_path: Path, vendor: str, flags: str) -> Path:
    path = tmp_path / "cpuinfo"
    one = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: A Processor @ 2.0 GHz\nflags\t\t: fpu {flags}\n"
    path.write_text(one + "\n" + one.replace(flags, "fpu"))
    return path


@pytest.mark.parametrize(
    ("vendor", "flags", "name", "fast"),
    [
        ("GenuineIntel", V4 + " avx512_bf16 amx_bf16", "x86_64-v4-amx/intel/cpu", True),
        ("AuthenticAMD", V4 + " avx512_bf16", "x86_64-v4-bf16/amd/cpu", True),
        ("GenuineIntel", V4, "x86_64-v4/intel/cpu", False),
        ("AuthenticAMD", V3, "x86_64-v3/amd/cpu", False),
        ("AuthenticAMD", V3.replace("fma", "") + " avx512f", "x86_64-v2/amd/cpu", False),
        ("Elbrus", "", "x86_64-v1/elbrus/cpu", False),
    ],
)
def test_machine_class(
    vendor: str, flags: str, name: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    path = cpuinfo(tmp_path, vendor, flags)
    assert provenance.machine_class("cpu", path) == name
    assert provenance.supports_bf16(path) is fast


def test_machine_class_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert provenance.machine_class("cpu", tmp_path / "absent") == "arm64/unknown/cpu"
    assert provenance.supports_bf16(tmp_path / "absent") is False


def test_gpus_are_read_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("0000:01:00.0", "Model: \t\t NVIDIA H200\nIRQ: 1\n"), ("0000:02:00.0", "IRQ: 2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "information").write_text(text)
    assert provenance.gpus(tmp_path) == ["NVIDIA H200", "unknown"]
    assert provenance.gpus(tmp_path / "absent") == []
    monkeypatch.setattr(provenance, "gpus", lambda: ["NVIDIA H200"])
    assert provenance.machine_class("cuda:0") == "cuda/NVIDIA H200"


def test_bf16_agrees_with_torch() -> None:
    code = "import torch; print(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert str(provenance.supports_bf16()) == done.stdout.strip()


def test_the_command_is_told_without_where_the_program_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/me/venv/bin/bbmcl", "matrix", "--runs", "my runs"])
    assert provenance.collect()["command"] == "bbmcl matrix --runs 'my runs'"


def test_collect_is_json_and_complete() -> None:
    facts = json.loads(json.dumps(provenance.collect()))
    assert facts["versions"]["backdoorbench-mcl"] == backdoorbench_mcl.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["torch"][0].isdigit()
    assert facts["machine_class"] == provenance.machine_class()
    assert facts["cores"] >= 1
    assert facts["memory_mb"] > 100
    assert len(facts["host"]) == 12
    assert platform.node() not in facts["host"]
    assert facts["time"].endswith("+00:00")
    assert facts["command"]


def test_a_missing_distribution_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "DISTRIBUTIONS", ("no-such-distribution",))
    assert provenance.versions()["no-such-distribution"] == "absent"


def test_versions_of_packages_stand_beside_those_of_the_libraries() -> None:
    found = provenance.versions(["pytest", "torch", "no-such-distribution"])
    assert found["pytest"] == pytest.__version__
    assert found["no-such-distribution"] == "absent"
    assert {name: found[name] for name in provenance.versions()} == provenance.versions()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_and_dirt_of_a_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert provenance._git(tmp_path) is None
    git("init", "-q")
    assert provenance._git(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert provenance._git(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert provenance._git(tmp_path) == {"commit": commit, "dirty": True}
    below = tmp_path / "site-packages"
    below.mkdir()
    assert provenance._git(below) is None  # a repository further up is somebody else's


def test_neither_module_needs_torch() -> None:
    code = (
        "import sys, backdoorbench_mcl.provenance as p, backdoorbench_mcl.confine as c;"
        "p.collect(); c.interpreter_paths(); print('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
