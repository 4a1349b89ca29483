"""Training of students: what it comes to, its series, its events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query
from sqlalchemy.orm import Session
from starlette.responses import Response

from .. import distillation, problems
from ..figures import training
from ..schemas import FieldProblem
from ..services import ServicesDep
from ..training_schemas import Distillation, StudentEvents, TrainingWindow
from .answers import RunIdPath, answer
from .runs import found

router = APIRouter(prefix="/runs/{run_id}/distillation", tags=["distillation"])

Part = Literal["heatmap", "bands", "lines"]
UpdateNumber = Annotated[int | None, Query(ge=0, le=2**53)]
Width = Annotated[
    int | None,
    Query(ge=1, le=2**40, description="of a bucket: a power of two; goes before points"),
]


@router.get("", response_model=Distillation)
def one_training(run_id: RunIdPath, services: ServicesDep) -> Response:
    """A run's training: totals, and each layer's newest numbers and readiness."""
    with services.store.read() as session:
        return answer(distillation.summary(session, found(session, run_id)))


@router.get("/events", response_model=StudentEvents)
def list_events(
    run_id: RunIdPath,
    services: ServicesDep,
    after: Annotated[int, Query(ge=-1, description="newest seq that you have")] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> Response:
    """What happened to students besides updates, oldest first."""
    with services.store.read() as session:
        return answer(distillation.events(session, found(session, run_id), after, limit))


@dataclass(frozen=True)
class Window:
    """Which window into a metric's series is wanted."""

    metric: Annotated[str, Query(max_length=64)] = "nmse_ema"
    layer: Annotated[list[str] | None, Query(description="all trained ones if left out")] = None
    from_update: UpdateNumber = None
    to_update: UpdateNumber = None
    points: Annotated[
        int,
        Query(
            ge=distillation.LEAST_POINTS, le=distillation.MOST_POINTS, description="most buckets"
        ),
    ] = 1000
    width: Width = None

    def check(self) -> None:
        """Refuse what is no window.

        Raises:
            ProblemError: with the field (422).
        """
        if self.width is not None and self.width & (self.width - 1):
            raise problems.invalid(
                [FieldProblem(field="width", value=self.width, allowed="a power of two")]
            )
        first, last = self.from_update, self.to_update
        if first is not None and last is not None and last < first:
            allowed = f"at least from_update, {first}"
            raise problems.invalid([FieldProblem(field="to_update", value=last, allowed=allowed)])

    def read(self, session: Session, run_id: str, parts: Sequence[Part]) -> dict[str, Any]:
        """The window's numbers."""
        self.check()
        return distillation.window(
            session,
            found(session, run_id),
            distillation.metric_of(self.metric),
            parts,
            layers=self.layer or (),
            first=self.from_update,
            last=self.to_update,
            points=self.points,
            width=self.width,
        )


@router.get("/series", response_model=TrainingWindow)
def one_window(
    run_id: RunIdPath,
    services: ServicesDep,
    window: Annotated[Window, Depends()],
    part: Annotated[list[Part] | None, Query(description="all if left out")] = None,
) -> Response:
    """A metric of the updates between two numbers, in buckets that lose no spike."""
    with services.store.read() as session:
        made = window.read(session, run_id, part or ("heatmap", "bands", "lines"))
    return Response(distillation.as_json(made), media_type="application/json")


@router.get("/figures/{name}", response_model=dict[str, Any])
def one_figure(
    run_id: RunIdPath,
    name: training.TrainingFigure,
    services: ServicesDep,
    window: Annotated[Window, Depends()],
    data: Annotated[bool, Query(description="0 leaves the numbers out")] = True,
) -> Response:
    """A figure as plotly's JSON; `meta.bind` of each trace names what it draws of a window."""
    with services.store.read() as session:
        found(session, run_id)
        figure = training.build(name, run_id, distillation.metric_of(window.metric))
        if data:
            numbers = orjson.loads(distillation.as_json(window.read(session, run_id, (name,))))
            figure = training.fill(figure, numbers)
    return Response(orjson.dumps(figure), media_type="application/json")
