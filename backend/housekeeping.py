"""Renaming and deleting runs."""

from __future__ import annotations

from ..db import changes, images, runs
from ..db.session import Transaction
from ..wire import RunStatus
from . import problems, serial
from .schemas import Run
from .services import Services


def rename(services: Services, run_id: str, label: str) -> Run:
    """Give a run another label.

    Raises:
        ProblemError: there is no such run (404).
    """

    def work(tx: Transaction) -> Run:
        run = runs.find(tx.session, run_id)
        if run is None:
            raise problems.not_found("run", run_id)
        run.label = label
        tx.changed("run", run_id, run_id)
        return serial.run(tx.session, run)

    return services.store.write(work)


def delete(services: Services, run_id: str) -> None:
    """Delete a run that has ended, with the images that no other run has.

    Raises:
        ProblemError: there is no such run (404), or it is running (409).
    """

    def work(tx: Transaction) -> None:
        run = runs.find(tx.session, run_id)
        if run is None:
            raise problems.not_found("run", run_id)
        if run.status == RunStatus.RUNNING.value:
            raise problems.ProblemError(
                409, "run-running", "status: running; allowed: an ended run. Interrupt it first."
            )
        hashes = {image.sha256 for image in images.of_run(tx.session, run.id)}
        runs.delete_run(tx.session, run)
        changes.forget_run(tx.session, run_id)
        tx.changed("run_deleted", run_id, run_id)
        unused = images.unreferenced(tx.session, hashes)
        # within the writer's lock: no batch can take the file up again in between
        tx.after_commit.append(lambda: services.images.remove(unused))

    services.store.write(work)
