"""Rows as records: JSON and CSV, every field of every row. No pandas, for scripts that call often."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..evaluate import MARKS, marks
from ..rows import Row
from ..text import one_line


def finite(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON does not have, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def embedded(value: Any) -> str:
    """JSON, without spaces, that cannot end the script element that it stands in. Raises ValueError for a NaN."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def as_json(rows: Iterable[Row]) -> str:
    """One array, a cell a line, fields in the order of `Row`, then `evaluate.marks`; ASCII, so that every terminal and
    file takes it.
    """
    lines = (json.dumps(finite(row.as_dict() | marks(row)), allow_nan=False) for row in rows)
    body = ",\n".join(lines)
    return f"[\n{body}\n]" if body else "[]"


def as_csv(rows: Iterable[Row]) -> str:
    """One line a cell, fields of `Row`, then `evaluate.marks`; None is empty, lists and mappings are JSON."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*(field.name for field in fields(Row)), *MARKS])
    for row in rows:
        writer.writerow([_csv_field(value) for value in finite(row.as_dict() | marks(row)).values()])
    return out.getvalue().removesuffix("\n")


def _csv_field(value: Any) -> Any:
    if isinstance(value, str):
        value = one_line(value)
        return f"'{value}" if value[:1] in ("=", "+", "-", "@") else value  # spreadsheets would run it as a formula
    return json.dumps(value) if isinstance(value, dict | list) else value
