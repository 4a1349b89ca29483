"""Runs from ``hybrid-attention-results.jsonl``: a line is what one run came to.

The plugin appends such lines, and so did an older ComfyUI node pack that the hybrid goes back to.
A line has ``timestamp``, ``quality``, ``config`` and ``meta``. Names that are unknown here are
passed over, values of the wrong type are errors. A run is stored once, however often its line is
imported: where the line names the run, by that name, else by the line itself.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..attention.settings import HybridSettings
from ..wire import (
    AnyEvent,
    InstanceInfo,
    LayerColumns,
    ModelInfo,
    RunEnded,
    RunId,
    RunStarted,
    SamplingInfo,
    StepClosed,
)

VARIANT = "hybrid"
LAYER = "unknown.0"
"""A line is about the whole model."""

_NAMESPACE = uuid.UUID("6d2a5a0e-2f3b-4a53-9a3f-5a2f3f0c9d11")

Value = Annotated[float, Field(strict=True)]
Whole = Annotated[int, Field(strict=True, ge=0)]


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Quality(_Lenient):
    """How near the run came to exact attention. The older pack has the first six alone."""

    mean_abs: Value | None = None
    max_abs: Value | None = None
    mean_rel: Value | None = None
    max_rel: Value | None = None
    samples: Whole | None = None
    calls: Whole | None = None
    calls_hybrid: Whole | None = None
    nmse_mean: float | None = None
    nmse_max: float | None = None
    cosine_mean: float | None = None
    log_mass_bias: float | None = None
    attn_ms: float | None = None


class Meta(_Lenient):
    """What was sampled, and with what."""

    run_start_ts: Value | None = None
    duration_ms: Value | None = None
    model: str | None = None
    model_class: str | None = None
    sampler: str | None = None
    seed: int | None = None
    cfg: Value | None = None
    sigmas: list[Value] | None = None
    sigma: float | None = None
    q_len: Whole | None = None
    k_len: Whole | None = None
    head_dim: Whole | None = None
    latent_shape: list[Whole] | None = None


class Result(_Lenient):
    """A line."""

    timestamp: Value
    run_id: RunId | None = None
    status: str = "completed"
    quality: Quality
    config: dict[str, Any]
    meta: Meta = Meta()


class BadLine(ValueError):
    """A line that is none of ours; the message says what is wrong with it."""


def is_result(text: bytes) -> bool:
    """Whether a file that begins with this line is one of results."""
    try:
        first = json.loads(text)
    except ValueError:
        return False
    return isinstance(first, dict) and "kind" not in first and {"quality", "config"} <= set(first)


def read_line(text: bytes) -> tuple[Result, HybridSettings]:
    """A line and its settings.

    Raises:
        BadLine: naming the field.
    """
    try:
        result = Result.model_validate_json(text)
        known = {name: v for name, v in result.config.items() if name in _NAMES}
        # The older pack had one form, and no setting for it.
        known.setdefault("combine", "additive")
        return result, HybridSettings.model_validate(known, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "line"
        if error.title == HybridSettings.__name__:
            place = f"config.{place}"
        raise BadLine(f"{place}: {first['msg']}") from None


_NAMES = frozenset(HybridSettings.model_fields)


def events_of(text: bytes) -> tuple[InstanceInfo, list[AnyEvent]]:
    """A line as the events of a run.

    Raises:
        BadLine: naming the field.
    """
    result, settings = read_line(text)
    meta, quality = result.meta, result.quality
    run_id = result.run_id or uuid.uuid5(_NAMESPACE, text.strip().decode()).hex
    began = meta.run_start_ts or result.timestamp
    sigma = 0.0 if meta.sigma is None else meta.sigma
    # The schedule isn't told by the older pack: then there is the sigma of the last call alone.
    sigmas = meta.sigmas or [sigma, 0.0]
    started = RunStarted(
        run_id=run_id,
        seq=0,
        at=began,
        variant=VARIANT,
        settings=settings.model_dump(mode="json"),
        label=_label(quality),
        sampling=SamplingInfo(
            sampler=meta.sampler,
            sigmas=sigmas,
            seed=meta.seed,
            cfg=meta.cfg,
            latent_shape=(meta.latent_shape or [])[:8],
        ),
        model=ModelInfo(name=(meta.model or meta.model_class or "")[:200], layers=[LAYER]),
    )
    duration = meta.duration_ms
    if duration is None:
        duration = max(0.0, result.timestamp - began) * 1e3
    ended = RunEnded(
        run_id=run_id,
        seq=2,
        at=result.timestamp,
        status=_status(result.status),
        duration_ms=duration,
    )
    step = _step(run_id, result, sigma, duration, max(0, len(sigmas) - 2))
    instance = InstanceInfo(
        instance_id=uuid.uuid5(_NAMESPACE, "instance").hex,
        name="hybrid-attention-results.jsonl",
        started_at=began,
    )
    return instance, [started, step, ended]


def _step(run_id: str, result: Result, sigma: float, duration: float, last: int) -> StepClosed:
    """The run's figures as those of its last step: lines say nothing of single steps."""
    quality, meta = result.quality, result.meta
    calls = quality.calls or 0
    made = calls if quality.calls_hybrid is None else quality.calls_hybrid
    metrics: dict[str, list[float | None]] = {
        name: [value]
        for name, value in (
            ("nmse", quality.nmse_mean),
            ("nmse_eff", quality.nmse_mean),
            ("cosine", quality.cosine_mean),
            ("cosine_eff", quality.cosine_mean),
            ("log_mass_bias", quality.log_mass_bias),
            ("attn_ms", quality.attn_ms),
            ("head_dim", meta.head_dim),
        )
        if value is not None
    }
    columns = LayerColumns(
        layer=[LAYER],
        path=[VARIANT if made == calls else "mixed"],
        calls=[calls],
        calls_variant=[made],
        calls_gated=[0],
        calls_fallback=[0],
        tokens_q=[meta.q_len or 0],
        tokens_k=[meta.k_len or 0],
        metrics=metrics,
    )
    return StepClosed(
        run_id=run_id,
        seq=1,
        at=result.timestamp,
        step=last,
        sigma=sigma,
        model_calls=0,
        duration_ms=duration,
        revision=0,
        layers=columns,
    )


def _status(text: str) -> Any:
    return text if text in ("completed", "interrupted", "failed") else "completed"


def _label(quality: Quality) -> str:
    """What no metric here stands for is kept in words."""
    parts = [
        f"{name} {value:.4g}"
        for name in ("mean_abs", "max_abs", "mean_rel", "max_rel", "nmse_mean", "nmse_max")
        if (value := getattr(quality, name)) is not None and math.isfinite(value)
    ]
    return "; ".join(["imported result", *parts])[:200]


def lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, empty ones passed over."""
    for number, text in enumerate(file, start=1):
        if text.strip():
            yield number, text
