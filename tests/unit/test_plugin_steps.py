"""The step tracker, fed with the evaluations and callbacks of samplers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

from attnscope.comfy_plugin.steps import StepTracker

FULL = [1.0, 0.75, 0.5, 0.25, 0.0]
CUT = [1.0, 0.75, 0.5, 0.25]
MID = 0.6180339

Act = float | int
"""A float is an evaluation at that sigma, an int the callback of that step."""


def play(tracker: StepTracker, acts: Iterable[Act]) -> tuple[list[int], list[int]]:
    """Step of each evaluation, and the steps that began, in order."""
    steps, begun = [], []
    for act in acts:
        if isinstance(act, int):
            if tracker.callback(act):
                begun.append(tracker.step)
        else:
            if tracker.evaluation(act):
                begun.append(tracker.step)
            steps.append(tracker.step)
    return steps, begun


def once(sigmas: list[float]) -> list[Act]:
    return [act for i in range(len(sigmas) - 1) for act in (sigmas[i], i)]


def heun(sigmas: list[float]) -> list[Act]:
    acts: list[Act] = []
    for i in range(len(sigmas) - 1):
        acts += [sigmas[i], i]
        if sigmas[i + 1] != 0:
            acts.append(sigmas[i + 1])
    return acts


def middle(sigmas: list[float], count: int = 1) -> list[Act]:
    acts: list[Act] = []
    for i in range(len(sigmas) - 1):
        acts += [sigmas[i], i]
        if sigmas[i + 1] != 0:
            between = (sigmas[i] + sigmas[i + 1]) / 2
            acts += [between - 0.01 * k for k in range(count)]
    return acts


def heunpp2(sigmas: list[float]) -> list[Act]:
    acts: list[Act] = []
    for i in range(len(sigmas) - 1):
        acts += [sigmas[i], i]
        if sigmas[i + 1] == sigmas[-1]:
            continue
        acts.append(sigmas[i + 1])
        if sigmas[i + 2] != sigmas[-1]:
            acts.append(sigmas[i + 2])
    return acts


def pece(sigmas: list[float]) -> list[Act]:
    acts: list[Act] = []
    for i in range(len(sigmas) - 1):
        acts += [sigmas[i], i, *([sigmas[i]] if i else [])]
    return acts


CASES = [
    ("sample_euler", FULL, once(FULL), [1, 1, 1, 1]),
    ("sample_euler", CUT, once(CUT), [1, 1, 1]),
    ("sample_unipc", FULL, once(FULL), [1, 1, 1, 1]),
    ("sample_heun", FULL, heun(FULL), [2, 2, 2, 1]),
    ("sample_heun", CUT, heun(CUT), [2, 2, 2]),
    ("sample_dpm_2", FULL, middle(FULL), [2, 2, 2, 1]),
    ("sample_dpmpp_sde", CUT, middle(CUT), [2, 2, 2]),
    ("sample_seeds_3", FULL, middle(FULL, 2), [3, 3, 3, 1]),
    ("sample_heunpp2", FULL, heunpp2(FULL), [3, 3, 2, 1]),
    ("sample_heunpp2", CUT, heunpp2(CUT), [3, 2, 1]),
    ("sample_sa_solver_pece", FULL, pece(FULL), [1, 2, 2, 2]),
    ("some_euler", FULL, once(FULL), [1, 1, 1, 1]),
    ("some_dpm_2", FULL, middle(FULL), [2, 2, 2, 1]),
    ("some_seeds", FULL, middle(FULL, 2), [3, 3, 3, 1]),
]


@pytest.mark.parametrize(("sampler", "sigmas", "acts", "counts"), CASES)
def test_evaluations_land_in_their_steps(
    sampler: str, sigmas: list[float], acts: list[Act], counts: list[int]
) -> None:
    steps, begun = play(StepTracker(sigmas, sampler), acts)
    assert list(Counter(steps).values()) == counts
    assert steps == sorted(steps)
    assert begun == list(range(len(sigmas) - 1))


def test_one_unknown_heun_is_learned_from_its_second_callback_on() -> None:
    steps, begun = play(StepTracker(FULL, "some_heun"), heun(FULL))
    assert begun == [0, 1, 2, 3]
    assert Counter(steps) == {0: 1, 1: 3, 2: 2, 3: 1}


def test_churned_sigmas_of_a_known_sampler_do_not_matter() -> None:
    acts: list[Act] = [1.1, 0, 0.8, 1, 0.55, 2, 0.3, 3]
    steps, _ = play(StepTracker(FULL, "sample_euler"), acts)
    assert steps == [0, 1, 2, 3]


def test_churned_sigmas_of_an_unknown_sampler_are_put_right_by_callbacks() -> None:
    tracker = StepTracker(FULL, "some_euler")
    steps, begun = play(tracker, [1.1, 0, 0.8, 1, 0.55, 2, 0.3, 3])
    assert begun == [0, 1, 2, 3]
    assert steps[2:] == [2, 3]


def test_a_sampler_without_callbacks_is_told_by_its_sigmas() -> None:
    steps, begun = play(StepTracker(FULL, "some_euler"), [1.0, 0.75, 0.7, 0.5, 0.25])
    assert steps == [0, 1, 1, 2, 3]
    assert begun == [0, 1, 2, 3]


def test_dpm_fast_goes_by_its_rounds() -> None:
    sigmas = [float(10 - i) for i in range(8)]
    tracker = StepTracker(sigmas, "dpm_fast_function")
    acts: list[Act] = [10.0, 0, 9.0, 8.0, 7.0, 1, 6.0, 5.0, 4.0, 2]
    steps, begun = play(tracker, acts)
    assert steps == [0, 0, 0, 1, 1, 1, 2]
    assert begun == [0, 1, 2]
    assert tracker.needs_sigma
    assert tracker.sigma == 4.0


def test_dpm_adaptive_may_take_more_steps_than_the_schedule_has() -> None:
    acts: list[Act] = []
    for i in range(6):
        acts += [1.0 - i / 10, 0.95 - i / 10, 0.91 - i / 10, i]
    steps, begun = play(StepTracker(FULL, "dpm_adaptive_function"), acts)
    assert Counter(steps) == dict.fromkeys(range(6), 3)
    assert begun == list(range(6))


def test_a_known_sampler_that_behaves_otherwise_is_followed_by_its_callbacks() -> None:
    tracker = StepTracker(FULL, "sample_euler")
    _, begun = play(tracker, [1.0, 0, MID, 0.75, 1, 0.7, 0.5, 2, 0.4, 0.25, 3])
    assert tracker.step == 3
    assert begun == sorted(set(begun))


def test_known_samplers_need_no_sigma() -> None:
    assert not StepTracker(FULL, "sample_heun").needs_sigma
    assert StepTracker(FULL, "sample_of_somebody").needs_sigma


def test_no_step_begins_behind_the_last_one() -> None:
    tracker = StepTracker(FULL, "sample_euler")
    play(tracker, once(FULL))
    assert not tracker.evaluation(0.0)
    assert tracker.step == 3
