"""Confinement is irrevocable, so every case runs in a process of its own."""

from __future__ import annotations

import ctypes
import errno
import json
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from backdoorbench_mcl import confine as confine_module
from backdoorbench_mcl.confine import abi_version, confine, interpreter_paths

needs_landlock = pytest.mark.skipif(abi_version() == 0, reason="this kernel has no Landlock")

PRELUDE = """
import errno, json, os, sys
from pathlib import Path
from backdoorbench_mcl.confine import confine, interpreter_paths, watch
inputs, work, outside = (Path(p) for p in sys.argv[1:4])

def attempt(act):
    try:
        return act()
    except OSError as error:
        return errno.errorcode[error.errno]
"""


def run(tmp_path: Path, body: str) -> Any:
    """Run `body` after PRELUDE in a fresh interpreter with three folders; what it puts in `out` comes back."""
    folders = [tmp_path / name for name in ("inputs", "work", "outside")]
    for folder in folders:
        folder.mkdir()
        (folder / "file.txt").write_text(folder.name)
    code = PRELUDE + textwrap.dedent(body) + "\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_landlock
def test_only_what_was_granted_can_be_read_and_written(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import subprocess, tempfile
        mode = confine([*interpreter_paths(), inputs], [work])
        script = f"open({str(outside / 'file.txt')!r}).read()"
        out = {
            "mode": mode,
            "read inputs": attempt((inputs / "file.txt").read_text),
            "list inputs": attempt(lambda: sorted(os.listdir(inputs))),
            "write inputs": attempt(lambda: (inputs / "new.txt").write_text("x")),
            "read work": attempt((work / "file.txt").read_text),
            "write work": attempt(lambda: (work / "new.txt").write_text("xy")),
            "make folder in work": attempt(lambda: (work / "a" / "b").mkdir(parents=True)),
            "move within work": attempt(lambda: os.replace(work / "new.txt", work / "a" / "new.txt")),
            "truncate in work": attempt(lambda: os.truncate(work / "file.txt", 1)),
            "remove in work": attempt(lambda: os.remove(work / "file.txt")),
            "read outside": attempt((outside / "file.txt").read_text),
            "list outside": attempt(lambda: os.listdir(outside)),
            "write outside": attempt(lambda: (outside / "new.txt").write_text("x")),
            "remove outside": attempt(lambda: os.remove(outside / "file.txt")),
            "through a link": attempt(lambda: [os.symlink(outside, work / "l"), (work / "l" / "file.txt").read_text()]),
            "through /proc": attempt(Path(f"/proc/self/root{outside}/file.txt").read_text),
            "the parent's memory": attempt(lambda: open(f"/proc/{os.getppid()}/mem", "rb").read(1)),
            "temporary file": attempt(lambda: Path(tempfile.NamedTemporaryFile().name).parent == work),
            "throw away": attempt(lambda: open("/dev/null", "w").write("x")),
            "child outside": subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE).stderr.decode(),
        }
        """,
    )
    child = out.pop("child outside")
    assert "PermissionError" in child, child
    assert out == {
        "mode": "landlock",
        "read inputs": "inputs",
        "list inputs": ["file.txt"],
        "write inputs": "EACCES",
        "read work": "work",
        "write work": 2,
        "make folder in work": None,
        "move within work": None,
        "truncate in work": None,
        "remove in work": None,
        "read outside": "EACCES",
        "list outside": "EACCES",
        "write outside": "EACCES",
        "remove outside": "EACCES",
        "through a link": "EACCES",
        "through /proc": "EACCES",
        "the parent's memory": "EACCES",
        "temporary file": True,
        "throw away": 1,
    }
    assert (tmp_path / "outside" / "file.txt").read_text() == "outside"


@pytest.mark.skipif(abi_version() < 6, reason="Landlock before version 6 leaves signals alone")
def test_neither_sockets_nor_signals_leave(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import socket
        server = socket.create_server(("127.0.0.1", 0))
        confine(interpreter_paths(), [work])
        out = {
            "connect": attempt(lambda: socket.create_connection(server.getsockname(), timeout=5)),
            "bind": attempt(lambda: socket.create_server(("127.0.0.1", 0))),
            "signal the parent": attempt(lambda: os.kill(os.getppid(), 0)),
            "signal itself": attempt(lambda: os.kill(os.getpid(), 0)),
        }
        """,
    )
    assert out == {"connect": "EACCES", "bind": "EACCES", "signal the parent": "EPERM", "signal itself": None}


