"""Which step of the schedule a model evaluation belongs to: a pure state machine.

A sampler step is not a model evaluation. heun evaluates twice a step, the second time at the
sigma with which the next step begins; dpm_2 evaluates between two sigmas; uni_pc calls back after
its evaluation rather than within the step. What samplers share is the callback, once a step.
So a step begins with an evaluation that comes after the previous step's callback, and how many
evaluations still follow that callback within the step is known per sampler, told by the sigma, or
learned while sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Follow = Callable[[Sequence[float], int], int]
"""Of a schedule and a step: how many evaluations follow the step's callback within the step."""


def _none(sigmas: Sequence[float], step: int) -> int:
    return 0


def _one_unless_last(sigmas: Sequence[float], step: int) -> int:
    return 0 if sigmas[step + 1] == 0 else 1


def _two_unless_last(sigmas: Sequence[float], step: int) -> int:
    return 0 if sigmas[step + 1] == 0 else 2


def _heunpp2(sigmas: Sequence[float], step: int) -> int:
    if sigmas[step + 1] == sigmas[-1]:
        return 0
    return 1 if sigmas[step + 2] == sigmas[-1] else 2


def _corrected(sigmas: Sequence[float], step: int) -> int:
    return 1 if step > 0 else 0


def _dpm_fast(sigmas: Sequence[float], step: int) -> int:
    evaluations = len(sigmas) - 1
    rounds = evaluations // 3 + 1
    if evaluations % 3 == 0:
        orders = [3] * (rounds - 2) + [2, 1]
    else:
        orders = [3] * (rounds - 1) + [evaluations % 3]
    return orders[step] - 1 if step < len(orders) else 0


_ONCE = (
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "euler_ancestral_RF",
    "lms", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm",
    "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp",
    "er_sde", "sa_solver", "unipc", "unipc_bh2",
)  # fmt: skip
_SECOND_ORDER = (
    "heun", "dpm_2", "dpm_2_ancestral", "dpm_2_ancestral_RF", "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_RF", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "seeds_2",
)  # fmt: skip

KNOWN: dict[str, Follow] = {
    **{f"sample_{name}": _none for name in _ONCE},
    **{f"sample_{name}": _one_unless_last for name in _SECOND_ORDER},
    "sample_seeds_3": _two_unless_last,
    "sample_heunpp2": _heunpp2,
    "sample_sa_solver_pece": _corrected,
    "dpm_fast_function": _dpm_fast,
    "dpm_adaptive_function": _none,
}
"""ComfyUI's samplers, by the name of their function."""

OFF_SCHEDULE = frozenset({"dpm_fast_function", "dpm_adaptive_function"})
"""Samplers that make their own sigmas of the schedule's ends."""


class StepTracker:
    """Tells the steps of one run apart.

    Attributes:
        step: index of the current step, from 0; -1 before the first evaluation.
        sigma: the current step's sigma; None before the first evaluation.
    """

    def __init__(self, sigmas: Sequence[float], sampler: str = "") -> None:
        """
        Args:
            sigmas: the schedule, one value more than there are steps.
            sampler: name of the sampler's function, such as ``sample_heun``.
        """
        self.sigmas = list(sigmas)
        self.step = -1
        self.sigma: float | None = None
        self._follow = KNOWN.get(sampler)
        self._off_schedule = sampler in OFF_SCHEDULE
        self._callbacks = 0
        self._since_callback = 0
        self._closed_by_callback = False
        self._learned: int | None = None

    @property
    def needs_sigma(self) -> bool:
        """Whether `evaluation` has to be told the sigma; reading it can wait for the device."""
        return self._follow is None or self._off_schedule

    @property
    def called_back(self) -> bool:
        """Whether the sampler has called back for the current step, which ends its main part."""
        return self._closed_by_callback

    def evaluation(self, sigma: float | None = None) -> bool:
        """A model evaluation is about to run.

        Args:
            sigma: its noise level; may be left out unless `needs_sigma`.

        Returns:
            Whether it begins a step.
        """
        if self.step < 0:
            self._enter(0, sigma)
            return True
        self._since_callback += 1
        if self._begins(sigma):
            self._enter(self.step + 1, sigma)
            return True
        return False

    def callback(self, index: int) -> bool:
        """The sampler has called back for a step.

        Returns:
            Whether that told of a step which no evaluation had begun. The caller then closes the
            step before and begins this one, late.
        """
        if self._callbacks and self._follow is None and self._since_callback:
            self._learned = self._since_callback
        self._callbacks += 1
        self._since_callback = 0
        self._closed_by_callback = True
        if index == self.step:
            return False
        # A known sampler that behaves otherwise isn't the one we know.
        if self._follow is not None and not self._off_schedule:
            self._follow = None
        if index > self.step:
            self._enter(index, None)
            self._closed_by_callback = True
            return True
        return False

    def _begins(self, sigma: float | None) -> bool:
        if not self._callbacks:
            # A sampler that never calls back: only its sigmas tell.
            return self._follow is None and self._reaches_next(sigma)
        if not self._closed_by_callback:
            return False
        if self._off_schedule and self._follow is not None:
            return self._since_callback > self._follow(self.sigmas, self.step)
        if self.step + 1 >= len(self.sigmas) - 1:
            return False
        if self._follow is not None:
            return self._since_callback > self._follow(self.sigmas, self.step)
        if self._learned is not None:
            return self._since_callback >= self._learned
        return self._reaches_next(sigma)

    def _reaches_next(self, sigma: float | None) -> bool:
        following = self.step + 1
        if sigma is None or following >= len(self.sigmas) - 1:
            return False
        return math.isclose(sigma, self.sigmas[following], rel_tol=1e-5, abs_tol=1e-8)

    def _enter(self, step: int, sigma: float | None) -> None:
        self.step = step
        self._closed_by_callback = False
        if step < len(self.sigmas) and not (self._off_schedule and sigma is not None):
            sigma = self.sigmas[step]
        self.sigma = sigma
