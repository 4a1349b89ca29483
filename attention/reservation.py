"""Asking the host program for memory before a call allocates it."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from .variant import Reserve

LEAST_BYTES = 64 * 2**20
"""A smaller need isn't worth the question: it fits where any model runs."""


class Reservation:
    """Asks once per kind of call and run, not at each call."""

    def __init__(self, reserve: Reserve | None) -> None:
        """
        Args:
            reserve: makes room; None where nobody can.
        """
        self._reserve = reserve
        self._asked: set[Hashable] = set()

    def ask(self, kind: Hashable, estimate: Callable[[], float], device: torch.device) -> None:
        """Make room for a call.

        Args:
            kind: what the need depends on; the same kind is asked for once.
            estimate: bytes that the call will need.
            device: where.
        """
        if self._reserve is None or (kind, device) in self._asked:
            return
        self._asked.add((kind, device))
        needed = estimate()
        if needed >= LEAST_BYTES:
            self._reserve(int(needed), device)
