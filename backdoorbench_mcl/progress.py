"""What the driver shows while it works: a live display on a terminal, plain lines in a file or a pipe.

It never touches results, and a stream that breaks (a closed pipe) silences it instead of stopping the run.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, cast

from .rows import Row
from .text import one_line

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

HEARTBEAT = 30.0  # seconds between two plain lines about one running stage
BURST = 20  # plain lines that may come at once: a run that finds everything stored must not flood a log
REFILL = 5.0  # lines a second after that; what is dropped is counted and said


@dataclass
class _Stage:
    """A running stage, and where it stood at its first tick (a resumed training does not start at 0)."""

    title: str
    started: float
    last: float
    first: tuple[float, int] | None = None
    task: TaskID | None = None

    def left(self, now: float, done: int, total: int) -> float | None:
        """Seconds left at the pace since the first tick, None before there is one."""
        if self.first is None:
            self.first = (now, done)
        passed, made = now - self.first[0], done - self.first[1]
        return passed / made * (total - done) if made > 0 else None


class _Muting(io.TextIOBase):
    """A text stream that falls silent when the one behind it breaks: nobody is left to be told.

    rich would end the process on a closed pipe; here only the display ends.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._name = stream.encoding or "utf-8"
        self._mute = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._name

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, text: str) -> int:
        if not self._mute:
            try:
                self._stream.write(text.encode(self._name, "replace").decode(self._name))
                self._stream.flush()
            except (OSError, ValueError):
                self._mute = True
        return len(text)


