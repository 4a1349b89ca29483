"""A batch of events on its way into the database: whole or not at all, and never twice."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from ..db import changes, instances, models, runs
from ..db.session import Transaction
from ..wire import AnyEvent, Batch, IngestAnswer, InstanceInfo, RunStarted
from . import validation
from .clock import now
from .problems import FieldErrors, ProblemError
from .run_writer import RunWriter
from .schemas import FieldProblem
from .services import Services


def parse(data: bytes) -> Batch:
    """A batch from JSON.

    Raises:
        FieldErrors: naming the event's place in the batch and the field.
    """
    try:
        return Batch.model_validate_json(data)
    except ValidationError as error:
        raise FieldErrors(validation.field_problems(error.errors(include_url=False))) from None


def store(services: Services, batch: Batch, *, replay: bool = False) -> IngestAnswer:
    """Store a batch in one transaction.

    Args:
        replay: the events are history (an import): the clock is theirs, a deleted run may come
            back, and nothing is sent to any plugin.

    Raises:
        FieldErrors: an event is not valid; nothing of the batch is stored.
        ProblemError: events of a run whose beginning is not known (409 ``unknown-run``).
    """
    validation.check_batch(batch, services.config)

    def work(tx: Transaction) -> IngestAnswer:
        return _BatchWriter(services, tx, batch.instance, replay).write(batch.events)

    return services.store.write(work)


class _BatchWriter:
    def __init__(
        self, services: Services, tx: Transaction, instance: InstanceInfo, replay: bool
    ) -> None:
        self.services = services
        self.tx = tx
        self.instance = instance
        self.replay = replay

    def write(self, events: Sequence[AnyEvent]) -> IngestAnswer:
        by_run: dict[str, list[AnyEvent]] = {}
        for event in events:
            by_run.setdefault(event.run_id, []).append(event)
        for of_run in by_run.values():
            of_run.sort(key=lambda event: event.seq)
        session = self.tx.session
        known = runs.find_many(session, by_run.keys())
        deleted = changes.deleted_runs(session, list(by_run)) if by_run else set()
        if self.replay:
            for run_id in deleted:
                changes.forget_deletion(session, run_id)
            deleted = set()
        self._refuse_unknown(by_run, set(known) | deleted)
        self._upsert_instance(events)
        durable: dict[str, int] = {}
        touched = False
        for run_id, of_run in by_run.items():
            if run_id in deleted:
                # a straggler of a run that the user has thrown away
                durable[run_id] = of_run[-1].seq
                continue
            writer = RunWriter(self.services, self.tx, known.get(run_id), self.replay)
            durable[run_id] = writer.write(self.instance.instance_id, of_run)
            touched = touched or writer.status_changed
        if touched:
            self.tx.changed("instance", None, self.instance.instance_id)
        return IngestAnswer(durable=durable)

    def _refuse_unknown(self, by_run: dict[str, list[AnyEvent]], known: set[str]) -> None:
        unknown = [
            run_id
            for run_id, events in by_run.items()
            if run_id not in known and not isinstance(events[0], RunStarted)
        ]
        if unknown:
            raise ProblemError(
                409,
                "unknown-run",
                f"run_id: {', '.join(unknown[:3])} did not begin here; allowed: runs whose "
                "run_started (seq 0) has been sent. Send it and then these events again.",
                errors=[
                    FieldProblem(field="run_id", value=run_id, allowed="run_started first")
                    for run_id in unknown
                ],
            )

    def _upsert_instance(self, events: Sequence[AnyEvent]) -> None:
        info = self.instance.model_dump()
        row = instances.find(self.tx.session, self.instance.instance_id)
        newest = max((event.at for event in events), default=self.instance.started_at)
        seen = newest if self.replay else now()
        if row is None:
            row = models.Instance(**info, last_seen_at=seen)
            self.tx.session.add(row)
            self.tx.session.flush()
            self.tx.changed("instance", None, row.instance_id)
            return
        if any(getattr(row, name) != value for name, value in info.items()) and not self.replay:
            for name, value in info.items():
                setattr(row, name, value)
            self.tx.changed("instance", None, row.instance_id)
        row.last_seen_at = max(row.last_seen_at, seen)
