"""Medians of measured calls, by length, noise level and configuration."""

from __future__ import annotations

from typing import Any

from attnscope.attention.evaluation import Outcome
from attnscope.backend.evaluation_summary import MEASURED, medians, table


def outcome(configuration: str = "tiled", **given: Any) -> Outcome:
    fields: dict[str, Any] = {
        "case": "one", "layer": "double_0", "step": 0, "sigma": 0.9, "tokens": 4608,
        "logit_std": 1.0, "configuration": configuration, "reason": "", "reference": "float64",
        "queries": 64,
    }  # fmt: skip
    return Outcome(**(fields | given))


def test_calls_of_one_place_and_configuration_are_one_row() -> None:
    rows = medians(
        [
            outcome(nmse=0.1, ms=3.0, logit_std=1.0),
            outcome(nmse=0.4, ms=5.0, logit_std=2.0, layer="single_3"),
            outcome(nmse=0.2, ms=10.0, logit_std=4.0, case="two", step=7),
        ]
    )
    assert [(row.tokens, row.at, row.configuration, row.calls) for row in rows] == [
        (4608, "σ 0.9", "tiled", 3)
    ]
    assert rows[0].medians["nmse"] == 0.2 and rows[0].medians["ms"] == 5.0
    assert rows[0].logit_std == 2.0 and rows[0].exact_instead == 0
    assert rows[0].medians.keys() == {name for name, _, _ in MEASURED}


def test_what_was_not_measured_counts_nowhere() -> None:
    """Exact attention that ran instead has no figures; it is counted, and its spread is known."""
    (row,) = medians(
        [
            outcome(nmse=0.5, logit_std=1.0),
            outcome(reason="min_tokens", logit_std=3.0),
            outcome(reason="mask: no masks", logit_std=9.0),
        ]
    )
    assert (row.calls, row.exact_instead, row.logit_std) == (3, 2, 3.0)
    assert row.medians["nmse"] == 0.5 and row.medians["cosine"] is None


def test_length_noise_and_configuration_each_part_rows() -> None:
    rows = medians(
        [
            outcome("a"), outcome("a", tokens=1040), outcome("b"), outcome("a", sigma=0.25),
            outcome("b", tokens=1040),
        ]
    )  # fmt: skip
    # Places in the order of their first call, and in each the configurations in theirs.
    assert [(row.tokens, row.at, row.configuration) for row in rows] == [
        (4608, "σ 0.9", "a"),
        (4608, "σ 0.9", "b"),
        (1040, "σ 0.9", "a"),
        (1040, "σ 0.9", "b"),
        (4608, "σ 0.25", "a"),
    ]


def test_without_a_sigma_the_spread_of_logits_says_where() -> None:
    rows = medians([outcome(sigma=None, logit_std=2.04), outcome(sigma=None, logit_std=3.0)])
    assert [row.at for row in rows] == ["std 2", "std 3"]


def test_nothing_measured_is_no_rows() -> None:
    assert medians([]) == []
    assert len(table([]).splitlines()) == 1


def test_the_table_has_every_figure_in_its_unit() -> None:
    given = [
        outcome("P 3", nmse=0.01234, cosine=0.99876, log_mass_bias=0.02, ms=12.34, exact_ms=61.7,
                time_ratio=0.2, flops=3.5e9, flops_ratio=0.125),
        outcome("exact", reason="disabled"),
    ]  # fmt: skip
    heading, measured, nothing = table(given).splitlines()
    titles = [title for _, title, _ in MEASURED]
    assert all(title in heading for title in titles)
    figures = ["0.0123", "0.9988", "+0.020", "12.3", "61.7", "0.20", "3.50", "0.125"]
    assert measured.split() == ["4608", "σ", "0.9", "1.00", "1", "0", *figures, "P", "3"]
    assert nothing.split() == ["4608", "σ", "0.9", "1.00", "1", "1", *["–"] * 8, "exact"]
    # Figures stand under the ends of their headings.
    for title, figure in zip(titles, figures, strict=True):
        assert heading.index(title) + len(title) == measured.index(figure) + len(figure)