class Progress:
    """Cells done, running stages with their speed and time left, finished stages, failures.

    total_cells: cells of this run. stream: stderr by default. live: redraw in place (default: where the stream is a
    terminal). clock: seconds, monotonic; for tests. Use it as a context manager; keys are any unique text.

    Example:
        with Progress(4) as progress:
            progress.started("k1", "victim badnets 0")
            progress.tick("k1", 10, 790, 812.5)
            progress.finished("k1", "victim badnets 0", "ok", 41.0)
    """

    def __init__(
        self,
        total_cells: int,
        stream: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = _Muting(sys.stderr if stream is None else stream)
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb" if live is None else live
        self._clock = clock
        self._total = total_cells
        self._told, self._left = False, ""
        self._cells = 0
        self._bad = 0
        self._stages: dict[str, _Stage] = {}
        self._credit, self._credited, self._dropped = float(BURST), clock(), 0
        self._bars: Bars | None = None
        self._overall: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._live:
            self._bars = _bars(self._stream)
            self._overall = self._bars.add_task("cells", total=self._total, speed=self._summary(), left="")
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif self._dropped:
            self._write(f"... {self._dropped} more lines left out")

    def started(self, key: str, title: str) -> None:
        """A stage begins; on a terminal it gets a line of its own until it is finished."""
        title = one_line(title, 34 if self._live else 60)  # with bar, speed and time left: 80 columns
        now = self._clock()
        stage = self._stages[key] = _Stage(title, now, now)
        if self._bars is not None:
            stage.task = self._bars.add_task(title, total=None, speed="", left="")

    def tick(self, key: str, done: int, total: int, images_per_s: float) -> None:
        """A running stage stands at `done` of `total` steps. Unknown keys are ignored: ticks may arrive late."""
        stage = self._stages.get(key)
        if stage is None:
            return
        now = self._clock()
        left = stage.left(now, done, total)
        speed = f"{images_per_s:,.0f} img/s" if images_per_s > 0 else ""
        ahead = "" if left is None else f"{duration(left)} left"
        if self._bars is not None and stage.task is not None:
            self._bars.update(stage.task, completed=done, total=total, speed=speed, left=ahead)
        elif now - stage.last >= HEARTBEAT:
            stage.last = now
            share = f"{100 * done / total:.0f} %" if total else ""
            whole = self._left and f"{self._left} of the run"
            self._line(f"  {stage.title}: {', '.join(filter(None, (share, speed, ahead, whole)))}")

    def finished(self, key: str, title: str, state: str, seconds: float, reason: str = "") -> None:
        """A stage ended. On a terminal only a failure leaves a line behind."""
        stage = self._stages.pop(key, None)
        if self._bars is not None and stage is not None and stage.task is not None:
            self._bars.remove_task(stage.task)
        text = f"  {one_line(title, 60)}: {state}, {duration(seconds)}" + _why(reason)
        if state != "ok":
            self._line(text, needed=True)
        elif self._bars is None:
            self._line(text)

    def cell(self, row: Row) -> None:
        """A cell is settled: counted, and printed with its ASR, floor and BA or with the reason why it has none."""
        self._cells += 1
        good = row.state in ("ok", "n/a")  # that a method has no meaning here is an answer
        self._bad += not good
        seeds = str(row.victim_seed) if row.defense_seed is None else f"{row.victim_seed}/{row.defense_seed}"
        name = one_line(f"{row.attack} / {row.defense}, seed {seeds}", 90)
        result = _result(row) if row.state == "ok" else row.state + _why(row.reason)
        result += _marks(row)
        self._line(f"[{self._cells}/{self._total}] {name}: {result}", needed=not good or bool(row.blame))
        if self._bars is not None and self._overall is not None:
            self._bars.update(self._overall, completed=self._cells, speed=self._summary())

    def ahead(self, seconds: float | None, text: str) -> None:
        """How long the run takes from here on, None where that is unknown: the first time as a line that says `text`.

        Later on a terminal shows it beside the cells, and other streams with a stage that runs long.
        """
        if not self._told:
            self._told = True
            self._line(f"time: {one_line(text)}", needed=True)
        self._left = "" if seconds is None else f"{duration(seconds)} left"
        if self._bars is not None and self._overall is not None:
            self._bars.update(self._overall, left=self._left)

    def note(self, text: str) -> None:
        """One line about the run as a whole."""
        self._line(one_line(text), needed=True)

    def _summary(self) -> str:
        bad = f", {self._bad} without result" if self._bad else ""
        return f"{self._cells}/{self._total}{bad}"

    def _line(self, text: str, needed: bool = False) -> None:
        if self._bars is not None:
            self._bars.refresh()  # a print repeats the last drawing, which may show stages that are gone
            self._bars.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
            return
        now = self._clock()
        self._credit = min(float(BURST), self._credit + (now - self._credited) * REFILL)
        self._credited = now
        if self._credit < 1 and not needed:
            self._dropped += 1
            return
        self._credit = max(0.0, self._credit - 1)
        if self._dropped:
            self._write(f"... {self._dropped} more lines left out")
            self._dropped = 0
        self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")


def _result(row: Row) -> str:
    asr = "" if row.asr is None else f"ASR {row.asr:.2f}"
    floor = f"(FTR {row.ftr:.2f})" if asr and row.ftr is not None else ""
    ba = "" if row.ba is None else f"BA {row.ba:.2f}"
    text = " ".join(filter(None, (asr, floor, ba)))
    return text if row.seconds is None else f"{text}, {duration(row.seconds)}"


def _why(reason: str) -> str:
    return f" ({one_line(reason, 200)})" if reason else ""


def _marks(row: Row) -> str:
    """What else a method did, and whose it is."""
    said = [f"changed the {', '.join(row.changed)} of its process"] if row.changed else []
    said += [f"opened or changed {row.strays[0]}, which was not granted"] if row.strays else []
    return "".join(f"; {one_line(text, 200)}" for text in (*said, row.blame) if text)


def duration(seconds: float) -> str:
    """Example: `duration(0.4)` -> `0.4 s`, `duration(75)` -> `1:15 min`, `duration(3700)` -> `1:01 h`"""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _bars(stream: _Muting) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[speed]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
        console=Console(file=cast(TextIO, stream), force_terminal=True),
        transient=True,
        redirect_stdout=False,  # results go to stdout, which may be another file than the stream of this display
        refresh_per_second=4,
    )
