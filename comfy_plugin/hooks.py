"""Our hooks in ComfyUI: one wrapper on the model, everything else for the length of a run.

A node puts a single `SamplerHook` on its clone of the model, as a SAMPLER_SAMPLE wrapper. When a
sampler runs, the hook makes a `Run` and adds to the options of that sampling alone: the attention
override, a PREDICT_NOISE wrapper, an APPLY_MODEL wrapper, and itself between the sampler and its
callback. They go when the sampler returns or raises. An override that another node has set is
found when the run begins and becomes the exact path.

Nothing of ours may disturb the sampling: whatever fails here is logged, and the sampler goes on
with what ComfyUI gave it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..attention.out_of_memory import is_out_of_memory
from ..attention.quality import sampled_indices
from ..attention.reasons import Choice, Fallback, Gate
from ..attention.registry import VARIANTS
from ..attention.samples import sample_call
from ..attention.settings import RouterSettings, VariantSettings
from ..attention.token_layout import TokenLayout
from ..attention.variant import Call, Dense, LayerId, Result, RunInfo
from .capture import capture_for
from .clocks import clock_for
from .config import Config
from .identity import find_place, model_info, sampler_function, sampling_info, with_recipe
from .images import Previews
from .layouts import OWN_ARGUMENTS, AttentionCall, Unreadable, read_call
from .learning import learning_for
from .memory import reserve_for
from .plugin import get_plugin
from .pre_rope import OPTION as PRE_ROPE
from .pre_rope import PreRope, register
from .quality_log import QualityLog
from .recorder import UNKNOWN_LAYER, CallRecord
from .report import Report, Reports, RunReport
from .router_tables import TableFile, TableReport, table_for, with_candidates
from .run import Run
from .steps import StepTracker
from .token_layout import LayoutReader

log = logging.getLogger("attnscope")

KEY = "attnscope"
"""Names our wrappers in ComfyUI's tables."""

OVERRIDE = "optimized_attention_override"

_is_compiling = torch.compiler.is_compiling


@dataclass(frozen=True)
class Plan:
    """What a node wants of the runs of its model.

    Attributes:
        variant: name of the variant.
        settings: that runs begin with, unless the server has others for them.
        label: of the runs.
        config: where to send to.
        earlier: variants, with their settings, of the nodes before on the same model, in order.
    """

    variant: str
    settings: VariantSettings
    label: str
    config: Config
    earlier: tuple[tuple[str, VariantSettings], ...] = ()


def attach(model: Any, plan: Plan) -> Any:
    """A clone of the model that runs by the plan. The later of two plans on a model is in force;
    the variants of earlier ones are what a router chooses from.

    Args:
        model: ComfyUI's MODEL; left as it is.
        plan: what to do.
    """
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    before = [
        hook.plan
        for hook in clone.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY)
        if isinstance(hook, SamplerHook)
    ]
    clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    if before:
        last = before[-1]
        plan = replace(plan, earlier=(*last.earlier, (last.variant, last.settings)))
    if isinstance(plan.settings, RouterSettings):
        plan = replace(plan, settings=with_candidates(plan.settings, plan.earlier))
        log.info("AttnScope: the router chooses from %s", plan.settings.candidates)  # type: ignore[attr-defined]
    elif before:
        log.info(
            "AttnScope: '%s' takes the place of '%s', which an earlier node set on this model",
            plan.variant, before[-1].variant,
        )  # fmt: skip
    wants_pre_rope = VARIANTS[plan.variant].needs_pre_rope(plan.settings)
    register(clone, KEY, wants_pre_rope)
    if plan.variant != "exact" or not plan.config.disabled:
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, SamplerHook(plan))
    return clone


