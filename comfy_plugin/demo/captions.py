"""The demo model's language: a small grammar of captions and the rule that holds some out.

A caption names one thing or two::

    caption  := thing | thing "at" place | thing relation thing
    thing    := [size] colour shape
    relation := "left of" | "right of" | "above" | "below"
    place    := "center" | "left" | "top left" | ...

Two things always differ in colour, so that each can be found in a picture by its colour.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)

CONTENT_WORDS = (
    *COLOURS,
    *SHAPES,
    *SIZES,
    *("left", "right", "above", "below", "top", "bottom", "center"),
)
VOCABULARY = (*CONTENT_WORDS, "of", "at")
"""Every word that the model is told about, in the order of its embedding."""

FILLERS = frozenset({"a", "an", "the", "to", "in", "is"})
"""Words that may stand in a prompt and mean nothing: "a red circle to the left of …"."""

HELD_OUT_PERCENT = 12
_MIRROR = {"right of": "left of", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """One object: its colour, its shape, and its size where the caption says one."""

    colour: str
    shape: str
    size: str | None = None

    @property
    def text(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Caption:
    """One thing, perhaps at a place; or two things with a relation between them."""

    first: Thing
    place: str | None = None
    relation: str | None = None
    second: Thing | None = None

    @property
    def text(self) -> str:
        if self.second is not None:
            return f"{self.first.text} {self.relation} {self.second.text}"
        if self.place is not None:
            return f"{self.first.text} at {self.place}"
        return self.first.text

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)


def words_of(text: str) -> list[str]:
    """Split a prompt into known words, lower-cased, without fillers and punctuation.

    Raises ValueError that names the first unknown word and lists the allowed ones.
    """
    raw = text.lower().replace(",", " ").replace(".", " ").split()
    words = [word for word in raw if word not in FILLERS]
    for word in words:
        if word not in VOCABULARY:
            raise ValueError(
                f"The demo model does not know the word {word!r}. Known words: "
                f"{', '.join(VOCABULARY)}; ignored: {', '.join(sorted(FILLERS))}. "
                'Example: "small red circle left of large blue square".'
            )
    return words


def parse(text: str) -> Caption:
    """Read a caption of the grammar; ValueError when it is not one."""
    words = words_of(text)
    first, rest = _take_thing(words, text)
    if not rest:
        return Caption(first)
    tail = " ".join(rest)
    if rest[0] == "at" and tail[3:] in PLACES:
        return Caption(first, place=tail[3:])
    for relation in RELATIONS:
        if tail.startswith(relation + " "):
            second, left_over = _take_thing(tail[len(relation) :].split(), text)
            if not left_over and second.colour != first.colour:
                return Caption(first, relation=relation, second=second)
    raise ValueError(f"Not a caption of the demo's grammar: {text!r}")


def _take_thing(words: list[str], text: str) -> tuple[Thing, list[str]]:
    size = words[0] if words and words[0] in SIZES else None
    body = words[1:] if size else words
    if len(body) < 2 or body[0] not in COLOURS or body[1] not in SHAPES:
        raise ValueError(f"Not a caption of the demo's grammar: {text!r}")
    return Thing(body[0], body[1], size), body[2:]


def meaning(caption: Caption) -> str:
    """The combination that a caption shows, whatever its wording.

    Sizes are left out and "A right of B" is the same as "B left of A", so that holding one
    meaning out keeps every picture of that combination out of the training data.
    """
    first, second, relation = caption.first, caption.second, caption.relation
    if second is None:
        return f"{first.colour} {first.shape} at {caption.place or 'anywhere'}"
    if relation in _MIRROR:
        first, second, relation = second, first, _MIRROR[relation]
    return f"{first.colour} {first.shape} {relation} {second.colour} {second.shape}"


@cache
def _held_out_meaning(key: str) -> bool:
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def is_held_out(caption: Caption) -> bool:
    """Whether training must never see this caption: a hash of its meaning decides."""
    return _held_out_meaning(meaning(caption))


def all_captions() -> list[Caption]:
    """Every caption of the grammar, in a fixed order."""
    sizes = (None, *SIZES)
    things = [Thing(c, s, size) for c, s, size in product(COLOURS, SHAPES, sizes)]
    single = [Caption(t, place=p) for t in things for p in (None, *PLACES)]
    double = [
        Caption(a, relation=r, second=b)
        for a, r, b in product(things, RELATIONS, things)
        if a.colour != b.colour
    ]
    return single + double


def sample_caption(
    rng: np.random.Generator, *, held_out: bool = False, single_share: float = 0.3
) -> Caption:
    """Draw a caption that training may see, or (held_out) one that it may not."""
    while True:
        caption = _draw(rng, single=rng.random() < single_share)
        if is_held_out(caption) == held_out:
            return caption


def _draw(rng: np.random.Generator, *, single: bool) -> Caption:
    first = _draw_thing(rng, COLOURS)
    if single:
        # A caption without a place is one of ten, as each place is.
        index = int(rng.integers(len(PLACES) + 1))
        return Caption(first, place=PLACES[index] if index < len(PLACES) else None)
    others = tuple(colour for colour in COLOURS if colour != first.colour)
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    return Caption(first, relation=relation, second=_draw_thing(rng, others))


def _draw_thing(rng: np.random.Generator, colours: tuple[str, ...]) -> Thing:
    sizes = (None, None, *SIZES)
    return Thing(
        colours[int(rng.integers(len(colours)))],
        SHAPES[int(rng.integers(len(SHAPES)))],
        sizes[int(rng.integers(len(sizes)))],
    )
