"""Training metrics to Comet, for those who use it and have ``comet_ml`` installed.

Everything of Comet's happens on a thread of its own: its import takes seconds, and opening and
closing an experiment waits for the network. With COMET_OFFLINE_DIRECTORY set, which is Comet's own
variable, experiments are written there instead.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ..attention.distillation import Occurrence, Update
from ..attention.settings import TtrSettings

log = logging.getLogger("attnscope")

MOST_WAITING = 50_000
"""Updates and events that wait for the thread; what comes on top is left out and counted."""

_OURS_ALONE: dict[str, Any] = {
    name: False
    for name in (
        "auto_metric_logging", "auto_param_logging", "auto_output_logging", "log_code",
        "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "parse_args",
    )
}  # fmt: skip
"""Comet would else send the process's output, environment and code."""


def comet_for(settings: TtrSettings, model: str) -> CometLog | None:
    """Who sends to Comet what the settings ask for; None where they ask for nothing."""
    project = settings.comet_project.strip()
    return CometLog(lambda: open_experiment(project, model)) if project else None


def open_experiment(project: str, model: str) -> Any:
    """An experiment of Comet's, online or not.

    Raises:
        ImportError: comet_ml isn't installed.
        Exception: whatever Comet raises, such as for a missing API key.
    """
    import comet_ml

    offline = os.environ.get("COMET_OFFLINE_DIRECTORY", "").strip()
    experiment: Any
    if offline:
        experiment = comet_ml.OfflineExperiment(
            project_name=project, offline_directory=offline, display_summary_level=0, **_OURS_ALONE
        )
    else:
        experiment = comet_ml.Experiment(
            project_name=project, display_summary_level=0, **_OURS_ALONE
        )
    experiment.log_other("model", model)
    return experiment


class CometLog:
    """Is told of the training and sends it on, from a thread that begins with the first news."""

    def __init__(self, open: Callable[[], Any]) -> None:
        """
        Args:
            open: makes the experiment, on the thread.
        """
        self.every = 1
        self._open = open
        self._queue: queue.Queue[Update | Occurrence | None] = queue.Queue(MOST_WAITING)
        self._left_out = 0
        self._thread: threading.Thread | None = None

    def updated(self, updates: Sequence[Update], replay_limit_bytes: int) -> None:
        """Every ``every``-th update of a layer is sent, and all that were measured."""
        for update in updates:
            if update.update % self.every == 0 or "nmse" in update.metrics:
                self._put(update)

    def happened(self, occurrence: Occurrence) -> None:
        """Sent as a named value of the experiment."""
        self._put(occurrence)

    def close(self) -> None:
        """No more news. Nothing is waited for."""
        if self._thread is not None:
            self._queue.put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until everything is sent; whether it is."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def _put(self, item: Update | Occurrence) -> None:
        # One place stays free for the end.
        if self._queue.qsize() >= MOST_WAITING - 1:
            self._left_out += 1
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, name="attnscope-comet", daemon=True)
            self._thread.start()
        self._queue.put(item)

    def _send(self) -> None:
        experiment: Any = None
        try:
            experiment = self._open()
        except Exception as error:
            log.warning("AttnScope: nothing is sent to Comet: %s: %s", type(error).__name__, error)
        failed = experiment is None
        while (item := self._queue.get()) is not None:
            if failed:
                continue
            try:
                _log(experiment, item)
            except Exception:
                failed = True
                log.warning("AttnScope: nothing more is sent to Comet", exc_info=True)
        if self._left_out:
            log.warning(
                "AttnScope: %d updates were left out for Comet, which was slower", self._left_out
            )
        if experiment is not None:
            try:
                experiment.end()
            except Exception:
                log.warning("AttnScope: the experiment at Comet was not closed", exc_info=True)


def _log(experiment: Any, item: Update | Occurrence) -> None:
    if isinstance(item, Update):
        metrics = {f"{item.layer}/{name}": value for name, value in item.metrics.items()}
        experiment.log_metrics(metrics, step=item.update)
    else:
        name = " ".join(part for part in (item.layer, item.event.value) if part)
        experiment.log_other(name, item.detail)
