"""The file that export writes and import reads: JSON lines, one record per line.

====================  ===========================================================================
``kind``              what it holds
====================  ===========================================================================
``attnscope-runs``    first line: ``version`` of the format, ``made_by``, ``at``
``instance``          the ComfyUI process of the runs that follow (`wire.InstanceInfo`)
``event``             an event as the plugin sent it (`wire.AnyEvent`), with its ``seq``
``revision``          a settings revision and what became of it (`schemas.Revision`)
``run``               closes a run: what no single event says
``end``               last line: how many runs; without it the file is cut off
====================  ===========================================================================

A run is its ``event`` ``run_started``, its revisions, its other events by ``seq``, its ``run``.
Version 1. Non-finite numbers are strings, as on the wire.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from ..wire import AnyEvent, Count, InstanceInfo, Message, RunId, RunStatus, UnixTime
from .schemas import Revision

VERSION = 1


class Head(Message):
    """First line."""

    kind: Literal["attnscope-runs"] = "attnscope-runs"
    version: int
    made_by: str
    at: UnixTime


class InstanceLine(Message):
    """The ComfyUI process of the runs that follow."""

    kind: Literal["instance"] = "instance"
    instance: InstanceInfo


class EventLine(Message):
    """An event as the plugin sent it."""

    kind: Literal["event"] = "event"
    event: AnyEvent


class RevisionLine(Message):
    """A settings revision and what became of it."""

    kind: Literal["revision"] = "revision"
    revision: Revision


class RunLine(Message):
    """Closes a run."""

    kind: Literal["run"] = "run"
    run_id: RunId
    status: RunStatus
    durable_seq: int
    last_event_at: UnixTime
    events_lost: Count
    steps_duplicate: Count


class End(Message):
    """Last line."""

    kind: Literal["end"] = "end"
    runs: Count


Line = Annotated[
    Head | InstanceLine | EventLine | RevisionLine | RunLine | End, Field(discriminator="kind")
]
LINE: TypeAdapter[Line] = TypeAdapter(Line)
