"""Counts what would make a host wait for a device, on a machine that has none.

Every torch call of Python passes the dispatcher, on whatever device, so a CPU shows the same
operators that a GPU would run. Counted are those whose answer a host reads (`item`, `bool`,
`float`, `tolist` of a tensor come out as ``_local_scalar_dense``), those whose output shape
depends on values (``nonzero``, boolean masks as an index, ``unique``), and copies from another
device to the CPU that are not non-blocking. It also counts what a GPU would launch.

It can't see: a wait inside a kernel or a library (cuSOLVER's error checks, Triton's launches), a
copy from pageable memory, ``torch.cuda.synchronize`` and events, and a full queue of launches.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
_SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
_COPIES = {"_to_copy", "copy_"}
_LAUNCH_NOTHING = {"_unsafe_view", "_reshape_alias", "empty", "empty_strided", "new_empty"}


class Synchronisations(TorchDispatchMode):
    """Collects the operators that wait for work that was submitted under the mode.

    Attributes:
        waits: names of the operators, in order. Reading a tensor that was there before doesn't
            count: its work was done.
        launches: names of the operators that compute or copy, in order: all but views and empty
            tensors. Some are more than one kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches: list[str] = []
        self._made: set[int] = set()
        self._held: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        indexed = name in ("index", "index_put_") and any(
            x.dtype in (torch.bool, torch.uint8) for x in inputs[1:]
        )
        fresh = any(id(x) in self._made for x in inputs)
        if fresh and (name in _READS | _SHAPED_BY_VALUES or indexed):
            self.waits.append(name)
        if not func.is_view and name not in _LAUNCH_NOTHING | _READS:
            self.launches.append(name)
        out = func(*args, **kwargs)
        if name in _COPIES and inputs and not kwargs.get("non_blocking"):
            outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            source = inputs[-1] if name == "copy_" else inputs[0]
            if source.device.type != "cpu" and any(x.device.type == "cpu" for x in outputs):
                self.waits.append(name)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                # Held, so that an id is not given to another tensor.
                self._held.append(x)
                self._made.add(id(x))
        return out

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        self._held.clear()
