"""The wire: what goes out comes in equal, and bad messages are refused by place."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from attnscope import wire

RUN = "0123456789abcdef" * 2


def step(**changes: object) -> dict[str, object]:
    layers = {
        "layer": ["double.0", "single.0"],
        "path": ["taylor", "exact"],
        "calls": [1, 1],
        "calls_variant": [1, 0],
        "calls_gated": [0, 1],
        "calls_fallback": [0, 0],
        "tokens_q": [64, 64],
        "tokens_k": [64, 64],
        "metrics": {"nmse": [0.1, None]},
    }
    layers.update(changes)
    return {
        "kind": "step", "run_id": RUN, "seq": 1, "at": 1.0, "step": 0, "sigma": 1.0,
        "model_calls": 1, "duration_ms": 5.0, "revision": 0, "layers": layers,
    }  # fmt: skip


def test_nan_and_infinities_survive_the_wire() -> None:
    event = wire.StepClosed.model_validate(
        step(metrics={"nmse": [math.nan, -math.inf], "cosine": [None, math.inf]})
    )
    back = wire.StepClosed.model_validate_json(event.model_dump_json())
    values = back.layers.metrics
    assert math.isnan(values["nmse"][0]) and values["nmse"][1] == -math.inf
    assert values["cosine"] == [None, math.inf]
    assert '"NaN"' in event.model_dump_json()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"metrics": {"nmse": [0.1]}}, "metrics.nmse: has 1 items; allowed: 2"),
        ({"calls": [1]}, "layers.calls: has 1 items"),
        ({"layer": ["single.0", "single.0"]}, "names a layer twice"),
        ({"layer": ["single", "single.0"]}, "pattern"),
        ({"calls": [-1, 1]}, "greater than or equal to 0"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_bad_steps_are_refused(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        wire.StepClosed.model_validate(step(**changes))


def test_image_bytes_survive_the_wire() -> None:
    event = wire.ImageTaken(
        run_id=RUN, seq=2, at=1.0, image_kind="final", media_type="image/png", width=1, height=1,
        data=b"iVBORw0KGgo=",
    )  # fmt: skip
    assert event.data == b"\x89PNG\r\n\x1a\n"
    assert wire.ImageTaken.model_validate_json(event.model_dump_json()).data == event.data
