"""Where students are kept on disk."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ..variant import ModelPrint
from .checkpoint import SUFFIX
from .student import StudentOptions


def checkpoint_path(
    named: str, folder: Path | None, model: ModelPrint, options: StudentOptions
) -> Path | None:
    """The checkpoint's absolute path; None where nothing is named and there is no folder.

    Args:
        named: by the user: a path, or a name within the folder; empty for a name of our own.
        folder: absolute.
        model: that is sampled.
        options: of the students; heads and head_dim don't count.
    """
    named = named.strip()
    if named:
        path = Path(named).expanduser()
        if not path.name.endswith(SUFFIX):
            path = path.with_name(path.name + SUFFIX)
        if path.is_absolute():
            return path
        return folder / path if folder is not None else None
    if folder is None:
        return None
    what = (
        model.name, model.weights, options.kind, options.features, options.window_radius,
        options.landmarks,
    )  # fmt: skip
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "_", Path(model.name).stem)[:60] or "model"
    return folder / f"{stem}-{options.kind}-{digest}{SUFFIX}"
