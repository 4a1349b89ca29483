"""What can be set and what is measured, as the page and the problems show it."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from ..attention import settings as variant_settings
from ..attention.distillation import STUDENT_EVENT_DESCRIPTIONS, TRAINING_METRICS
from ..attention.metrics import METRICS, Metric
from ..attention.reasons import DESCRIPTIONS
from .figures.schedules import SCHEDULES
from .schemas import (
    MetricInfo,
    MetricInfos,
    ScheduleInfo,
    SettingField,
    SettingGroup,
    VariantSchema,
    VariantSchemas,
)

FieldType = Literal["boolean", "integer", "number", "string"]


@cache
def variant_schemas() -> VariantSchemas:
    """All variants and their settings."""
    groups = [
        SettingGroup(name=group.value, title=title)
        for group, title in variant_settings.GROUP_TITLES.items()
    ]
    variants = [_variant(name) for name in variant_settings.SETTINGS]
    return VariantSchemas(groups=groups, variants=variants)


@cache
def metric_infos() -> MetricInfos:
    """All metrics, and prose for the reasons."""
    return MetricInfos(
        metrics=[_metric(metric) for metric in METRICS],
        reasons=dict(DESCRIPTIONS),
        training=[_metric(metric) for metric in TRAINING_METRICS],
        student_events=dict(STUDENT_EVENT_DESCRIPTIONS),
    )


def _metric(metric: Metric) -> MetricInfo:
    return MetricInfo(
        name=metric.name,
        title=metric.title,
        help=metric.help,
        unit=metric.unit,
        direction=metric.direction.value,
        log=metric.log,
        names={str(value): name for value, name in metric.names.items()},
    )


@cache
def fields(variant: str) -> dict[str, SettingField]:
    """A variant's settings by name.

    Raises:
        KeyError: the variant is unknown.
    """
    model = variant_settings.settings_model(variant)
    schema = model.model_json_schema()
    return {name: _field(name, schema["properties"][name]) for name in model.model_fields}


def allowed(field: SettingField) -> str:
    """Which values a setting takes, in words."""
    if field.choices is not None:
        return "one of " + ", ".join(field.choices)
    if field.type == "boolean":
        return "true or false"
    if field.max_length is not None:
        return f"text of at most {field.max_length} characters"
    kind = {"integer": "a whole number", "number": "a number"}.get(field.type, "text")
    low = ""
    if field.minimum is not None:
        low = f" from {field.minimum:.10g}"
    elif field.exclusive_minimum is not None:
        low = f" above {field.exclusive_minimum:.10g}"
    high = "" if field.maximum is None else f" to {field.maximum:.10g}"
    return f"{kind}{low}{high}"


def _variant(name: str) -> VariantSchema:
    model = variant_settings.settings_model(name)
    lines = (model.__doc__ or name).strip().splitlines()
    return VariantSchema(
        name=name,
        title=lines[0].split(":")[0].rstrip("."),
        help=" ".join(line.strip() for line in lines),
        fields=list(fields(name).values()),
        schedules=[
            ScheduleInfo(name=schedule.name, title=schedule.title, unit=schedule.unit)
            for schedule in SCHEDULES.get(name, ())
        ],
        json_schema=model.model_json_schema(),
    )


def _field(name: str, schema: dict[str, Any]) -> SettingField:
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    kind: FieldType = schema.get("type", "string")
    return SettingField(
        name=name,
        title=schema.get("title") or name.replace("_", " "),
        type=kind,
        default=schema.get("default"),
        group=schema["group"],
        help=schema.get("description", ""),
        unit=schema.get("unit", ""),
        live=schema.get("live", True),
        advanced=schema.get("advanced", False),
        minimum=schema.get("minimum"),
        maximum=schema.get("maximum"),
        exclusive_minimum=schema.get("exclusiveMinimum"),
        step=schema.get("step"),
        max_length=schema.get("maxLength"),
        choices=choices,
    )
