"""The paper's tables and figures: pinned runs in the paper's layout, beside the paper's numbers (spec 10-12)."""

from __future__ import annotations

import difflib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import params, report, runner
from .errors import UserError
from .needed import wanted_by
from .presets.suite import NAMES, Suite, datasets, on, suite
from .registry import Described, Registry, Wanted, cache_folder
from .request import NOTHING, Options, resolve
from .rows import Row
from .store import Store

if TYPE_CHECKING:
    from .report.sheets import Sheet

ALL = "all"


@dataclass(frozen=True)
class Reproduced:
    """One target: its rows, what to print, the printed numbers, the figures that were written, what could not be drawn.

    sheets: its tables beyond the grids and their statistics. The last target has the claims of all of them in `judged`,
    and where it is not the only one as text in `closing`.
    """

    suite: Suite
    rows: tuple[Row, ...]
    text: str
    sheets: tuple[Sheet, ...]
    files: tuple[Path, ...]
    problems: tuple[str, ...] = ()
    judged: tuple[Sheet, ...] = ()
    closing: str = ""


def targets(name: str) -> tuple[str, ...]:
    """`all`, or names separated by commas. Raises UserError for one that does not exist, before anything is run."""
    names = _parts(name)
    found = NAMES if ALL in names else names
    for each in found or ("",):
        suite(each, "", "")
    return found


def _parts(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in name.split(",") if part.strip()))


def planned(
    name: str, base: Options, announce: Callable[[str], None] = lambda line: None
) -> list[tuple[Suite, Options]]:  # fmt: skip
    """Targets and the options of their runs. base: everything but attacks and defenses, which a target names; an attack
    of the base (the control `none`) comes after those of each target that repairs anything.

    A `--set` line of the base beats one of the target. Where there are several targets it holds for those that have a
    method of its name; the others are announced, as are the targets that `all` leaves out on a data set.
    Raises UserError for a target that the paper does not have on the data set, and for a line that no target heeds.
    """
    names = targets(name)
    selection = params.selection(base.dataset)
    dataset = selection.name.rpartition("/")[2]
    left_out = [each for each in names if not on(each, dataset)]
    if left_out and ALL not in _parts(name):
        has = " or ".join(datasets(left_out[0]))
        raise UserError(
            f"reproduce {left_out[0]} --dataset {base.dataset}: the paper has it on {has} only; use that, or shapes "
            "for a toy run"
        )
    if left_out:
        announce(f"note: the paper has no {', '.join(left_out)} on {dataset}: left out")
    known = runner.registry()
    budget = base.budget or known.describe([Wanted("dataset", selection)])[0].budget
    found = [suite(each, dataset, budget) for each in names if each not in left_out]
    bare = [
        replace(
            base, attacks=_attacks(one, base), defenses=one.defenses, model=base.model or one.model, budget=budget,
            overrides=one.set, sweeps=one.sweep, embed=one.kind == "tsne",
        )
        for one in found
    ]  # fmt: skip
    lines = [tuple(base.overrides)] * len(found)
    if base.overrides and len(found) > 1:  # alone, a target refuses a line as `matrix` does
        lines = _shared_out(base.overrides, found, bare, known, announce)
    return [(one, replace(options, overrides=(*one.set, *own)))
            for one, options, own in zip(found, bare, lines, strict=True)]  # fmt: skip


def _attacks(one: Suite, base: Options) -> str:
    return f"{one.attacks},{base.attacks}" if base.attacks and one.defenses != NOTHING else one.attacks


def _shared_out(
    lines: Sequence[str], found: Sequence[Suite], bare: Sequence[Options], known: Registry,
    announce: Callable[[str], None],
) -> list[tuple[str, ...]]:  # fmt: skip
    """Which of the typed `--set` lines hold for each target. Raises UserError for one that holds for none."""
    params.overrides(list(lines))  # says which one cannot be read
    heeded, names = [], set()
    for options in bare:
        own, has = _heeded(lines, options, known)
        heeded.append(own)
        names |= has
    for line in lines:
        without = [one.name for one, own in zip(found, heeded, strict=True) if line not in own]
        if len(without) == len(found):
            close = difflib.get_close_matches(_method(line), names, 1)
            hint = (
                f"did you mean {close[0]!r}?"
                if close
                else f"these targets have {', '.join(sorted(n for n in names if '/' not in n))}"
            )
            raise UserError(f"--set {line}: nothing selected is called {_method(line)!r}; {hint}")
        if without:
            announce(f"note: --set {line} is left out of {', '.join(without)}, without {_method(line)!r}")
    return heeded


def _heeded(lines: Sequence[str], options: Options, known: Registry) -> tuple[tuple[str, ...], set[str]]:
    """The `--set` lines that mean something in a run, and all names that one could have.

    Level by level of what methods need, for a line about one method may decide which others are needed.
    """
    prepare = runner.prepare_data(known, cache_folder())
    kept: tuple[str, ...] = ()
    for depth in itertools.count(1):
        asked = resolve(replace(options, overrides=(*options.overrides, *kept)), known, prepare)
        names: set[str] = set()
        level = [asked.train, asked.defend, asked.dataset, asked.model, *asked.attacks, *asked.defenses]
        for _ in range(depth):
            names |= {name for m in level for name in _names(m)}
            level = [asked.needed[item] for method in level for item in wanted_by(method)]
        before, kept = kept, tuple(line for line in lines if _method(line) in names)
        if not level and kept == before:
            break
    return kept, names


