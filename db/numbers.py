"""NaN through a database that has none: a text column names what was NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def nan_names(values: Mapping[str, Any]) -> str | None:
    """Names of the values that are NaN, joined by commas; None when there is none."""
    names = [n for n, v in values.items() if isinstance(v, float) and math.isnan(v)]
    return ",".join(names) or None


def restored(row: Any, names: Iterable[str], nan_column: str = "nan_fields") -> dict[str, Any]:
    """The named columns of a row, with NaN where the row says that it was NaN."""
    values = {name: getattr(row, name) for name in names}
    marked = getattr(row, nan_column)
    if marked:
        for name in marked.split(","):
            if name in values:
                values[name] = math.nan
    return values


def with_nan(values: Sequence[float | None], names: Sequence[str], marked: str | None) -> Any:
    """Values in the order of their names, with NaN where ``marked`` names one."""
    if not marked:
        return values
    nan = set(marked.split(","))
    return [math.nan if n in nan else v for n, v in zip(names, values, strict=True)]
