"""Node inputs made of a settings model: each setting is defined there and nowhere else."""

from __future__ import annotations

import inspect
import typing
from typing import Any, Literal

from comfy_api.latest import io
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ...attention.settings import VariantSettings
from ..mailbox import refusal


def _limit(field: FieldInfo, name: str) -> Any:
    for rule in field.metadata:
        value = getattr(rule, name, None)
        if value is not None:
            return value
    return None


def _made(kind: Any, id: str, *, advanced: bool, **options: Any) -> Any:
    """An input, with the advanced flag in the form that this ComfyUI knows, if it knows one."""
    known = inspect.signature(kind.Input.__init__).parameters
    if advanced and "advanced" in known:
        options["advanced"] = True
    elif advanced and "extra_dict" in known:
        options["extra_dict"] = {"advanced": True}
    return kind.Input(id, **options)


def setting_input(name: str, field: FieldInfo) -> Any:
    """The input of one setting.

    Raises:
        TypeError: the setting's type has no input.
    """
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    unit = f" ({extra['unit']})" if extra.get("unit") else ""
    options: dict[str, Any] = {
        "advanced": bool(extra.get("advanced")),
        "display_name": field.title or name.replace("_", " "),
        "tooltip": f"{field.description}{unit}",
        "default": field.default,
        # A saved workflow that is older than a setting must still be accepted.
        "optional": True,
    }
    kind = field.annotation
    if typing.get_origin(kind) is Literal:
        return _made(io.Combo, name, options=list(typing.get_args(kind)), **options)
    if kind is bool:
        return _made(io.Boolean, name, **options)
    if kind is str:
        return _made(io.String, name, **options)
    if kind in (int, float):
        return _number(name, field, int if kind is int else float, options)
    raise TypeError(f"{name}: settings of type {kind} have no input")


def _number(
    name: str, field: FieldInfo, kind: type[int] | type[float], options: dict[str, Any]
) -> Any:
    """The input of a number, which must have both ends: JSON has no infinity for the page."""
    extra: Any = field.json_schema_extra or {}
    step = extra.get("step") or (1 if kind is int else 0.01)
    least, most = _limit(field, "ge"), _limit(field, "le")
    above, below = _limit(field, "gt"), _limit(field, "lt")
    # The page knows no open ends: the outermost values are a step inside.
    if least is None and above is not None:
        least = above + step
    if most is None and below is not None:
        most = below - step
    if least is None or most is None:
        raise TypeError(f"{name}: a number needs a least and a greatest value to have an input")
    limits: dict[str, Any] = {"min": kind(least), "max": kind(most), "step": kind(step)}
    if kind is int:
        return _made(io.Int, name, **limits, **options)
    return _made(io.Float, name, **limits, round=step, **options)


def settings_inputs(model: type[VariantSettings]) -> list[Any]:
    """One input per setting, in the model's order, advanced ones last."""
    fields = list(model.model_fields.items())

    def folded(item: tuple[str, FieldInfo]) -> bool:
        extra = item[1].json_schema_extra
        return bool(isinstance(extra, dict) and extra.get("advanced"))

    return [setting_input(name, field) for name, field in sorted(fields, key=folded)]


def read_settings(model: type[VariantSettings], values: dict[str, Any]) -> VariantSettings:
    """Settings of a node's values.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ValueError(refusal(error)) from None
