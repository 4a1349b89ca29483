"""What a run teaches its students: which queries, which updates, and what came of them.

Nothing here waits for the device but `Teaching.settle`, which is called between steps: losses and
measurements stay where they were computed until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..distillation import Occurrence, StudentEvent, Update
from ..out_of_memory import is_out_of_memory
from ..reservation import Reservation
from ..settings import TtrSettings
from ..token_layout import TokenLayout
from .loss import LossOptions
from .pending import Pending, Stopwatch, read
from .readiness import Rule
from .replay import KeptCall, Replay
from .runtime import Layer, Runtime
from .scores import exact_weights, output_scores, weight_scores
from .student import Rows
from .teacher import log_mass
from .trainer import Rates, training

LEAST_CHUNK = 4
"""A chunk that is not halved any more: training off is better than training forever."""

WEIGHT_QUERIES = 8
"""Held-out queries whose attention weights are compared: they take N numbers each."""

MOST_PENDING = 2048
"""Updates whose numbers wait on the device."""

MOST_FAILURES = 3
"""Updates of a layer that may fail one after the other before training goes off."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A call and what the model's own attention made of it.

    Attributes:
        query: ``[B, H, N, D]``.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, D]``.
        out: ``[B, H, N, D]``.
        scale: factor on q·k.
        layout: of the tokens.
        step: of the schedule.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    scale: float
    layout: TokenLayout | None
    step: int

    def rows(self, index: torch.Tensor) -> KeptCall:
        """Some of the queries, by ``[S]`` int64 on the device, in float32 and memory of their own:
        gradients flow through no tensor of the inference mode."""
        query = _clone(self.query.index_select(2, index))
        key, value = _clone(self.key), _clone(self.value)
        out = _clone(self.out.index_select(2, index))
        mass = log_mass(query, key, self.scale)
        return KeptCall(query, index, key, value, out, mass, self.scale, self.layout)


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


@dataclass(slots=True)
class _Plan:
    """What a call is for, drawn before anything is allocated, so that a retry does the same."""

    trained: torch.Tensor
    heldout: torch.Tensor
    sources: list[KeptCall | None]
    chosen: list[torch.Tensor]
    measured: int | None
    keep: bool
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)
    done: int = 0

    @property
    def present(self) -> bool:
        return self.keep or any(source is None for source in self.sources[self.done :])


