"""Samples of calls, held until their statistics are computed together."""

from __future__ import annotations

import logging
import threading
from typing import Any

from ..attention.samples import CallSample, statistics

log = logging.getLogger("attnscope")

MOST_VALUES = 2**24
"""Numbers that a step's samples may hold on the device, 64 MiB in float32; a step with more is
computed in several parts."""


class SamplePool:
    """The samples of one step; any thread that samples may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[tuple[CallSample, dict[str, Any]]] = []
        self._values = 0

    def add(self, sample: CallSample, stats: dict[str, Any]) -> None:
        """Hold a call's sample.

        Args:
            sample: what the call left.
            stats: gets the statistics, 0-dimensional tensors, when they are computed.
        """
        with self._lock:
            self._held.append((sample, stats))
            self._values += sample.values
            if self._values > MOST_VALUES:
                self._settle()

    def settle(self) -> None:
        """Compute what is held, on the device and without waiting for it."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        held, self._held, self._values = self._held, [], 0
        try:
            found = statistics([sample for sample, _ in held])
        except Exception:
            # Short of memory, say: the step is told without them.
            log.warning("AttnScope: statistics of calls could not be computed", exc_info=True)
            return
        for (_, stats), values in zip(held, found, strict=True):
            stats.update(values)
