"""Checks of what comes in, and their errors as fields, values and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ..attention.distillation import TRAINING_METRIC_NAMES
from ..attention.metrics import METRIC_NAMES
from ..attention.settings import SETTINGS, VariantSettings, settings_model
from ..wire import AnyEvent, Batch, ImageTaken, RunStarted, StepClosed, StudentsUpdated
from . import catalogue
from .config import Config
from .problems import FieldErrors, shorten
from .schemas import FieldProblem

EVENT_KINDS = frozenset(
    {
        "run_started",
        "step",
        "image",
        "revision",
        "tuned",
        "students_updated",
        "student_event",
        "run_ended",
        "events_lost",
    }
)
MOST_ERRORS = 20


def field_problems(
    errors: Sequence[Mapping[str, Any]], *, skip: Sequence[str] = (), prefix: str = ""
) -> list[FieldProblem]:
    """Pydantic's errors as problems.

    Args:
        errors: what ``ValidationError.errors()`` gives.
        skip: beginnings of a place that mean nothing to the caller (``body``).
        prefix: put before each place, such as ``settings.``.
    """
    return [_problem(error, skip, prefix) for error in list(errors)[:MOST_ERRORS]]


def _problem(error: Mapping[str, Any], skip: Sequence[str], prefix: str) -> FieldProblem:
    place = _place(error["loc"])
    if place and place[0] in (*skip, "query", "path", "header"):
        place = place[1:]
    path = ".".join(place)
    message: str = error["msg"]
    if error["type"] == "value_error":
        # our own validators say "field: value; allowed: what", the field from its model on
        text = message.removeprefix("Value error, ")
        name, _, rest = text.partition(": ")
        value, found, limits = rest.partition("; allowed: ")
        if found:
            parent = ".".join(place[:-1]) if place and name.startswith(place[-1]) else path
            full = f"{parent}.{name}" if parent else name
            return FieldProblem(field=prefix + full, value=value, allowed=limits)
    if error["type"] == "json_invalid":
        return FieldProblem(field=prefix + (path or "body"), value=None, allowed=message)
    given = None if error["type"] == "missing" else shorten(error.get("input"))
    return FieldProblem(field=(prefix + path) or "body", value=given, allowed=_allowed(error))


def _place(loc: Sequence[Any]) -> list[str]:
    parts: list[str] = []
    for index, part in enumerate(loc):
        is_tag = index == 2 and loc[0] == "events" and part in EVENT_KINDS
        if not is_tag:
            parts.append(str(part))
    return parts


def _allowed(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind == "missing":
        return "a value, since the field is required"
    if kind == "extra_forbidden":
        return "no field of this name"
    message: str = error["msg"]
    text = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def settings(variant: str, values: Mapping[str, Any], prefix: str) -> VariantSettings:
    """A variant's settings, checked.

    Args:
        prefix: put before a field's name in errors, such as ``settings.``.

    Raises:
        FieldErrors: values that the variant doesn't take.
    """
    try:
        return settings_model(variant).model_validate(dict(values))
    except ValidationError as error:
        raise FieldErrors(_setting_problems(variant, error, prefix)) from None


def _setting_problems(variant: str, error: ValidationError, prefix: str) -> list[FieldProblem]:
    known = catalogue.fields(variant)
    problems = []
    for item, problem in zip(
        error.errors(), field_problems(error.errors(), prefix=prefix), strict=False
    ):
        name = str(item["loc"][0]) if item["loc"] else ""
        if name in known and item["type"] != "value_error":
            problem = problem.model_copy(update={"allowed": catalogue.allowed(known[name])})
        elif item["type"] == "extra_forbidden":
            names = ", ".join(known)
            problem = problem.model_copy(update={"allowed": f"a setting of {variant}: {names}"})
        problems.append(problem)
    return problems


def known_variant(variant: str, field: str) -> None:
    """Refuse a variant that this server doesn't know.

    Raises:
        FieldErrors: with the names that it knows.
    """
    if variant not in SETTINGS:
        allowed = "one of " + ", ".join(sorted(SETTINGS))
        raise FieldErrors([FieldProblem(field=field, value=shorten(variant), allowed=allowed)])


def check_batch(batch: Batch, config: Config) -> None:
    """Check what the message's types can't say.

    Raises:
        FieldErrors: naming the event's place in the batch and the field.
    """
    problems: list[FieldProblem] = []
    for index, event in enumerate(batch.events):
        try:
            check_event(event, f"events.{index}", config)
        except FieldErrors as error:
            problems.extend(error.errors)
    if problems:
        raise FieldErrors(problems[:MOST_ERRORS])


def check_event(event: AnyEvent, place: str, config: Config) -> None:
    """Check what an event's types can't say.

    Args:
        place: where the event stands, such as ``events.3``.

    Raises:
        FieldErrors: naming the field.
    """
    if isinstance(event, RunStarted):
        if event.seq != 0:
            raise FieldErrors(
                [
                    FieldProblem(
                        field=f"{place}.seq",
                        value=event.seq,
                        allowed="0, since run_started is a run's first event",
                    )
                ]
            )
        known_variant(event.variant, f"{place}.variant")
        settings(event.variant, event.settings, f"{place}.settings.")
    elif isinstance(event, StepClosed):
        _known_metrics(event.layers.metrics, METRIC_NAMES, f"{place}.layers.metrics")
    elif isinstance(event, StudentsUpdated):
        _known_metrics(event.updates.metrics, TRAINING_METRIC_NAMES, f"{place}.updates.metrics")
    elif isinstance(event, ImageTaken):
        _check_image(event, place, config)


def _known_metrics(given: Iterable[str], known: Sequence[str], place: str) -> None:
    for name in given:
        if name not in known:
            allowed = "a metric of this server: " + ", ".join(known)
            raise FieldErrors([FieldProblem(field=f"{place}.{name}", value=name, allowed=allowed)])


def _check_image(event: ImageTaken, place: str, config: Config) -> None:
    problems = []
    if len(event.data) > config.max_image:
        allowed = f"at most {config.max_image} bytes"
        value: Any = f"{len(event.data)} bytes"
        problems.append(FieldProblem(field=f"{place}.data", value=value, allowed=allowed))
    elif sniff(event.data) != event.media_type:
        found = sniff(event.data) or "no image that is known here"
        allowed = f"bytes of {event.media_type}, as media_type says"
        problems.append(FieldProblem(field=f"{place}.data", value=found, allowed=allowed))
    for side in ("width", "height"):
        length: int = getattr(event, side)
        if not 1 <= length <= config.max_image_side:
            allowed = f"a whole number from 1 to {config.max_image_side}"
            problems.append(FieldProblem(field=f"{place}.{side}", value=length, allowed=allowed))
    if problems:
        raise FieldErrors(problems)


def sniff(data: bytes) -> str | None:
    """Media type of an image by its first bytes; None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None
