"""The variants that attend themselves, by name. Adding one takes its folder, its settings and a
line here."""

from __future__ import annotations

from .exact import ExactVariant
from .hybrid.variant import HybridVariant
from .taylor.variant import TaylorVariant
from .tiled.variant import TiledVariant
from .variant import Variant

ATTENDING: dict[str, type[Variant]] = {
    variant.name: variant for variant in (ExactVariant, TaylorVariant, HybridVariant, TiledVariant)
}
