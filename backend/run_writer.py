"""Events of one run on their way into the database, within one transaction."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert

from ..attention.metrics import METRIC_NAMES
from ..db import changes, conditions, models, numbers, revisions, runs, steps
from ..db.session import Transaction
from ..wire import (
    AnyEvent,
    EventsLost,
    ImageTaken,
    RevisionReported,
    RevisionState,
    RunEnded,
    RunStarted,
    RunStatus,
    SettingsTuned,
    StepClosed,
    StudentHappened,
    StudentsUpdated,
)
from . import aggregates, steering, validation
from .clock import now
from .services import Services
from .training_writer import TrainingWriter

log = logging.getLogger(__name__)

OPEN = frozenset({RevisionState.PENDING.value, RevisionState.DELIVERED.value})


class RunWriter:
    """Takes a run's events in order; rows go to the database together at the end.

    Args:
        run: the run's row; None when the first event is its beginning.
        replay: the events are history, see `ingest.store`.
    """

    def __init__(
        self, services: Services, tx: Transaction, run: models.Run | None, replay: bool
    ) -> None:
        self.services = services
        self.tx = tx
        self.session = tx.session
        self.replay = replay
        self.known_run = run
        self.status_changed = False
        self.layers: dict[str, int] = {}
        self.layers_stored = 0
        self.steps: set[int] = set()
        self.step_rows: list[tuple[Any, ...]] = []
        self.layer_rows: list[tuple[Any, ...]] = []
        self.reason_rows: list[tuple[Any, ...]] = []
        self.nmse_worst: float | None = None
        self.attn_ms: float | None = None
        self.tuned: Sequence[models.Revision] | None = None
        self.training: TrainingWriter | None = None

    def write(self, instance_id: str, events: Sequence[AnyEvent]) -> int:
        """Store what is new among the events.

        Returns:
            The run's highest durable seq.
        """
        run = self.known_run
        if run is None:
            started = events[0]
            assert isinstance(started, RunStarted)
            run = self._begin(instance_id, started)
        else:
            names = runs.layer_names(self.session, run.id)
            self.layers = {name: index for index, name in enumerate(names)}
            self.layers_stored = len(names)
        fresh = [event for event in events if event.seq > run.durable_seq]
        if not fresh and self.known_run is not None:
            return run.durable_seq
        # before its steps, since a reader of the feed must know a run before what belongs to it
        self.tx.changed("run", run.run_id, run.run_id)
        self._load_rolling(run)
        wanted = [event.step for event in fresh if isinstance(event, StepClosed)]
        self.steps = steps.known(self.session, run.id, wanted) if wanted else set()
        for event in fresh:
            if event.seq <= run.durable_seq:
                continue
            self._take(run, event)
            run.durable_seq = event.seq
            run.last_event_at = max(run.last_event_at, event.at)
        run.heard_at = run.last_event_at if self.replay else now()
        self._store(run)
        return run.durable_seq

    def _begin(self, instance_id: str, event: RunStarted) -> models.Run:
        settings = validation.settings(event.variant, event.settings, "settings.")
        stored = settings.model_dump(mode="json")
        sampling, model = event.sampling.model_dump(), event.model.model_dump()
        run = models.Run(
            run_id=event.run_id,
            instance_id=instance_id,
            label=event.label,
            status=RunStatus.RUNNING.value,
            variant=event.variant,
            settings=stored,
            revision=0,
            applied_revision=0,
            instance_revision=event.instance_revision,
            sampling=sampling,
            model=model,
            conditions=conditions.digest(sampling, model),
            started_at=event.at,
            last_event_at=event.at,
            heard_at=event.at if self.replay else now(),
            durable_seq=event.seq,
            steps_total=max(len(event.sampling.sigmas) - 1, 0),
            steps_done=0,
            steps_duplicate=0,
            nmse_median_sum=0.0,
            nmse_median_count=0,
            calls=0,
            calls_gated=0,
            calls_fallback=0,
            nonfinite=0,
            events_lost=0,
        )
        self.session.add(run)
        self.session.flush()
        first = models.Revision(
            id=changes.take_numbers(self.session, changes.MESSAGE_COUNTER),
            run=run.id,
            number=0,
            base=None,
            variant=event.variant,
            settings=stored,
            changes={},
            state=RevisionState.APPLIED.value,
            reason="",
            requested_at=event.at,
            settled_at=event.at,
            applied_step=0,
            instance_revision=event.instance_revision,
        )
        self.session.add(first)
        for name in event.model.layers:
            self._layer(name)
        self.tx.changed("run", run.run_id, run.run_id)
        self.tx.changed("revision", run.run_id, first.id)
        self.status_changed = True
        if not self.replay and steering.apply_override(self.tx, run):
            self.tx.after_commit.append(lambda: self.services.mailboxes.ring(instance_id))
        return run

    def _take(self, run: models.Run, event: AnyEvent) -> None:
        if run.status == RunStatus.LOST.value and not isinstance(event, RunEnded):
            run.status = RunStatus.RUNNING.value
            self.status_changed = True
        if isinstance(event, StepClosed):
            self._take_step(run, event)
        elif isinstance(event, ImageTaken):
            self._take_image(run, event)
        elif isinstance(event, RevisionReported):
            self._take_report(run, event)
        elif isinstance(event, SettingsTuned):
            self._take_tuned(run, event)
        elif isinstance(event, StudentsUpdated):
            self._students(run).take_updates(event)
        elif isinstance(event, StudentHappened):
            self._students(run).take_event(event)
        elif isinstance(event, RunEnded):
            self._take_end(run, event)
        elif isinstance(event, EventsLost):
            run.events_lost += event.count

    def _take_step(self, run: models.Run, event: StepClosed) -> None:
        if event.step in self.steps:
            run.steps_duplicate += 1
            log.warning("run %s: step %d came twice, the first stays", run.run_id, event.step)
            return
        self.steps.add(event.step)
        figures = aggregates.of_step(event.layers)
        values: dict[str, Any] = {
            **vars(figures),
            "run": run.id,
            "step": event.step,
            "seq": event.seq,
            "sigma": event.sigma,
            "closed_at": event.at,
            "model_calls": event.model_calls,
            "duration_ms": event.duration_ms,
            "revision": self._revision_of(run, event),
        }
        values["nan_fields"] = numbers.nan_names(values)
        self.step_rows.append(tuple(values[name] for name in steps.STEP_COLUMNS))
        self._add_layers(run, event)
        self._add_reasons(run, event)
        self._add_to_run(run, event.step, figures)
        self.tx.changed("step", run.run_id, event.step)

    def _add_layers(self, run: models.Run, event: StepClosed) -> None:
        layers = event.layers
        count = len(layers.layer)
        nothing = [None] * count
        metrics = [layers.metrics.get(name, nothing) for name in METRIC_NAMES]
        rows = zip(
            [run.id] * count,
            [event.step] * count,
            [self._layer(name) for name in layers.layer],
            layers.path,
            layers.calls,
            layers.calls_variant,
            layers.calls_gated,
            layers.calls_fallback,
            layers.tokens_q,
            layers.tokens_k,
            _nan_marks(layers.metrics, count),
            *metrics,
            strict=True,
        )
        self.layer_rows.extend(rows)

    def _add_reasons(self, run: models.Run, event: StepClosed) -> None:
        merged: dict[tuple[int, str, str], tuple[int, str]] = {}
        for item in event.reasons:
            key = (self._layer(item.layer), item.kind, item.reason)
            count, detail = merged.get(key, (0, item.detail))
            merged[key] = (count + item.count, detail)
        for (layer, kind, reason), (count, detail) in merged.items():
            self.reason_rows.append((run.id, event.step, layer, kind, reason, count, detail))

    def _add_to_run(self, run: models.Run, step: int, figures: aggregates.StepFigures) -> None:
        run.steps_done += 1
        run.last_step = step if run.last_step is None else max(run.last_step, step)
        if figures.nmse_median is not None and not math.isnan(figures.nmse_median):
            run.nmse_median_sum += figures.nmse_median
            run.nmse_median_count += 1
        if aggregates.is_worse_nmse(figures.nmse_worst, self.nmse_worst):
            self.nmse_worst = figures.nmse_worst
            run.worst_layer = figures.worst_layer
        run.calls += figures.calls
        run.calls_gated += figures.calls_gated
        run.calls_fallback += figures.calls_fallback
        run.fallback_share = aggregates.share(run.calls_fallback, run.calls)
        self.attn_ms = aggregates.total((self.attn_ms, figures.attn_ms))
        run.nonfinite += figures.nonfinite

    def _take_image(self, run: models.Run, event: ImageTaken) -> None:
        sha256 = self.services.images.save(event.data)
        row = models.Image(
            run=run.id,
            seq=event.seq,
            sha256=sha256,
            kind=event.image_kind,
            step=event.step,
            media_type=event.media_type,
            width=event.width,
            height=event.height,
            bytes=len(event.data),
            at=event.at,
        )
        self.session.add(row)
        self.session.flush()
        if event.image_kind == "final":
            run.final = sha256
        else:
            run.preview = sha256
        self.tx.changed("image", run.run_id, row.id)

    def _take_report(self, run: models.Run, event: RevisionReported) -> None:
        row = revisions.find(self.session, event.revision_id)
        if row is None or row.run != run.id:
            log.warning(
                "run %s reports on revision %d, which it has not", run.run_id, event.revision_id
            )
            return
        if event.state == "delivered":
            row.delivered_at = event.at
            if row.state != RevisionState.PENDING.value:
                event_changes_nothing = row.state != RevisionState.DELIVERED.value
                if event_changes_nothing:
                    self.tx.changed("revision", run.run_id, row.id)
                return
            row.state = event.state
        elif row.state == RevisionState.APPLIED.value:
            return
        else:
            # what the sampler did goes before what was expected of it
            row.state = event.state
            row.reason = event.reason
            row.settled_at = event.at
            if event.state == "applied":
                row.applied_step = event.step
                # in the order of the sampler, in which a tuned revision may have come before
                run.applied_revision = row.number
                run.settings = row.settings
        self.tx.changed("revision", run.run_id, row.id)

    def _take_tuned(self, run: models.Run, event: SettingsTuned) -> None:
        settings = validation.settings(run.variant, event.settings, "settings.")
        before = validation.settings(run.variant, run.settings, "settings.")
        row = models.Revision(
            id=changes.take_numbers(self.session, changes.MESSAGE_COUNTER),
            run=run.id,
            number=run.revision + 1,
            base=event.revision,
            variant=run.variant,
            settings=settings.model_dump(mode="json"),
            changes={name: list(pair) for name, pair in settings.changed_from(before).items()},
            state=RevisionState.APPLIED.value,
            reason=event.detail,
            requested_at=event.at,
            settled_at=event.at,
            applied_step=event.step,
            tuned=True,
        )
        self.session.add(row)
        self.session.flush()
        run.revision = run.applied_revision = row.number
        run.settings = row.settings
        self.tuned = None
        self.tx.changed("revision", run.run_id, row.id)

    def _revision_of(self, run: models.Run, event: StepClosed) -> int:
        """The plugin knows the numbers of what was pushed; the server numbers what it tuned."""
        if self.tuned is None:
            self.tuned = revisions.tuned_of_run(self.session, run.id)
        for row in self.tuned:
            first = row.applied_step or 0
            if row.base == event.revision and event.step >= first:
                return row.number
        return event.revision

    def _take_end(self, run: models.Run, event: RunEnded) -> None:
        if run.ended_at is not None:
            return
        run.status = event.status
        run.error = event.error
        run.ended_at = event.at
        run.ended_seq = event.seq
        run.duration_ms = event.duration_ms
        run.interrupt_id = None
        self.session.flush()
        for revision in revisions.open_of_run(self.session, run.id):
            revision.state = RevisionState.EXPIRED.value
            revision.settled_at = event.at
            revision.reason = "the run ended first"
            self.tx.changed("revision", run.run_id, revision.id)
        self.status_changed = True

    def _students(self, run: models.Run) -> TrainingWriter:
        if self.training is None:
            self.training = TrainingWriter(self.session, run.id, self._layer)
            self.tx.changed("training", run.run_id, run.run_id)
        return self.training

    def _layer(self, name: str) -> int:
        return self.layers.setdefault(name, len(self.layers))

    def _load_rolling(self, run: models.Run) -> None:
        known = numbers.restored(run, ("nmse_worst", "attn_ms", "duration_ms"))
        self.nmse_worst = known["nmse_worst"]
        self.attn_ms = known["attn_ms"]

    def _store(self, run: models.Run) -> None:
        if run.duration_ms is None and "duration_ms" in (run.nan_fields or "").split(","):
            run.duration_ms = math.nan
        run.nmse_worst = self.nmse_worst
        run.attn_ms = self.attn_ms
        run.nan_fields = numbers.nan_names(
            {"nmse_worst": run.nmse_worst, "attn_ms": run.attn_ms, "duration_ms": run.duration_ms}
        )
        self.session.flush()
        new_layers = [
            {"run": run.id, "layer": index, "name": name}
            for name, index in self.layers.items()
            if index >= self.layers_stored
        ]
        if new_layers:
            self.session.execute(insert(models.RunLayer), new_layers)
        steps.insert_rows(self.session, "steps", self.step_rows)
        steps.insert_rows(self.session, "layer_steps", self.layer_rows)
        steps.insert_rows(self.session, "reasons", self.reason_rows)
        if self.training is not None:
            self.training.store()


def _nan_marks(metrics: dict[str, list[float | None]], count: int) -> list[str | None]:
    """Per layer the names of the metrics that are NaN, or None."""
    marks: list[str | None] = [None] * count
    for name, column in metrics.items():
        for index, value in enumerate(column):
            # only NaN differs from itself; this line runs for every number that comes in
            if value != value:
                marks[index] = name if marks[index] is None else f"{marks[index]},{name}"
    return marks
