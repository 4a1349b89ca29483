"""The variants by name. Adding one takes its folder, its settings and a line here."""

from __future__ import annotations

from .exact import ExactVariant
from .hybrid.variant import HybridVariant
from .taylor.variant import TaylorVariant
from .tiled.variant import TiledVariant
from .ttr.variant import TtrVariant
from .variant import Variant

VARIANTS: dict[str, type[Variant]] = {
    variant.name: variant
    for variant in (ExactVariant, TaylorVariant, HybridVariant, TiledVariant, TtrVariant)
}