def _names(method: Described) -> tuple[str, ...]:
    """What a `--set` line may call a method. All recipes are of one class: they go by their labels."""
    return (method.label,) if method.kind == "recipe" else (method.full_name, method.full_name.rpartition("/")[2])


def _method(line: str) -> str:
    """Of what a `--set` line speaks. Example: `mcldef` of `mcldef.epochs=3`"""
    return line.partition("=")[0].rpartition(".")[0]


def reproduce(
    name: str, base: Options, settings: runner.Settings, fmt: report.Format | Literal["html"] = "table", *,
    color: bool = False, announce: Callable[[str], None] = lambda line: None, live: bool | None = None,
) -> Iterator[Reproduced]:  # fmt: skip
    """Run what is missing of each target and say what came of it, one after the other.

    base: as for `planned`, with defenses "" and model "" for the targets' own. Figures go to `figures/` in
    the runs folder. Raises UserError as `runner.run_matrix` does.
    Example: `for found in reproduce("table1", Options("", "", "shapes", ""), Settings()): print(found.text)`
    """
    runs = planned(name, base, announce)
    printing = fmt not in ("json", "csv", "html")
    claimed = tuple(dict.fromkeys(claim for found, _ in runs for claim in found.claims))
    own: dict[str, Row] = {}
    for i, (found, options) in enumerate(runs, 1):
        announce(f"== {found.title} ==")
        rows = runner.run_matrix(options, settings, announce=announce, live=live)
        own |= {row.key: row for row in rows}
        files, problems = _drawn(found, options, settings, rows)
        sheets = _printed(found, rows)
        last = i == len(runs)
        judged = _judged(claimed, settings, list(own.values())) if last else ()  # a claim may rest on several targets
        closing = text = ""
        if printing:
            within = sheets if len(runs) > 1 else (*sheets, *judged)
            text = _text(found, options, settings, rows, fmt, within, color)
        if printing and judged and len(runs) > 1:
            closing = _titled(_named(one for one, _ in runs), fmt, _alone(judged, fmt))
        yield Reproduced(found, tuple(rows), text, sheets, files, problems, judged, closing)


def write_page(name: str, found: Sequence[Reproduced], runs: Path) -> Path:
    """The HTML page of what `reproduce` found: each target for itself, then the claims of all. Returns where it is."""
    from . import documents
    from .report.html import Part

    parts = [Part(one.suite.title, one.rows, one.sheets, features=one.suite.kind == "tsne") for one in found]
    judged = found[-1].judged
    if len(parts) == 1:
        parts = [replace(parts[0], below=(*parts[0].below, *judged))]
    elif judged:
        parts.append(Part(f"{_named(one.suite for one in found)}: claims", (), judged))
    return documents.write_parts(
        runs, parts, runs / f"reproduce-{stem(name)}.html", f"bbmcl reproduce {name}", printed_names=True
    )


def stem(name: str) -> str:
    """Targets as a part of a file name."""
    return "-".join(targets(name)) if name != ALL else ALL


def _named(suites: Iterable[Suite]) -> str:
    return ", ".join(one.name for one in suites)


def _printed(found: Suite, rows: Sequence[Row]) -> tuple[Sheet, ...]:
    """Ours beside the printed numbers."""
    from .report import paper

    return () if found.table is None else tuple(paper.sheets(rows, found.table))


def _judged(claimed: Sequence[str], settings: runner.Settings, own: Sequence[Row]) -> tuple[Sheet, ...]:
    """The claims, judged on whatever is stored of the protocol of a run, whose rows are `own`."""
    from .report import claimed as tables

    return tuple(tables.sheets(runner.stored_rows(settings.runs), own, claimed)) if claimed else ()


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
    return _titled(found.title, fmt, grids)


def _titled(title: str, fmt: str, text: str) -> str:
    return {"markdown": f"## {title}", "latex": f"% {title}"}.get(fmt, title) + f"\n\n{text}"


def _alone(printed: Sequence[Sheet], fmt: str) -> str:
    """Sheets that stand below no grid."""
    from .report import sheets

    if fmt == "markdown":
        return sheets.as_markdown(printed)
    if fmt == "latex":
        return sheets.as_latex(printed)
    return sheets.as_text(printed, shutil.get_terminal_size((80, 24)).columns)


def _drawn(
    found: Suite, options: Options, settings: runner.Settings, rows: Sequence[Row]
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """As `_figures`; what cannot be drawn, as a gallery of victims that all failed, is a line, not the end of a run."""
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
        drawn = (
            row for row in rows if row.state == "ok" and row.asr is not None
        )  # a clean model has no triggered images
        shown = [(row, evidence.embedding(row)) for row in drawn]
    finally:
        store.close()
    problems = tuple(
        f"{row.attack} / {row.defense}: its embedding is not stored" for row, panel in shown if panel is None
    )
    panels = [panel for _, panel in shown if panel is not None]
    if not panels:
        return (), (*problems, f"{found.name}: no model to draw")
    return tuple(figures.save(figures.tsne(panels, found.title), stem)), problems


__all__ = ["ALL", "Reproduced", "planned", "reproduce", "stem", "targets", "write_page"]
