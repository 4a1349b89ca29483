"""``attnscope evaluate``: variants on captured or synthetic tensors; it needs torch."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from ..attention.captured import CapturedCall, CaptureError, CaptureInfo, read_call
from ..attention.evaluation import Case, Configuration, Outcome, evaluate
from ..attention.structured import KINDS, before_rotation, in_raster_order, structured_qkv
from ..attention.token_layout import TokenLayout
from . import evaluation_page, evaluation_summary, validation
from .problems import FieldErrors

DEFAULT_VARIANTS = (
    "exact",
    "taylor",
    "taylor:centre_queries=false,centre_keys=false,centre_values=false",
    "taylor:feature_projection=0",
    "taylor:P=5,feature_projection=16",
    "taylor:P=4,sub_head_blocks=4,sub_head_mode=independent,centre_queries=false,"
    "centre_keys=false,centre_values=false",
    "taylor:P=7,feature_projection=8",
    "tiled:dense_first_steps=0",
    "hybrid",
)

DEFAULT_SYNTHETIC = ("content:std=1", "positional:std=1", "content:std=2", "positional:std=2")

SYNTHETIC_FIELDS: dict[str, tuple[type, Any]] = {
    "std": (float, 1.0),
    "rows": (int, 64),
    "columns": (int, 64),
    "text_tokens": (int, 256),
    "heads": (int, 1),
    "seed": (int, 0),
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EvaluationError(ValueError):
    """What was asked for can't be evaluated; the message is for the user."""


def split_spec(text: str) -> tuple[str, dict[str, str]]:
    """``name:key=value,key=value`` in its parts.

    Raises:
        EvaluationError: a part has no value, or stands twice.
    """
    name, _, rest = text.partition(":")
    values: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or key.strip() in values:
            problem = "is given twice" if equals else "has no value"
            raise EvaluationError(f"{text}: {key!r} {problem}; allowed: name:key=value,key=value")
        values[key.strip()] = value.strip()
    return name.strip(), values


def configuration(variant: str, values: Mapping[str, Any], label: str) -> Configuration:
    """A checked configuration.

    Raises:
        EvaluationError: names the field, its value and what is allowed.
    """
    try:
        validation.known_variant(variant, "variant")
        checked = validation.settings(variant, values, "")
    except FieldErrors as error:
        problems = (f"{e.field}: is {e.value!r}; allowed: {e.allowed}" for e in error.errors)
        raise EvaluationError(f"{label}: " + "; ".join(problems)) from None
    return Configuration(label, variant, checked)


