"""Realistic messages of a plugin, for tests that need a run."""

from __future__ import annotations

import base64
import itertools
import math
import struct
import time
import uuid
import zlib
from collections.abc import Sequence
from typing import Any

from attnscope.attention.distillation import TRAINING_METRIC_NAMES
from attnscope.attention.metrics import METRIC_NAMES
from attnscope.attention.settings import settings_model
from attnscope.wire import (
    Batch,
    EventsLost,
    ImageTaken,
    InstanceInfo,
    LayerColumns,
    ModelInfo,
    ReasonCount,
    RevisionReported,
    RunEnded,
    RunStarted,
    SamplingInfo,
    SettingsTuned,
    StepClosed,
    StudentHappened,
    StudentsUpdated,
    UpdateColumns,
)

NAN = math.nan
INF = math.inf


def new_id() -> str:
    """An id of a run or an instance."""
    return uuid.uuid4().hex


def layer_names(count: int) -> list[str]:
    """Layers as Flux has them: a third double blocks, then single ones."""
    double = count // 3
    names = [f"double.{index}" for index in range(double)]
    return names + [f"single.{index}" for index in range(count - double)]


def instance(instance_id: str | None = None, **fields: Any) -> InstanceInfo:
    """A ComfyUI process."""
    values: dict[str, Any] = {
        "instance_id": instance_id or new_id(),
        "name": "test:8188",
        "started_at": 1_700_000_000.0,
        "plugin_version": "0.1.0",
        "device": "cpu",
    }
    return InstanceInfo(**{**values, **fields})