@needs_landlock
def test_torch_imports_trains_and_saves_afterwards(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        mode = confine(interpreter_paths(), [work])
        import torch, torchvision, numpy, safetensors.torch, pyarrow.parquet
        from torch import nn
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        model = model.to(memory_format=torch.channels_last)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = torch.rand(16, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.arange(16) % 4
        losses = []
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            loss = nn.functional.cross_entropy(logits.float(), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        weights = {name: w.contiguous() for name, w in model.state_dict().items()}
        safetensors.torch.save_file(weights, work / "model.safetensors")
        again = safetensors.torch.load_file(work / "model.safetensors")
        out = {"mode": mode, "losses": losses, "same": bool(torch.equal(again["0.weight"], model[0].weight)),
               "outside": attempt((outside / "file.txt").read_text)}
        """,
    )
    assert out["mode"] == "landlock"
    assert out["losses"][-1] < 0.5 * out["losses"][0]
    assert out["same"]
    assert out["outside"] == "EACCES"


def test_paths_stay_minimal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package on PYTHONPATH is readable, its neighbours (a runs folder, say) are not."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "bbmcl_stranger").mkdir()
    (tmp_path / "bbmcl_stranger" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    paths = interpreter_paths(["bbmcl_stranger.method", "no_such_package"])
    assert tmp_path / "bbmcl_stranger" in paths
    assert not any((tmp_path / "runs").is_relative_to(path) for path in paths)
    assert not any(Path.home() == path or path == Path("/") or path.name == "shm" for path in paths)
    assert Path(sys.executable).resolve().is_relative_to(Path(sys.base_prefix).resolve())
    assert any(Path(sys.base_prefix).resolve().is_relative_to(path) for path in paths)
    assert all(path.exists() for path in paths)
    assert not any(a != b and a.is_relative_to(b) for a in paths for b in paths)


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Make every system call of the module fail with errno `code`."""

    def call(number: int, *arguments: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(confine_module, "_call", call)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_no_support_is_an_answer(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, code)
    assert abi_version() == 0
    assert confine([], []) == "process"


def test_a_container_that_filters_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine_module, "abi_version", lambda: 3)
    refuse(monkeypatch, errno.EPERM)
    assert confine([], []) == "process"
    refuse(monkeypatch, errno.E2BIG)
    with pytest.raises(OSError, match="could not create a ruleset"):
        confine([], [])


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6, 7])
def test_old_kernels_are_asked_only_for_what_they_know(version: int) -> None:
    newest_bit = {1: 12, 2: 13, 3: 14, 4: 14}.get(version, 15)
    assert confine_module._handled(version) == (1 << (newest_bit + 1)) - 1


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        confine([tmp_path / "nowhere"], [])


def test_threads_that_would_stay_free_are_refused() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="2 run; call it first"):
            confine([], [])
    finally:
        done.set()
        thread.join()


def test_watch_notes_what_lies_outside(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        seen = watch(interpreter_paths(), [work])
        (work / "file.txt").read_text()
        (outside / "file.txt").read_text()
        (work / ".." / "outside" / "file.txt").read_text()
        attempt((outside / "absent.txt").read_text)
        out = [Path(p).name for p in seen if Path(p).parent == outside.resolve()] + [len(seen)]
        """,
    )
    assert out == ["file.txt", "absent.txt", 2]


def test_watch_notes_what_is_changed_outside(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import shutil
        for name in ("gone", "moved", "folder/inner"):
            (outside / name).mkdir(parents=True)
        (inputs / "link").symlink_to(outside / "file.txt")
        seen = watch([*interpreter_paths(), inputs, outside], [work])  # all may be read
        (work / "new" / "er").mkdir(parents=True)
        (work / "new" / "er" / "file.txt").write_text("x")
        os.replace(work / "file.txt", work / "other.txt")
        shutil.rmtree(work / "new")
        open(os.devnull, "w").write("x")
        (outside / "file.txt").read_text()
        allowed = len(seen)
        (outside / "new.txt").write_text("x")
        (inputs / "link").open("a").close()
        os.close(os.open(inputs / "file.txt", os.O_RDWR))
        (outside / "made").mkdir()
        (outside / "gone").rmdir()
        (outside / "moved").rename(work / "moved")
        (work / "other.txt").rename(outside / "other.txt")
        out = [allowed, *(str(Path(p).relative_to(inputs.parent.resolve())) for p in seen)]
        """,
    )
    assert out == [
        0, "outside/new.txt", "outside/file.txt", "inputs/file.txt", "outside/made", "outside/gone", "outside/moved",
        "outside/other.txt",
    ]  # fmt: skip
