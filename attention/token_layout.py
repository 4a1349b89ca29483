"""Where a sequence's tokens stand: text first, then grids of image tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The places of a self-attention's tokens.

    Text comes first, then each grid in raster order (row by row, from the top left). The first
    grid is the picture that is sampled. What follows are reference latents in the order in which
    the model was given them, each a grid of its own. ComfyUI's Flux joins its tokens so.

    Attributes:
        text_tokens: how many tokens of text; 0 for none.
        grids: ``(rows, columns)`` of each grid, in tokens.
    """

    text_tokens: int
    grids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.text_tokens < 0:
            raise ValueError(f"text_tokens: is {self.text_tokens}; allowed: a whole number from 0")
        for rows, columns in self.grids:
            if rows < 1 or columns < 1:
                raise ValueError(f"grids: holds {rows}×{columns}; allowed: whole numbers from 1")

    @property
    def image_tokens(self) -> int:
        """Tokens of all grids."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def tokens(self) -> int:
        """Tokens in all: the length of the sequence."""
        return self.text_tokens + self.image_tokens
