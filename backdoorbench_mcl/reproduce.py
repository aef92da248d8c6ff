"""The paper's tables and figures: pinned runs in the paper's layout, beside the paper's numbers (spec 10-12)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import params, report, runner
from .errors import UserError
from .presets.suite import NAMES, Suite, suite
from .registry import Wanted, cache_folder
from .request import NOTHING, Options
from .rows import Row
from .store import Store

if TYPE_CHECKING:
    from .report.sheets import Sheet

ALL = "all"


@dataclass(frozen=True)
class Reproduced:
    """One target: its rows, what to print, the printed numbers and claims, the figures that were written, what could
    not be drawn.
    """

    suite: Suite
    rows: tuple[Row, ...]
    text: str
    sheets: tuple[Sheet, ...]
    files: tuple[Path, ...]
    problems: tuple[str, ...] = ()


def targets(name: str) -> tuple[str, ...]:
    """`all`, or names separated by commas. Raises UserError for one that does not exist, before anything is run."""
    names = tuple(dict.fromkeys(part.strip() for part in name.split(",") if part.strip()))
    found = NAMES if ALL in names else names
    for each in found or ("",):
        suite(each, "", "")
    return found


def planned(name: str, base: Options) -> tuple[Suite, Options]:
    """A target and the options of its run. base: everything but attacks and defenses, which the target names.

    A `--set` line of the base beats one of the target.
    """
    selection = params.selection(base.dataset)
    known = runner.registry()
    budget = base.budget or known.describe([Wanted("dataset", selection)])[0].budget
    found = suite(name, selection.name, budget)
    overrides = (*found.set, *(line for line in base.overrides if _concerns(line, found)))
    options = replace(
        base, attacks=found.attacks, defenses=found.defenses, model=base.model or found.model, budget=budget,
        overrides=overrides, sweeps=found.sweep, embed=found.kind == "tsne",
    )  # fmt: skip
    return found, options


def _concerns(line: str, found: Suite) -> bool:
    """Whether a `--set` line may mean something to a target: not if it is of a method that only others have."""
    name = line.partition("=")[0].rpartition(".")[0]

    def methods(attacks: str, defenses: str) -> set[str]:
        chosen = [params.selection(part) for part in params.split(f"{attacks},{defenses}")]
        needed = {str(s.params["inverter"]) for s in chosen if "inverter" in s.params}
        return {s.name for s in chosen} | needed

    elsewhere = set().union(*(methods(s.attacks, s.defenses) for s in (suite(each, "", "") for each in NAMES)))
    return name not in elsewhere or name in methods(found.attacks, found.defenses)


def reproduce(
    name: str, base: Options, settings: runner.Settings, fmt: report.Format | Literal["html"] = "table", *,
    color: bool = False, announce: Callable[[str], None] = lambda line: None, live: bool | None = None,
) -> Iterator[Reproduced]:  # fmt: skip
    """Run what is missing of each target and say what came of it, one after the other.

    base: as for `planned`, with attacks and defenses "" and model "" for the target's own. Figures go to `figures/` in
    the runs folder. Raises UserError as `runner.run_matrix` does.
    Example: `for found in reproduce("table1", Options("", "", "shapes", ""), Settings()): print(found.text)`
    """
    for each in targets(name):
        found, options = planned(each, base)
        announce(f"== {found.title} ==")
        rows = runner.run_matrix(options, settings, announce=announce, live=live)
        files, problems = _drawn(found, options, settings, rows)
        sheets = _printed(found, settings, rows)
        text = "" if fmt in ("json", "csv", "html") else _text(found, options, settings, rows, fmt, sheets, color)
        yield Reproduced(found, tuple(rows), text, sheets, files, problems)


def stem(name: str) -> str:
    """Targets as a part of a file name."""
    return "-".join(targets(name)) if name != ALL else ALL


def _printed(found: Suite, settings: runner.Settings, rows: Sequence[Row]) -> tuple[Sheet, ...]:
    """The printed numbers and the claims that a target bears on."""
    from .report import claims, paper

    out = []
    if found.table is not None:
        out += paper.sheets(rows, found.table)
    if found.claims:  # a claim may rest on several targets: whatever of the same protocol is stored counts
        same = runner.stored_rows(settings.runs, lambda r: (r.budget, r.preset) == (rows[0].budget, rows[0].preset))
        out.append(claims.sheet(same, found.claims))
    return tuple(out)


def _text(
    found: Suite, options: Options, settings: runner.Settings, rows: Sequence[Row], fmt: Any, printed: Sequence[Sheet],
    color: bool,
) -> str:  # fmt: skip
    from .report import inference, paper
    from .report.evidence import Evidence
    from .report.grid import build

    below: list[Sheet] = []
    if options.defenses != NOTHING:
        store = Store(settings.runs)
        try:
            blocks = [paper.restyle(block) for block in build(rows)]
            below = inference.sheets(blocks, paper.DEFENSES["mcldef"], Evidence(store).predictions)
        finally:
            store.close()
    grids = report.render(rows, fmt, color=color, restyle=paper.restyle, below=[*below, *printed])
    title = {"markdown": f"## {found.title}", "latex": f"% {found.title}"}.get(fmt, found.title)
    return f"{title}\n\n{grids}"


def _drawn(
    found: Suite, options: Options, settings: runner.Settings, rows: Sequence[Row]
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """As `_figures`. A target that cannot be drawn, as the gallery of victims that all failed, keeps none from running."""
    try:
        return _figures(found, options, settings, rows)
    except UserError as error:
        return (), (f"{found.name}: {error}",)


def _figures(
    found: Suite, options: Options, settings: runner.Settings, rows: Sequence[Row]
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Files written, and a line for each picture that could not be drawn."""
    from .report import figures, files
    from .report.gallery import sheets

    folder = settings.runs / "figures"
    name = files.stem(found.name, options.dataset, options.preset, str(options.budget))
    if found.kind == "gallery":
        found_sheets = list(sheets(settings.runs, rows, cache_folder(), folder / name))
        return (tuple(item for item in found_sheets if isinstance(item, Path)),
                tuple(str(item) for item in found_sheets if not isinstance(item, Path)))  # fmt: skip
    if found.kind == "tsne":
        return _tsne(found, settings, rows, folder / name)
    made = {}
    if found.kind == "curves":
        made[name] = figures.curves(rows, f"{found.title}, {options.dataset}")
    else:
        made[f"{name}_front"] = figures.scatter(rows, f"{found.title}, {options.dataset}")
        made[f"{name}_cost"] = figures.scatter(rows, f"{found.title}, {options.dataset}", cost=True)
    drawn = [path for part, one in made.items() if one is not None for path in figures.save(one, folder / part)]
    return tuple(drawn), tuple(f"{part}: no finished cell to draw" for part, one in made.items() if one is None)


def _tsne(
    found: Suite, settings: runner.Settings, rows: Sequence[Row], stem: Path
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    from .report import figures
    from .report.evidence import Evidence

    store = Store(settings.runs)
    try:
        evidence = Evidence(store)
        shown = [(row, evidence.embedding(row)) for row in rows if row.state == "ok"]
    finally:
        store.close()
    problems = tuple(
        f"{row.attack} / {row.defense}: its embedding is not stored" for row, panel in shown if panel is None
    )
    panels = [panel for _, panel in shown if panel is not None]
    if not panels:
        return (), (*problems, f"{found.name}: no model to draw")
    return tuple(figures.save(figures.tsne(panels, found.title), stem)), problems


__all__ = ["ALL", "Reproduced", "planned", "reproduce", "stem", "targets"]
