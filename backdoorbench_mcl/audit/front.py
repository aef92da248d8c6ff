"""What the commands call: opens, scans, repairs, remembers what was done, and tells of it. Free of torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import request, runner
from ..engines.local import Local
from ..errors import UserError
from ..plainfiles import read_plain
from ..registry import cache_folder
from ..report import files
from ..runner import Settings
from ..store import Store
from ..workdir import WorkFolder
from . import card as cards
from . import purify as repairing
from . import words
from .chain import Say
from .opened import Asked, Opened, check, opened
from .page import page
from .purify import Judgement, Repair
from .scan import Scan
from .session import Machine, Session
from .stages import How

MOST_CARD = 64 << 20  # bytes


@dataclass(frozen=True)
class Wishes:
    """How to compute, as typed."""

    preset: str
    budget: str
    overrides: Sequence[str]
    device: str
    precision: str
    workers: int | None
    threads: int | None  # of a job that runs alone
    timeout: float | None
    memory: float | None
    isolation: str
    runs: Path
    seed: int


class Front:
    """One model, from the command line to what is told of it. defenses: None for every one that can be used; out: where
    `write` will be asked to write.

    A context manager. Raises UserError, one line, for all that is wrong with what was typed.
    """

    def __init__(
        self, asked: Asked, wishes: Wishes, defenses: Sequence[str] | None, say: Say, out: Path | None = None
    ) -> None:
        check(asked)
        if defenses is None and asked.hold_out == 0:
            raise UserError("--all --hold-out 0: repairs are ranked by held-out images; hold some out")
        if out is not None:
            _require_place(out, asked.model)
        settings = Settings(wishes.runs, wishes.workers, None, wishes.timeout, wishes.isolation, memory=wishes.memory)
        device = request.resolve_device(wishes.device)
        precision = request.resolve_precision(wishes.precision, device)
        self.how = How(wishes.preset, wishes.budget, tuple(wishes.overrides), device, precision, wishes.seed)
        self.asked = asked
        self.wishes = wishes
        self.say = say
        self.registry = runner.registry(say)
        self.at_once = runner.resources(settings, device)
        alone = Settings(wishes.runs, 1, wishes.threads, isolation=wishes.isolation)
        self.in_turn = runner.resources(alone, device)
        self.typed = defenses
        self.found: Scan | None = None
        self.held: list[float | None] = []
        self.repairs: list[Repair] = []
        self.output: dict[str, Any] | None = None
        self.work = WorkFolder()
        self.store: Store | None = None
        self.session: Session | None = None
        self.opened: Opened

    def __enter__(self) -> Front:
        try:
            self.opened = opened(
                self.asked, self.registry, cache_folder(), self.work.path, self.how.precision, self.how.device,
                self.in_turn.isolation, self.say, self.wishes.timeout, self.wishes.memory,
            )  # fmt: skip
            for line in self.opened.lines:
                self.say(line)
            self.store = Store(self.wishes.runs)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what runs, remove what was temporary."""
        if self.session is not None:
            self.session.machine.close()
        if self.store is not None:
            self.store.close()
        self.work.close()

    # ------------------------------------------------------------ doing

    def _begin(self, defenses: Sequence[str]) -> Session:
        assert self.store is not None
        if self.session is not None:
            self.session.machine.close()
        quick = Local(
            self.at_once.workers or 1, self.wishes.timeout, self.at_once.isolation == "inline", self.wishes.memory
        )
        thorough = Local(1, self.wishes.timeout, self.in_turn.isolation == "inline", self.wishes.memory)
        machine = Machine(quick, thorough, self.at_once, self.in_turn)
        self.session = Session(self.opened.handed, self.registry, self.how, machine, self.store, defenses, self.say)
        return self.session

    def scan(self) -> Scan:
        """See `scan.scan`."""
        return self._scan(self._begin(()))

    def _scan(self, session: Session) -> Scan:
        self.found = session.scan()
        self.held = session.held(self.found)
        return self.found

    def purify(self, target: int | None) -> list[Repair]:
        """Repairs, the best first, [] where no scan finds the model suspicious. target: None to have it found."""
        handed = self.opened.handed
        if target is not None and target >= handed.classes:
            raise UserError(f"--target {target}: the model has the labels 0 to {handed.classes - 1}")
        names = repairing.usable(self.registry, handed.labelled) if self.typed is None else list(self.typed)
        session = self._begin(names)  # what is wrong with a defense is said before minutes of search
        kind = None
        if target is None:
            found = self._scan(session)
            if found.call != "suspicious":
                self.say(
                    "nothing is repaired: no label was found suspicious; --target LABEL repairs against one anyway"
                )
                return []
            target, kind = found.target, found.kind
        assert target is not None
        chosen = [repairing.suited(self.registry, name, kind, self.how.overrides) for name in names]
        if chosen != names:
            session = self._begin(chosen)
        trigger = session.trigger(target, kind)
        self.repairs = repairing.ranked([self._repair(session, name, target, trigger) for name in chosen])
        return self.repairs

    def _repair(self, session: Session, defense: str, target: int, trigger: Path | None) -> Repair:
        """One repair; of several one that cannot be made is a line in the ranking."""
        try:
            return session.purify(defense, target, trigger)
        except UserError as error:
            if self.typed is not None:
                raise
            return Repair(defense, target, None, Judgement(0), 0.0, False, str(error))

    def write(self, repair: Repair, file: Path) -> None:
        """The repaired weights and the card beside them. Raises UserError where they cannot be written."""
        assert repair.folder is not None
        try:
            content = (repair.folder / "weights.safetensors").read_bytes()
            files.write(file, content)
            self.output = {"file": file.name, "sha256": hashlib.sha256(content).hexdigest()}
            if repair.rebuild:
                self.output["rebuild"] = dict(repair.rebuild)
                self.say(
                    f"note: {repair.defense} changes the network: load the weights into what "
                    f"{repair.rebuild['function']} makes of it, with the parameters in the card"
                )
            cards.write(file.with_suffix(".json"), self.card())
        except OSError as error:
            raise UserError(f"--out {file}: cannot be written: {error.strerror or error}") from error
        self.say(f"{file} and {file.with_suffix('.json')} written; to look for what is left: bbmcl scan {file} ...")

    # ------------------------------------------------------------ telling

    def card(self) -> dict[str, Any]:
        """See `card.card`."""
        about = {name: dict(value) for name, value in self.opened.about.items()}
        return cards.card(about, self.opened.handed, self.how, self.found, tuple(self.repairs), self.output)

    def as_json(self) -> str:
        """The card as text."""
        return json.dumps(self.card(), indent=1)

    def as_text(self) -> str:
        """Tables for a terminal."""
        handed = self.opened.handed
        lines = [] if self.found is None else words.scan_lines(self.found, handed, self.held)
        if self.repairs:
            lines += ["", *words.repair_lines(self.repairs[0], handed)]
        if len(self.repairs) > 1:
            lines += ["", *words.ranking_lines(self.repairs)]
        return "\n".join(lines)

    def write_page(self, file: Path) -> Path:
        """One page of it all."""
        facts = [(line.partition(" ")[0], line.partition(" ")[2]) for line in self.opened.lines]
        text = page(f"bbmcl: {self.asked.model.name}", facts, self.opened.handed, self.found, self.held, self.repairs)
        try:
            return files.write(file, text.encode())
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error


def _require_place(out: Path, model: Path) -> None:
    """Raises UserError, before minutes of work, where OUT cannot be written, or something else would be lost."""
    card = out.with_suffix(".json")
    if out.exists() and model.exists() and out.samefile(model):
        raise UserError(f"--out {out}: is the model itself; name another file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if card.exists() and "bbmcl_card" not in json.loads(read_plain(card, MOST_CARD)):
            raise ValueError
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--out {out}: {card} is there and is no card of bbmcl; name another file") from error
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: {out.parent} cannot be written")


__all__ = ["Front", "Wishes"]
