"""The Python API for notebooks and scripts: a matrix, or a runs folder, as a tidy pandas frame. Free of torch."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from . import evaluate, params, runner
from .request import CONTROL, Options
from .rows import Row

if TYPE_CHECKING:
    import pandas as pd

_DTYPES = {int: "Int64", float: "float64", bool: "boolean"}  # of columns; others are objects
_NESTED = ("params", "versions", "stages")
_RECIPES = ("train", "defend")
_METHODS = ("attack", "defense", "inverter", "model", "dataset")


def run(
    attacks: str | Iterable[str], defenses: str | Iterable[str], *, dataset: str = "shapes", model: str = "wrn-16-1",
    seeds: int | str | Iterable[int] = 0, defense_seeds: int | str | Iterable[int] = 0, clean_rate: float = 0.05,
    exclude_poisoned: bool = False, preset: str = "paper", budget: str | None = None,
    set: Mapping[str, Any] | None = None, sweep: Mapping[str, Sequence[Any]] | None = None, retune: int = 0,
    clean_model: bool = False, device: str = "auto", precision: str = "auto", workers: int | None = None,
    threads_per_job: int | None = None, timeout: float | None = None, isolation: str = "auto", retry: bool = True,
    runs: str | os.PathLike[str] | None = None, data_root: str | os.PathLike[str] | None = None,
    parameters: bool = False, quiet: bool = False, engine: str = "local", address: str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """`bbmcl matrix` as a function: the rows of this matrix, one per cell, in the order of the table.

    The arguments are the options of the command and mean the same; lists may be lists. What is stored in `runs` is not
    computed again, and an interrupted call goes on where it stopped.

    Args:
        set: parameters, as in `{"mcldef.temperature": 0.1, "train.augment": "flip"}`.
        sweep: values to try, as in `{"mcldef.temperature": [0.1, 0.5], "clean-rate": [0.01, 0.05]}`.
        runs: folder of results; default: the environment variable BBMCL_RUNS, else `bbmcl-runs`.
        data_root: where data sets lie; default: the environment variable BBMCL_DATA.
        parameters: as in `load_results`.
        quiet: show neither what `all` stood for nor progress on stderr.

    Returns:
        A frame as `load_results` returns it. A cell that failed is a row with its `state` and `reason`.

    Raises:
        UserError: the request cannot be carried out as given; the message says what to do.

    Example: `run("badnets", ["ft", "mcldef"], seeds=range(3)).groupby("defense")[["asr", "ba"]].mean()`
    """
    named = f"{_text(attacks)},{CONTROL}" if clean_model else _text(attacks)
    root = data_root or os.environ.get("BBMCL_DATA")
    options = Options(
        named, _text(defenses), dataset, model, _text(seeds), _text(defense_seeds), clean_rate, preset, budget,
        tuple(f"{name}={params.typed(_plain(given))}" for name, given in (set or {}).items()), device, precision,
        None if root is None else Path(root), exclude_poisoned,
        tuple(f"{name}={','.join(params.typed(_plain(one)) for one in values)}"
              for name, values in (sweep or {}).items()), retune,
    )  # fmt: skip
    settings = runner.Settings(
        _folder(runs), workers, threads_per_job, timeout, isolation, retry, engine=engine, address=address
    )
    if quiet:
        return frame(runner.run_matrix(options, settings, live=False, stream=io.StringIO()), parameters)
    return frame(runner.run_matrix(options, settings, lambda line: print(line, file=sys.stderr)), parameters)


def load_results(runs: str | os.PathLike[str] | None = None, *, parameters: bool = False) -> pd.DataFrame:
    """Every stored cell of a runs folder as a tidy frame, by data set, attack, seed and defense.

    Columns are the fields of `rows.Row`: percentages (0-100, unrounded), counts `*_k` of `*_n`, seconds, MB; what is
    undefined is missing. The floor of `asr` is `ftr`: `asr_at_floor` tells that no ASR beats it, and
    `target_class_erased` that the model hardly says the target any more. Tuples are text, as in `target, location`.

    Args:
        runs: folder of results; default: the environment variable BBMCL_RUNS, else `bbmcl-runs`.
        parameters: also a column for every parameter, as `defense.temperature`, `attack.rate`, `train.epochs`;
            missing where a method has no such parameter.

    Raises:
        UserError: there is no such folder.

    Example: `load_results("bbmcl-runs").pivot_table(index="attack", columns="defense", values=["asr", "ba"])`
    """
    return frame(runner.stored_rows(_folder(runs)), parameters)


def frame(rows: Sequence[Row], parameters: bool = False) -> pd.DataFrame:
    """Rows as a frame with the same columns and dtypes whatever the rows, none included."""
    import pandas as pd  # half a second, for this only

    hints = get_type_hints(Row)
    out = {}
    for field in fields(Row):
        if field.name in _NESTED:
            continue
        values = [getattr(row, field.name) for row in rows]
        texts = [", ".join(value) if isinstance(value, tuple) else value for value in values]
        out[field.name] = pd.Series(texts, dtype=_dtype(hints[field.name]))
    marks = [evaluate.marks(row) for row in rows]
    out |= {name: pd.Series([one[name] for one in marks], dtype="boolean") for name in evaluate.MARKS}
    if parameters:
        found = [_parameters(row) for row in rows]
        for name in dict.fromkeys(name for one in found for name in one):
            out[name] = pd.Series([one.get(name) for one in found], dtype=object).infer_objects()
    return pd.DataFrame(out)


def _dtype(hint: Any) -> str:
    """`float | None` -> `float64`; what is no number and no truth value is an object."""
    kinds = [kind for kind in getattr(hint, "__args__", (hint,)) if kind is not type(None)]
    return _DTYPES.get(kinds[0], "object") if len(kinds) == 1 else "object"


def _parameters(row: Row) -> dict[str, Any]:
    out = {}
    for section in (*_METHODS, *_RECIPES):
        found = row.params.get(section, {})
        for name, value in (found if section in _RECIPES else found.get("params", {})).items():
            out[f"{section}.{name}"] = tuple(value) if isinstance(value, list) else value
    return out


def _text(given: object) -> str:
    return given if isinstance(given, str) else ",".join(map(str, given if isinstance(given, Iterable) else [given]))


def _plain(given: Any) -> Any:
    """Scalars of numpy as those of Python, whose text can be read again."""
    return given.item() if hasattr(given, "item") else given


def _folder(runs: str | os.PathLike[str] | None) -> Path:
    return Path(runs or os.environ.get("BBMCL_RUNS") or runner.Settings.runs)


__all__ = ["frame", "load_results", "run"]