class SamplerHook:
    """SAMPLER_SAMPLE wrapper: makes a run of every sampling."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            sampling = _Sampling(self.plan, executor, list(args), dict(kwargs))
        except Exception:
            log.exception("AttnScope: this run is neither changed nor recorded")
            return executor(*args, **kwargs)
        with sampling.installed():
            return executor(*sampling.args, **sampling.kwargs)


class _Sampling:
    """A run with its hooks in one sampling's options."""

    _POSITIONS = ("guider", "sigmas", "extra_args", "callback", "noise")

    def __init__(self, plan: Plan, executor: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs
        self._plugin = get_plugin()
        guider = self._argument("guider")
        extra_args = self._argument("extra_args")
        sampler = getattr(executor, "class_obj", None)
        noise = self._argument("noise")
        sigmas = [float(sigma) for sigma in self._argument("sigmas").detach().cpu().tolist()]
        self._options: dict[str, Any] = extra_args["model_options"].setdefault(
            "transformer_options", {}
        )
        self._guider_options: dict[str, Any] = guider.model_options.setdefault(
            "transformer_options", {}
        )
        device = noise.device
        place = self._place = find_place()
        layers, model = model_info(guider.model_patcher, place)
        self._channel = None
        if not plan.config.disabled:
            self._channel = self._plugin.channel(plan.config, device)
        settings, instance_revision = plan.settings, None
        remembered = self._channel.shelf.get(plan.variant) if self._channel else None
        if remembered is not None:
            settings, instance_revision = remembered.settings, remembered.id
            # What names files, accounts and candidates is the node's alone to say: not any page's.
            settings = settings.with_own_of(plan.settings)
        if isinstance(settings, RouterSettings) and isinstance(plan.settings, RouterSettings):
            # What there is to choose from is the workflow's, whatever was set for later runs.
            chosen_from = {"candidates": plan.settings.candidates}
            settings = settings.model_copy(update=chosen_from)
        reports = _reports(plan, len(sigmas) - 1)
        clock = clock_for(device)
        self._table: TableFile | None = None
        if isinstance(settings, RouterSettings):
            self._table = table_for(settings, model().name)
            if self._channel is not None:
                reports.append(TableReport(self._table))
        self.run = Run(
            variant=VARIANTS[plan.variant](),
            settings=settings,
            tracker=StepTracker(sigmas, sampler_function(sampler)),
            clock=clock,
            info=RunInfo(
                sigmas=sigmas,
                layers=layers,
                reserve=reserve_for(guider.model_patcher),
                settings=settings,
                clock=clock,
                tables=self._table,
            ),
            learning=learning_for(
                plan.variant, settings, guider.model_patcher, lambda: model().name
            ),
            put=self._channel.outbox.put if self._channel else None,
            interrupt=self._plugin.interrupt,
            report=Reports(reports),
            layouts=LayoutReader(_patch_size(guider.model_patcher)),
        )
        with _guarded("capture"):
            self.run.capture = capture_for(
                settings,
                self.run.run_id,
                model=lambda: model().name,
            )
        self._previews: Previews | None = None
        if self._channel is not None:
            self._previews = Previews(self.run.run_id, place.node_id, self._channel.outbox.put)
        info = sampling_info(
            sampler=sampler,
            guider=guider,
            sigmas=sigmas,
            seed=extra_args.get("seed"),
            noise=noise,
            place=place,
        )
        if getattr(settings, "log_quality_stats", False):
            run = self.run
            reports.append(QualityLog(run.run_id, lambda: run.settings, info, model))
        self._begin = lambda: self.run.start(
            sampling=lambda: with_recipe(info, place),
            model=model,
            label=plan.label,
            instance_revision=instance_revision,
        )
        self._set_argument("callback", _Callback(self.run, self._argument("callback")))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks in, and out again whatever happens; the run is told of its end."""
        status, error = "completed", ""
        undo = contextlib.ExitStack()
        with _guarded("a run's beginning"):
            self._install(undo)
        try:
            yield
        except BaseException as problem:
            status, error = _verdict(problem)
            raise
        finally:
            with _guarded("a run's end"):
                undo.close()
            with _guarded("a run's end"):
                if self.run.capture is not None:
                    self.run.capture.close()
            with _guarded("a run's end"):
                self.run.variant.close(status == "completed")
                if self._table is not None and self._channel is None:
                    # Nobody else would: events are what the link's thread lives for.
                    self._table.save()
            with _guarded("a run's end"):
                self.run.end(status, error)
            with _guarded("a run's end"):
                self._plugin.end(
                    self.run, self._channel, self._place, completed=status == "completed"
                )

    def _install(self, undo: contextlib.ExitStack) -> None:
        from comfy.patcher_extension import WrappersMP

        run = self.run
        # First, so that the run's beginning is its first event.
        self._begin()
        self._plugin.begin(run, self._channel, self._place)
        if self._previews is not None:
            undo.callback(self._previews.stop)
            with _guarded("previews"):
                self._previews.start()
        earlier = self._options.get(OVERRIDE)
        undo.callback(_put_back, self._options, OVERRIDE, earlier)
        pre_rope = PreRope() if run.variant.wants_pre_rope else None
        self._options[OVERRIDE] = AttentionHook(run, earlier, pre_rope)
        if pre_rope is not None:
            undo.callback(_put_back, self._options, PRE_ROPE, self._options.get(PRE_ROPE))
            self._options[PRE_ROPE] = pre_rope
        for options, kind, wrapper in (
            (self._guider_options, WrappersMP.PREDICT_NOISE, _Evaluation(run)),
            (self._options, WrappersMP.APPLY_MODEL, _ModelCall(run)),
        ):
            by_key = options.setdefault("wrappers", {}).setdefault(kind, {})
            undo.callback(by_key.pop, KEY, None)
            by_key[KEY] = [wrapper]

    def _argument(self, name: str) -> Any:
        index = self._POSITIONS.index(name)
        return self.args[index] if index < len(self.args) else self.kwargs[name]

    def _set_argument(self, name: str, value: Any) -> None:
        index = self._POSITIONS.index(name)
        if index < len(self.args):
            self.args[index] = value
        else:
            self.kwargs[name] = value


@contextlib.contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Our own failures end here."""
    try:
        yield
    except Exception:
        log.exception("AttnScope: %s failed; sampling goes on", what)


def _patch_size(model_patcher: Any) -> int | None:
    """Latent pixels on a token's side, where the model says it as one number."""
    inner = getattr(model_patcher, "model", None)
    size = getattr(getattr(inner, "diffusion_model", None), "patch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _reports(plan: Plan, steps: int) -> list[Report]:
    if not plan.config.log_steps:
        return []
    name = plan.label or plan.variant
    return [RunReport(max(0, steps), lambda line: log.info("AttnScope %s: %s", name, line))]


def _put_back(options: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        options.pop(key, None)
    else:
        options[key] = value


def _verdict(problem: BaseException) -> tuple[str, str]:
    """How a run ended that raised: its status and the error for people."""
    if type(problem).__name__ == "InterruptProcessingException":
        return "interrupted", ""
    if isinstance(problem, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        return "interrupted", type(problem).__name__
    return "failed", f"{type(problem).__name__}: {problem}"


class _Callback:
    """Stands between the sampler and its callback."""

    def __init__(self, run: Run, callback: Callable[..., Any] | None) -> None:
        self._run = run
        self._callback = callback

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self._run.called_back(int(args[0] if args else kwargs["step"]))
        except Exception:
            log.exception("AttnScope: a step's callback was left out")
        if self._callback is not None:
            return self._callback(*args, **kwargs)
        return None


class _Evaluation:
    """PREDICT_NOISE wrapper: one evaluation of the model by the sampler."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            sigma = None
            if self._run.needs_sigma:
                timestep = args[1] if len(args) > 1 else kwargs["timestep"]
                # Reading it waits for the device; only samplers that we don't know need it.
                sigma = float(timestep.flatten()[0])
            self._run.begin_evaluation(sigma)
        except Exception:
            log.exception("AttnScope: an evaluation was left out")
        return executor(*args, **kwargs)


class _ModelCall:
    """APPLY_MODEL wrapper: one call of the model; cond and uncond can come apart."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            self._run.model_called()
            context = args[3] if len(args) > 3 else kwargs.get("c_crossattn")
            latent = args[0] if args else kwargs.get("x")
            self._run.layouts.model_called(latent, context, kwargs.get("ref_latents"))
        except Exception:
            log.exception("AttnScope: a model call was left out")
        return executor(*args, **kwargs)


class _Attempt:
    """What our side of a call came to."""

    layer: LayerId | None = None
    name = UNKNOWN_LAYER
    measured = False
    about: Call | None = None
    call: AttentionCall | None = None
    layout: TokenLayout | None = None
    out: torch.Tensor | None = None
    result: Result | None = None
    kind = ""
    reason = ""
    detail = ""

    def __init__(self) -> None:
        self.stats: dict[str, Any] = {}

    def gate(self, gate: Gate, detail: str = "") -> None:
        self.kind, self.reason, self.detail = "gate", gate.value, detail

    def choose(self, choice: Choice, detail: str) -> None:
        self.kind, self.reason, self.detail = "choice", choice.value, detail

    def fall_back(self, reason: Fallback, detail: str = "") -> None:
        self.out = None
        self.kind, self.reason, self.detail = "fallback", reason.value, detail


class AttentionHook:
    """ComfyUI's ``optimized_attention_override`` for the length of a run."""

    def __init__(
        self,
        run: Run,
        earlier: Callable[..., Any] | None,
        pre_rope: PreRope | None = None,
    ) -> None:
        """
        Args:
            run: that the calls belong to.
            earlier: another node's override, which then is the exact path.
            pre_rope: remembers query and key before rotary embedding; None where the run's
                variant doesn't want them.
        """
        self._run = run
        self._pre_rope = pre_rope
        self._earlier = earlier
        timed = (run.records or run.variant.times_calls) and run.clock.measures_calls
        self._mark = run.clock.mark if timed else None
        self._complaints: set[str] = set()

    def __call__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            # A traced graph can hold neither our decisions nor our measurements.
            return self._exact(func, args, kwargs)
        run, mark = self._run, self._mark
        if not run.variant.attends and run.capture is None:
            return self._watch(func, args, kwargs)
        start = None if mark is None else mark()
        attempt = self._attempt(func, args, kwargs)
        out = attempt.out
        if out is None:
            returned = self._exact(func, args, kwargs)
        else:
            returned = out if attempt.call is None else self._returned(attempt, out)
            if returned is None:
                returned = self._exact(func, args, kwargs)
        afterwards = None if attempt.result is None else attempt.result.afterwards
        end = None if mark is None else mark()
        if afterwards is not None:
            try:
                afterwards(start, end)
            except Exception:
                self._complain("a call was not measured")
        if run.records:
            try:
                self._record(attempt, args, kwargs, start, end)
            except Exception:
                self._complain("a call was not recorded")
        if attempt.about is not None and run.variant.learns:
            self._teach(attempt, returned, func, args, kwargs)
        if run.capture is not None and attempt.call is not None:
            options = kwargs.get("transformer_options")
            run.capture.take(
                attempt.call, attempt.layer, run.sigma, run.step,
                layout=attempt.layout,
                text_tokens=run.layouts.text_tokens(attempt.call.query.shape[2], options),
            )  # fmt: skip
        return returned

    def _teach(
        self,
        attempt: _Attempt,
        returned: Any,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Any,
    ) -> None:
        """Let the variant learn from what the model's own attention makes of the call, if it
        wants to: what was returned, or, where the variant's output was, another pass."""
        variant, call, about = self._run.variant, attempt.call, attempt.about
        assert call is not None and about is not None
        try:
            if not variant.wants(call.query, call.key, about):
                return
            if attempt.out is not None:
                returned = self._exact(func, args, kwargs)
            out = call.read_output(returned)
            variant.observe(call.query, call.key, call.value, out, about)
        except Exception:
            self._complain("a variant could not learn from a call")

    def _watch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """A call of a variant that leaves attention alone: read only where it is measured."""
        run, mark = self._run, self._mark
        start = None if mark is None else mark()
        returned = self._exact(func, args, kwargs)
        if not run.records:
            return returned
        end = None if mark is None else mark()
        try:
            name = _layer(kwargs.get("transformer_options"))[1]
            if run.measures(name):
                self._record(self._attempt(func, args, kwargs), args, kwargs, start, end)
            else:
                queries, keys = _tokens(args, kwargs, 0), _tokens(args, kwargs, 1)
                run.record(
                    CallRecord(name, False, "", "", "", queries, keys, {}, start, end),
                )
        except Exception:
            self._complain("a call was not recorded")
        return returned

    def _exact(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if self._earlier is not None:
            return self._earlier(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _dense(self, func: Callable[..., Any], kwargs: Mapping[str, Any]) -> Dense | None:
        """The other node's attention, for what a variant attends to exactly."""
        earlier = self._earlier
        if earlier is None:
            return None
        shared = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}

        def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = earlier(
                func, query, key, value, query.shape[1],
                skip_reshape=True, skip_output_reshape=True, **shared,
            )  # fmt: skip
            if out.ndim == 3:
                # Not all overrides know `skip_output_reshape`.
                out = out.unflatten(2, (query.shape[1], -1)).transpose(1, 2)
            return out

        return dense

    def _attempt(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> _Attempt:
        attempt = _Attempt()
        run = self._run
        try:
            options = kwargs.get("transformer_options")
            attempt.layer, attempt.name = _layer(options)
            attempt.measured = run.measures(attempt.name)
            attempt.call = call = read_call(args, kwargs)
            if run.variant.attends or run.capture is not None:
                attempt.layout = run.layouts.read(call.query.shape[2], call.key.shape[2], options)
            if not run.variant.attends:
                return attempt
            attempt.about = about = Call(
                settings=run.settings,
                layer=attempt.layer,
                sigma=run.sigma,
                step=run.step,
                scale=call.scale,
                mask=call.mask,
                log_mass_rows=_sampled_rows(run, call.query) if attempt.measured else None,
                layout=attempt.layout,
                pre_rope=None if self._pre_rope is None else self._pre_rope.of(call),
                dense=self._dense(func, kwargs),
            )
            gate = run.variant.gate(call.query, call.key, about)
            if gate is not None:
                attempt.gate(gate)
                return attempt
            result = run.variant.attend(call.query, call.key, call.value, about)
            attempt.stats.update(result.stats)
            attempt.result = result
            if result.fallback is not None:
                attempt.fall_back(result.fallback, result.detail)
            elif result.gate is not None:
                attempt.gate(result.gate, result.detail)
            else:
                attempt.out = result.out
                if result.choice is not None:
                    attempt.choose(result.choice, result.detail)
        except Unreadable as unreadable:
            # A variant that leaves attention alone has nothing to fall back from.
            if run.variant.attends:
                attempt.fall_back(unreadable.reason, unreadable.detail)
        except Exception as error:
            if is_out_of_memory(error):
                attempt.fall_back(Fallback.OUT_OF_MEMORY, str(error))
            else:
                attempt.fall_back(Fallback.ERROR, f"{type(error).__name__}: {error}")
                self._complain("a variant raised an error")
        return attempt

    def _returned(self, attempt: _Attempt, out: torch.Tensor) -> torch.Tensor | None:
        try:
            assert attempt.call is not None
            return attempt.call.give_back(out)
        except Exception as error:
            attempt.fall_back(Fallback.ERROR, f"{type(error).__name__}: {error}")
            self._complain("a variant's output can't be used")
            return None

    def _record(
        self, attempt: _Attempt, args: tuple[Any, ...], kwargs: Any, start: Any, end: Any
    ) -> None:
        run, call = self._run, attempt.call
        record = CallRecord(
            layer=attempt.name,
            made_by_variant=attempt.out is not None,
            made_by=attempt.result.made_by if attempt.result is not None else "",
            kind=attempt.kind,
            reason=attempt.reason,
            detail=attempt.detail,
            tokens_q=call.query.shape[2] if call else _tokens(args, kwargs, 0),
            tokens_k=call.key.shape[2] if call else _tokens(args, kwargs, 1),
            stats=attempt.stats,
            start=start,
            end=end,
        )
        run.record(record)
        if call is not None and attempt.measured:
            settings, result = run.settings, attempt.result
            run.measure(
                record,
                sample_call(
                    call.query,
                    call.key,
                    call.value,
                    attempt.out,
                    call.scale,
                    call.mask,
                    settings.quality_samples,  # type: ignore[attr-defined]
                    settings.quality_seed,  # type: ignore[attr-defined]
                    effective=result.effective if result else None,
                    log_mass=result.log_mass if result else None,
                ),
            )

    def _complain(self, what: str) -> None:
        """Log the first of each kind with its traceback: a call comes thousands of times a run."""
        if what not in self._complaints:
            self._complaints.add(what)
            log.warning("AttnScope: %s; exact attention serves", what, exc_info=True)


_NO_LAYER = (None, UNKNOWN_LAYER)
_LAYERS: dict[tuple[str, int], tuple[LayerId, str]] = {}


def _layer(options: Any) -> tuple[LayerId | None, str]:
    """The block that calls, as Flux-family models tell it, and its name."""
    # The exact type first: a look-up of the abstract one costs more than all the rest.
    if type(options) is not dict and not isinstance(options, Mapping):
        return _NO_LAYER
    kind, index = options.get("block_type"), options.get("block_index")
    if not isinstance(kind, str) or not isinstance(index, int):
        return _NO_LAYER
    known = _LAYERS.get((kind, index))
    if known is None:
        layer = LayerId(kind, index)
        known = _LAYERS[kind, index] = layer, str(layer)
    return known


def _sampled_rows(run: Run, query: torch.Tensor) -> torch.Tensor | None:
    """The queries that the call is measured on; None where its mass can't be told."""
    if not run.variant.tells_log_mass:
        return None
    settings: Any = run.settings
    return sampled_indices(
        query.shape[2], settings.quality_samples, settings.quality_seed, query.device
    )


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int) -> int:
    """Tokens of a tensor that wasn't read: its last dimension but one in every layout."""
    try:
        tensor = args[index] if index < len(args) else kwargs[("q", "k")[index]]
        return int(tensor.shape[-2])
    except (IndexError, AttributeError, KeyError):
        return 0
