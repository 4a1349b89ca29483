"""Columns of a layer's updates as bytes.

A metric's column is float32, little-endian: the values that were measured, in order, and behind
them one bit per update (`numpy.packbits`) that says which updates they belong to. NaN and
infinities are values like others. Whole numbers are the differences of successive int64, packed by
zlib, and times are float64.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..attention.distillation import TRAINING_METRIC_NAMES

BLOCK = 1024
"""Updates of a full block."""

WHOLE = ("update", "step", "seq")
TIME = "at"
COLUMNS: tuple[str, ...] = (*WHOLE, TIME, *TRAINING_METRIC_NAMES)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Column:
    """A metric's column: values of float32 and which of them were measured, [updates] each."""

    values: Floats
    measured: Bools


def of_metric(values: Sequence[float | None]) -> Column:
    """A column from numbers; None was not measured."""
    made = np.array(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        # beyond float32's range is as good as infinite
        narrow = made.astype(np.float32)
    measured = ~np.isnan(made)
    if not measured.all():
        measured = np.fromiter((value is not None for value in values), bool, len(values))
    return Column(narrow, measured)


def joined(parts: list[Column]) -> Column:
    """Columns one after the other."""
    return Column(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.measured for part in parts]),
    )


def pack_metric(column: Column) -> bytes | None:
    """A metric's column as bytes; None where nothing was measured."""
    if not column.measured.any():
        return None
    values = column.values[column.measured].astype("<f4")
    return values.tobytes() + np.packbits(column.measured).tobytes()


def unpack_metric(data: bytes, count: int) -> Column:
    """What `pack_metric` has packed."""
    bits = -(-count // 8)
    mask = np.frombuffer(data, np.uint8, bits, len(data) - bits)
    measured = np.unpackbits(mask, count=count).astype(bool)
    given = np.frombuffer(data, "<f4", (len(data) - bits) // 4)
    if len(given) == count:
        return Column(given, measured)
    values = np.full(count, np.nan, np.float32)
    values[measured] = given
    return Column(values, measured)


def pack_whole(numbers: Ints) -> bytes:
    """Whole numbers as bytes."""
    return zlib.compress(np.diff(numbers, prepend=0).astype("<i8").tobytes(), 1)


def unpack_whole(data: bytes) -> Ints:
    """What `pack_whole` has packed."""
    return np.cumsum(np.frombuffer(zlib.decompress(data), "<i8"), dtype=np.int64)


def pack_times(times: npt.NDArray[np.float64]) -> bytes:
    """Times as bytes."""
    return times.astype("<f8").tobytes()


def unpack_times(data: bytes) -> npt.NDArray[np.float64]:
    """What `pack_times` has packed."""
    return np.frombuffer(data, "<f8").astype(np.float64)


def is_consecutive(numbers: Ints) -> bool:
    """Whether numbers go up by one, so that the first says them all."""
    return bool((np.diff(numbers) == 1).all())


@dataclass(frozen=True)
class Updates:
    """Successive updates of one layer.

    Attributes:
        whole: ``update``, ``step`` and ``seq``, int64 [updates] each.
        at: when, in seconds since 1970, float64 [updates].
        metrics: one column per metric of ``attention/distillation.py``.
    """

    whole: Mapping[str, Ints]
    at: npt.NDArray[np.float64]
    metrics: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.at)

    def cut(self, start: int, stop: int) -> Updates:
        """Some of them."""
        part = slice(start, stop)
        return Updates(
            {name: column[part] for name, column in self.whole.items()},
            self.at[part],
            {
                name: Column(column.values[part], column.measured[part])
                for name, column in self.metrics.items()
            },
        )

    def packed(self) -> dict[str, bytes]:
        """All columns as bytes. Update numbers that go up by one and metrics that nothing
        measured are left out."""
        result = {
            name: pack_whole(column)
            for name, column in self.whole.items()
            if name != "update" or not is_consecutive(column)
        }
        result[TIME] = pack_times(self.at)
        for name, column in self.metrics.items():
            data = pack_metric(column)
            if data is not None:
                result[name] = data
        return result


def unpacked(columns: Mapping[str, bytes], count: int, first_update: int) -> Updates:
    """What `Updates.packed` has packed."""
    whole = {name: unpack_whole(columns[name]) for name in WHOLE if name in columns}
    whole.setdefault("update", np.arange(first_update, first_update + count, dtype=np.int64))
    nothing = Column(np.full(count, np.nan, np.float32), np.zeros(count, bool))
    return Updates(
        whole,
        unpack_times(columns[TIME]),
        {
            name: unpack_metric(columns[name], count) if name in columns else nothing
            for name in TRAINING_METRIC_NAMES
        },
    )


def joined_updates(parts: list[Updates]) -> Updates:
    """Updates one after the other."""
    return Updates(
        {name: np.concatenate([part.whole[name] for part in parts]) for name in WHOLE},
        np.concatenate([part.at for part in parts]),
        {name: joined([part.metrics[name] for part in parts]) for name in TRAINING_METRIC_NAMES},
    )
