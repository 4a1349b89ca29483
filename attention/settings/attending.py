"""Settings models of the variants that attend themselves."""

from __future__ import annotations

from .base import VariantSettings
from .hybrid import HybridSettings
from .monitor import MonitorSettings
from .taylor import TaylorSettings
from .tiled import TiledSettings

ATTENDING: dict[str, type[VariantSettings]] = {
    "exact": MonitorSettings,
    "taylor": TaylorSettings,
    "hybrid": HybridSettings,
    "tiled": TiledSettings,
}
"""By the variant's name."""
