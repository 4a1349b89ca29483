"""The prompt encoder: words → context tokens and a pooled vector, with no learned weights.

Flux gives every text token the position zero, so a token has to carry its own place in the
sentence. Image tokens know where they lie only against each other and against the text, and
nothing tells them how large the picture is. So every context token is also an *anchor*: it holds
a point of the picture, written in the frequencies of Flux's own rotary positions. An attention
head that compares anchors with an image token's rotation finds the nearest ones, at any picture
size.

Tokens 0–7 are the prompt's words, anchored where their thing belongs. Tokens 8–11 stand for the
first thing and 12–15 for the second, with all of its words, around its centre. Where a thing
belongs ("A left of B" puts A to the left and B to the right) is read off the caption here, by
rule: the model learns to draw what stands at the anchors, not what the directions mean. Tokens
that nothing fills lie on a 4×4 grid over the picture.

Context token (64 values): words | position | phrase | anchor x | anchor y.
Pooled vector (64 values): words of phrase 1 | words of phrase 2 | width | height | constant.
Phrase 1 ends with the first shape word; what follows (relation and second thing, or the place) is
phrase 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .captions import CONTENT_WORDS, SHAPES, VOCABULARY, Caption, parse, words_of
from .pictures import layout

MAX_WORDS = 8
CONTEXT_LENGTH = 16
CONTEXT_DIM = 64
POOLED_DIM = 64
SIZE_STOPS = (16, 24, 32, 48, 64)
"""Latent cells a side between which the size code runs linearly (over the logarithm)."""

ANCHOR_PAIRS = (1, 2, 3, 4, 5, 6)
"""Rotary pairs that anchors are written in: 0.72 down to 0.14 radians a token."""
AXIS_DIM, THETA = 56, 10000.0
"""Flux's rotary dimensions for y and for x, and their base."""

WORD_AT = 0
POSITION_AT = len(VOCABULARY) + 1
PHRASE_AT = POSITION_AT + CONTEXT_LENGTH
ANCHOR_X_AT = PHRASE_AT + 2
ANCHOR_Y_AT = ANCHOR_X_AT + 2 * len(ANCHOR_PAIRS)

_CORNERS = ((-0.16, 0.0), (0.16, 0.0), (0.0, -0.16), (0.0, 0.16))
"""Where a thing's tokens lie around its centre."""
_GRID = [((column + 0.5) / 4, (row + 0.5) / 4) for row in range(4) for column in range(4)]
_GAIN = 4.0  # one-hot parts at this height give a token of 64 values about unit variance


def anchor_code(tokens: float, share: float) -> list[float]:
    """A point at ``share`` (0..1) of a side of ``tokens`` image tokens: 12 values of norm 1.

    Only the frequencies that turn about three quarters of a circle over the side are used, so
    that the code's similarity falls off over the same part of any picture.
    """
    turn = 1.5 * math.pi / max(tokens, 1.0)
    middle = -math.log(turn) / math.log(THETA) * AXIS_DIM / 2
    middle = min(max(middle, ANCHOR_PAIRS[0]), ANCHOR_PAIRS[-1])
    loud = [math.exp(-((pair - middle) ** 2) / 2) for pair in ANCHOR_PAIRS]
    norm = math.sqrt(sum(value * value for value in loud))
    where = share * tokens - 0.5
    code = []
    for pair, value in zip(ANCHOR_PAIRS, loud, strict=True):
        angle = THETA ** (-2 * pair / AXIS_DIM) * where
        code += [value / norm * math.cos(angle), value / norm * math.sin(angle)]
    return code


def size_code(cells: float) -> list[float]:
    """A side's length as weights of the two nearest stops; beyond the ends, the end's."""
    logs = [math.log2(stop) for stop in SIZE_STOPS]
    value = min(max(math.log2(max(cells, 1.0)), logs[0]), logs[-1])
    code = [0.0] * len(logs)
    upper = next(i for i, stop in enumerate(logs) if value <= stop)
    if upper == 0:
        code[0] = 1.0
        return code
    share = (value - logs[upper - 1]) / (logs[upper] - logs[upper - 1])
    code[upper - 1], code[upper] = 1.0 - share, share
    return code


def encode_prompt(text: str, width: int, height: int) -> tuple[Tensor, Tensor]:
    """A prompt for a picture of width×height pixels → context [16, 64], pooled [64]; float32.

    The empty prompt gives the unconditional embedding. ValueError on unknown words and on more
    words than fit.
    """
    words = words_of(text)
    if len(words) > MAX_WORDS:
        raise ValueError(
            f"The demo model takes at most {MAX_WORDS} words, this prompt has {len(words)}."
        )
    phrases, phrase = [], 0
    for word in words:
        phrases.append(phrase)
        if word in SHAPES:
            phrase = 1
    context = _context(words, phrases, _caption(text), width / 16, height / 16)
    return context * _GAIN, _pooled(words, phrases, width / 8, height / 8) * _GAIN


def _caption(text: str) -> Caption | None:
    """The caption that a prompt is, if it is one: known words may stand in any order."""
    try:
        return parse(text)
    except ValueError:
        return None


def _context(
    words: list[str], phrases: list[int], caption: Caption | None, across: float, down: float
) -> Tensor:
    """Context tokens [16, 64], before gain, for a picture of across×down image tokens."""
    centres = layout(caption) if caption else []
    tokens = []
    for index in range(CONTEXT_LENGTH):
        thing, corner = divmod(index - MAX_WORDS, len(_CORNERS))
        if index < len(words):
            phrase = phrases[index]
            point = centres[phrase] if phrase < len(centres) else (0.5, 0.5)
            token = _token([words[index]], index, phrase, point, across, down)
        elif caption and 0 <= thing < len(caption.things):
            (x, y), (dx, dy) = centres[thing], _CORNERS[corner]
            named = caption.things[thing].text.split()
            token = _token(named, index, thing, (x + dx, y + dy), across, down)
        else:
            token = _token([], index, None, _GRID[index], across, down)
        tokens.append(token)
    return torch.stack(tokens)


def _token(
    words: list[str],
    index: int,
    phrase: int | None,
    point: tuple[float, float],
    across: float,
    down: float,
) -> Tensor:
    """One context token [64]: no words make a padding token."""
    token = torch.zeros(CONTEXT_DIM)
    # The slot after the vocabulary is padding's own word.
    for word in [VOCABULARY.index(word) for word in words] or [len(VOCABULARY)]:
        token[WORD_AT + word] = 1.0
    token[POSITION_AT + index] = 1.0
    if phrase is not None:
        token[PHRASE_AT + phrase] = 1.0
    length = 2 * len(ANCHOR_PAIRS)
    token[ANCHOR_X_AT : ANCHOR_X_AT + length] = torch.tensor(anchor_code(across, point[0]))
    token[ANCHOR_Y_AT : ANCHOR_Y_AT + length] = torch.tensor(anchor_code(down, point[1]))
    return token


def _pooled(words: list[str], phrases: list[int], width: float, height: float) -> Tensor:
    """Pooled vector [64], before gain, for a latent of width×height cells."""
    count = len(CONTENT_WORDS)
    sides = torch.tensor(size_code(width) + size_code(height))
    pooled = torch.zeros(POOLED_DIM)
    for word, phrase in zip(words, phrases, strict=True):
        if word in CONTENT_WORDS:
            pooled[phrase * count + CONTENT_WORDS.index(word)] = 1.0
    pooled[2 * count : 2 * count + len(sides)] = sides
    pooled[2 * count + len(sides)] = 1.0 if words else -1.0
    return pooled
