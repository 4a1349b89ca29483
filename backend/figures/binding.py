"""The small language of ``meta.bind``: what a trace draws, as page and server both read it.

An expression is one of

- a path into `Columns`: ``steps.nmse_median``, ``layers``, ``layer_steps.nmse``, ``paths``,
  ``reasons.fallback.denominator``;
- ``finite(E)``: values, with null for NaN and infinities;
- ``log10(E)``: logarithms of the positive finite values, null for all others;
- ``median(M)``, ``min(M)``, ``max(M)``: of a matrix, per step over the layers that have a finite
  value;
- ``where(C, KIND, E)``: items of E (a column, or a number to repeat) at the steps where column C
  is of a KIND: ``nan``, ``inf``, ``-inf``, ``nonpositive`` (finite and ≤ 0);
- ``cells_x(M, KIND)``, ``cells_y(M, KIND)``: step and layer of each cell of a matrix that is of
  a KIND.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..schemas import Columns
from .common import Trace

TARGETS = ("x", "y", "z", "customdata", "text")


class UnknownColumn(KeyError):
    """A path names nothing that the run has."""


def fill(trace: Trace, columns: Columns) -> Trace | None:
    """A trace with its numbers; None where the run has no such column, or an optional is empty."""
    meta = trace.get("meta", {})
    values: dict[str, Any] = {}
    try:
        for target, expression in meta.get("bind", {}).items():
            values[target] = evaluate(expression, columns)
    except UnknownColumn:
        return None
    if meta.get("optional") and not any(len(value) for value in values.values()):
        return None
    return {**trace, **values}


def evaluate(expression: str, columns: Columns) -> Any:
    """The value of an expression.

    Raises:
        UnknownColumn: a path names nothing that the run has.
        ValueError: the expression is none.
    """
    name, bracket, rest = expression.partition("(")
    if not bracket:
        return _path(expression.strip(), columns)
    if not rest.endswith(")"):
        raise ValueError(f"no expression: {expression!r}")
    arguments = _split(rest[:-1])
    function = _FUNCTIONS.get(name.strip())
    if function is None:
        raise ValueError(f"no such function: {name!r}")
    return function(arguments, columns)


def kind_of(value: float | None) -> str | None:
    """Why a value has no place on a log axis; None where it has one or was not measured."""
    if value is None:
        return None
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return "nonpositive" if value <= 0 else None


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


def _path(path: str, columns: Columns) -> Any:
    head, _, tail = path.partition(".")
    if head in ("layers", "paths") and not tail:
        return getattr(columns, head)
    if head in ("steps", "layer_steps", "reasons"):
        table: dict[str, Any] = getattr(columns, head)
        if tail in table:
            return table[tail]
        raise UnknownColumn(path)
    raise ValueError(f"no path into the columns: {path!r}")


def _each(values: Any, change: Callable[[float | None], float | None]) -> Any:
    if values and isinstance(values[0], list):
        return [[change(value) for value in row] for row in values]
    return [change(value) for value in values]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _log10(value: float | None) -> float | None:
    return math.log10(value) if value is not None and 0 < value < math.inf else None


def _fold(
    matrix: Sequence[Sequence[float | None]], pick: Callable[[list[float]], float]
) -> list[float | None]:
    columns = (
        [v for v in map(_finite, column) if v is not None] for column in zip(*matrix, strict=True)
    )
    return [pick(column) if column else None for column in columns]


def _where(arguments: list[str], columns: Columns) -> list[Any]:
    column, kind, source = arguments
    hits = [kind_of(value) == kind for value in evaluate(column, columns)]
    try:
        values: Sequence[Any] = [float(source)] * len(hits)
    except ValueError:
        values = evaluate(source, columns)
    return [value for value, hit in zip(values, hits, strict=True) if hit]


def _cells(arguments: list[str], columns: Columns) -> list[tuple[int, str]]:
    matrix, kind = arguments
    steps: list[int] = columns.steps["step"]
    return [
        (step, layer)
        for layer, row in zip(columns.layers, evaluate(matrix, columns), strict=True)
        for step, value in zip(steps, row, strict=True)
        if kind_of(value) == kind
    ]


_FUNCTIONS: dict[str, Callable[[list[str], Columns], Any]] = {
    "finite": lambda a, c: _each(evaluate(a[0], c), _finite),
    "log10": lambda a, c: _each(evaluate(a[0], c), _log10),
    "median": lambda a, c: _fold(evaluate(a[0], c), statistics.median),
    "min": lambda a, c: _fold(evaluate(a[0], c), min),
    "max": lambda a, c: _fold(evaluate(a[0], c), max),
    "where": _where,
    "cells_x": lambda a, c: [step for step, _ in _cells(a, c)],
    "cells_y": lambda a, c: [layer for _, layer in _cells(a, c)],
}
