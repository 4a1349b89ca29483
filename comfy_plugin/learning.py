"""What a learning variant needs of ComfyUI, and who is told of its training."""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..attention.distillation import Occurrence, StudentEvent, Update
from ..attention.registry import VARIANTS
from ..attention.settings import TtrSettings, VariantSettings
from ..attention.variant import ModelPrint, RunInfo
from ..wire import StudentHappened, StudentsUpdated, UpdateColumns
from .comet import CometLog, comet_for
from .outbox import Draft

log = logging.getLogger("attnscope")

FOLDER = "attnscope"
"""Below ComfyUI's output folder."""

SECONDS = 0.5
"""Least time between two messages of updates, but for what goes with an event or the end."""

MOST_UPDATES = 20_000
"""Of one message."""

_SAMPLED_PARAMETERS = 64
_SAMPLED_VALUES = 8

_WARNINGS = frozenset(
    {
        StudentEvent.OUT_OF_MEMORY,
        StudentEvent.TRAINING_OFF,
        StudentEvent.TEACHER_NOT_FINITE,
        StudentEvent.UPDATE_FAILED,
        StudentEvent.CHECKPOINT_FAILED,
    }
)


def learning_for(
    variant: str, settings: VariantSettings, model_patcher: Any, model_name: Callable[[], str]
) -> Learning | None:
    """Of a run; None where its variant doesn't learn.

    Args:
        variant: name of the variant.
        settings: that the run begins with.
        model_patcher: the sampled model.
        model_name: tells the model's name.
    """
    if not VARIANTS[variant].learns or not isinstance(settings, TtrSettings):
        return None
    model = ModelPrint(model_name(), weights_print(model_patcher))
    comet = comet_for(settings, model.name)
    return Learning(model, comet)


def students_folder() -> Path | None:
    """Where checkpoints are by default; None outside ComfyUI."""
    try:
        import folder_paths

        return (Path(folder_paths.get_output_directory()) / FOLDER).absolute()
    except Exception:
        return None


