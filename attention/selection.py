"""Layers and steps chosen by text: ``single.0-5,double.3`` and ``0,5,10-12``.

Imports nothing, so that settings can be checked where there is no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LAYERS_ALLOWED = (
    "empty, 'all', or names between commas: a block type such as 'single', a block such as "
    "'double.3', a range such as 'single.0-5'"
)
STEPS_ALLOWED = "'all', or step indices and ranges between commas, such as '0,5,10-12'"

_LAYER = re.compile(r"([a-z][a-z_]*)(?:\.(\d{1,4})(?:-(\d{1,4}))?)?")
_STEP = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


@dataclass(frozen=True)
class Layers:
    """Some blocks of a model.

    Attributes:
        every: whether all are meant.
        ranges: block type with first and last index, both included.
    """

    every: bool = False
    ranges: tuple[tuple[str, int, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Layers:
        """Read the text form.

        Raises:
            ValueError: names the part that can't be read; what is allowed: `LAYERS_ALLOWED`.
        """
        ranges: list[tuple[str, int, float]] = []
        every = False
        for part in _parts(text):
            found = _LAYER.fullmatch(part)
            if found is None:
                raise ValueError(f"{part!r} is no layer")
            kind, first, last = found.groups()
            if kind == "all" and first is None:
                every = True
            elif first is None:
                ranges.append((kind, 0, float("inf")))
            else:
                ranges.append((kind, int(first), int(last or first)))
                if int(last or first) < int(first):
                    raise ValueError(f"{part!r} ends before it begins")
        return cls(every, tuple(ranges))

    def __bool__(self) -> bool:
        return self.every or bool(self.ranges)

    def has(self, block_type: str, block_index: int) -> bool:
        """Whether a block is among them."""
        return self.every or any(
            kind == block_type and first <= block_index <= last
            for kind, first, last in self.ranges
        )


@dataclass(frozen=True)
class Steps:
    """Some steps of a schedule, counted from 0.

    Attributes:
        every: whether all are meant.
        ranges: first and last, both included.
    """

    every: bool = False
    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Steps:
        """Read the text form.

        Raises:
            ValueError: names the part that can't be read; what is allowed: `STEPS_ALLOWED`.
        """
        if text.strip() == "all":
            return cls(every=True)
        ranges = []
        for part in _parts(text):
            found = _STEP.fullmatch(part)
            if found is None:
                raise ValueError(f"{part!r} is no step")
            first, last = int(found[1]), int(found[2] or found[1])
            if last < first:
                raise ValueError(f"{part!r} ends before it begins")
            ranges.append((first, last))
        if not ranges:
            raise ValueError("no step is named")
        return cls(ranges=tuple(ranges))

    def has(self, step: int) -> bool:
        """Whether a step is among them."""
        return self.every or any(first <= step <= last for first, last in self.ranges)
