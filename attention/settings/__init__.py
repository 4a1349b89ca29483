"""Every setting of every variant, defined once.

The nodes' inputs, the REST schema, the form in the page and the check of a pushed revision are
all generated from these models. The module imports neither torch nor ComfyUI.
"""

from __future__ import annotations

from .attending import ATTENDING
from .base import GROUP_TITLES, Group, Measured, VariantSettings, setting
from .hybrid import HybridSettings
from .monitor import MonitorSettings
from .router import RouterSettings
from .taylor import TaylorSettings
from .tiled import TiledSettings
from .ttr import TtrSettings

SETTINGS: dict[str, type[VariantSettings]] = {
    **ATTENDING,
    "ttr": TtrSettings,
    "router": RouterSettings,
}
"""Settings model of each variant, by the variant's name."""


def settings_model(variant: str) -> type[VariantSettings]:
    """The settings model of a variant.

    Raises:
        KeyError: the variant is unknown; the message names those that are known.
    """
    try:
        return SETTINGS[variant]
    except KeyError:
        raise KeyError(
            f"variant: unknown value {variant!r}; allowed: {', '.join(sorted(SETTINGS))}"
        ) from None


__all__ = [
    "GROUP_TITLES",
    "SETTINGS",
    "Group",
    "HybridSettings",
    "Measured",
    "MonitorSettings",
    "RouterSettings",
    "TaylorSettings",
    "TiledSettings",
    "TtrSettings",
    "VariantSettings",
    "setting",
    "settings_model",
]
