"""Comparing stored images: each pair once, one at a time, kept in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from . import image_quality, pictures, problems
from .image_files import ImageFiles
from .image_quality import Difference, Picture
from .schemas import FieldProblem

KEPT_DIFFERENCES = 4096
KEPT_MAPS = 64
PATIENCE_S = 30.0
"""How long a request waits for the comparisons before it."""

Result = TypeVar("Result")


class Comparer:
    """Compares images by their hashes. Its methods compute, so they belong on a worker's thread.

    Args:
        files: where the images lie.
    """

    def __init__(self, files: ImageFiles) -> None:
        self._files = files
        self._turn = threading.Lock()
        self._differences: OrderedDict[tuple[str, ...], Difference] = OrderedDict()
        self._maps: OrderedDict[tuple[str, ...], bytes] = OrderedDict()

    def difference(self, one: str, other: str) -> Difference:
        """How far two images lie apart; the same either way round.

        Raises:
            ProblemError: an image can't be compared (422), or others are being compared (503).
        """
        if one == other:
            return image_quality.IDENTICAL
        key = (min(one, other), max(one, other))
        return self._kept(
            self._differences,
            KEPT_DIFFERENCES,
            key,
            lambda: image_quality.difference(*self._pair(one, other)),
        )

    def error_map(self, one: str, other: str, scale: int) -> bytes:
        """Where two images differ, as PNG; see `pictures.error_map`.

        Raises:
            ProblemError: an image can't be compared (422), or others are being compared (503).
        """
        key = (min(one, other), max(one, other), str(scale))
        return self._kept(
            self._maps,
            KEPT_MAPS,
            key,
            lambda: pictures.error_map(*self._pair(one, other), scale),
        )

    def _kept(
        self,
        kept: OrderedDict[tuple[str, ...], Result],
        most: int,
        key: tuple[str, ...],
        compute: Callable[[], Result],
    ) -> Result:
        found = kept.get(key)
        if found is not None:
            return found
        # One at a time: the server may share its machine with the sampler.
        if not self._turn.acquire(timeout=PATIENCE_S):
            raise problems.ProblemError(
                503,
                "busy",
                f"images: others have been compared for {PATIENCE_S:g} s. Try again.",
                headers={"Retry-After": "5"},
            )
        try:
            if key not in kept:
                kept[key] = compute()
            kept.move_to_end(key)
            while len(kept) > most:
                kept.popitem(last=False)
            return kept[key]
        finally:
            self._turn.release()

    def _pair(self, one: str, other: str) -> tuple[Picture, Picture]:
        first, second = self._read(one), self._read(other)
        if first.shape != second.shape:
            sizes = [f"{shape[1]}×{shape[0]}" for shape in (first.shape, second.shape)]
            raise _refused("image-sizes-differ", other, f"{sizes[1]} pixels", sizes[0])
        return first, second

    def _read(self, sha256: str) -> Picture:
        try:
            return pictures.read(self._files.path(sha256))
        except pictures.UnreadablePicture as error:
            allowed = "an image that can be read; sample again to get one"
            raise _refused("image-unreadable", sha256, str(error), allowed) from None


def _refused(type: str, sha256: str, found: str, allowed: str) -> problems.ProblemError:
    return problems.ProblemError(
        422,
        type,
        f"image {sha256[:12]}: {found}; allowed: {allowed}.",
        errors=[FieldProblem(field="image", value=sha256, allowed=allowed)],
    )