class Teaching:
    """Training in one run.

    Attributes:
        off: why training is off for the rest of the run; empty while it is on.
        replay: of all layers.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: TtrSettings,
        reservation: Reservation,
        happened: Callable[[Occurrence], None],
    ) -> None:
        """
        Args:
            runtime: that learns.
            settings: that the run begins with; those that are not live are taken from them.
            reservation: asks for room before an update of a new kind.
            happened: takes what happens.
        """
        self.off = ""
        self._runtime = runtime
        self._reservation = reservation
        self._happened = happened
        # Other draws in each run, yet the same for the same students.
        seed = settings.training_seed + 1_000_003 * (runtime.updates + 1)
        self._generator = torch.Generator().manual_seed(seed)
        self.replay = Replay(settings.replay_mb * 10**6, self._generator)
        self._query_samples = settings.query_samples
        self._heldout_queries = settings.heldout_queries
        self._seed = settings.training_seed
        self._chunk = settings.training_chunk
        self._chunks: dict[str, int] = {}
        self._waiting: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._pending: list[Pending] = []
        self._places: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def left(self, layer: Layer | None, settings: TtrSettings) -> int:
        """Updates that a layer still gets; all of them where it has no student yet."""
        if layer is None:
            return settings.training_steps
        made = layer.updates + self._waiting.get(layer.name, 0)
        return max(0, settings.training_steps - made)

    def chunk(self, layer: str) -> int:
        """Of a layer's training."""
        return self._chunks.get(layer, self._chunk)

    def teach(self, layer: Layer, call: Observed, settings: TtrSettings) -> None:
        """Make the updates of a call. What is raised, but an interrupt, ends here."""
        if self.off or self.left(layer, settings) == 0:
            return
        with training(call.query.device):
            plan = self._plan(layer, call, settings)
            while not self.off:
                try:
                    self._follow(plan, layer, call, settings)
                    self._failures.pop(layer.name, None)
                    return
                except Exception as error:
                    lacked, what = is_out_of_memory(error), f"{type(error).__name__}: {error}"
                # Outside the handler: the error's frames hold what is to be freed.
                if not lacked:
                    self._failed(layer, call.step, what)
                    return
                self._lacked(layer, call, what)

    def settle(self, settings: TtrSettings) -> list[Update]:
        """Read what waits on the device and draw the consequences; between steps.

        Args:
            settings: in force.

        Returns:
            The updates, in the order in which they were made.
        """
        pending, self._pending = self._pending, []
        self._waiting.clear()
        updates: list[Update] = []
        wrong: dict[tuple[str, StudentEvent], Pending] = {}
        for one, numbers in zip(pending, read(pending), strict=True):
            loss, norm, teacher_finite, finite = numbers[:4]
            if not finite:
                event = (
                    StudentEvent.UPDATE_FAILED
                    if teacher_finite
                    else StudentEvent.TEACHER_NOT_FINITE
                )
                wrong[one.layer.name, event] = one
                if one.source is not None:
                    self.replay.discard(one.source)
                continue
            measured = dict(zip(one.measured, numbers[4:], strict=True))
            updates.append(self._account(one, loss, norm, measured, settings))
        for (name, event), one in wrong.items():
            failed = event is StudentEvent.UPDATE_FAILED
            detail = f"{name}: the loss or its gradient was not finite" if failed else name
            self._tell(event, one.layer, one.step, detail)
        for update in updates:
            layer = self._runtime.layers[update.layer]
            if update.update == settings.training_steps:
                self._tell(StudentEvent.COMPLETE, layer, update.step, f"{update.update} updates")
        return updates

    @property
    def due(self) -> bool:
        """Whether something waits that is worth waiting for the device: a measurement, or much.

        On the CPU nothing has to be waited for.
        """
        pending = self._pending
        return bool(pending) and (
            len(pending) >= MOST_PENDING
            or pending[-1].layer.device.type == "cpu"
            or any(one.measured for one in pending)
        )

    def turn_off(self, why: str, step: int | None = None, layer: Layer | None = None) -> None:
        """No more training in this run."""
        if not self.off:
            self.off = why
            self.replay.clear()
            self._tell(StudentEvent.TRAINING_OFF, layer, step, why)

    def release(self) -> None:
        """Hold no tensors any more."""
        self._pending.clear()
        self._waiting.clear()
        self._places.clear()
        self.replay.clear()

    def _plan(self, layer: Layer, call: Observed, settings: TtrSettings) -> _Plan:
        count = min(settings.updates_per_call, self.left(layer, settings))
        made = layer.updates + self._waiting.get(layer.name, 0)
        measured = None
        for place in range(count):
            number = made + place + 1
            if number % settings.progress_every == 0 or number == settings.training_steps:
                measured = place
        sources: list[KeptCall | None] = []
        for place in range(count):
            coin = float(torch.rand((), generator=self._generator))
            again = coin < settings.replay_share and (place > 0 or layer.started)
            sources.append(self.replay.draw(layer.name) if again else None)
        trained, heldout = self._split(call)
        # Each kept call has as many queries as this one, or all that it had.
        chosen = [
            _some(
                len(trained) if source is None else len(source.index),
                settings.batch_queries,
                self._generator,
            )
            for source in sources
        ]
        size = _kept_bytes(call, min(self._query_samples, len(trained)))
        keep = settings.replay_share > 0.0 and self.replay.admits(layer.name, size)
        return _Plan(trained, heldout, sources, chosen, measured, keep)

    def _follow(self, plan: _Plan, layer: Layer, call: Observed, settings: TtrSettings) -> None:
        self._make_room(layer, call, settings)
        if plan.measured is not None and not plan.numbers:
            # Before this call's updates: no student has ever seen its keys and values.
            plan.numbers = self._measure(layer, call, plan.heldout)
        kept: KeptCall | None = None
        if plan.present or not layer.started:
            kept = call.rows(plan.trained)
        if not layer.started:
            assert kept is not None
            everything = torch.arange(len(plan.trained))
            with torch.no_grad():
                layer.student.start(kept.lesson(everything, layer.device)[0])
            layer.started = True
        while plan.done < len(plan.sources):
            source = plan.sources[plan.done]
            lesson = kept if source is None else source
            assert lesson is not None
            self._update(plan, layer, lesson, source, call, settings)
            plan.done += 1
        if plan.keep and kept is not None:
            plan.keep = False
            self._keep(layer, kept, len(plan.sources))

    def _update(
        self, plan: _Plan, layer: Layer, lesson: KeptCall, source: KeptCall | None,
        call: Observed, settings: TtrSettings,
    ) -> None:  # fmt: skip
        stopwatch = Stopwatch(layer.device)
        rows, target = lesson.lesson(plan.chosen[plan.done], layer.device)
        made = layer.trainer.update(
            rows,
            target,
            Rates(settings.learning_rate, settings.share_learning_rate, settings.gradient_clip),
            LossOptions(settings.huber_beta, settings.cosine_weight, settings.far_weight),
            self.chunk(layer.name),
        )
        stopwatch.stop()
        self._waiting[layer.name] = self._waiting.get(layer.name, 0) + 1
        self._pending.append(
            Pending(
                layer=layer,
                step=call.step,
                at=time.time(),
                made=made,
                measured=plan.numbers if plan.done == plan.measured else {},
                stopwatch=stopwatch,
                held_bytes=self.replay.held_bytes(layer.name),
                replay_bytes=self.replay.total_bytes,
                source=source,
            )
        )

    @torch.no_grad()
    def _measure(
        self, layer: Layer, call: Observed, heldout: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        everything = torch.arange(len(heldout))
        rows, target = call.rows(heldout).lesson(everything, layer.device)
        prediction = layer.student.predict(rows, self.chunk(layer.name))
        found = output_scores(prediction, target)
        some = Rows(
            rows.query[:, :, :WEIGHT_QUERIES], rows.index[:WEIGHT_QUERIES], rows.key, rows.value,
            rows.scale, rows.layout,
        )  # fmt: skip
        weights = layer.student.weights(some)
        if weights is not None:
            exact = exact_weights(some.query, some.key, some.scale)
            found.update(weight_scores(weights, exact))
        return found

    def _keep(self, layer: Layer, kept: KeptCall, updates: int) -> None:
        try:
            copy = kept.to_host()
            self.replay.add(layer.name, copy)
            for one in self._pending[-updates:]:
                # So that a call that taught nothing isn't returned to.
                one.source = one.source or copy
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.replay.clear()
            self._tell(
                StudentEvent.OUT_OF_MEMORY, layer, None,
                "the host has no room for earlier calls: they are forgotten",
            )  # fmt: skip

    def _split(self, call: Observed) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries to train on, drawn anew, and those that never are: ``[S]`` and ``[M]`` int64.

        The latter are the same in every call of a length, at every step and in every run.
        """
        tokens, device = call.query.shape[2], call.query.device
        places = self._places.get((tokens, device))
        if places is None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + tokens)
            order = torch.randperm(tokens, generator=generator)
            count = min(self._heldout_queries, max(1, tokens // 4))
            heldout, rest = order[:count].sort().values, order[count:].sort().values
            places = self._places[tokens, device] = (rest.to(device), heldout.to(device))
        rest, heldout = places
        drawn = _some(len(rest), self._query_samples, self._generator)
        return rest.index_select(0, drawn.to(device, non_blocking=True)), heldout

    def _make_room(self, layer: Layer, call: Observed, settings: TtrSettings) -> None:
        if not settings.memory_reserve:
            return
        batch, heads, tokens, width = call.query.shape
        queries, chunk = min(settings.batch_queries, tokens), self.chunk(layer.name)

        def estimate() -> float:
            # Two copies of keys and values: the present call and the one that is returned to.
            copies = 4 * batch * heads * width * (4 * tokens + 4 * self._query_samples)
            logits = 4 * batch * heads * tokens * self._query_samples
            working = layer.student.training_bytes(
                (batch, heads, tokens, width), max(queries, self._heldout_queries), chunk
            )
            return settings.memory_reserve_factor * (copies + max(logits, working))

        kind = ("training", layer.student.kind, tuple(call.query.shape), queries, chunk)
        self._reservation.ask(kind, estimate, call.query.device)

    def _account(
        self, one: Pending, loss: float, norm: float, measured: dict[str, float],
        settings: TtrSettings,
    ) -> Update:  # fmt: skip
        layer, decay = one.layer, settings.ready_decay
        layer.updates += 1
        self._runtime.unsaved += 1
        layer.loss.add(loss, decay)
        metrics: dict[str, float | None] = {"loss": loss, "loss_ema": layer.loss.value}
        if measured:
            layer.nmse.add(measured["nmse"], decay)
            metrics.update(measured)
        for changed in self._runtime.judge(rule_of(settings), [layer]):
            self.tell_readiness(changed, one.step, settings)
        metrics.update(
            nmse_ema=layer.nmse.value if measured else None,
            gradient_norm=norm,
            ready=float(layer.ready),
            seconds=one.stopwatch.seconds,
            held_bytes=float(one.held_bytes),
            replay_bytes=float(one.replay_bytes),
        )
        known = {name: value for name, value in metrics.items() if value is not None}
        return Update(layer.name, layer.updates, one.step, one.at, known)

    def tell_readiness(self, layer: Layer, step: int | None, settings: TtrSettings) -> None:
        """That a layer has become ready, or is so no longer."""
        event = StudentEvent.READY if layer.ready else StudentEvent.NOT_READY
        average = layer.nmse.value
        shown = "not measured" if average is None else f"{average:.3g}"
        self._tell(
            event, layer, step,
            f"NMSE on held-out queries {shown}, threshold {settings.ready_threshold:g}",
        )  # fmt: skip

    def _failed(self, layer: Layer, step: int, what: str) -> None:
        self._failures[layer.name] = self._failures.get(layer.name, 0) + 1
        self._tell(StudentEvent.UPDATE_FAILED, layer, step, what)
        if self._failures[layer.name] >= MOST_FAILURES:
            self.turn_off(f"{MOST_FAILURES} updates failed: {what}", step, layer)

    def _lacked(self, layer: Layer, call: Observed, what: str) -> None:
        chunk = self.chunk(layer.name)
        if call.query.device.type == "cuda":
            torch.cuda.empty_cache()
        if chunk <= LEAST_CHUNK:
            self.turn_off(f"no memory for a chunk of {chunk}: {what}", call.step, layer)
            return
        self._chunks[layer.name] = max(LEAST_CHUNK, chunk // 2)
        self._tell(
            StudentEvent.OUT_OF_MEMORY, layer, call.step,
            f"training chunk {chunk} → {self._chunks[layer.name]}: {what}",
        )  # fmt: skip

    def _tell(
        self, event: StudentEvent, layer: Layer | None, step: int | None, detail: str
    ) -> None:
        name = None if layer is None else layer.name
        updates = None if layer is None else layer.updates
        self._happened(Occurrence(event, name, updates, step, detail))


def rule_of(settings: TtrSettings) -> Rule:
    """What makes a layer ready."""
    return Rule(settings.ready_threshold, settings.ready_hysteresis, settings.ready_min_updates)


def _some(count: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """``[S]`` int64 on the CPU: different numbers below ``count``, at random."""
    return torch.randperm(count, generator=generator)[:most]


def _kept_bytes(call: Observed, queries: int) -> int:
    batch, heads, tokens, width = call.query.shape
    return 2 * batch * heads * width * (2 * tokens + 2 * queries)
