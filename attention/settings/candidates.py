"""Variants with their settings as one text: what a router chooses from.

``tiled:window_radius=2,top_k=4; taylor:P=5``: a variant, then its settings that differ from the
defaults. In a value ``%``, ``,`` and ``;`` are written as %25, %2C and %3B.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from pydantic import ValidationError

from .attending import ATTENDING
from .base import Group, VariantSettings

NEVER = ("exact",)
"""Variants that are no candidates: exact attention always is there."""

DEFAULT = "tiled; taylor"

_UNCOUNTED = {Group.GATE.value, Group.QUALITY.value, Group.CAPTURE.value}
"""Groups of settings that don't change what the variant computes where it runs."""

_UNCOUNTED_NAMES = {"memory_reserve", "memory_reserve_factor"}


@dataclass(frozen=True)
class Candidate:
    """A variant that a router may choose.

    Attributes:
        name: for people: the variant's, numbered where several are of one variant.
        variant: its name.
        settings: of the variant's model.
        text: the variant with those of its settings that differ from the defaults.
    """

    name: str
    variant: str
    settings: VariantSettings
    text: str

    @property
    def id(self) -> str:
        """The variant and a digest of all that changes what it computes: what is measured of it
        holds for this alone."""
        counted = {}
        values = self.settings.model_dump(mode="json")
        for name, field in type(self.settings).model_fields.items():
            extra = field.json_schema_extra
            group = extra["group"] if isinstance(extra, dict) else ""
            if group not in _UNCOUNTED and name not in _UNCOUNTED_NAMES:
                counted[name] = values[name]
        digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
        return f"{self.variant}-{digest[:12]}"


def text_of(variant: str, settings: VariantSettings) -> str:
    """A candidate as text."""
    defaults = type(settings)()
    changed = settings.changed_from(defaults)
    pairs = ",".join(f"{name}={_written(new)}" for name, (_, new) in changed.items())
    return f"{variant}:{pairs}" if pairs else variant


def text_of_all(candidates: Iterable[tuple[str, VariantSettings]]) -> str:
    """Candidates as text, each once, in their order."""
    return "; ".join(dict.fromkeys(text_of(variant, one) for variant, one in candidates))


def parse(text: str) -> tuple[Candidate, ...]:
    """The candidates that a text names; those of `DEFAULT` where it is empty.

    Raises:
        ValueError: names the candidate, its value and what is allowed.
    """
    parts = [part.strip() for part in (text.strip() or DEFAULT).split(";")]
    return _named([_one(part) for part in dict.fromkeys(filter(None, parts))])


def _written(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("%", "%25").replace(",", "%2C").replace(";", "%3B")


def _one(text: str) -> tuple[str, VariantSettings]:
    variant, _, rest = text.partition(":")
    variant = variant.strip()
    if variant not in ATTENDING or variant in NEVER:
        allowed = ", ".join(name for name in ATTENDING if name not in NEVER)
        raise ValueError(f"{variant!r} is no candidate; allowed: {allowed}")
    values: dict[str, str] = {}
    for pair in filter(None, (pair.strip() for pair in rest.split(","))):
        name, equals, value = pair.partition("=")
        if not equals or name.strip() in values:
            problem = "is given twice" if equals else "has no value"
            raise ValueError(f"{text}: {name!r} {problem}; allowed: variant:name=value,name=value")
        values[name.strip()] = unquote(value.strip())
    try:
        return variant, ATTENDING[variant].model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{text}: {field}: is {first['input']!r}; {message}") from None


def _named(found: Sequence[tuple[str, VariantSettings]]) -> tuple[Candidate, ...]:
    made: list[Candidate] = []
    ids: set[str] = set()
    for variant, settings in found:
        earlier = sum(candidate.variant == variant for candidate in made)
        name = variant if earlier == 0 else f"{variant} {earlier + 1}"
        candidate = Candidate(name, variant, settings, text_of(variant, settings))
        # Two that differ in their gates alone would share what is measured of them.
        if candidate.id not in ids:
            ids.add(candidate.id)
            made.append(candidate)
    return tuple(made)
