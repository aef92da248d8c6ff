"""The progress display on a fake stream, with a clock that the test turns."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from backdoorbench_mcl.progress import Progress, duration
from backdoorbench_mcl.rows import Row, State


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def cell(state: State = "ok", reason: str = "", gate: str = "ok", defense_seed: int | None = 0) -> Row:
    numbers = {"asr": 1.6, "ftr": 1.69, "ba": 81.93, "seconds": 41.0} if state == "ok" else {}
    return Row(
        key="k", dataset="d", model="m", attack="badnets", defense="mcldef", victim_seed=2, defense_seed=defense_seed,
        clean_rate=0.05, state=state, reason=reason, gate=gate, **numbers,  # type: ignore[arg-type]
    )  # fmt: skip


def test_plain_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(3, stream, clock=clock) as progress:
        progress.started("a", "victim badnets 2")
        progress.finished("a", "victim badnets 2", "ok", 75.0)
        progress.cell(cell())
        progress.finished("b", "invert", "failed", 3.0, "out of\n\x1b[31mmemory")
        progress.cell(cell("failed", "out of memory"))
        progress.cell(cell("n/a", "weak attack", gate="weak", defense_seed=None))
        progress.note("3 cells\x07")
    assert stream.getvalue().splitlines() == [
        "  victim badnets 2: ok, 1:15 min",
        "[1/3] badnets / mcldef, seed 2/0: ASR 1.60 (FTR 1.69) BA 81.93, 41 s",
        "  invert: failed, 3.0 s (out of memory)",
        "[2/3] badnets / mcldef, seed 2/0: failed (out of memory)",
        "[3/3] badnets / mcldef, seed 2: n/a (weak attack)",
        "3 cells",
    ]


def test_whose_a_cell_is_stands_at_its_end() -> None:
    stream = io.StringIO()
    blame = "mydef 1.0, mydef.py; skip it with BBMCL_DISABLE=mydef"
    with Progress(40, stream, clock=Clock()) as progress:
        progress.cell(replace(cell("failed", "out of memory"), blame=blame))
        for _ in range(30):
            progress.cell(cell())
        progress.cell(replace(cell(), blame=blame, changed=("threads", "seed"), strays=("/a", "/b")))  # cut by no flood
    lines = stream.getvalue().splitlines()
    assert lines[0] == f"[1/40] badnets / mcldef, seed 2/0: failed (out of memory); {blame}"
    assert lines[-1] == (
        "[32/40] badnets / mcldef, seed 2/0: ASR 1.60 (FTR 1.69) BA 81.93, 41 s; changed the threads, seed of its "
        f"process; opened or changed /a, which was not granted; {blame}"
    )


def test_a_running_stage_is_heard_of_every_half_minute() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1, stream, clock=clock)
    progress.started("a", "victim")
    for step in range(0, 61):  # resumed at step 100 of 400, one step a second
        clock.now = float(step)
        progress.tick("a", 100 + step, 400, 812.34)
    progress.tick("late", 1, 2, 3.0)
    assert stream.getvalue().splitlines() == [
        "  victim: 32 %, 812 img/s, 4:30 min left",
        "  victim: 40 %, 812 img/s, 4:00 min left",
    ]


def test_a_flood_is_cut_and_counted_but_failures_are_told() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(60, stream, clock=clock) as progress:
        for _ in range(50):
            progress.cell(cell())
        progress.cell(cell("timeout", "after 600 s"))
        clock.now = 10.0
        progress.cell(cell())
        clock.now = 10.0
        for _ in range(40):
            progress.finished("a", "x", "ok", 1.0)
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("...")] == [
        "... 30 more lines left out",
        "... 21 more lines left out",
    ]
    assert "[51/60] badnets / mcldef, seed 2/0: timeout (after 600 s)" in lines
    assert any(line.startswith("[52/60]") for line in lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_live_display_shows_stages_and_keeps_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with Progress(2, stream, clock=clock) as progress:
        progress.started("a", "victim [bold]badnets")
        clock.now = 1.0
        progress.tick("a", 10, 100, 812.0)
        clock.now = 2.0
        progress.tick("a", 20, 100, 1812.0)
        progress.note("see")  # a print redraws, so that the state of now is in the stream
        progress.finished("a", "victim [bold]badnets", "ok", 2.0)
        progress.cell(cell("failed", "it broke"))
    text = stream.getvalue()
    for part in ("victim [bold]badnets", "1,812 img/s", "8.0 s left", "0/2", "seed 2/0: failed (it broke)"):
        assert part in text
    assert "1/2, 1 without result" in text.rsplit("it broke", 1)[1]
    assert "victim" not in text.rsplit("1/2, 1 without result", 1)[1]


def test_dumb_terminals_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(1, stream) as progress:
        progress.cell(cell())
    assert "\x1b" not in stream.getvalue()


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("live", [False, True])
def test_a_broken_stream_does_not_stop_the_run(live: bool) -> None:
    with Progress(1, Closed(), live=live) as progress:
        progress.started("a", "victim")
        progress.finished("a", "victim", "failed", 1.0, "x")
        progress.cell(cell())
        progress.note("done")


def test_ascii_streams_get_question_marks() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Progress(1, stream) as progress:
        progress.note("naïve ±")
    assert raw.getvalue() == b"na?ve ?\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1.0, "0.0 s"), (0.44, "0.4 s"), (9.96, "10 s"), (59.6, "1:00 min"), (75, "1:15 min"), (3700, "1:01 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
