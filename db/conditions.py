"""The conditions of a run: what must be equal for two pictures to be comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FIELDS: tuple[str, ...] = (
    "model",
    "seed",
    "sigmas",
    "sampler",
    "cfg",
    "denoise",
    "latent_shape",
)
"""Names of the conditions that every run has, in the order in which they are told."""

RECIPE = "recipe"
"""The further condition, which only a run out of a workflow has: see ``wire.SamplingInfo``."""


def of_run(sampling: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """A run's conditions by name, floats to six significant digits.

    Args:
        sampling: a stored ``wire.SamplingInfo``.
        model: a stored ``wire.ModelInfo``.
    """
    described = (str(model.get("name") or ""), model.get("parameters"), model.get("layers") or [])
    return {
        "model": list(described),
        **{name: _rounded(sampling.get(name)) for name in FIELDS if name != "model"},
    }


def digest(sampling: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """SHA-256 of a run's conditions, 64 hex digits; the recipe is not among them."""
    text = json.dumps(of_run(sampling, model), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the conditions, as `of_run` gives them, in which two runs differ."""
    return [name for name in FIELDS if one[name] != other[name]]


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    # Schedules of two devices differ in their last bits, and 1 and 1.0 are one number.
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if isinstance(value, int) else value
