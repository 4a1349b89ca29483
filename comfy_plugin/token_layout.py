"""Which tokens of a call are text and which stand where in a picture, from the model's inputs.

ComfyUI's Flux (`comfy/ldm/flux/model.py`, ``_forward`` and ``forward_orig``) joins the patches of
the latent and then those of each reference latent, in the order of ``ref_latents`` and each row by
row, and puts the text before them. Newer ComfyUI says in ``transformer_options["img_slice"]``
where the image begins. Where it doesn't, the numbers of tokens must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..attention.token_layout import TokenLayout


class LayoutReader:
    """Tells the layout of attention calls. One object serves one run, on the sampler's thread."""

    def __init__(self, patch_size: int | None) -> None:
        """
        Args:
            patch_size: latent pixels on a token's side; None where the model doesn't say.
        """
        self._patch_size = patch_size
        self._grids: tuple[tuple[int, int], ...] | None = None
        self._context: int | None = None

    def model_called(self, latent: Any, context: Any, references: Any = None) -> None:
        """The model is called; its attention calls follow.

        Args:
            latent: ``[B, C, H, W]``, or with one frame ``[B, C, 1, H, W]``.
            context: text, ``[B, tokens, channels]``, or None.
            references: reference latents, shaped like the latent but for their height and width;
                None for none.
        """
        self._grids = None
        if isinstance(references, Sequence) or references is None:
            grids = [self._grid(one) for one in (latent, *(references or ()))]
            known = tuple(grid for grid in grids if grid is not None)
            self._grids = known if len(known) == len(grids) else None
        shape: tuple[int, ...] = tuple(getattr(context, "shape", ()))
        self._context = int(shape[1]) if len(shape) == 3 else None

    def text_tokens(self, tokens: int, options: Any) -> int | None:
        """Text tokens of a self-attention as far as the model says them itself.

        Args:
            tokens: in the sequence.
            options: the call's ``transformer_options``.
        """
        said = options.get("img_slice") if isinstance(options, Mapping) else None
        if isinstance(said, (list, tuple)) and len(said) == 2 and said[1] == tokens:
            return int(said[0])
        return None

    def read(self, queries: int, keys: int, options: Any) -> TokenLayout | None:
        """The layout of a call; None where it isn't certain.

        Args:
            queries: tokens of the query.
            keys: tokens of the key.
            options: the call's ``transformer_options``.
        """
        if queries != keys or self._grids is None:
            return None
        text = self.text_tokens(queries, options)
        if text is None:
            text = self._context
        if text is None or text < 0:
            return None
        layout = TokenLayout(text, self._grids)
        # A model that keeps its text elsewhere, or adds tokens, has other numbers of them.
        return layout if layout.tokens == queries else None

    def _grid(self, latent: Any) -> tuple[int, int] | None:
        """Rows and columns of a latent's tokens; Flux pads a latent to whole patches."""
        shape: tuple[int, ...] = tuple(getattr(latent, "shape", ()))
        one_frame = len(shape) == 4 or (len(shape) == 5 and shape[2] == 1)
        if self._patch_size is None or not one_frame or min(shape[-2:]) < 1:
            return None
        return -(-int(shape[-2]) // self._patch_size), -(-int(shape[-1]) // self._patch_size)
