"""Runs to a file of JSON lines; `archive.py` describes it."""

from __future__ import annotations

import base64
import gzip
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..attention.metrics import METRIC_NAMES
from ..db import images, instances, migrate, models, numbers, revisions, runs, steps, students
from ..db.session import Store
from ..db.student_models import StudentBatch, StudentEventRow
from ..version import __version__
from ..wire import (
    ImageTaken,
    InstanceInfo,
    LayerColumns,
    Message,
    ModelInfo,
    ReasonCount,
    ReasonKind,
    RunEnded,
    RunStarted,
    RunStatus,
    SamplingInfo,
    StepClosed,
)
from . import archive, exporting_students, serial
from .clock import now
from .config import Config
from .image_files import ImageFiles


class ExportError(Exception):
    """Runs can't be exported; the message says why."""


def export_file(
    config: Config, path: Path, run_ids: Sequence[str] = (), *, with_images: bool = True
) -> int:
    """Write runs to a file, which is complete or not there at all.

    Args:
        path: the file; packed where it ends in ``.gz``; ``-`` is standard output.
        run_ids: which runs; all where empty.

    Returns:
        How many runs were written.

    Raises:
        ExportError: there is no such run or no usable database.
        OSError: the file can't be written.
    """
    store = Store(config.url, config.busy_timeout)
    try:
        if (
            store.is_sqlite
            and not config.database_url
            and not (config.data_dir / "attnscope.db").exists()
        ):
            raise ExportError(f"there is no database in {config.data_dir}")
        migrate.upgrade(store)
        files = ImageFiles(config.images_dir) if with_images else None
        with _writing(path) as out:
            return export(store, out, run_ids, files)
    except migrate.NewerDatabase as error:
        raise ExportError(str(error)) from None
    finally:
        store.close()


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    if str(path) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as raw:
            if path.suffix == ".gz":
                # no file name and no time inside: the same runs give the same bytes
                with gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
                    yield packed  # type: ignore[misc]
            else:
                yield raw
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def export(
    store: Store, out: IO[bytes], run_ids: Sequence[str] = (), files: ImageFiles | None = None
) -> int:
    """Write runs as lines.

    Args:
        files: where images lie; None leaves images out.

    Returns:
        How many runs were written.

    Raises:
        ExportError: there is no such run.
    """
    with store.read() as session:
        chosen = _chosen(session, run_ids)
    _write(out, archive.Head(version=archive.VERSION, made_by=__version__, at=now()))
    instance_id = None
    for run_id in chosen:
        with store.read() as session:
            run = runs.find(session, run_id)
            if run is None:
                raise ExportError(f"run {run_id} was deleted meanwhile")
            if run.instance_id != instance_id:
                _write(out, _instance(session, run.instance_id))
                instance_id = run.instance_id
            for line in _run_lines(session, run, files):
                _write(out, line)
    _write(out, archive.End(runs=len(chosen)))
    return len(chosen)


def _chosen(session: Session, run_ids: Sequence[str]) -> list[str]:
    if run_ids:
        known = runs.find_many(session, run_ids)
        for run_id in run_ids:
            if run_id not in known:
                raise ExportError(f"there is no run {run_id!r}")
        return list(dict.fromkeys(run_ids))
    return list(session.scalars(select(models.Run.run_id).order_by(models.Run.id)))


def _write(out: IO[bytes], line: Message) -> None:
    out.write(line.model_dump_json().encode() + b"\n")


def _instance(session: Session, instance_id: str) -> archive.InstanceLine:
    row = instances.find(session, instance_id)
    info = {name: getattr(row, name) for name in InstanceInfo.model_fields}
    return archive.InstanceLine(instance=InstanceInfo(**info))


