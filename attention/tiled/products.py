"""Products of batches of matrices that don't pay for a batch of one."""

from __future__ import annotations

import torch


def multiply(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``left @ right`` of three dimensions, into ``out`` where given.

    One matrix goes through torch's product of matrices, which on a CPU is up to 1.6 times as
    fast as its product of batches, above all into columns of a larger matrix.
    """
    if left.shape[0] != 1:
        return torch.bmm(left, right, out=out)
    if out is None:
        return torch.mm(left[0], right[0]).unsqueeze(0)
    torch.mm(left[0], right[0], out=out[0])
    return out


def add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``target += left @ right`` of three dimensions, in place."""
    if left.shape[0] == 1:
        target[0].addmm_(left[0], right[0])
    else:
        target.baddbmm_(left, right)
