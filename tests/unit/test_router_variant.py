"""The router as a variant: it measures, remembers, chooses, hands on, and says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from support.synchronisations import Synchronisations

from attnscope.attention import attending
from attnscope.attention.exact import reference_attention
from attnscope.attention.quality import nmse
from attnscope.attention.reasons import Choice, Fallback, Gate
from attnscope.attention.router.table import EXACT, Scores, Table
from attnscope.attention.router.variant import RouterVariant
from attnscope.attention.settings import RouterSettings, TiledSettings, VariantSettings
from attnscope.attention.settings.candidates import parse, text_of_all
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.variant import Call, LayerId, Result, RunInfo, Variant

LAYERS = tuple(LayerId("single", index) for index in range(3))
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.0]
TOKENS = 96


class Blurred(Variant):
    """Exact attention with a known error in some heads, at a known cost."""

    name: ClassVar[str] = "tiled"
    title: ClassVar[str] = "Blurred"
    settings_model: ClassVar[type[VariantSettings]] = TiledSettings
    tells_log_mass: ClassVar[bool] = True
    errors: ClassVar[dict[str, list[float]]] = {}
    """By layer: relative errors of the heads."""
    result: ClassVar[Result | None] = None
    raises: ClassVar[bool] = False

    def gate(self, query: torch.Tensor, key: torch.Tensor, call: Call) -> Gate | None:
        settings: Any = call.settings
        return Gate.DENSE_STEP if call.step < settings.dense_first_steps else None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> Result:
        if self.raises:
            raise RuntimeError("broken")
        if self.result is not None:
            return self.result
        exact = reference_attention(query, key, value, call.scale).float()
        sizes = torch.tensor(self.errors[str(call.layer)]).sqrt()[None, :, None, None]
        return Result(exact * (1.0 + sizes), stats={"head_dim": float(query.shape[3])})

    @classmethod
    def flops(
        cls,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        settings: VariantSettings,
        layout: TokenLayout | None = None,
    ) -> float:
        return 1000.0


@dataclass
class Store:
    """A table in memory."""

    table: Table = field(default_factory=Table)
    added: list[Scores] = field(default_factory=list)

    def load(self) -> Table:
        return self.table

    def add(self, scores: Scores) -> None:
        self.added.append(scores)
        self.table = self.table.with_run(scores)


class Ticks:
    """A clock whose hand moves when it is told to."""

    measures_calls = True

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1.0
        return self.now

    def elapsed_ms(self, start: float, end: float) -> float:
        return end - start

    def reached(self, mark: float) -> bool:
        return True


@pytest.fixture(autouse=True)
def blurred(monkeypatch: pytest.MonkeyPatch) -> type[Blurred]:
    monkeypatch.setitem(attending.ATTENDING, "tiled", Blurred)
    errors = {"single.0": [0.001] * 4, "single.1": [0.004] * 4, "single.2": [0.5] * 4}
    monkeypatch.setattr(Blurred, "errors", errors)
    monkeypatch.setattr(Blurred, "result", None)
    monkeypatch.setattr(Blurred, "raises", False)
    return Blurred


CANDIDATE = "tiled:dense_first_steps=0"


def settings(**given: Any) -> RouterSettings:
    plain: dict[str, Any] = {
        "candidates": CANDIDATE, "cost": "flops", "min_runs": 2, "budget_layer": 0.01,
        "budget_step": 1.0, "recheck_runs": 0,
    }  # fmt: skip
    return RouterSettings(**{**plain, **given})


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4, TOKENS, 16, generator=generator) for _ in range(3)]


@dataclass
class Ran:
    """A run's calls, by step and layer."""

    router: RouterVariant
    results: dict[tuple[int, str], Result]
    exact: dict[tuple[int, str], torch.Tensor]

    def made_by(self, layer: str) -> list[str]:
        return [self.results[step, layer].made_by for step in range(len(SIGMAS) - 1)]

    def gates(self, layer: str) -> set[Gate | None]:
        return {self.results[step, layer].gate for step in range(len(SIGMAS) - 1)}


def run(
    store: Store, given: RouterSettings, seed: int = 0, clock: Any = None, completed: bool = True
) -> Ran:
    """As the plugin does it."""
    router = RouterVariant()
    info = RunInfo(sigmas=SIGMAS, layers=LAYERS, settings=given, tables=store, clock=clock)
    router.prepare(info)
    results, exacts = {}, {}
    for step, sigma in enumerate(SIGMAS[:-1]):
        if step:
            assert router.retune(given) is None
        for layer in LAYERS:
            query, key, value = tensors(1000 * seed + 10 * step + layer.block_index)
            call = Call(given, layer, sigma, step, 0.25)
            start = clock.mark() if clock else None
            gate = router.gate(query, key, call)
            if gate is None:
                result = router.attend(query, key, value, call)
                end = clock.mark() if clock else None
                if result.afterwards is not None:
                    result.afterwards(start, end)
            else:
                result = Result(None, gate=gate)
            results[step, str(layer)] = result
            exacts[step, str(layer)] = reference_attention(query, key, value, 0.25)
    router.close(completed)
    return Ran(router, results, exacts)


