"""Settings of Flux2TTR: students distilled from the model's own attention while it samples."""

from __future__ import annotations

from typing import Literal

from .base import Group, Measured, setting
from .shared import reserve_factor_setting, reserve_setting


class TtrSettings(Measured):
    """Flux2TTR: small attention students, one a layer, that serve only where they are ready."""

    enabled: bool = setting(True, Group.GATE, "Off runs exact attention everywhere, untrained.")
    min_tokens: int = setting(
        0,
        Group.GATE,
        "Calls with fewer tokens run exact attention and teach nothing.",
        unit="tokens",
        ge=0,
        le=1_000_000,
        step=1,
    )
    ttr_sigma_max: float = setting(
        0.0,
        Group.GATE,
        "Serve and train only at steps whose sigma is at most this. 0 sets no limit.",
        title="sigma max",
        unit="sigma",
        ge=0.0,
        le=1000.0,
        step=0.01,
    )
    ttr_layer_start: int = setting(
        -1,
        Group.GATE,
        "First block index with a student, counted within its block type. -1 sets no limit.",
        title="layer start",
        unit="block",
        ge=-1,
        le=999,
    )
    ttr_layer_end: int = setting(
        -1,
        Group.GATE,
        "Last block index with a student, inclusive. -1 sets no limit.",
        title="layer end",
        unit="block",
        ge=-1,
        le=999,
    )
    ttr_block_type: Literal["all", "double", "single"] = setting(
        "all", Group.GATE, "Kind of block that has students.", title="block type"
    )

    mode: Literal["distill", "serve"] = setting(
        "distill",
        Group.TRAINING,
        "distill: the model's own attention makes the picture and teaches the students. serve: "
        "students that are ready stand in for it, exact attention for the others; nothing is "
        "trained.",
    )
    training_paused: bool = setting(
        False, Group.TRAINING, "Stop training for now; what has been learnt stays."
    )
    training_preview: bool = setting(
        False,
        Group.TRAINING,
        "While distilling let the trained students make the picture, ready or not, to see how far "
        "they are. Costs a pass of the student for each call, and the picture is not exact.",
    )
    training_steps: int = setting(
        512,
        Group.TRAINING,
        "Updates that each layer gets in all, over all runs; then its training is complete.",
        unit="updates",
        ge=1,
        le=10_000_000,
    )
    updates_per_call: int = setting(
        1,
        Group.TRAINING,
        "Updates of a layer at each of its calls. More train faster and slow sampling down.",
        unit="updates",
        ge=1,
        le=64,
    )
    learning_rate: float = setting(
        3e-3,
        Group.TRAINING,
        "Of AdamW, for all parameters but the landmarks' share.",
        gt=0.0,
        le=1.0,
        step=1e-4,
    )
    share_learning_rate: float = setting(
        1e-2,
        Group.TRAINING,
        "Of AdamW, for the scalars that weigh a student's parts: the far mass of the residual "
        "student, the landmarks' share of the kernel student.",
        gt=0.0,
        le=1.0,
        step=1e-3,
        advanced=True,
    )
    ready_threshold: float = setting(
        0.02,
        Group.TRAINING,
        "A layer becomes ready when the moving average of its NMSE on held-out queries is at most "
        "this.",
        gt=0.0,
        le=10.0,
        step=0.005,
    )
    ready_hysteresis: float = setting(
        1.2,
        Group.TRAINING,
        "A ready layer stays so until its average exceeds the threshold times this.",
        ge=1.0,
        le=10.0,
        step=0.05,
    )
    ready_min_updates: int = setting(
        24,
        Group.TRAINING,
        "No layer is ready before it has had so many updates.",
        unit="updates",
        ge=1,
        le=1_000_000,
    )
    ready_decay: float = setting(
        0.9,
        Group.TRAINING,
        "Of the moving averages: how much of the old value each new one leaves.",
        ge=0.0,
        lt=1.0,
        step=0.01,
        advanced=True,
    )
    progress_every: int = setting(
        10,
        Group.TRAINING,
        "Log a layer's progress, and measure it on held-out queries, at every n-th of its "
        "updates.",
        unit="updates",
        ge=1,
        le=10_000,
    )
    query_samples: int = setting(
        256,
        Group.TRAINING,
        "Queries that a call leaves for training, drawn at random; keys and values are kept "
        "whole, or the student would learn another attention.",
        unit="queries",
        live=False,
        ge=16,
        le=16_384,
        advanced=True,
    )
    batch_queries: int = setting(
        128,
        Group.TRAINING,
        "Queries of one update.",
        unit="queries",
        ge=8,
        le=16_384,
        advanced=True,
    )
    heldout_queries: int = setting(
        64,
        Group.TRAINING,
        "Queries of a call on which nothing is ever trained, for all measurements.",
        unit="queries",
        live=False,
        ge=8,
        le=4096,
        advanced=True,
    )
    replay_mb: int = setting(
        1024,
        Group.MEMORY,
        "Most memory of the host for earlier calls that training returns to, over all layers. The "
        "oldest go first.",
        title="replay memory",
        unit="MB",
        live=False,
        ge=1,
        le=1_000_000,
    )
    replay_share: float = setting(
        0.5,
        Group.TRAINING,
        "Share of updates that learn from an earlier call in place of the present one.",
        ge=0.0,
        le=1.0,
        step=0.05,
        advanced=True,
    )
    huber_beta: float = setting(
        0.05,
        Group.TRAINING,
        "Errors above this, relative to the teacher's root mean square, count linearly.",
        gt=0.0,
        le=100.0,
        step=0.01,
        advanced=True,
    )
    cosine_weight: float = setting(
        1.0,
        Group.TRAINING,
        "Of the cosine distance per token and head, beside the Huber loss.",
        ge=0.0,
        le=100.0,
        step=0.1,
        advanced=True,
    )
    far_weight: float = setting(
        0.1,
        Group.TRAINING,
        "Of the residual student's far part alone: its numerator and the log of its mass.",
        ge=0.0,
        le=100.0,
        step=0.05,
        advanced=True,
    )
    gradient_clip: float = setting(
        1.0,
        Group.TRAINING,
        "Longest gradient of an update; longer ones are shortened to it.",
        gt=0.0,
        le=1000.0,
        step=0.1,
        advanced=True,
    )
    training_seed: int = setting(
        0,
        Group.TRAINING,
        "Of the students' first weights and of the queries drawn.",
        live=False,
        ge=0,
        le=2**31 - 1,
        advanced=True,
    )

    student: Literal["residual", "kernel", "scan"] = setting(
        "residual",
        Group.APPROXIMATION,
        "residual: exact in a window and to the text, a learnt feature map for the rest, one "
        "normaliser. kernel: a positive feature map for all keys, blended with exact attention to "
        "landmarks; without an exact part its error has a floor. scan: the founding form, prefix "
        "and suffix sums over the order of tokens: it depends on that order, has no normaliser, "
        "and costs features × head_dim of memory for every token of a chunk.",
        live=False,
    )
    features: int = setting(
        128,
        Group.APPROXIMATION,
        "Features of a head. More follow sharper attention; time grows with them.",
        live=False,
        ge=8,
        le=1024,
        step=8,
    )
    window_radius: int = setting(
        1,
        Group.LOCAL,
        "Residual student: tiles of 8×8 tokens around each query's own tile that are exact, in "
        "each direction.",
        unit="tiles",
        live=False,
        ge=0,
        le=16,
    )
    landmarks: int = setting(
        128,
        Group.LOCAL,
        "Kernel student: image tokens to which attention is exact, evenly spread; all text tokens "
        "come on top.",
        unit="tokens",
        live=False,
        ge=0,
        le=16_384,
    )
    serve_chunk: int = setting(
        128,
        Group.MEMORY,
        "Scan student: tokens of a chunk in serving. Halved for a layer that runs out of memory.",
        unit="tokens",
        live=False,
        ge=1,
        le=65_536,
        advanced=True,
    )
    training_chunk: int = setting(
        64,
        Group.MEMORY,
        "Most queries of an update that are computed at a time, each with the weights of all "
        "keys. Halved for a layer that runs out of memory, and not raised again in that run.",
        unit="queries",
        live=False,
        ge=1,
        le=65_536,
        advanced=True,
    )

    checkpoint: str = setting(
        "",
        Group.CHECKPOINT,
        "File of the students, read when it is there and written when a run ends: a path, or a "
        "name within ComfyUI's output/attnscope folder; .safetensors is added. Empty: a name made "
        "of the model and the student's settings.",
        live=False,
        node_only=True,
        max_length=500,
    )
    checkpoint_every: int = setting(
        0,
        Group.CHECKPOINT,
        "Write it also after so many updates, all layers counted. 0 writes at a run's end only.",
        unit="updates",
        ge=0,
        le=100_000_000,
        advanced=True,
    )
    checkpoint_now: int = setting(
        0,
        Group.CHECKPOINT,
        "Raise this number to have the checkpoint written before the next step.",
        title="save checkpoint now",
        ge=0,
        le=2**31 - 1,
        advanced=True,
    )

    memory_reserve: bool = reserve_setting()
    memory_reserve_factor: float = reserve_factor_setting()

    comet_project: str = setting(
        "",
        Group.CHECKPOINT,
        "Project at Comet that also gets the training metrics, where the package comet_ml is "
        "installed and an API key configured. Empty sends nothing.",
        live=False,
        node_only=True,
        max_length=200,
        advanced=True,
    )
    comet_every: int = setting(
        1,
        Group.CHECKPOINT,
        "Send to Comet at every n-th update of a layer.",
        unit="updates",
        ge=1,
        le=10_000,
        advanced=True,
    )