def configurations(texts: Sequence[str]) -> list[Configuration]:
    """Configurations of texts, each ``variant:setting=value,…`` or a JSON file's path.

    Raises:
        EvaluationError: one of them can't be read.
    """
    found: list[Configuration] = []
    for text in texts or DEFAULT_VARIANTS:
        if text.endswith(".json"):
            found.extend(_from_json(Path(text)))
        else:
            name, values = split_spec(text)
            found.append(configuration(name, values, text))
    labels = [item.label for item in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise EvaluationError(f"variants: {twice[0]!r} is given twice; allowed: each once")
    return found


def _from_json(path: Path) -> Iterator[Configuration]:
    try:
        items = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: can't be read: {error}") from None
    allowed = 'a list of texts or of {"variant": …, "settings": {…}, "label": …}'
    if not isinstance(items, list):
        raise EvaluationError(f"{path}: is no list; allowed: {allowed}")
    for number, item in enumerate(items):
        if isinstance(item, str):
            name, values = split_spec(item)
            yield configuration(name, values, item)
            continue
        known = isinstance(item, dict) and set(item) <= {"variant", "settings", "label"}
        if not known or not isinstance(item.get("settings", {}), dict):
            raise EvaluationError(f"{path}: item {number}: is {item!r}; allowed: {allowed}")
        settings = item.get("settings", {})
        pairs = ",".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        default = f"{item.get('variant')}:{pairs}" if pairs else str(item.get("variant"))
        yield configuration(str(item.get("variant")), settings, str(item.get("label") or default))


def synthetic_case(text: str, dtype: torch.dtype) -> Case:
    """A synthetic case of ``kind:std=2,rows=64,columns=64,text_tokens=256,heads=1,seed=0``.

    Raises:
        EvaluationError: names the field, its value and what is allowed.
    """
    kind, given = split_spec(text)
    values: dict[str, Any] = {name: default for name, (_, default) in SYNTHETIC_FIELDS.items()}
    for name, value in given.items():
        if name not in SYNTHETIC_FIELDS:
            allowed = ", ".join(SYNTHETIC_FIELDS)
            raise EvaluationError(f"{text}: {name}: is no field; allowed: {allowed}")
        wanted = SYNTHETIC_FIELDS[name][0]
        try:
            values[name] = wanted(value)
        except ValueError:
            what = "a whole number" if wanted is int else "a number"
            raise EvaluationError(f"{text}: {name}: is {value!r}; allowed: {what}") from None
    try:
        made = structured_qkv(kind, dtype=dtype, **values)  # type: ignore[arg-type]
    except ValueError as error:
        raise EvaluationError(f"{text}: {error}") from None
    made, layout = in_raster_order(made)
    return Case(
        text, kind, 0, None, made.query, made.key, made.value, made.scale,
        layout=layout, pre_rope=before_rotation(made),
    )  # fmt: skip


def captured_case(path: Path) -> Case:
    """A case of a captured file.

    Raises:
        CaptureError: the file can't be used.
    """
    call = read_call(path)
    info = call.info
    return Case(
        f"{info.run_id[:8]} {path.name}", info.layer, info.step, info.sigma,
        call.query, call.key, call.value, info.scale, call.mask, _layout(info, call),
    )  # fmt: skip


def _layout(info: CaptureInfo, call: CapturedCall) -> TokenLayout | None:
    if info.text_tokens is None or info.rows is None or info.columns is None:
        return None
    layout = TokenLayout(info.text_tokens, ((info.rows, info.columns),))
    # What a file says of itself need not be so.
    return layout if layout.tokens == call.query.shape[2] == call.key.shape[2] else None


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files, and in place of a folder the captures in it and below.

    Raises:
        EvaluationError: a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        if not inside:
            raise EvaluationError(f"{path}: holds no captured calls (*.safetensors)")
        found.extend(inside)
    return found


def run(arguments: argparse.Namespace, out: TextIO) -> None:
    """Evaluate as the command line says, print a table, write the exports.

    Raises:
        EvaluationError: something can't be evaluated.
        OSError: a file can't be written.
    """
    chosen = configurations(arguments.variants)
    files = files_of(arguments.files)
    synthetic = arguments.synthetic or ([] if files else DEFAULT_SYNTHETIC)
    plotly = evaluation_page.plotly_script() if arguments.html else ""
    device = _device(arguments.device)
    outcomes: list[Outcome] = []
    print(_line(HEADINGS), file=out, flush=True)
    for case in _cases(files, synthetic, DTYPES[arguments.dtype]):
        print(f"\n{case.name}", file=out)
        for outcome in evaluate(
            _on(case, device), chosen,
            queries=arguments.queries, seed=arguments.seed, pairs=arguments.pairs,
        ):  # fmt: skip
            outcomes.append(outcome)
            print(_line(_cells(outcome)), file=out, flush=True)
    if len({outcome.case for outcome in outcomes}) > 1:
        print(f"\nMedians\n{evaluation_summary.table(outcomes)}", file=out, flush=True)
    rows = [dataclasses.asdict(outcome) for outcome in outcomes]
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Outcome)])
            writer.writeheader()
            writer.writerows(rows)
    if arguments.json:
        text = json.dumps(_finite(rows), indent=2, ensure_ascii=False)
        arguments.json.write_text(text + "\n", "utf-8")
    if arguments.html:
        report = evaluation_page.page(_finite(rows), evaluation_summary.medians(outcomes), plotly)
        arguments.html.write_text(report, "utf-8")


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON knows neither NaN nor infinity; they stand as text."""
    return [
        {
            name: repr(value)
            if isinstance(value, float) and not abs(value) < float("inf")
            else value
            for name, value in row.items()
        }
        for row in rows
    ]


def _cases(files: Sequence[Path], synthetic: Sequence[str], dtype: torch.dtype) -> Iterator[Case]:
    """One after the other, so that only one lies in memory."""
    for file in files:
        try:
            yield captured_case(file)
        except CaptureError as error:
            raise EvaluationError(str(error)) from None
    for text in synthetic:
        kind, colon, rest = text.partition(":")
        for each in KINDS if kind == "all" else (kind,):
            yield synthetic_case(f"{each}{colon}{rest}", dtype)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise EvaluationError(f"device: is {name!r}; allowed: cpu, cuda ({first})") from None
    return device


def _on(case: Case, device: torch.device) -> Case:
    return dataclasses.replace(
        case,
        query=case.query.to(device),
        key=case.key.to(device),
        value=case.value.to(device),
        mask=None if case.mask is None else case.mask.to(device),
        pre_rope=None
        if case.pre_rope is None
        else (case.pre_rope[0].to(device), case.pre_rope[1].to(device)),
    )


HEADINGS = (
    "layer", "step", "sigma", "std", "NMSE", "cosine", "mass bias", "ms", "exact ms", "time ÷",
    "GFLOP", "FLOP ÷", "configuration",
)  # fmt: skip
_WIDTHS = (12, 5, 7, 6, 10, 9, 10, 9, 9, 8, 9, 8, 0)


def _line(cells: Sequence[str]) -> str:
    pairs = zip(cells, _WIDTHS, strict=True)
    return " ".join(f"{cell:>{width}}" if width else cell for cell, width in pairs)


def _cells(outcome: Outcome) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    gigaflops = None if outcome.flops is None else outcome.flops / 1e9
    reason = f"   [{outcome.reason}]" if outcome.reason else ""
    return (
        outcome.layer[:12], str(outcome.step), number(outcome.sigma, ".4g"),
        number(outcome.logit_std, ".2f"), number(outcome.nmse, ".3g"),
        number(outcome.cosine, ".5f"),
        number(outcome.log_mass_bias, "+.4f"), number(outcome.ms, ".1f"),
        number(outcome.exact_ms, ".1f"), number(outcome.time_ratio, ".2f"),
        number(gigaflops, ".2f"), number(outcome.flops_ratio, ".3f"),
        outcome.configuration + reason,
    )  # fmt: skip
