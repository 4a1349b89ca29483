"""Settings: one definition, clear refusals, and every part of it filled in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from attnscope.attention import settings
from attnscope.attention.reasons import DESCRIPTIONS, Choice, Fallback, Gate
from attnscope.attention.registry import VARIANTS
from attnscope.attention.settings import SETTINGS, TaylorSettings


@given(every=st.integers(1, 12), layers=st.integers(1, 120), start=st.integers(0, 50))
def test_every_layer_is_measured_once_in_a_round_of_steps(
    every: int, layers: int, start: int
) -> None:
    chosen = SETTINGS["exact"](quality_every=every)
    steps = range(start, start + every)
    turns = [[chosen.measures(step, layer) for layer in range(layers)] for step in steps]
    assert all(sum(layer) == 1 for layer in zip(*turns, strict=True))
    # Eight at most are ahead: no step has to bear the work of the others.
    loads = [sum(step) for step in turns]
    assert max(loads) - min(loads) <= 8


def test_without_samples_or_a_say_in_it_nothing_is_measured() -> None:
    assert not SETTINGS["exact"](quality_samples=0).measures(0, 0)
    assert not settings.VariantSettings().measures(0, 0)


def test_every_variant_has_its_settings_and_the_other_way_round() -> None:
    assert {name: variant.settings_model for name, variant in VARIANTS.items()} == SETTINGS


@pytest.mark.parametrize("variant", SETTINGS)
def test_every_setting_says_what_it_is(variant: str) -> None:
    for name, field in SETTINGS[variant].model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), name
        assert field.description and field.description.endswith("."), name
        assert extra["group"] in [group.value for group in settings.Group], name
        assert set(settings.GROUP_TITLES) == set(settings.Group)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"P": 9}, "P"),
        ({"P": "four"}, "P"),
        ({"P": 2.5}, "P"),
        ({"scale_mul": float("nan")}, "scale_mul"),
        ({"taylor_sigma_max": -1}, "taylor_sigma_max"),
        ({"sigma": 1}, "sigma"),
        ({"taylor_block_type": "triple"}, "taylor_block_type"),
    ],
)
def test_bad_values_are_refused_by_field(values: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TaylorSettings.model_validate(values)
    assert [error["loc"] for error in caught.value.errors()] == [(named,)]


def test_changes_name_old_and_new() -> None:
    before = TaylorSettings()
    after = TaylorSettings(P=5, scale_mul=0.5)
    assert after.changed_from(before) == {"P": (3, 5), "scale_mul": (1.0, 0.5)}
    assert before.changed_from(before) == {}


def test_live_names_leave_out_what_waits_for_the_next_run() -> None:
    assert "taylor_sigma_max" in TaylorSettings.live_names()
    assert "quality_seed" not in TaylorSettings.live_names()


def test_an_unknown_variant_is_refused_with_those_that_exist() -> None:
    with pytest.raises(KeyError, match=r"variant: unknown value 'nope'; allowed: exact, .*taylor"):
        settings.settings_model("nope")


def test_every_reason_has_prose() -> None:
    assert set(DESCRIPTIONS) == {reason.value for reason in (*Gate, *Fallback, *Choice)}


def test_feature_dimensions_up_to_a_thousand_million_may_be_allowed() -> None:
    assert TaylorSettings(max_feature_dim_R=10**9).max_feature_dim_R == 10**9