def weights_print(model_patcher: Any) -> str:
    """Hash of a sample of the model's biases and norms; empty where they can't be read.

    These are one-dimensional, which quantised files keep as numbers and LoRAs leave alone, so that
    the same model with and without one has the same students by default.
    """
    try:
        import torch

        with torch.no_grad():
            small = [
                (name, parameter)
                for name, parameter in model_patcher.model.diffusion_model.named_parameters()
                if parameter.ndim == 1 and parameter.is_floating_point()
            ]
            step = max(1, len(small) // _SAMPLED_PARAMETERS)
            digest = hashlib.sha256()
            for name, parameter in small[::step]:
                values = parameter.detach().flatten()[:_SAMPLED_VALUES].float().cpu()
                digest.update(f"{name} {tuple(parameter.shape)} {values.tolist()}\n".encode())
        return digest.hexdigest()
    except Exception as error:
        log.debug("AttnScope: the model's weights can't be told: %s", error)
        return ""


class Learning:
    """Tells of one run's training: the server, the log, and whoever else listens."""

    def __init__(self, model: ModelPrint, comet: CometLog | None = None) -> None:
        """
        Args:
            model: that is sampled.
            comet: is told the same; None for nobody.
        """
        self._model = model
        self._comet = comet
        self._settings: Callable[[], VariantSettings] = TtrSettings
        self._run_id = ""
        self._tell: Callable[[Draft], None] = lambda draft: None
        self._waiting: list[Update] = []
        self._limit = 0
        self._sent = 0.0
        self._newest: dict[str, Update] = {}

    def join(
        self,
        info: RunInfo,
        run_id: str,
        tell: Callable[[Draft], None],
        settings: Callable[[], VariantSettings],
    ) -> RunInfo:
        """What the run's variant prepares with.

        Args:
            info: what else it prepares with.
            run_id: of the run, which has begun.
            tell: takes drafts.
            settings: tells those in force.
        """
        self._run_id, self._tell, self._settings = run_id, tell, settings
        return replace(info, model=self._model, folder=students_folder(), listener=self)

    def updated(self, updates: Sequence[Update], replay_limit_bytes: int) -> None:
        """Updates are told in batches; a measured one brings a line of the log."""
        self._waiting += updates
        self._limit = replay_limit_bytes
        if time.monotonic() - self._sent >= SECONDS:
            self._send()
        for update in updates:
            if "nmse" in update.metrics:
                self._newest[update.layer] = update
        settings = self._settings()
        assert isinstance(settings, TtrSettings)
        if any("nmse" in update.metrics for update in updates):
            line = progress_line(self._newest, settings.training_steps)
            log.info("AttnScope Flux2TTR: %s", line)
        if self._comet is not None:
            self._comet.every = settings.comet_every
            self._comet.updated(updates, replay_limit_bytes)

    def happened(self, occurrence: Occurrence) -> None:
        """Something happened; what was updated before it is told first."""
        self._send()
        run_id, at = self._run_id, time.time()

        def make(seq: int) -> StudentHappened:
            return StudentHappened(
                run_id=run_id,
                seq=seq,
                at=at,
                event=occurrence.event,
                layer=occurrence.layer,
                update=occurrence.update,
                step=occurrence.step,
                detail=occurrence.detail[:1000],
            )

        self._tell(_StudentDraft(run_id, make, droppable=False))
        level = logging.WARNING if occurrence.event in _WARNINGS else logging.INFO
        where = f" {occurrence.layer}" if occurrence.layer else ""
        log.log(
            level, "AttnScope Flux2TTR:%s %s: %s",
            where, occurrence.event.value.replace("_", " "), occurrence.detail,
        )  # fmt: skip
        if self._comet is not None:
            self._comet.happened(occurrence)

    def close(self) -> None:
        """The run is over: tell what waits."""
        self._send()
        if self._comet is not None:
            self._comet.close()

    def _send(self) -> None:
        updates, self._waiting = self._waiting, []
        self._sent = time.monotonic()
        for start in range(0, len(updates), MOST_UPDATES):
            self._tell(self._batch(updates[start : start + MOST_UPDATES]))

    def _batch(self, updates: Sequence[Update]) -> Draft:
        run_id, at, limit = self._run_id, time.time(), self._limit

        def make(seq: int) -> StudentsUpdated:
            return StudentsUpdated(
                run_id=run_id,
                seq=seq,
                at=at,
                updates=columns(updates),
                replay_limit_bytes=limit,
            )

        return _StudentDraft(run_id, make, droppable=True)


class _StudentDraft:
    """An event of the training."""

    urgent = True

    def __init__(self, run_id: str, make: Callable[[int], Any], droppable: bool) -> None:
        self.run_id = run_id
        self.droppable = droppable
        self._make = make

    def ready(self) -> bool:
        return True

    def build(self, seq: int) -> Any:
        return self._make(seq)


def columns(updates: Sequence[Update]) -> UpdateColumns:
    """Updates as the wire has them, one list per metric that any of them has."""
    names = dict.fromkeys(name for update in updates for name in update.metrics)
    return UpdateColumns(
        layer=[update.layer for update in updates],
        update=[update.update for update in updates],
        step=[update.step for update in updates],
        at=[update.at for update in updates],
        metrics={name: [update.metrics.get(name) for update in updates] for name in names},
    )


def progress_line(newest: dict[str, Update], training_steps: int) -> str:
    """How far the layers are, by the newest measured update of each.

    Args:
        newest: by layer; not empty.
        training_steps: of each layer in all.
    """
    errors = {layer: one.metrics.get("nmse_ema", math.nan) for layer, one in newest.items()}
    worst = max(errors, key=lambda layer: errors[layer])
    losses = [one.metrics["loss_ema"] for one in newest.values() if "loss_ema" in one.metrics]
    ready = sum(one.metrics.get("ready", 0.0) > 0.0 for one in newest.values())
    least = min(one.update for one in newest.values())
    return (
        f"update {least} of {training_steps}, {ready} of {len(newest)} layers ready, "
        f"loss {statistics.median(losses):.3g}, NMSE {statistics.median(errors.values()):.3g}, "
        f"worst {errors[worst]:.3g} ({worst})"
    )