def test_it_measures_first_and_then_takes_what_fits_the_budget() -> None:
    store = Store()
    for seed in (1, 2):
        ran = run(store, settings(), seed)
        for layer in LAYERS:
            assert ran.gates(str(layer)) == {Gate.ROUTER_UNMEASURED}
            assert ran.results[0, str(layer)].out is None
    ran = run(store, settings(), 3)
    assert ran.made_by("single.0") == ran.made_by("single.1") == ["tiled"] * 4
    assert ran.gates("single.2") == {Gate.ROUTER_OVER_BUDGET}
    for place, result in ran.results.items():
        if result.out is None:
            assert "tiled up to 0.5" in result.detail
            continue
        predicted = result.stats["predicted_nmse"]
        assert isinstance(predicted, float)
        assert nmse(result.out, ran.exact[place]) <= predicted * (1 + 1e-3) <= 0.0101
        assert result.stats["budget_share"] == pytest.approx(predicted / 0.01)
        assert result.stats["head_dim"] == 16.0
        assert result.choice is Choice.ROUTER_CHEAPEST
        assert "(chosen)" in result.detail


def test_the_step_s_budget_goes_to_the_layer_that_saves_most_for_its_error() -> None:
    store = Store()
    for seed in (1, 2):
        run(store, settings(), seed)
    ran = run(store, settings(budget_step=0.0045), 3)
    assert ran.made_by("single.0") == ["tiled"] * 4
    assert ran.gates("single.1") == {Gate.ROUTER_STEP_BUDGET}


def test_heads_of_little_weight_are_not_ruined(blurred: type[Blurred]) -> None:
    blurred.errors["single.0"] = [0.02, 0.0, 0.0, 0.0]
    store = Store()
    for seed in range(1, 9):
        run(store, settings(min_runs=8), seed)
    assert run(store, settings(head_group_limit=0.0), 3).made_by("single.0") == ["tiled"] * 4
    ran = run(store, settings(head_group_limit=1.5), 3)
    assert ran.gates("single.0") == {Gate.ROUTER_OVER_BUDGET}
    assert "0.02 in some heads" in ran.results[0, "single.0"].detail


def test_quality_speed_0_and_switched_off_measure_nothing() -> None:
    for given in (settings(quality_speed=0.0), settings(enabled=False)):
        store = Store()
        assert run(store, given).gates("single.0") == {Gate.DISABLED}
        assert store.table == Table()


def test_a_candidate_s_own_gates_hold_and_keep_it_from_being_measured() -> None:
    store = Store()
    given = settings(candidates="tiled:dense_first_steps=2")
    for seed in (1, 2):
        ran = run(store, given, seed)
        gates = [ran.results[step, "single.0"].gate for step in range(4)]
        assert gates == [Gate.DENSE_STEP] * 2 + [Gate.ROUTER_UNMEASURED] * 2
    assert run(store, given, 3).made_by("single.0") == ["", "", "tiled", "tiled"]
    # Gates are not part of what is measured.
    assert run(store, settings(), 4).made_by("single.0") == ["", "", "tiled", "tiled"]


def test_a_candidate_that_falls_back_does_so_with_its_name(blurred: type[Blurred]) -> None:
    store = Store()
    for seed in (1, 2):
        run(store, settings(), seed)
    blurred.result = Result(None, Fallback.MASK, "no mask")
    result = run(store, settings(), 3).results[0, "single.0"]
    assert (result.out, result.fallback, result.detail) == (None, Fallback.MASK, "tiled: no mask")


def test_a_candidate_that_raises_while_it_is_measured_costs_the_run_nothing(
    blurred: type[Blurred], caplog: pytest.LogCaptureFixture
) -> None:
    blurred.raises = True
    store = Store()
    assert run(store, settings()).gates("single.0") == {Gate.ROUTER_UNMEASURED}
    assert caplog.text.count("tiled failed and is left out of this run") == 1
    assert store.table.errors == {}


def test_a_run_that_broke_off_is_not_remembered() -> None:
    store = Store()
    run(store, settings(), completed=False)
    assert store.added == []


def test_frozen_it_neither_measures_nor_changes_its_choice() -> None:
    store = Store()
    for seed in (1, 2):
        run(store, settings(), seed)
    before = store.table
    frozen = settings(learn=False)
    first, second = run(store, frozen, 3), run(store, frozen, 4)
    assert store.table is before
    for place, result in first.results.items():
        again = second.results[place]
        assert (result.made_by, result.detail) == (again.made_by, again.detail)
        assert result.afterwards is None


