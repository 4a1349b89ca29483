"""Settings and interrupts on their way to a sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from ..attention.settings import VariantSettings
from ..db import changes, instances, models, revisions, runs
from ..db.session import Transaction
from ..wire import RevisionState, RunStatus
from . import problems, serial, validation
from .clock import now
from .problems import FieldErrors, ProblemError, shorten
from .schemas import FieldProblem, InstanceSettingsAnswer, Revision, Run
from .services import Services


def push(services: Services, run_id: str, base: int, wanted: Mapping[str, Any]) -> Revision:
    """Make a revision of a running run's settings and send it to the sampler.

    Args:
        base: number of the newest revision that the caller has seen.
        wanted: settings to change; the others keep their value of the newest revision that was
            not rejected.

    Raises:
        ProblemError: no such run (404); it does not run (409 ``run-ended``); the caller has not
            seen the newest revision (409 ``stale-revision``, which carries it).
        FieldErrors: values that are not allowed, not live, or no change at all.
    """

    def work(tx: Transaction) -> Revision:
        run = _running(tx.session, run_id)
        newest = revisions.numbered(tx.session, run.id, run.revision)
        assert newest is not None
        if base != run.revision:
            raise ProblemError(
                409,
                "stale-revision",
                f"base_revision: {base}; allowed: {run.revision}, the newest. Somebody else "
                "changed the settings: look at them and send yours again.",
                current=serial.revision(newest, run_id),
            )
        standing = revisions.newest_standing(tx.session, run.id)
        before = validation.settings(run.variant, standing.settings, "settings.")
        merged = {**standing.settings, **wanted}
        after = validation.settings(run.variant, merged, "settings.")
        changed = after.changed_from(before)
        _must_be_live(before, changed)
        if not changed:
            raise FieldErrors(
                [
                    FieldProblem(
                        field="settings",
                        value=shorten(dict(wanted)),
                        allowed=f"at least one value that differs from revision {standing.number}",
                    )
                ]
            )
        row = add_revision(tx, run, after, changed, instance_revision=None)
        tx.changed("run", run_id, run_id)
        tx.after_commit.append(lambda: services.mailboxes.ring(run.instance_id))
        return serial.revision(row, run_id)

    return services.store.write(work)


def _must_be_live(before: VariantSettings, changed: Mapping[str, tuple[Any, Any]]) -> None:
    fixed = [name for name in changed if name not in before.live_names()]
    if fixed:
        raise FieldErrors(
            [
                FieldProblem(
                    field=f"settings.{name}",
                    value=shorten(changed[name][1]),
                    allowed=f"{shorten(changed[name][0])!r} for this run, since the setting is "
                    "not live; set it for the instance's later runs instead",
                )
                for name in fixed
            ]
        )


def add_revision(
    tx: Transaction,
    run: models.Run,
    settings: VariantSettings,
    changed: Mapping[str, tuple[Any, Any]],
    *,
    instance_revision: int | None,
) -> models.Revision:
    """Store a run's next revision; older ones that are still under way give way to it."""
    for older in revisions.open_of_run(tx.session, run.id):
        older.state = RevisionState.SUPERSEDED.value
        older.settled_at = now()
        older.reason = f"revision {run.revision + 1} came before it was applied"
        tx.changed("revision", run.run_id, older.id)
    row = models.Revision(
        id=changes.take_numbers(tx.session, changes.MESSAGE_COUNTER),
        run=run.id,
        number=run.revision + 1,
        base=run.revision,
        variant=run.variant,
        settings=settings.model_dump(mode="json"),
        changes={name: list(pair) for name, pair in changed.items()},
        state=RevisionState.PENDING.value,
        reason="",
        requested_at=now(),
        instance_revision=instance_revision,
        tuned=False,
    )
    tx.session.add(row)
    run.revision = row.number
    tx.changed("revision", run.run_id, row.id)
    return row


def apply_override(tx: Transaction, run: models.Run) -> bool:
    """Send a run that began without its instance's newest settings a revision with them.

    Only settings that are live can be taken up by then; the others wait for the next run.

    Returns:
        Whether a revision was made.
    """
    override = instances.override(tx.session, run.instance_id, run.variant)
    if override is None or override.settings is None or override.id == run.instance_revision:
        return False
    before = validation.settings(run.variant, run.settings, "settings.")
    live = before.live_names()
    wanted = {name: value for name, value in override.settings.items() if name in live}
    after = validation.settings(run.variant, {**run.settings, **wanted}, "settings.")
    changed = after.changed_from(before)
    if not changed:
        return False
    add_revision(tx, run, after, changed, instance_revision=override.id)
    return True


def set_instance_settings(
    services: Services, instance_id: str, variant: str, settings: Mapping[str, Any] | None
) -> InstanceSettingsAnswer:
    """Set what later runs of an instance begin with; None takes it back.

    Args:
        settings: those left out take their defaults, so that what is stored is complete.

    Raises:
        ProblemError: no such instance (404).
        FieldErrors: the variant is unknown, or values are not allowed.
    """
    validation.known_variant(variant, "variant")
    stored = None
    if settings is not None:
        stored = validation.settings(variant, settings, "settings.").model_dump(mode="json")

    def work(tx: Transaction) -> InstanceSettingsAnswer:
        if instances.find(tx.session, instance_id) is None:
            raise problems.not_found("instance", instance_id)
        row = models.InstanceSettings(
            id=changes.take_numbers(tx.session, changes.MESSAGE_COUNTER),
            instance_id=instance_id,
            variant=variant,
            settings=stored,
            requested_at=now(),
        )
        tx.session.add(row)
        tx.changed("instance", None, instance_id)
        tx.after_commit.append(lambda: services.mailboxes.ring(instance_id))
        return InstanceSettingsAnswer(id=row.id, variant=variant, settings=stored)

    return services.store.write(work)


def interrupt(services: Services, run_id: str) -> Run:
    """Ask ComfyUI to stop a run; asking twice is asking once.

    Raises:
        ProblemError: no such run (404), or it does not run (409 ``run-ended``).
    """

    def work(tx: Transaction) -> Run:
        run = _running(tx.session, run_id)
        if run.interrupt_id is None:
            run.interrupt_id = changes.take_numbers(tx.session, changes.MESSAGE_COUNTER)
            tx.after_commit.append(lambda: services.mailboxes.ring(run.instance_id))
        return serial.run(tx.session, run)

    return services.store.write(work)


def _running(session: Session, run_id: str) -> models.Run:
    run = runs.find(session, run_id)
    if run is None:
        raise problems.not_found("run", run_id)
    if run.status != RunStatus.RUNNING.value:
        raise ProblemError(
            409, "run-ended", f"status: {run.status}; allowed: running. The run takes no more."
        )
    return run