def _run_lines(session: Session, run: models.Run, files: ImageFiles | None) -> Iterator[Message]:
    yield archive.EventLine(event=_started(session, run))
    for row in revisions.of_run(session, run.id):
        yield archive.RevisionLine(revision=serial.revision(row, run.run_id))
    names = runs.layer_names(session, run.id)
    step_rows = steps.of_run(session, run.id)
    image_rows = images.of_run(session, run.id) if files is not None else ()
    pending: list[tuple[int, Any]] = [(row.seq, row) for row in step_rows]
    pending.extend((row.seq, row) for row in image_rows)
    if run.ended_seq is not None:
        pending.append((run.ended_seq, run))
    pending.extend((row.seq, row) for row in students.batches(session, run.id))
    pending.extend((row.seq, row) for row in students.events(session, run.id))
    training = exporting_students.Batches(session, run, names)
    for _, item in sorted(pending, key=lambda pair: pair[0]):
        if isinstance(item, models.Step):
            yield archive.EventLine(event=_step(session, run, item, names))
        elif isinstance(item, models.Run):
            yield archive.EventLine(event=_ended(run))
        elif isinstance(item, StudentBatch):
            yield archive.EventLine(event=training.event(item))
        elif isinstance(item, StudentEventRow):
            yield archive.EventLine(event=exporting_students.happened(run, item, names))
        else:
            assert files is not None
            yield archive.EventLine(event=_image(run, item, files))
    yield archive.RunLine(
        run_id=run.run_id,
        status=RunStatus(run.status),
        durable_seq=run.durable_seq,
        last_event_at=run.last_event_at,
        events_lost=run.events_lost,
        steps_duplicate=run.steps_duplicate,
    )


def _started(session: Session, run: models.Run) -> RunStarted:
    first = revisions.numbered(session, run.id, 0)
    assert first is not None
    return RunStarted(
        run_id=run.run_id,
        seq=0,
        at=run.started_at,
        variant=run.variant,
        settings=first.settings,
        instance_revision=run.instance_revision,
        label=run.label,
        sampling=SamplingInfo.model_validate(run.sampling),
        model=ModelInfo.model_validate(run.model),
    )


def _step(session: Session, run: models.Run, row: models.Step, names: Sequence[str]) -> StepClosed:
    known = numbers.restored(row, ("sigma", "duration_ms"))
    rows = steps.layer_rows(session, run.id, row.step, row.step)
    values = [serial.metric_values(item) for item in rows]
    metrics = {
        name: [item[index] for item in values]
        for index, name in enumerate(METRIC_NAMES)
        if any(item[index] is not None for item in values)
    }
    why = [
        ReasonCount(
            layer=names[item.layer],
            kind=cast(ReasonKind, item.kind),
            reason=item.reason,
            count=item.count,
            detail=item.detail,
        )
        for item in steps.reasons(session, run.id, row.step, row.step)
    ]
    return StepClosed(
        run_id=run.run_id,
        seq=row.seq,
        at=row.closed_at,
        step=row.step,
        sigma=known["sigma"],
        model_calls=row.model_calls,
        duration_ms=known["duration_ms"],
        revision=row.revision,
        layers=LayerColumns(
            layer=[names[item[2]] for item in rows],
            path=[item[3] for item in rows],
            calls=[item[4] for item in rows],
            calls_variant=[item[5] for item in rows],
            calls_gated=[item[6] for item in rows],
            calls_fallback=[item[7] for item in rows],
            tokens_q=[item[8] for item in rows],
            tokens_k=[item[9] for item in rows],
            metrics=metrics,
        ),
        reasons=why,
    )


def _image(run: models.Run, row: models.Image, files: ImageFiles) -> ImageTaken:
    try:
        data = files.path(row.sha256).read_bytes()
    except OSError as error:
        raise ExportError(
            f"image {row.sha256} of run {run.run_id} can't be read ({error}); "
            "--no-images leaves images out"
        ) from None
    return ImageTaken.model_validate(
        {
            "run_id": run.run_id,
            "seq": row.seq,
            "at": row.at,
            "image_kind": row.kind,
            "step": row.step,
            "media_type": row.media_type,
            "width": row.width,
            "height": row.height,
            "data": base64.b64encode(data),
        }
    )


def _ended(run: models.Run) -> RunEnded:
    assert run.ended_at is not None and run.ended_seq is not None
    known = numbers.restored(run, ("duration_ms",))
    return RunEnded.model_validate(
        {
            "run_id": run.run_id,
            "seq": run.ended_seq,
            "at": run.ended_at,
            "status": run.status,
            "error": run.error,
            "duration_ms": known["duration_ms"],
        }
    )
