"""Flux2TTR as a variant: students learn from the model's own attention, and serve where ready."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar, cast

import torch

from .. import gates
from ..distillation import Occurrence, StudentEvent
from ..out_of_memory import is_out_of_memory
from ..reasons import Fallback, Gate
from ..reservation import Reservation
from ..settings import TtrSettings, VariantSettings
from ..taylor.deferred import WorstByLayer
from ..token_layout import TokenLayout
from ..variant import Call, ModelPrint, Result, RunInfo, Variant
from .build import STUDENTS
from .checkpoint import CheckpointError
from .checkpoint_path import checkpoint_path
from .pool import POOL
from .runtime import Layer, Runtime
from .student import StudentOptions
from .teaching import LEAST_CHUNK, Observed, Teaching, rule_of

NO_CHECKPOINT = "no checkpoint is named, so there are no students; name one, and set mode to serve"


def options_of(settings: TtrSettings, heads: int = 0, head_dim: int = 0) -> StudentOptions:
    """What students are built by; what their kind doesn't use is 0."""
    return StudentOptions(
        settings.student,
        heads,
        head_dim,
        settings.features,
        settings.window_radius if settings.student == "residual" else 0,
        settings.landmarks if settings.student == "kernel" else 0,
    )


class TtrVariant(Variant):
    """Attention by students, one a layer, that the model's own attention has taught."""

    name: ClassVar[str] = "ttr"
    title: ClassVar[str] = "Flux2TTR"
    settings_model: ClassVar[type[VariantSettings]] = TtrSettings
    tells_log_mass: ClassVar[bool] = True
    learns: ClassVar[bool] = True

    def __init__(self) -> None:
        # Several threads run the model at once where several GPUs do.
        self._lock = threading.RLock()
        self._run = RunInfo(sigmas=())
        self._reservation = Reservation(None)
        self._runtime: Runtime | None = None
        self._teaching: Teaching | None = None
        self._settings: TtrSettings | None = None
        self._broken = NO_CHECKPOINT
        self._serving_chunks: dict[str, int] = {}
        self._not_served: set[str] = set()
        self._not_finite = WorstByLayer()
        self._saves_asked = 0

    def prepare(self, run: RunInfo) -> None:
        self._run = run
        self._reservation = Reservation(run.reserve)
        if run.settings is not None:
            self._begin(cast(TtrSettings, run.settings))

    def gate(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        settings = cast(TtrSettings, call.settings)
        gate = self._closed(query, key, call)
        if gate is not None:
            return gate
        layer, refusal = self._student(query, key, call)
        if refusal is not None:
            return None
        if settings.mode == "distill":
            shown = settings.training_preview and layer is not None and layer.updates > 0
            return None if shown else Gate.DISTILLING
        return None if layer is not None and layer.ready else Gate.NOT_READY

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> Result:
        stats: dict[str, torch.Tensor | float] = {"head_dim": float(query.shape[3])}
        layer, refusal = self._student(query, key, call)
        if refusal is None and value.shape != key.shape:
            refusal = Fallback.LAYOUT, f"value is {tuple(value.shape)}, key {tuple(key.shape)}"
        if refusal is not None or layer is None:
            reason, detail = refusal or (Fallback.CHECKPOINT, "the layer has no student")
            return Result(None, reason, detail, stats)
        if layer.name in self._not_served:
            detail = "the student did not fit at its smallest chunk, earlier in this run"
            return Result(None, Fallback.OUT_OF_MEMORY, detail, stats)
        if self._not_finite.worst(layer.name, call.step):
            detail = "the student's output held NaN or infinity at an earlier step"
            return Result(None, Fallback.NON_FINITE, detail, stats)
        with self._lock:
            return self._serve(layer, query, key, value, call, stats)

    def wants(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> bool:
        settings, teaching = cast(TtrSettings, call.settings), self._teaching
        if teaching is None or teaching.off or settings.training_paused:
            return False
        if settings.mode != "distill" or self._closed(query, key, call) is not None:
            return False
        layer, refusal = self._student(query, key, call)
        return refusal is None and layer is not None and teaching.left(layer, settings) > 0

    def observe(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        call: Call,
    ) -> None:
        layer, teaching = self._student(query, key, call)[0], self._teaching
        if layer is None or teaching is None or not query.shape == value.shape == out.shape:
            return
        observed = Observed(query, key, value, out, call.scale, call.layout, call.step)
        with self._lock:
            teaching.teach(layer, observed, cast(TtrSettings, call.settings))

    def retune(self, settings: VariantSettings) -> None:
        """Between two steps: reads what was measured, decides who is ready, saves on demand."""
        own = self._settings = cast(TtrSettings, settings)
        runtime, teaching = self._runtime, self._teaching
        if runtime is None or teaching is None:
            return
        with self._lock:
            if teaching.due:
                self._settle(teaching, own)
            for changed in runtime.judge(rule_of(own)):
                teaching.tell_readiness(changed, None, own)
            on_demand = own.checkpoint_now > self._saves_asked
            self._saves_asked = own.checkpoint_now
            if on_demand or 0 < own.checkpoint_every <= runtime.unsaved:
                self._settle(teaching, own)
                self._save(runtime)

    def finish(self) -> None:
        runtime, teaching, settings = self._runtime, self._teaching, self._settings
        self._runtime = self._teaching = None
        self._not_finite.clear()
        if runtime is None or teaching is None or settings is None:
            return
        try:
            self._settle(teaching, settings)
            if runtime.unsaved:
                self._save(runtime)
        finally:
            teaching.release()
            runtime.release()
            POOL.give_back(runtime)

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        settings: VariantSettings,
        layout: TokenLayout | None = None,
    ) -> float:
        own = cast(TtrSettings, settings)
        options = options_of(own, query_shape[1], query_shape[3])
        return STUDENTS[own.student].flops(query_shape, options, layout)

    def _begin(self, settings: TtrSettings) -> None:
        """Take the students of the run, from memory or from their checkpoint."""
        run, options = self._run, options_of(settings)
        model = run.model or ModelPrint("model")
        self._settings, self._saves_asked = settings, settings.checkpoint_now
        path = checkpoint_path(settings.checkpoint, run.folder, model, options)
        if path is None:
            return
        layers = frozenset(str(layer) for layer in run.layers)

        def load(runtime: Runtime) -> bool:
            return runtime.load(layers, named=bool(settings.checkpoint.strip()))

        try:
            taken = POOL.take(path, options, settings.training_seed, model, load)
        except CheckpointError as error:
            self._break(str(error))
            return
        self._broken = ""
        runtime = self._runtime = taken.runtime
        self._teaching = Teaching(runtime, settings, self._reservation, self._happened)
        runtime.judge(rule_of(settings))
        known = (
            f"{path}: {len(runtime.layers)} layers, {runtime.ready} of them ready, "
            f"{runtime.updates} updates"
        )
        if taken.recovered:
            lost = "" if taken.loaded else f"{path}: can't be found; training begins anew"
            self._happened(Occurrence(StudentEvent.RECOVERED, detail=lost or known))
        if taken.loaded:
            self._happened(Occurrence(StudentEvent.CHECKPOINT_LOADED, detail=known))
        elif settings.mode == "serve" and not runtime.layers:
            missing = f"{path}: can't be found, so there are no students; distill first"
            self._happened(Occurrence(StudentEvent.CHECKPOINT_FAILED, detail=missing))
        if taken.shared:
            self._teaching.turn_off("another run is using the same students")

    def _break(self, why: str) -> None:
        """Students can't be used in this run, and what lies on disk stays as it is."""
        self._broken = why
        self._happened(Occurrence(StudentEvent.CHECKPOINT_FAILED, detail=why))

    def _closed(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        """The rules that neither let a student serve nor have it taught."""
        settings = cast(TtrSettings, call.settings)
        if not settings.enabled:
            return Gate.DISABLED
        queries, keys = query.shape[2], key.shape[2]
        return (
            gates.tokens(queries, keys, settings.min_tokens)
            or gates.cross_attention(queries, keys, allowed=False)
            or gates.sigma(call.sigma, settings.ttr_sigma_max)
            or gates.block_type(call.layer, settings.ttr_block_type)
            or gates.layers(call.layer, settings.ttr_layer_start, settings.ttr_layer_end)
            or (Gate.LAYER_UNKNOWN if call.layer is None else None)
        )

    def _student(
        self, query: torch.Tensor, key: torch.Tensor, call: Call
    ) -> tuple[Layer | None, tuple[Fallback, str] | None]:
        """The layer's student, which distilling builds at the first call, and why it can't take
        the call."""
        if self._broken:
            return None, (Fallback.CHECKPOINT, self._broken)
        if call.mask is not None:
            return None, (Fallback.MASK, "students attend without a mask")
        runtime = self._runtime
        if runtime is None or call.layer is None:
            return None, None
        name, settings = str(call.layer), cast(TtrSettings, call.settings)
        if name not in runtime.layers and settings.mode != "distill":
            return None, None
        try:
            with self._lock:
                layer = runtime.layer(name, query.shape[1], query.shape[3], query.device)
        except CheckpointError as error:
            self._break(str(error))
            if self._teaching is not None:
                self._teaching.turn_off(str(error), call.step)
            return None, (Fallback.CHECKPOINT, str(error))
        return layer, layer.student.refuses(query.shape, key.shape, call.layout)

    def _serve(
        self,
        layer: Layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        stats: dict[str, torch.Tensor | float],
    ) -> Result:
        settings = cast(TtrSettings, call.settings)
        while True:
            chunk = self._serving_chunks.get(layer.name, settings.serve_chunk)
            try:
                self._make_room(layer, query, call, chunk)
                with torch.no_grad():
                    served = layer.student.serve(
                        query, key, value, call.scale, call.layout, chunk, call.log_mass_rows
                    )
                    wrong = served.out.isfinite().all().logical_not().float()
                self._not_finite.post(layer.name, call.step, wrong)
                return Result(served.out, stats=stats, log_mass=served.log_mass)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                what = f"{type(error).__name__}: {error}"
            # Outside the handler: the error's frames hold what is to be freed.
            if query.device.type == "cuda":
                torch.cuda.empty_cache()
            smaller = max(LEAST_CHUNK, chunk // 2)
            fits = smaller < chunk
            detail = f"serving chunk {chunk} → {smaller}" if fits else "exact attention serves"
            self._happened(
                Occurrence(
                    StudentEvent.OUT_OF_MEMORY, layer.name, layer.updates, call.step,
                    f"{detail}: {what}",
                )
            )  # fmt: skip
            if not fits:
                self._not_served.add(layer.name)
                return Result(None, Fallback.OUT_OF_MEMORY, what, stats)
            self._serving_chunks[layer.name] = smaller

    def _make_room(self, layer: Layer, query: torch.Tensor, call: Call, chunk: int) -> None:
        settings = cast(TtrSettings, call.settings)
        if not settings.memory_reserve:
            return
        shape = tuple(query.shape)
        kind = ("serving", layer.student.kind, shape, query.dtype, call.layout, chunk)
        self._reservation.ask(
            kind,
            lambda: (
                settings.memory_reserve_factor
                * layer.student.serving_bytes(shape, query.dtype, call.layout, chunk)
            ),
            query.device,
        )

    def _settle(self, teaching: Teaching, settings: TtrSettings) -> None:
        updates = teaching.settle(settings)
        if updates and self._run.listener is not None:
            self._run.listener.updated(updates, teaching.replay.limit_bytes)

    def _save(self, runtime: Runtime) -> None:
        try:
            updates = runtime.updates
            detail = f"{runtime.save()}: {len(runtime.layers)} layers, {updates} updates"
            event = StudentEvent.CHECKPOINT_SAVED
        except CheckpointError as error:
            detail, event = str(error), StudentEvent.CHECKPOINT_FAILED
        self._happened(Occurrence(event, detail=detail))

    def _happened(self, occurrence: Occurrence) -> None:
        if self._run.listener is not None:
            self._run.listener.happened(occurrence)
