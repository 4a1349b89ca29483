"""Memory that is used again from head to head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class Workspace:
    """Named buffers of one call.

    A fresh piece of memory costs a CPU as much as filling it: its pages come one by one.
    """

    def __init__(self, like: torch.Tensor, dtype: torch.dtype) -> None:
        """
        Args:
            like: on whose device.
            dtype: of all buffers.
        """
        self._like, self._dtype = like, dtype
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """A buffer of a shape, not initialised; the one that had the name before is lost."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = self._like.new_empty(size, dtype=self._dtype)
        return held[:size].view(tuple(shape))