def png(width: int = 4, height: int = 4, shade: int = 0) -> bytes:
    """A small grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    rows = b"".join(b"\0" + bytes([shade % 256]) * width for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


class RunScript:
    """Makes the events of one run, in order.

    Args:
        layers: how many layers the model has.
        steps: how many steps the schedule has.
        variant: variant of the run.
    """

    def __init__(
        self,
        layers: int = 6,
        steps: int = 4,
        variant: str = "taylor",
        *,
        run_id: str | None = None,
        at: float | None = None,
        settings: dict[str, Any] | None = None,
        label: str = "",
        instance_revision: int | None = None,
    ) -> None:
        self.run_id = run_id or new_id()
        self.layers = layer_names(layers)
        self.steps = steps
        self.variant = variant
        self.settings = settings_model(variant)(**(settings or {})).model_dump(mode="json")
        self.label = label
        self.instance_revision = instance_revision
        self.at = time.time() if at is None else at
        self._seq = itertools.count()

    def _next(self) -> dict[str, Any]:
        seq = next(self._seq)
        return {"run_id": self.run_id, "seq": seq, "at": self.at + 0.25 * seq}

    def started(self) -> RunStarted:
        """The beginning."""
        sigmas = [1.0 - index / self.steps for index in range(self.steps + 1)]
        return RunStarted(
            **self._next(),
            variant=self.variant,
            settings=self.settings,
            instance_revision=self.instance_revision,
            label=self.label,
            sampling=SamplingInfo(
                sampler="euler", sigmas=sigmas, seed=7, latent_shape=[1, 16, 64, 64]
            ),
            model=ModelInfo(name="Flux", parameters=12_000_000, layers=self.layers),
        )

    def columns(self, step: int, **metrics: Any) -> LayerColumns:
        """What the layers did in a step; metrics given replace the made-up ones."""
        count = len(self.layers)
        made = {
            name: [_value(name, step, index) for index in range(count)] for name in METRIC_NAMES
        }
        return LayerColumns(
            layer=self.layers,
            path=[self.variant] * count,
            calls=[2] * count,
            calls_variant=[1] * count,
            calls_gated=[0] * count,
            calls_fallback=[1] * count,
            tokens_q=[1024 + 256] * count,
            tokens_k=[1024 + 256] * count,
            metrics={**made, **metrics},
        )

    def step(
        self, step: int, *, revision: int = 0, reasons: bool = True, **metrics: Any
    ) -> StepClosed:
        """A closed step."""
        why = [
            ReasonCount(
                layer=layer, kind="fallback", reason="denominator", count=1, detail="2.1 % bad"
            )
            for layer in self.layers
        ]
        return StepClosed(
            **self._next(),
            step=step,
            sigma=1.0 - step / self.steps,
            model_calls=1,
            duration_ms=120.5 + step,
            revision=revision,
            layers=self.columns(step, **metrics),
            reasons=why if reasons else [],
        )

    def image(self, kind: str = "preview", step: int | None = 0, **fields: Any) -> ImageTaken:
        """A preview or the finished image."""
        values: dict[str, Any] = {
            "image_kind": kind,
            "step": step,
            "media_type": "image/png",
            "width": 4,
            "height": 4,
            "data": base64.b64encode(png(shade=step or 0)),
        }
        return ImageTaken(**self._next(), **{**values, **fields})

    def tuned(self, step: int, revision: int = 0, **settings: Any) -> SettingsTuned:
        """The variant has found settings for itself."""
        return SettingsTuned(
            **self._next(),
            step=step,
            revision=revision,
            settings={**self.settings, **settings},
            score_before=0.5,
            score_after=0.25,
            detail="mean NMSE 0.5 → 0.25",
        )

    def report(self, revision_id: int, state: str, step: int | None = None) -> RevisionReported:
        """What became of a revision."""
        reason = "no" if state == "rejected" else ""
        return RevisionReported(
            **self._next(), revision_id=revision_id, state=state, step=step, reason=reason
        )

    def updates(
        self,
        numbers: Sequence[int],
        *,
        layers: Sequence[str] | None = None,
        step: int = 0,
        limit: int | None = 1_000_000,
        **metrics: Any,
    ) -> StudentsUpdated:
        """Updates of these numbers of each layer; metrics given replace the made-up ones."""
        chosen = list(layers or self.layers)
        cells = [(number, layer) for number in numbers for layer in chosen]
        head = self._next()
        made = {
            name: [training_value(name, number, chosen.index(layer)) for number, layer in cells]
            for name in TRAINING_METRIC_NAMES
        }
        return StudentsUpdated(
            **head,
            updates=UpdateColumns(
                layer=[layer for _, layer in cells],
                update=[number for number, _ in cells],
                step=[step] * len(cells),
                at=[head["at"]] * len(cells),
                metrics={**made, **metrics},
            ),
            replay_limit_bytes=limit,
        )

    def happened(
        self, event: str, layer: str | None = None, update: int | None = None, **fields: Any
    ) -> StudentHappened:
        """Something else that happened to students."""
        return StudentHappened(
            **self._next(), event=event, layer=layer, update=update, **{"step": 0, **fields}
        )

    def lost(self, count: int) -> EventsLost:
        """Events that the plugin dropped."""
        return EventsLost(**self._next(), count=count, reason="spool full")

    def ended(self, status: str = "completed", error: str = "") -> RunEnded:
        """The end."""
        return RunEnded(**self._next(), status=status, error=error, duration_ms=4321.0)

    def whole(self) -> list[Any]:
        """A run from its beginning to its end, with previews and a finished image."""
        events: list[Any] = [self.started()]
        for step in range(self.steps):
            events.append(self.step(step))
            events.append(self.image("preview", step))
        events.append(self.ended())
        events.append(self.image("final", None))
        return events


def _value(name: str, step: int, layer: int) -> float:
    if name == "nmse":
        return 10.0 ** (-1 - (step + layer) % 5)
    if name == "cosine":
        return 1.0 - 0.01 * (layer + 1)
    if name == "denom_min":
        return 0.5 + 0.01 * layer
    return float(step) + 0.125 * layer


READY_BELOW = 0.02


def training_value(name: str, update: int, layer: int) -> float | None:
    """A metric of an update as training goes: errors fall, held-out ones come every tenth."""
    error = 0.5 * (1.0 + 0.1 * (layer % 5)) / (1.0 + 0.05 * update) + 0.002
    noise = 1.0 + 0.2 * math.sin(12.9898 * update + 78.233 * layer)
    heldout = update % 10 == 0
    values = {
        "loss": error * noise,
        "loss_ema": error,
        "nmse": error * noise if heldout else None,
        "nmse_ema": error if heldout else None,
        "cosine": 1.0 - error / 2 if heldout else None,
        "gradient_norm": 10.0 * error * noise,
        "ready": float(error <= READY_BELOW),
        "seconds": 0.01,
        "held_bytes": 1000.0 * min(update, 100),
        "replay_bytes": 1000.0 * min(update, 100) * 6,
    }
    return values.get(name)


def batch(of: InstanceInfo, *events: Any) -> Batch:
    """A request of a plugin."""
    return Batch(instance=of, events=list(events))


def batch_json(of: InstanceInfo, *events: Any) -> bytes:
    """A request of a plugin as it goes over the wire."""
    return batch(of, *events).model_dump_json().encode()
