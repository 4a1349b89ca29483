"""What a run's quality came to, with its settings: in the log, and in a file of JSON lines.

The file's records have the form that `attnscope import` reads: ``timestamp``, ``quality``,
``config`` and ``meta``.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..attention.settings import HybridSettings, VariantSettings
from ..wire import ModelInfo, RunEnded, SamplingInfo, StepClosed

log = logging.getLogger("attnscope")

FILE = "hybrid-attention-results.jsonl"
"""In ComfyUI's output folder."""


def results_file() -> Path:
    """Where results are appended."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / FILE


class _Mean:
    """A weighted mean with its extremes. NaN counts as what it is."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0
        self.least = math.inf
        self.most = -math.inf

    def add(self, value: float, weight: int) -> None:
        self._sum += value * weight
        self._weight += weight
        self.least = value if math.isnan(value) else min(self.least, value)
        self.most = value if math.isnan(value) else max(self.most, value)

    @property
    def known(self) -> bool:
        return self._weight > 0

    @property
    def mean(self) -> float:
        return self._sum / self._weight


class QualityLog:
    """Gathers the steps of one run, where its settings ask for that, and writes at its end.

    It is called where events are built, on the link's thread, so the sampler waits for nothing.
    """

    def __init__(
        self,
        run_id: str,
        settings: Callable[[], VariantSettings],
        sampling: SamplingInfo,
        model: Callable[[], ModelInfo],
    ) -> None:
        """
        Args:
            run_id: of the run.
            settings: tells those in force.
            sampling: of the run.
            model: tells what is sampled.
        """
        self._run_id = run_id
        self._settings = settings
        self._sampling = sampling
        self._model = model
        self._began = time.time()
        self._nmse, self._cosine, self._bias = _Mean(), _Mean(), _Mean()
        self._calls = self._calls_variant = self._measured = 0
        self._attn_ms = 0.0
        self._steps = 0
        self._last: StepClosed | None = None

    def step(self, step: StepClosed) -> None:
        """A step is closed."""
        layers = step.layers
        self._steps += 1
        self._last = step
        self._calls += sum(layers.calls)
        self._calls_variant += sum(layers.calls_variant)
        self._attn_ms += sum(value or 0.0 for value in layers.metrics.get("attn_ms", ()))
        for name, mean in (
            ("nmse", self._nmse),
            ("cosine", self._cosine),
            ("log_mass_bias", self._bias),
        ):
            for value, calls in zip(
                layers.metrics.get(name, ()), layers.calls_variant, strict=False
            ):
                if value is not None and calls:
                    mean.add(value, calls)
                    self._measured += calls if name == "nmse" else 0

    def end(self, ended: RunEnded) -> None:
        """The run is over: log and append, if anything was measured."""
        settings = self._settings()
        if not isinstance(settings, HybridSettings) or not self._nmse.known:
            return
        record = self._record(ended, settings)
        log.info("AttnScope hybrid quality: %s", json.dumps(record["quality"]))
        log.info("AttnScope hybrid settings: %s", json.dumps(record["config"]))
        path = results_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def _record(self, ended: RunEnded, settings: HybridSettings) -> dict[str, Any]:
        quality = {
            "nmse_mean": self._nmse.mean,
            "nmse_max": self._nmse.most,
            "cosine_mean": self._cosine.mean,
            "cosine_min": self._cosine.least,
            "log_mass_bias": self._bias.mean if self._bias.known else None,
            "attn_ms": self._attn_ms,
            "calls": self._calls,
            "calls_hybrid": self._calls_variant,
            "calls_measured": self._measured,
            "samples": settings.quality_samples,
        }
        return _plain(
            {
                "timestamp": time.time(),
                "run_id": self._run_id,
                "status": ended.status,
                "quality": quality,
                "config": settings.model_dump(mode="json"),
                "meta": self._meta(ended),
            }
        )

    def _meta(self, ended: RunEnded) -> dict[str, Any]:
        sampling, model, last = self._sampling, self._model(), self._last
        assert last is not None
        dims = [value for value in last.layers.metrics.get("head_dim", ()) if value]
        meta: dict[str, Any] = {
            "run_start_ts": self._began,
            "duration_ms": ended.duration_ms,
            "model": model.name,
            "layers": model.layers,
            "sampler": sampling.sampler,
            "seed": sampling.seed,
            "cfg": sampling.cfg,
            "sigmas": sampling.sigmas,
            "sigma": last.sigma,
            "steps": self._steps,
            "revision": last.revision,
            "q_len": max(last.layers.tokens_q, default=0),
            "k_len": max(last.layers.tokens_k, default=0),
            "head_dim": int(max(dims)) if dims else None,
            "latent_shape": sampling.latent_shape,
        }
        if len(sampling.latent_shape) >= 4:
            meta["batch"] = sampling.latent_shape[0]
            meta["latent_h"], meta["latent_w"] = sampling.latent_shape[-2:]
        return meta


def _plain(value: Any) -> Any:
    """Without what JSON has no number for: spelled out, as on the wire."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
