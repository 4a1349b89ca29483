"""Which calls share what was measured: ranges of sigma and classes of length."""

from __future__ import annotations

import math
from itertools import pairwise

HEAD_GROUPS = 4
"""Parts of neighbouring heads whose errors are told apart."""


def sigma_bin(sigma: float) -> int:
    """Eighths of sigma up to 1, where flow models live, and half octaves above."""
    if sigma <= 1.0:
        return max(0, min(7, math.floor(sigma * 8.0)))
    return 8 + math.floor(2.0 * math.log2(sigma))


def sigma_range(number: int) -> str:
    """A bin for people, such as ``0.25 to 0.375``."""
    if number < 8:
        return f"{number / 8:g} to {(number + 1) / 8:g}"
    return f"{2 ** ((number - 8) / 2):.3g} to {2 ** ((number - 7) / 2):.3g}"


def token_class(tokens: int) -> int:
    """Half octaves of the number of keys: 20 is about 1,024, 24 about 4,096."""
    return round(2.0 * math.log2(max(1, tokens)))


def head_groups(heads: int) -> list[range]:
    """Neighbouring heads in at most `HEAD_GROUPS` parts, as equal as can be."""
    groups = min(HEAD_GROUPS, heads)
    edges = [index * heads // groups for index in range(groups + 1)]
    return [range(first, last) for first, last in pairwise(edges)]
