"""Settings of the error-budget router."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from . import candidates as candidate_texts
from .base import Group, Measured, setting

_TABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")


class RouterSettings(Measured):
    """Error-budget router: per layer and step the cheapest variant whose error fits a budget."""

    enabled: bool = setting(True, Group.GATE, "Off runs exact attention everywhere.")

    quality_speed: float = setting(
        0.5,
        Group.BUDGET,
        "0 is exact attention everywhere, 1 the fastest. In between it sets both budgets: a layer "
        "may err by 0.1·quality_speed³ (NMSE; 0.0125 at 0.5), and all layers of a step together "
        "by half of what that makes for all of them.",
        title="quality ↔ speed",
        ge=0.0,
        le=1.0,
        step=0.05,
    )
    budget_layer: float = setting(
        0.0,
        Group.BUDGET,
        "NMSE that a layer's predicted error may reach at a step. 0 goes by quality_speed.",
        title="budget of a layer",
        unit="NMSE",
        ge=0.0,
        le=10.0,
        step=0.001,
    )
    budget_step: float = setting(
        0.0,
        Group.BUDGET,
        "What the predicted errors of a step's layers may add up to. 0 goes by quality_speed, or "
        "by budget_layer where that is set.",
        title="budget of a step",
        unit="NMSE",
        ge=0.0,
        le=10_000.0,
        step=0.01,
    )
    head_group_limit: float = setting(
        8.0,
        Group.BUDGET,
        "No quarter of a layer's heads may have a predicted NMSE above so many times the layer's "
        "budget: heads of little weight could be ruined without it. 0 sets no limit.",
        unit="× budget",
        ge=0.0,
        le=1000.0,
        step=0.5,
        advanced=True,
    )
    cost: Literal["time", "flops"] = setting(
        "time",
        Group.BUDGET,
        "What makes a candidate cheap: its measured time, or the arithmetic that it needs. The "
        "latter is the same on every machine and is taken too where calls can't be timed.",
        title="cheapest by",
        advanced=True,
    )

    candidates: str = setting(
        "",
        Group.ROUTING,
        "Variants to choose from: tiled:window_radius=2; taylor:P=5. Empty takes the AttnScope "
        "nodes before this one on the model, or tiled and taylor as they come. A candidate's own "
        "gates hold.",
        live=False,
        max_length=4000,
    )
    table: str = setting(
        "",
        Group.ROUTING,
        "Name of the file in attnscope/router of ComfyUI's output folder that holds what was "
        "measured. Empty takes the model's name.",
        live=False,
        max_length=100,
    )
    learn: bool = setting(
        True,
        Group.ROUTING,
        "Measure candidates and remember it for later runs. Off freezes what is known: runs of "
        "one schedule then choose alike.",
    )
    min_runs: int = setting(
        4,
        Group.ROUTING,
        "Runs that have to measure a candidate in a layer and sigma range before it may be chosen "
        "there. These runs are exact there, and slower. More make the prediction closer: with "
        "few it is far above what was measured.",
        unit="runs",
        ge=2,
        le=40,
    )
    recheck_runs: int = setting(
        8,
        Group.ROUTING,
        "Later every n-th run measures a layer again, a different part of the layers each run. "
        "0 never does.",
        unit="runs",
        ge=0,
        le=10_000,
    )
    calibration_samples: int = setting(
        32,
        Group.ROUTING,
        "Queries per call on which candidates are compared with exact attention; others than "
        "those of the quality measurement, drawn anew for each step.",
        unit="queries",
        ge=4,
        le=1024,
    )

    @field_validator("candidates")
    @classmethod
    def _candidates(cls, text: str) -> str:
        try:
            candidate_texts.parse(text)
        except ValueError as error:
            raise ValueError(f"candidates: {error}") from None
        return text.strip()

    @field_validator("table")
    @classmethod
    def _table(cls, text: str) -> str:
        name = text.strip().removesuffix(".json")
        if name and not _TABLE_NAME.fullmatch(name):
            raise ValueError(
                f"table: is {text!r}; allowed: letters, digits, blanks, dots, hyphens and "
                "underscores, beginning with a letter or digit"
            )
        return name
