"""Why a call ran as it did: stable machine names, shared by plugin, server and page.

A *gate* means the variant was not due for the call; a *fallback* means it was due and exact
attention ran instead; a *choice* means that a variant was picked among several. Prose for people
lies beside each name and nowhere else.
"""

from __future__ import annotations

from enum import Enum


class Gate(str, Enum):
    """A rule that kept the variant from a call."""

    DISABLED = "disabled"
    BELOW_MIN_TOKENS = "below_min_tokens"
    SIGMA_ABOVE_MAX = "sigma_above_max"
    SIGMA_UNKNOWN = "sigma_unknown"
    LAYER_OUTSIDE_RANGE = "layer_outside_range"
    LAYER_UNKNOWN = "layer_unknown"
    BLOCK_TYPE = "block_type"
    CROSS_ATTENTION = "cross_attention"
    DENSE_STEP = "dense_step"
    WINDOW_FULL = "window_full"
    DISTILLING = "distilling"
    NOT_READY = "not_ready"
    ROUTER_UNMEASURED = "router_unmeasured"
    ROUTER_OVER_BUDGET = "router_over_budget"
    ROUTER_STEP_BUDGET = "router_step_budget"
    ROUTER_NOT_FASTER = "router_not_faster"


class Fallback(str, Enum):
    """What made a variant that was due give way to exact attention."""

    DENOMINATOR = "denominator"
    DENOMINATOR_PROBE = "denominator_probe"
    DENOMINATOR_DEFERRED = "denominator_deferred"
    NON_FINITE = "non_finite"
    FEATURE_DIM = "feature_dim"
    HEAD_DIM = "head_dim"
    MASK = "mask"
    LAYOUT = "layout"
    TEXT_UNKNOWN = "text_unknown"
    PRE_ROPE = "pre_rope"
    CHECKPOINT = "checkpoint"
    UNKNOWN_ARGUMENT = "unknown_argument"
    OUT_OF_MEMORY = "out_of_memory"
    ERROR = "error"


class Choice(str, Enum):
    """What made a variant that chooses between others take the one that made the output."""

    ROUTER_CHEAPEST = "router_cheapest"


DESCRIPTIONS: dict[str, str] = {
    Gate.DISABLED.value: "The variant is switched off.",
    Gate.BELOW_MIN_TOKENS.value: "Fewer tokens than min_tokens.",
    Gate.SIGMA_ABOVE_MAX.value: "The step's sigma lies above the sigma gate.",
    Gate.SIGMA_UNKNOWN.value: "A sigma gate is set and the call does not say its sigma.",
    Gate.LAYER_OUTSIDE_RANGE.value: "The block index lies outside the layer range.",
    Gate.LAYER_UNKNOWN.value: "A layer gate is set and the call does not say its block.",
    Gate.BLOCK_TYPE.value: "The block is not of the chosen type.",
    Gate.CROSS_ATTENTION.value: (
        "Query and key lengths differ, which the variant or its settings leave to exact attention."
    ),
    Gate.DENSE_STEP.value: "The step is one of the first, which dense_first_steps keeps exact.",
    Gate.WINDOW_FULL.value: "The local window holds all tokens, which is exact attention.",
    Gate.DISTILLING.value: "The model's own attention makes the picture and teaches the student.",
    Gate.NOT_READY.value: "The layer's student is not ready, or there is none yet.",
    Gate.ROUTER_UNMEASURED.value: (
        "Too few runs have measured the router's candidates here to predict their error."
    ),
    Gate.ROUTER_OVER_BUDGET.value: (
        "Every candidate's predicted error is above the layer's budget."
    ),
    Gate.ROUTER_STEP_BUDGET.value: (
        "The step's error budget went to layers that save more for their error."
    ),
    Gate.ROUTER_NOT_FASTER.value: (
        "No candidate that stays within the layer's budget is cheaper than exact attention."
    ),
    Fallback.DENOMINATOR.value: "Too many denominators were not safely positive.",
    Fallback.DENOMINATOR_PROBE.value: (
        "Too many denominators of the early probe were not safely positive."
    ),
    Fallback.DENOMINATOR_DEFERRED.value: (
        "Too many denominators of the layer were not safely positive at an earlier step."
    ),
    Fallback.NON_FINITE.value: "The output held NaN or infinity.",
    Fallback.FEATURE_DIM.value: "The feature dimension R exceeds max_feature_dim_R.",
    Fallback.HEAD_DIM.value: (
        "The head dimension exceeds max_head_dim, or sub_head_blocks does not divide it."
    ),
    Fallback.MASK.value: "The variant can't apply this kind of mask.",
    Fallback.LAYOUT.value: "The tensors' shapes are not of a layout that the variant knows.",
    Fallback.TEXT_UNKNOWN.value: (
        "The model's inputs don't say which tokens are text, and prefix_tokens is -1."
    ),
    Fallback.PRE_ROPE.value: (
        "Query and key before rotary embedding, which the variant needs, are not to be had."
    ),
    Fallback.CHECKPOINT.value: "The students' checkpoint is not named, or can't be used.",
    Fallback.UNKNOWN_ARGUMENT.value: "The call carries an argument that the variant doesn't know.",
    Fallback.OUT_OF_MEMORY.value: "There was not enough memory for the variant.",
    Fallback.ERROR.value: "The variant raised an error.",
    Choice.ROUTER_CHEAPEST.value: (
        "It saves most of what the step can save within the error budgets."
    ),
}
