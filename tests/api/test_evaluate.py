"""``attnscope evaluate``: its table, its exports, and what it says of wrong input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnscope.attention.captured import CapturedCall, CaptureInfo, write_call
from attnscope.backend import cli, evaluating, evaluation_page

SMALL = "content:rows=8,columns=8,text_tokens=64"


def evaluate(*arguments: object) -> int:
    return cli.main(["evaluate", "--pairs", "0", *map(str, arguments)])


def capture(folder: Path, layer: str, sigma: float) -> Path:
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 2, 120, 32, generator=generator).unbind(0)
    info = CaptureInfo(
        run_id="f" * 32, model="flux", layer=layer, step=3, sigma=sigma, call=0,
        scale=32**-0.5, mask=False, dtype="float32",
    )  # fmt: skip
    path = folder / f"{layer}.safetensors"
    write_call(path, CapturedCall(info, q, k, v, None))
    return path


def test_captured_calls_by_layer_and_sigma(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for layer, sigma in (("double.1", 0.9), ("single.4", 0.25)):
        capture(tmp_path, layer, sigma)
    table, numbers = tmp_path / "out.csv", tmp_path / "out.json"
    arguments = ("--variants", "taylor:P=3", "--variants", "taylor:P=5,taylor_sigma_max=0.5")
    assert evaluate(tmp_path, *arguments, "--csv", table, "--json", numbers) == 0
    rows = json.loads(numbers.read_text("utf-8"))
    assert [(row["layer"], row["sigma"], row["configuration"]) for row in rows] == [
        (layer, sigma, label)
        for layer, sigma in (("double.1", 0.9), ("single.4", 0.25))
        for label in ("taylor:P=3", "taylor:P=5,taylor_sigma_max=0.5")
    ]
    gated, ran = rows[1], rows[3]
    assert gated["nmse"] is None and gated["reason"].startswith("sigma_above_max")
    assert 0 < ran["nmse"] < rows[2]["nmse"] < 1
    with table.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["nmse"]) if row["nmse"] else None for row in read] == [
        row["nmse"] for row in rows
    ]
    printed = capsys.readouterr().out
    assert "double.1" in printed and "[sigma_above_max" in printed


def test_a_hybrid_needs_query_and_key_before_rotation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hybrid = "hybrid:min_tokens=0,prefix_tokens=16,local_window=16,local_chunk=16"
    numbers = tmp_path / "out.json"
    chosen = ("--variants", hybrid, "--variants", f"{hybrid},global_weight=0", "--json", numbers)
    assert evaluate(capture(tmp_path, "single.4", 0.25), *chosen) == 0
    captured, without = json.loads(numbers.read_text("utf-8"))
    assert captured["nmse"] is None and without["nmse"] > 0
    assert captured["reason"].startswith("pre_rope: ")
    assert "captured calls hold them only as rotated" in captured["reason"]
    assert "captured calls hold them only as rotated" in capsys.readouterr().out

    # Synthetic heads have both; the series then makes the error smaller.
    assert evaluate("--synthetic", SMALL.replace("64", "16"), *chosen) == 0
    synthetic, without = json.loads(numbers.read_text("utf-8"))
    assert synthetic["reason"] == "" and 0 < synthetic["nmse"] < without["nmse"] / 2


def test_configurations_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "variants.json"
    items: list[Any] = [
        "taylor:P=3",
        {"variant": "taylor", "settings": {"P": 5, "feature_projection": 8}, "label": "narrow"},
        {"variant": "exact"},
    ]
    file.write_text(json.dumps(items), "utf-8")
    found = evaluating.configurations([str(file)])
    assert [(item.label, item.variant) for item in found] == [
        ("taylor:P=3", "taylor"), ("narrow", "taylor"), ("exact", "exact"),
    ]  # fmt: skip
    assert found[1].settings.model_dump()["feature_projection"] == 8


def test_the_default_list_can_be_read() -> None:
    assert len(evaluating.configurations([])) == len(evaluating.DEFAULT_VARIANTS)
    for text in evaluating.DEFAULT_SYNTHETIC:
        assert evaluating.split_spec(text)[0] in evaluating.KINDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variants", "tailor:P=3"), "variant: is 'tailor'; allowed: one of exact, "),
        (("--variants", "taylor:P=9"), "P: is '9'; allowed: a whole number from 1 to 8"),
        (("--variants", "taylor:Q=1"), "Q: is '1'; allowed: a setting of taylor:"),
        (("--variants", "taylor:P"), "'P' has no value"),
        (("--variants", "exact", "--variants", "exact"), "'exact' is given twice"),
        (("--variants", "nowhere.json"), "nowhere.json: can't be read"),
        (("--synthetic", "smooth"), "kind: is 'smooth'; allowed: content, positional, iso"),
        (("--synthetic", "content:rows=9"), "rows: is 9; allowed: a multiple of 8"),
        (("--synthetic", "content:std=x"), "std: is 'x'; allowed: a number"),
        (("--synthetic", "content:size=1"), "size: is no field; allowed: std, rows,"),
        (("nowhere.safetensors",), "nowhere.safetensors: can't be read"),
        (("--device", "abacus"), "device: is 'abacus'; allowed: cpu, cuda"),
    ],
)
def test_wrong_input_is_named(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*arguments) == 1
    assert message in capsys.readouterr().err


def test_without_torch_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert evaluate() == 1
    assert "needs torch and safetensors" in capsys.readouterr().err


def test_the_report_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "plotly.js"
    bundle.write_text("var Plotly = '</script>'", "utf-8")
    real = evaluation_page.plotly_script
    monkeypatch.setattr(evaluation_page, "plotly_script", lambda: real(bundle))
    report = tmp_path / "report.html"
    variants = ("--variants", "taylor:P=3", "--variants", "taylor:max_feature_dim_R=1")
    assert evaluate("--synthetic", SMALL, *variants, "--html", report) == 0
    text = report.read_text("utf-8")
    assert text.count("</script>") == 2
    assert "src=" not in text and "http" not in text
    assert "taylor:P=3" in text and "R 561 &gt; max_feature_dim_R 1" in text


def test_the_figures_are_plotlys(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    numbers = tmp_path / "out.json"
    for pairs in ("0", "1"):
        arguments = ["evaluate", "--pairs", pairs, "--synthetic", SMALL, "--json", str(numbers)]
        assert cli.main([*arguments, "--variants", "taylor:P=3", "--variants", "exact"]) == 0
        figures = evaluation_page.figures(json.loads(numbers.read_text("utf-8")))
        for figure in figures:
            go.Figure(figure)
        assert [trace["name"] for trace in figures[0]["data"]] == ["taylor:P=3", "exact"]
        axis = figures[1]["layout"]["xaxis"]["title"]["text"]
        assert axis.startswith("time" if pairs == "1" else "FLOP")


def test_a_report_without_plotly_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = evaluation_page.plotly_script
    monkeypatch.setattr(evaluation_page, "plotly_script", lambda: real(tmp_path / "none.js"))
    assert evaluate("--html", tmp_path / "report.html") == 1
    assert "make page" in capsys.readouterr().err
