"""Layers and steps by text."""

from __future__ import annotations

import pytest

from attnscope.attention.selection import Layers, Steps

BLOCKS = [("double", 0), ("double", 1), ("single", 0), ("single", 7), ("single", 12)]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("", []),
        ("all", BLOCKS),
        ("single", BLOCKS[2:]),
        ("single.7", [("single", 7)]),
        (" double.0 , single.1-12", [("double", 0), ("single", 7), ("single", 12)]),
        ("double,single.12", [*BLOCKS[:2], ("single", 12)]),
    ],
)
def test_layers(text: str, chosen: list[tuple[str, int]]) -> None:
    layers = Layers.parse(text)
    assert [block for block in BLOCKS if layers.has(*block)] == chosen
    assert bool(layers) == bool(chosen)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [("all", [*range(8)]), ("0", [0]), ("0, 2,5-6", [0, 2, 5, 6]), ("3-3", [3])],
)
def test_steps(text: str, chosen: list[int]) -> None:
    steps = Steps.parse(text)
    assert [step for step in range(8) if steps.has(step)] == chosen


@pytest.mark.parametrize(
    "text", ["single.", "3", "single.5-2", "single.-1", "a b", ",", "all.3.1"]
)
def test_what_is_no_layer_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no layer|ends before"):
        Layers.parse(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "5-2", "1.5", "1,,2"])
def test_what_is_no_step_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no step|ends before|no step"):
        Steps.parse(text)
