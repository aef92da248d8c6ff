"""Work folders: removed by their owner, or by the next run when the owner was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backdoorbench_mcl import workdir


def test_a_killed_drivers_folder_is_cleared_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code = (
        "import time; from backdoorbench_mcl.workdir import WorkFolder\n"
        "w = WorkFolder(); (w.path / 'x.npy').write_bytes(b'images'); print(w.path, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        mine = workdir.WorkFolder()
        assert (left / "x.npy").exists()
        other.kill()
        other.wait()
    second = workdir.WorkFolder()
    assert not left.exists()
    assert mine.path.exists()
    mine.close()
    second.close()
    assert list(tmp_path.iterdir()) == []
