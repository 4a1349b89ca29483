"""All variants by name: those that attend themselves, and the one that chooses between them."""

from __future__ import annotations

from .attending import ATTENDING
from .router.variant import RouterVariant
from .ttr.variant import TtrVariant
from .variant import Variant

VARIANTS: dict[str, type[Variant]] = {
    **ATTENDING,
    TtrVariant.name: TtrVariant,
    RouterVariant.name: RouterVariant,
}
