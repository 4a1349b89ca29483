"""The nodes that put a variant, or the monitor alone, on a model."""

from __future__ import annotations

from typing import Any, ClassVar

from comfy_api.latest import io

from ...attention.settings import settings_model
from ..hooks import Plan, attach
from ..plugin import configuration
from .inputs import read_settings, settings_inputs

CATEGORY = "AttnScope"

_STACKED = (
    " Of two AttnScope nodes on one model the later one is in force, alone; before a Router they "
    "are what it chooses from."
)


class _Backend(io.ComfyNode):
    """A variant on a model, recorded and steered live."""

    VARIANT: ClassVar[str]
    NODE_ID: ClassVar[str]
    TITLE: ClassVar[str]
    ABOUT: ClassVar[str]

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.NODE_ID,
            display_name=cls.TITLE,
            category=CATEGORY,
            description=cls.ABOUT + _STACKED,
            inputs=[
                io.Model.Input("model", tooltip="The model; the node works on a clone of it."),
                *settings_inputs(settings_model(cls.VARIANT)),
                io.String.Input(
                    "server_url",
                    default="",
                    optional=True,
                    tooltip="Address of the AttnScope server. Empty: ATTNSCOPE_URL, "
                    "attnscope.toml in ComfyUI's user folder, or http://127.0.0.1:8420.",
                ),
                io.String.Input(
                    "label",
                    default="",
                    optional=True,
                    tooltip="Name of the runs in the dashboard.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, **values: Any) -> io.NodeOutput:
        server_url = str(values.pop("server_url", None) or "")
        label = str(values.pop("label", None) or "")
        plan = Plan(
            variant=cls.VARIANT,
            settings=read_settings(settings_model(cls.VARIANT), values),
            label=label,
            config=configuration(server_url),
        )
        return io.NodeOutput(attach(model, plan))


class TaylorNode(_Backend):
    """Taylor attention."""

    VARIANT = "taylor"
    NODE_ID = "AttnScopeTaylor"
    TITLE = "Taylor Attention Backend"
    ABOUT = (
        "Runs the model's attention as a truncated Taylor series where its gates allow, and shows "
        "every step in the dashboard, from where the settings can be changed while it samples."
    )


class HybridNode(_Backend):
    """Hybrid attention."""

    VARIANT = "hybrid"
    NODE_ID = "AttnScopeHybrid"
    TITLE = "Hybrid Attention Backend"
    ABOUT = (
        "Runs Flux's attention exactly in a window and to the text, and approximates the rest by "
        "a low-dimensional Taylor series of query and key before rotary embedding. Window and "
        "weight can follow sigma. While the model runs, Flux's attention function is patched; it "
        "is put back when the run ends."
    )


class TiledNode(_Backend):
    """Tiled attention."""

    VARIANT = "tiled"
    NODE_ID = "AttnScopeTiled"
    TITLE = "Tiled Attention Backend"
    ABOUT = (
        "Runs the model's attention exactly between text and tiles of the picture that lie near "
        "each other, and to first order elsewhere, where its gates allow. Made for large "
        "pictures. Shows every step in the dashboard, from where the settings can be changed "
        "while it samples."
    )


class TtrNode(_Backend):
    """Students distilled from the model's own attention."""

    VARIANT = "ttr"
    NODE_ID = "AttnScopeFlux2TTR"
    TITLE = "Flux2TTR"
    ABOUT = (
        "Trains a small student for each layer's attention while the model samples: the model's "
        "own attention makes the picture and is the teacher. With mode set to serve, students "
        "that are ready stand in for it. What was learnt is kept in a checkpoint."
    )


class RouterNode(_Backend):
    """The error-budget router."""

    VARIANT = "router"
    NODE_ID = "AttnScopeRouter"
    TITLE = "Error-budget Router"
    ABOUT = (
        "Runs in each layer and step the cheapest of the AttnScope variants before it on the "
        "model (or tiled and Taylor attention) whose error stays within a budget, and exact "
        "attention where none does. The first runs measure and are exact; what they find is kept "
        "for the model. The dashboard says of every layer and step what was chosen and why."
    )


class MonitorNode(_Backend):
    """A model's own attention, watched."""

    VARIANT = "exact"
    NODE_ID = "AttnScopeMonitor"
    TITLE = "AttnScope Monitor"
    ABOUT = (
        "Leaves attention as it is and shows time and q·k statistics of every layer and step in "
        "the dashboard. Its runs serve as baselines."
    )
