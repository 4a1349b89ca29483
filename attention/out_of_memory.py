"""Whether an error is a lack of memory, by device and version of torch."""

from __future__ import annotations

import torch

try:
    OUT_OF_MEMORY: type[BaseException] = torch.OutOfMemoryError
except AttributeError:
    OUT_OF_MEMORY = torch.cuda.OutOfMemoryError

_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory")
"""On the CPU it is an ordinary RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, on a device or on the host."""
    if isinstance(error, (OUT_OF_MEMORY, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in _MESSAGES)
