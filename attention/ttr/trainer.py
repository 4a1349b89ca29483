"""One layer's optimizer. An update happens whole or not at all, and waits for no device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .loss import LossOptions, loss
from .student import Rows, Student, Target

WEIGHT_DECAY = 1e-2
"""AdamW's default; of the matrices alone, a scalar that weighs parts has no small value to go
back to."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Rates:
    """How far an update goes.

    Attributes:
        learning_rate: of all parameters but those that weigh parts.
        share_learning_rate: of those.
        gradient_clip: longest gradient.
    """

    learning_rate: float
    share_learning_rate: float
    gradient_clip: float


@dataclass(frozen=True, slots=True)
class Made:
    """What an update came to; 0-dimensional tensors that stay on the device.

    Attributes:
        loss: float32, before the update.
        gradient_norm: float32, before it is clipped.
        teacher_finite: bool, whether the target was finite; if not, nothing has changed.
        finite: bool, whether target, loss and gradient were; if not, nothing has changed.
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor
    teacher_finite: torch.Tensor
    finite: torch.Tensor


@contextlib.contextmanager
def training(device: torch.device) -> Iterator[None]:
    """Where tensors are made that gradients flow through: ComfyUI runs nodes and samplers in
    inference mode, and perhaps in autocast; training is float32 and needs neither."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


class Trainer:
    """Makes updates of a student. The student's parameters are those of the optimizer."""

    def __init__(self, student: Student) -> None:
        """Call it inside `training`."""
        self._student = student
        shares = {id(parameter) for parameter in student.share_parameters()}
        self._names = [name for name, _ in student.named_parameters()]
        self._parameters: list[nn.Parameter] = list(student.parameters())
        main = [p for p in self._parameters if id(p) not in shares]
        groups = [
            {"params": main, "weight_decay": WEIGHT_DECAY},
            {"params": student.share_parameters(), "weight_decay": 0.0},
        ]
        self._groups = [group for group in groups if group["params"]]
        self._shares = shares
        self._optimizer = torch.optim.AdamW(self._groups)

    def update(
        self, rows: Rows, target: Target, rates: Rates, loss_options: LossOptions, chunk: int
    ) -> Made:
        """One step of AdamW; call it inside `training`.

        Whatever is raised, a lack of memory or an interrupt, parameters and moments are what
        they were. The same where target, loss or gradient hold NaN or infinity, which is decided
        on the device.
        """
        before = self._snapshot()
        try:
            prediction = self._student.predict(rows, chunk)
            total = loss(prediction, target, loss_options).total
            total.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(self._parameters, rates.gradient_clip)
            teacher_finite = target.out.isfinite().all() & target.log_mass.isfinite().all()
            finite = teacher_finite & total.detach().isfinite() & norm.isfinite()
            for group in self._optimizer.param_groups:
                of_shares = id(group["params"][0]) in self._shares
                group["lr"] = rates.share_learning_rate if of_shares else rates.learning_rate
            self._optimizer.step()
            self._restore(before, unless=finite)
            return Made(total.detach(), norm.detach(), teacher_finite, finite)
        except BaseException:
            self._restore(before)
            raise
        finally:
            self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """The optimizer's state by ``parameter/what``; tensors of the optimizer's own memory."""
        found = {}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            for what, tensor in self._optimizer.state.get(parameter, {}).items():
                found[f"{name}/{what}"] = tensor
        return found

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave; call it inside `training`.

        Raises:
            ValueError: names or shapes are not those of the student.
        """
        by_name = dict(zip(self._names, self._parameters, strict=True))
        loaded: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in state.items():
            name, _, what = key.rpartition("/")
            parameter = by_name.get(name)
            if parameter is None or what not in (*_MOMENTS, "step"):
                raise ValueError(f"optimizer: holds {key!r}, which the student doesn't have")
            if what != "step" and tensor.shape != parameter.shape:
                raise ValueError(
                    f"optimizer: {key!r} has shape {tuple(tensor.shape)}; allowed: "
                    f"{tuple(parameter.shape)}"
                )
            loaded.setdefault(name, {})[what] = tensor
        for name, kept in loaded.items():
            if len(kept) != len(_MOMENTS) + 1:
                raise ValueError(f"optimizer: {name!r} has only {', '.join(sorted(kept))}")
            parameter = by_name[name]
            self._optimizer.state[parameter] = {
                # AdamW counts on the host, whatever the parameters' device.
                "step": kept["step"].detach().to("cpu", torch.float32, copy=True),
                **{
                    what: kept[what].detach().to(parameter.device, torch.float32, copy=True)
                    for what in _MOMENTS
                },
            }

    def to(self, device: torch.device) -> None:
        """Take the optimizer's moments to a device; the student is moved by itself, after which
        its parameters are still the same objects."""
        for state in self._optimizer.state.values():
            for what in _MOMENTS:
                state[what] = state[what].to(device)

    def _snapshot(self) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        return [
            (
                parameter.detach().clone(),
                {w: t.clone() for w, t in self._optimizer.state.get(parameter, {}).items()},
            )
            for parameter in self._parameters
        ]

    @torch.no_grad()
    def _restore(
        self,
        before: list[tuple[torch.Tensor, dict[str, torch.Tensor]]],
        unless: torch.Tensor | None = None,
    ) -> None:
        """Parameters and moments as they were; with ``unless``, where that is false, which the
        host never asks for. The count of steps then goes on: it only weighs the moments."""
        for parameter, (value, moments) in zip(self._parameters, before, strict=True):
            state = self._optimizer.state.get(parameter)
            if unless is None:
                parameter.copy_(value)
                if moments:
                    self._optimizer.state[parameter] = moments
                else:
                    self._optimizer.state.pop(parameter, None)
                continue
            parameter.copy_(torch.where(unless, parameter, value))
            for what in _MOMENTS if state else ():
                assert state is not None
                was = moments.get(what)
                zero = torch.zeros_like(state[what])
                state[what].copy_(torch.where(unless, state[what], zero if was is None else was))
