"""The router's tables: files in ComfyUI's output folder, and what they hold in this process.

A file is read when a run begins that it concerns and written on the link's thread when the run is
over. It can be copied elsewhere and put there again; a run takes up what has changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from ..attention.router.table import Scores, Table, TableError, from_json, to_json
from ..attention.settings import RouterSettings, VariantSettings
from ..attention.settings import candidates as candidate_texts
from ..wire import RunEnded, StepClosed

log = logging.getLogger("attnscope")

FOLDER = ("attnscope", "router")
"""In ComfyUI's output folder."""

_LARGEST = 256 * 2**20


def with_candidates(
    settings: RouterSettings, earlier: Sequence[tuple[str, VariantSettings]]
) -> RouterSettings:
    """The settings with what there is to choose from spelled out.

    Args:
        settings: of the router's node.
        earlier: variants of the nodes before it.
    """
    found: list[tuple[str, VariantSettings]] = []
    for variant, theirs in earlier:
        if isinstance(theirs, RouterSettings):
            found += [(c.variant, c.settings) for c in candidate_texts.parse(theirs.candidates)]
        elif variant not in candidate_texts.NEVER:
            found.append((variant, theirs))
    text = settings.candidates or candidate_texts.text_of_all(found) or candidate_texts.DEFAULT
    return RouterSettings.model_validate({**settings.model_dump(), "candidates": text})


class TableFile:
    """A table and its file. Any thread may use it."""

    def __init__(self, path: Path, model: str) -> None:
        """
        Args:
            path: of the file, which needn't exist.
            model: whose errors it holds.
        """
        self.path = path
        self._model = model
        self._lock = threading.Lock()
        self._table = Table()
        self._stamp: tuple[int, int] | None = None
        self._unsaved = False
        self._refused = ""

    def load(self) -> Table:
        """What earlier runs have measured; nothing where the file can't be used."""
        with self._lock:
            if not self._unsaved:
                self._read()
            return self._table

    def add(self, scores: Scores) -> None:
        """Take a run's measurements; `save` writes them."""
        with self._lock:
            after = self._table.with_run(scores)
            self._unsaved = self._unsaved or after is not self._table
            self._table = after

    def save(self) -> None:
        """Write what is new, whole or not at all."""
        with self._lock:
            if not self._unsaved or self._refused:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(to_json(self._table, self._model))
                os.replace(name, self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self._stamp, self._unsaved = _stamp(self.path), False

    def _read(self) -> None:
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp, self._table, self._refused = stamp, Table(), ""
        if stamp is None:
            return
        try:
            if stamp[1] > _LARGEST:
                raise TableError(f"the file: has {stamp[1]} bytes; allowed: {_LARGEST}")
            self._table = from_json(self.path.read_text("utf-8"), self._model)
        except (OSError, ValueError) as error:
            self._refused = str(error)
            log.error(
                "AttnScope: the router's table %s is left as it is and not used: %s. "
                "What is measured now is not kept; move the file away to begin anew.",
                self.path, error,
            )  # fmt: skip


class TableReport:
    """Writes a table when its run is over, on the link's thread."""

    def __init__(self, table: TableFile) -> None:
        self._table = table

    def step(self, step: StepClosed) -> None:
        """A step is closed."""

    def end(self, ended: RunEnded) -> None:
        """The run is over."""
        self._table.save()


_files: dict[tuple[Path, str], TableFile] = {}
_files_lock = threading.Lock()


def table_for(settings: RouterSettings, model: str) -> TableFile:
    """The table that a run's settings name, or the model's; the same object for the same file."""
    import folder_paths

    folder = Path(folder_paths.get_output_directory()).joinpath(*FOLDER)
    path = folder / f"{settings.table or _file_name(model)}.json"
    with _files_lock:
        return _files.setdefault((path, model), TableFile(path, model))


def _file_name(model: str) -> str:
    """The model's name as a file's, still telling models apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip("._-")[:80] or "model"
    if plain == model:
        return plain
    return f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
