"""The hybrid's definition in float64, key by key, without blocks, running sums or features."""

from __future__ import annotations

import math

import torch

from attnscope.attention.hybrid.attend import Form
from attnscope.attention.taylor.shaping import NormRule


def form(**changes: object) -> Form:
    """A form for small tensors."""
    values: dict[str, object] = dict(
        prefix=7, window=24, chunk=16, weight=1.0, terms=3, rank=8, scale=0.25, centre=True,
        norm=NormRule(), wide=True, eps=1e-6, combine="joint",
    )  # fmt: skip
    return Form(**(values | changes))  # type: ignore[arg-type]


def series(x: torch.Tensor, terms: int) -> torch.Tensor:
    """The first terms of exp."""
    return sum(x**degree / math.factorial(degree) for degree in range(terms))  # type: ignore


def near_mask(tokens: int, f: Form) -> torch.Tensor:
    """``[N, N]``: which keys each query sees exactly."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    seen[: f.prefix] = True
    seen[:, : f.prefix] = True
    for row in range(f.prefix, tokens):
        block = (row - f.prefix) // f.chunk * f.chunk
        first = max(0, block - f.window)
        last = min(tokens - f.prefix, min(block + f.chunk, tokens - f.prefix) + f.window)
        seen[row, f.prefix + first : f.prefix + last] = True
    return seen


def changed(x: torch.Tensor, f: Form) -> torch.Tensor:
    """Vectors of norm n at the norm min(clip, n^(1 - power))."""
    norm = x.norm(dim=-1, keepdim=True)
    wanted = norm ** (1.0 - f.norm.power)
    if f.norm.clip:
        wanted = wanted.clamp(max=f.norm.clip)
    return x / norm * wanted


def far_weights(
    query: torch.Tensor, key: torch.Tensor, pre: tuple[torch.Tensor, torch.Tensor],
    a: torch.Tensor, b: torch.Tensor, f: Form, skip: int,
) -> torch.Tensor:  # fmt: skip
    """``[B, H, N, N]``: what stands for exp(q·k) of far pairs. ``skip`` tokens have no mean."""
    parts = [x.double() for x in (*pre, query, key)]
    means = [x[:, :, skip:].mean(dim=2, keepdim=True) * f.centre for x in parts]
    q, k, turned_q, turned_k = parts
    low_q, low_k = (
        changed(x @ basis.double(), f) for x, basis in ((q - means[0], a), (k - means[1], b))
    )
    series_part = low_q @ low_k.mT
    key_part = means[2] @ (turned_k - means[3]).mT
    query_part = turned_q @ means[3].mT
    return series(f.scale * series_part, f.terms) * torch.exp(f.scale * (key_part + query_part))


def joint(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    pre: tuple[torch.Tensor, torch.Tensor], f: Form, a: torch.Tensor, b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output ``[B, H, N, Dv]`` and log of the denominator ``[B, H, N]``."""
    exact = torch.exp(scale * query.double() @ key.double().mT)
    seen = near_mask(query.shape[2], f)
    weights = torch.where(seen, exact, f.weight * far_weights(query, key, pre, a, b, f, f.prefix))
    total = weights.sum(dim=-1, keepdim=True)
    return weights @ value.double() / total, total.squeeze(-1).log()


def additive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    pre: tuple[torch.Tensor, torch.Tensor], f: Form, a: torch.Tensor, b: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Output ``[B, H, N, Dv]``."""
    exact = torch.exp(scale * query.double() @ key.double().mT)
    local = torch.where(near_mask(query.shape[2], f), exact, 0.0)
    everywhere = far_weights(query, key, pre, a, b, f, 0)
    return sum(  # type: ignore[return-value]
        weight * (part @ value.double()) / part.sum(dim=-1, keepdim=True)
        for weight, part in ((1.0, local), (f.weight, everywhere))
    )
