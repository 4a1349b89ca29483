"""Image files on disk, each under the hash of its bytes."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)


class ImageFiles:
    """A folder of image files.

    Args:
        folder: made when the server opens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> None:
        """Make the folder and clear away what a killed server left half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*/*.part"):
            leftover.unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """Where an image lies."""
        return self.folder / sha256[:2] / sha256

    def save(self, data: bytes) -> str:
        """Keep bytes; the file is complete or not there at all.

        Returns:
            Their SHA-256, 64 hex digits.

        Raises:
            OSError: the disk is full or can't be written.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256)
        if path.exists():
            return sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{sha256}.{uuid.uuid4().hex}.part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return sha256

    def remove(self, hashes: Iterable[str]) -> None:
        """Delete files; one that can't be deleted is logged and left."""
        for sha256 in hashes:
            try:
                self.path(sha256).unlink(missing_ok=True)
            except OSError as error:
                log.warning("image %s stays: %s", sha256, error)