def test_layers_are_measured_again_in_turn_and_a_broken_promise_ends_the_choice(
    blurred: type[Blurred],
) -> None:
    store = Store()
    for seed in (1, 2):
        run(store, settings(), seed)
    blurred.errors["single.0"] = [0.2] * 4
    blurred.errors["single.1"] = [0.2] * 4
    # Of three layers each third run measures one: with two runs on record it is the second.
    ran = run(store, settings(recheck_runs=3), 3)
    assert [bool(ran.results[0, str(layer)].afterwards) for layer in LAYERS] == [
        False, True, False,
    ]  # fmt: skip
    assert ran.made_by("single.0") == ["tiled"] * 4
    # Each step has a sigma bin of its own here: the promise of the next ones stands.
    assert ran.made_by("single.1") == ["tiled"] * 4
    ran = run(store, settings(), 4)
    assert ran.made_by("single.0") == ["tiled"] * 4
    assert ran.gates("single.1") == {Gate.ROUTER_OVER_BUDGET}


def test_within_a_run_too_what_was_measured_overrules_the_prediction(
    blurred: type[Blurred], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.SIGMAS", [1.0, 0.99, 0.98, 0.97, 0.0])
    store = Store()
    for seed in (1, 2):
        run(store, settings(), seed)
    blurred.errors["single.1"] = [0.2] * 4
    ran = run(store, settings(recheck_runs=3), 3)
    assert ran.made_by("single.1") == ["tiled", "", "", ""]


def test_time_is_that_of_calls_and_only_what_is_faster_is_chosen() -> None:
    store, clock = Store(), Ticks()
    given = settings(cost="time")
    for seed in (1, 2):
        run(store, given, seed, clock)
    whats = {timed.what for timed in store.table.times}
    assert whats == {EXACT, parse(CANDIDATE)[0].id}
    assert {timed.device for timed in store.table.times} == {"cpu"}
    # Both took a tick.
    assert run(store, given, 3, clock).gates("single.0") == {Gate.ROUTER_NOT_FASTER}
    times = {
        timed: tuple(4.0 if timed.what == EXACT else ms for ms in values)
        for timed, values in store.table.times.items()
    }
    faster = Store(Table(store.table.errors, times, {}, 2))
    ran = run(faster, given, 3, clock)
    assert ran.made_by("single.0") == ["tiled"] * 4
    assert "exact 4 ms" in ran.results[0, "single.0"].detail


def test_calls_that_say_no_layer_or_sigma_are_exact() -> None:
    router, given = RouterVariant(), settings()
    query, key, _ = tensors(0)
    assert router.gate(query, key, Call(given, None, 0.5, 0, 1.0)) is Gate.LAYER_UNKNOWN
    assert router.gate(query, key, Call(given, LAYERS[0], None, 0, 1.0)) is Gate.SIGMA_UNKNOWN


def test_no_call_waits_for_the_device() -> None:
    store = Store()
    for seed in (1, 2):
        run(store, settings(), seed)
    router = RouterVariant()
    router.prepare(RunInfo(SIGMAS, LAYERS, settings=settings(recheck_runs=1), tables=store))
    query, key, value = tensors(0)
    call = Call(settings(recheck_runs=1), LAYERS[0], 0.8, 1, 0.25)
    with Synchronisations() as seen:
        result = router.attend(query, key, value, call)
        assert result.out is not None and result.afterwards is not None
        result.afterwards(None, None)
    assert seen.waits == []
    with Synchronisations() as seen:
        router.retune(settings())
    assert seen.launches


def test_candidates_as_text_and_back() -> None:
    found = parse("tiled:window_radius=2,top_k=4; taylor:P=5; taylor")
    assert [one.name for one in found] == ["tiled", "taylor", "taylor 2"]
    assert found[0].settings == TiledSettings(window_radius=2, top_k=4)
    assert len({one.id for one in found}) == 3
    text = text_of_all((one.variant, one.settings) for one in found)
    assert text == "tiled:window_radius=2,top_k=4; taylor:P=5; taylor"
    assert parse(text) == found
    assert [one.name for one in parse(" ")] == ["tiled", "taylor"]
    assert parse("tiled")[0].id == parse("tiled:min_tokens=5,quality_samples=3")[0].id
    # What would share its measurements is there once.
    assert len(parse("tiled; tiled:min_tokens=5")) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("exact", "'exact' is no candidate; allowed: taylor, hybrid, tiled"),
        ("router", "'router' is no candidate"),
        ("tiled:top_k", "'top_k' has no value"),
        ("tiled:top_k=1,top_k=2", "'top_k' is given twice"),
        ("tiled:top_k=-1", "top_k: is '-1'; Input should be greater than or equal to 0"),
    ],
)
def test_candidates_that_cannot_be_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match="candidates: ") as caught:
        RouterSettings(candidates=text)
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", ".hidden", "a:b"])
def test_a_table_s_name_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="table: is"):
        RouterSettings(table=name)
