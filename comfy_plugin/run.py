"""One run: a sampler at work on a model that one of our nodes has prepared."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from ..attention.clock import Clock
from ..attention.samples import CallSample
from ..attention.settings import VariantSettings
from ..attention.variant import RunInfo, Variant
from ..wire import (
    ModelInfo,
    RevisionPushed,
    RevisionReported,
    RunEnded,
    RunStarted,
    SamplingInfo,
    SettingsTuned,
)
from .capture import Capture
from .learning import Learning
from .mailbox import refusal
from .outbox import Draft
from .recorder import CallRecord, ClosedStep, StepLog
from .report import Report
from .steps import StepTracker
from .token_layout import LayoutReader

log = logging.getLogger("attnscope")


class EventDraft:
    """An event that needs nothing but its number."""

    droppable = False
    urgent = True

    def __init__(self, run_id: str, make: Callable[[int], Any]) -> None:
        self.run_id = run_id
        self._make = make

    def ready(self) -> bool:
        return True

    def build(self, seq: int) -> Any:
        return self._make(seq)


class Run:
    """State of a run, owned by the sampler's thread but for what the mailbox hands in.

    Attributes:
        run_id: UUID, 32 hex digits.
        variant: that serves this run alone.
        settings: in force for the current step.
        revision: number of the settings' revision; 0 for those that the run began with.
        capture: writes chosen calls; None where no call is chosen.
        layouts: tells where the tokens of a call stand.
    """

    def __init__(
        self,
        *,
        variant: Variant,
        settings: VariantSettings,
        tracker: StepTracker,
        clock: Clock,
        info: RunInfo,
        put: Callable[[Draft], None] | None,
        interrupt: Callable[[Run], None],
        report: Report | None = None,
        layouts: LayoutReader | None = None,
        learning: Learning | None = None,
    ) -> None:
        """
        Args:
            variant: serves this run alone.
            settings: to begin with.
            tracker: of the schedule.
            clock: of the sampling device.
            info: for the variant to prepare with.
            put: takes drafts; None records nothing.
            interrupt: stops what ComfyUI samples, if that is this run.
            report: is told of every step and of the end, as they are built; None tells nobody.
            layouts: reads where tokens stand; None knows no layout.
            learning: of a variant that learns; None for the others.
        """
        self.run_id = uuid.uuid4().hex
        self.variant = variant
        self.settings = settings
        self.revision = 0
        self.capture: Capture | None = None
        self.layouts = LayoutReader(None) if layouts is None else layouts
        self._tracker = tracker
        self._clock = clock
        self._order = [str(layer) for layer in info.layers]
        self._places = {layer: place for place, layer in enumerate(self._order)}
        self._put = put
        self._interrupt = interrupt
        self._summary = report
        self._began = time.perf_counter()
        self._step: StepLog | None = None
        self._lock = threading.Lock()
        self._offered: tuple[RevisionPushed, VariantSettings] | None = None
        self._ended = False
        self._info = info
        self._learning = learning

    @property
    def records(self) -> bool:
        """Whether anything is recorded."""
        return self._put is not None

    @property
    def clock(self) -> Clock:
        """Of the sampling device."""
        return self._clock

    @property
    def step(self) -> int:
        """Index of the current step; 0 before the first one has begun."""
        return max(0, self._tracker.step)

    @property
    def sigma(self) -> float | None:
        """Sigma of the current step."""
        if self._tracker.step < 0:
            return self._tracker.sigmas[0] if self._tracker.sigmas else None
        return self._tracker.sigma

    def measures(self, layer: str) -> bool:
        """Whether quality is sampled in the layer's calls of the current step."""
        if self._put is None:
            return False
        # Layers that the model didn't announce come behind, as they are seen.
        place = self._places.setdefault(layer, len(self._places))
        return self.settings.measures(self.step, place)

    @property
    def needs_sigma(self) -> bool:
        """Whether `begin_evaluation` has to be told the sigma."""
        return self._tracker.needs_sigma

    def start(
        self,
        *,
        sampling: Callable[[], SamplingInfo],
        model: Callable[[], ModelInfo],
        label: str,
        instance_revision: int | None,
    ) -> None:
        """Tell that the run begins, and let the variant prepare.

        What is to be called is called on the link's thread.
        """
        run_id, at, variant = self.run_id, time.time(), self.variant.name
        settings = self.settings

        def make(seq: int) -> RunStarted:
            return RunStarted(
                run_id=run_id,
                seq=seq,
                at=at,
                variant=variant,
                settings=settings.model_dump(mode="json"),
                instance_revision=instance_revision,
                label=label[:200],
                sampling=sampling(),
                model=model(),
            )

        self._tell(EventDraft(run_id, make))
        info = self._info
        if self._learning is not None:
            info = self._learning.join(info, run_id, self._tell, lambda: self.settings)
        # Last, since it may tell of something itself.
        self.variant.prepare(info)

    def begin_evaluation(self, sigma: float | None = None) -> None:
        """The sampler is about to evaluate the model."""
        if self._tracker.evaluation(sigma):
            self._begin_step()

    def called_back(self, index: int) -> None:
        """The sampler has called back for a step."""
        if self._tracker.callback(index):
            self._begin_step()

    def model_called(self) -> None:
        """The model is called once."""
        if self._step is not None:
            self._step.model_calls += 1

    def record(self, call: CallRecord) -> None:
        """Keep what a call did."""
        if self._put is None:
            return
        if self._step is None:
            # A guider that doesn't come through PREDICT_NOISE: the first call begins the run.
            self.begin_evaluation(None)
        if self._step is not None:
            self._step.calls.append(call)

    def measure(self, call: CallRecord, sample: CallSample) -> None:
        """Keep a recorded call's sample until the step closes, when its statistics are made."""
        if self._step is not None:
            self._step.samples.add(sample, call.stats)

    def end(self, status: str, error: str = "") -> None:
        """Tell that the sampler has returned or raised."""
        with self._lock:
            self._ended = True
            self._offered = None
        if status == "completed" or self._tracker.called_back:
            self._close_step()
        # What is left of a step that broke off says nothing about the step.
        self._step = None
        try:
            self.variant.finish()
        except Exception:
            log.exception("AttnScope: the end of a run failed for its variant")
        if self._learning is not None:
            self._learning.close()
        run_id, at = self.run_id, time.time()
        duration_ms = (time.perf_counter() - self._began) * 1e3

        summary = self._summary

        def make(seq: int) -> RunEnded:
            ended = RunEnded(
                run_id=run_id,
                seq=seq,
                at=at,
                status=status,
                error=error[:2000],
                duration_ms=duration_ms,
            )
            if summary is not None:
                summary.end(ended)
            return ended

        self._tell(EventDraft(run_id, make))

    def offer(self, revision: RevisionPushed) -> None:
        """Take a revision for the next step; called by the mailbox."""
        self._report(revision.id, "delivered")
        try:
            checked = self._check(revision)
        except ValueError as error:
            self._report(revision.id, "rejected", reason=str(error))
            return
        with self._lock:
            if self._ended:
                return
            before, self._offered = self._offered, (revision, checked)
        if before is not None:
            self._report(before[0].id, "superseded", reason=f"by revision {revision.number}")

    def interrupt(self) -> None:
        """Stop, if this is what ComfyUI samples now; called by the mailbox."""
        self._interrupt(self)

    def _check(self, revision: RevisionPushed) -> VariantSettings:
        if revision.variant != self.variant.name:
            raise ValueError(
                f"variant: is {revision.variant!r}; allowed: {self.variant.name!r}, which runs"
            )
        try:
            settings = self.variant.settings_model.model_validate(revision.settings)
        except ValidationError as error:
            raise ValueError(refusal(error)) from None
        for name, (now, wanted) in settings.changed_from(self.settings).items():
            if name not in settings.live_names():
                raise ValueError(
                    f"{name}: is {wanted!r}; allowed: {now!r}, because it changes with the next "
                    "run only"
                )
        return settings

    def _begin_step(self) -> None:
        self._close_step()
        step = self._tracker.step
        if step > 0:
            with self._lock:
                offered, self._offered = self._offered, None
            if offered is not None:
                revision, self.settings = offered
                self.revision = revision.number
                self._report(revision.id, "applied", step=step)
            self._retune(step)
        if self._put is not None:
            self._step = StepLog(
                step=step,
                sigma=self._tracker.sigma,
                revision=self.revision,
                start=self._clock.mark(),
            )

    def _retune(self, step: int) -> None:
        try:
            tuning = self.variant.retune(self.settings)
        except Exception:
            log.exception("AttnScope: tuning failed; the settings stay")
            return
        if tuning is None:
            return
        self.settings = tuning.settings
        run_id, at, revision = self.run_id, time.time(), self.revision

        def make(seq: int) -> SettingsTuned:
            return SettingsTuned(
                run_id=run_id,
                seq=seq,
                at=at,
                step=step,
                revision=revision,
                settings=tuning.settings.model_dump(mode="json"),
                score_before=tuning.score_before,
                score_after=tuning.score_after,
                detail=tuning.detail[:500],
            )

        self._tell(EventDraft(run_id, make))

    def _close_step(self) -> None:
        closing, self._step = self._step, None
        if closing is None or self._put is None:
            return
        if closing.calls or closing.model_calls:
            report = self._summary.step if self._summary is not None else None
            self._tell(
                ClosedStep(
                    self.run_id, self.variant.name, closing, self._clock, self._order, report
                )
            )

    def _report(
        self, revision_id: int, state: str, *, step: int | None = None, reason: str = ""
    ) -> None:
        run_id, at = self.run_id, time.time()

        def make(seq: int) -> RevisionReported:
            return RevisionReported(
                run_id=run_id,
                seq=seq,
                at=at,
                revision_id=revision_id,
                state=state,
                step=step,
                reason=reason[:500],
            )

        self._tell(EventDraft(run_id, make))

    def _tell(self, draft: Draft) -> None:
        if self._put is not None:
            self._put(draft)
