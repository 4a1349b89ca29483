"""What the API says of itself: variants, metrics, the OpenAPI document and its examples."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from attnscope import wire
from attnscope.attention.metrics import METRIC_NAMES
from attnscope.attention.reasons import Choice, Fallback, Gate
from attnscope.attention.settings import SETTINGS
from attnscope.backend import api_document, catalogue, schemas
from attnscope.backend.app import create_app
from attnscope.backend.config import Config


def test_every_setting_is_described(api: Any) -> None:
    answer = api.get("/schema/variants")
    groups = {group["name"] for group in answer["groups"]}
    variants = {variant["name"]: variant for variant in answer["variants"]}
    assert set(variants) == set(SETTINGS)
    for name, model in SETTINGS.items():
        fields = {field["name"]: field for field in variants[name]["fields"]}
        assert set(fields) == set(model.model_fields)
        for field in fields.values():
            assert field["group"] in groups
            assert field["help"]
            assert field["title"]
        values = {field["name"]: field["default"] for field in fields.values()}
        assert model.model_validate(values) == model()
    taylor = {field["name"]: field for field in variants["taylor"]["fields"]}
    assert (taylor["P"]["minimum"], taylor["P"]["maximum"]) == (1, 8)
    assert taylor["eps"]["exclusive_minimum"] == 0
    assert taylor["taylor_block_type"]["choices"] == ["all", "double", "single"]
    assert taylor["quality_seed"]["live"] is False


@pytest.mark.parametrize("variant", sorted(SETTINGS))
def test_what_is_allowed_is_said_in_words(variant: str) -> None:
    for field in catalogue.fields(variant).values():
        words = catalogue.allowed(field)
        assert words.startswith(("one of ", "true or false", "a whole number", "a number", "text"))


def test_metrics_and_reasons_are_described(api: Any) -> None:
    answer = api.get("/schema/metrics")
    assert [metric["name"] for metric in answer["metrics"]] == list(METRIC_NAMES)
    names = {metric["name"]: metric["names"] for metric in answer["metrics"]}
    assert names["nmse"] == {}
    assert names["sums_path"]["2"] == "torch (no CUDA device)"
    assert set(answer["reasons"]) == {
        reason.value for kind in (Gate, Fallback, Choice) for reason in kind
    }


def document() -> dict[str, Any]:
    return api_document.document(create_app(Config()))


def test_the_document_is_the_same_at_every_call() -> None:
    command = [sys.executable, "-m", "attnscope.backend.openapi"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == document()
    assert printed == json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


def test_every_reference_leads_somewhere() -> None:
    spec = document()
    known = set(spec["components"]["schemas"])

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(value) for value in node.values()))
        if isinstance(node, list):
            return set().union(*(references(value) for value in node))
        return set()

    names = {reference.rsplit("/", 1)[1] for reference in references(spec)}
    assert names <= known
    assert {"Batch", "MailboxMessage", "Problem", "Change", "StepDelta"} <= known


def test_the_examples_are_valid() -> None:
    checked = 0
    for module in (wire, schemas):
        for model in vars(module).values():
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                continue
            for field in model.model_fields.values():
                adapter: TypeAdapter[Any] = TypeAdapter(field.annotation)
                for example in field.examples or ():
                    adapter.validate_python(example)
                    checked += 1
    assert checked >= 3


def test_every_route_of_the_docs_exists() -> None:
    import re
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "http_api.md").read_text("utf-8")
    spec = document()
    paths = {re.sub(r"\{\w+\}", "{}", path) for path in spec["paths"]}
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = set()
    for row in rows:
        for path in re.findall(r"`(?:[A-Z]+ )(/[^`?]*)", row):
            named.add("/api/v1" + re.sub(r"\{\w+\}", "{}", path))
    assert named
    assert named <= paths
