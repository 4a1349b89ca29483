"""The nodes that put a variant, or the monitor alone, on a model."""

from __future__ import annotations

from typing import Any, ClassVar

from comfy_api.latest import io

from ...attention.settings import settings_model
from ..hooks import Plan, attach
from ..plugin import configuration
from .inputs import read_settings, settings_inputs

CATEGORY = "AttnScope"

_STACKED = " Of two AttnScope nodes on one model the later one is in force, alone."


def _schema(node_id: str, name: str, variant: str, description: str) -> io.Schema:
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category=CATEGORY,
        description=description + _STACKED,
        inputs=[
            io.Model.Input("model", tooltip="The model; the node works on a clone of it."),
            *settings_inputs(settings_model(variant)),
            io.String.Input(
                "server_url",
                default="",
                optional=True,
                tooltip="Address of the AttnScope server. Empty: ATTNSCOPE_URL, attnscope.toml "
                "in ComfyUI's user folder, or http://127.0.0.1:8420.",
            ),
            io.String.Input(
                "label", default="", optional=True, tooltip="Name of the runs in the dashboard."
            ),
        ],
        outputs=[io.Model.Output()],
    )


def _apply(variant: str, model: Any, values: dict[str, Any]) -> io.NodeOutput:
    server_url = str(values.pop("server_url", None) or "")
    label = str(values.pop("label", None) or "")
    plan = Plan(
        variant=variant,
        settings=read_settings(settings_model(variant), values),
        label=label,
        config=configuration(server_url),
    )
    return io.NodeOutput(attach(model, plan))


class TaylorNode(io.ComfyNode):
    """Taylor attention on a model, recorded and steered live."""

    VARIANT: ClassVar[str] = "taylor"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "AttnScopeTaylor",
            "Taylor Attention Backend",
            cls.VARIANT,
            "Runs the model's attention as a truncated Taylor series where its gates allow, and "
            "shows every step in the dashboard, from where the settings can be changed while it "
            "samples.",
        )

    @classmethod
    def execute(cls, model: Any, **values: Any) -> io.NodeOutput:
        return _apply(cls.VARIANT, model, values)


class TiledNode(io.ComfyNode):
    """Tiled attention on a model, recorded and steered live."""

    VARIANT: ClassVar[str] = "tiled"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "AttnScopeTiled",
            "Tiled Attention Backend",
            cls.VARIANT,
            "Runs the model's attention exactly between text and tiles of the picture that lie "
            "near each other, and to first order elsewhere, where its gates allow. Made for "
            "large pictures. Shows every step in the dashboard, from where the settings can be "
            "changed while it samples.",
        )

    @classmethod
    def execute(cls, model: Any, **values: Any) -> io.NodeOutput:
        return _apply(cls.VARIANT, model, values)


class MonitorNode(io.ComfyNode):
    """A model's own attention, watched."""

    VARIANT: ClassVar[str] = "exact"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "AttnScopeMonitor",
            "AttnScope Monitor",
            cls.VARIANT,
            "Leaves attention as it is and shows time and q·k statistics of every layer and step "
            "in the dashboard. Its runs serve as baselines.",
        )

    @classmethod
    def execute(cls, model: Any, **values: Any) -> io.NodeOutput:
        return _apply(cls.VARIANT, model, values)
