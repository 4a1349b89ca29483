"""Error and time of hybrid attention on the structured synthetic set, in raster order.

Heads of `attention/structured.py` (256 text tokens, d = 128), content and positional ones, image
tokens put from order of tiles into raster order, query and key before rotation by turning them
back. The whole variant in float32, against exact attention in float64 at sampled queries.

``hybrid_nmse_std2``: mean NMSE over kinds and `SEEDS` of the default settings, with a window of
512, at logits with a standard deviation of 2 and 4,352 tokens. Beside it the same without a far
part, and the additive form as it was first used (linear series, weight 0.1) with text in sight.

``hybrid_cpu_speedup_16k``: median over pairs of the time of torch's own attention over that of
the hybrid, one head of 16,896 tokens, in turn.

    python benchmarks/hybrid.py [--quick] [--std 1 2 3 4]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from attnscope.attention.evaluation import Case, reference
from attnscope.attention.hybrid.variant import HybridVariant
from attnscope.attention.quality import nmse
from attnscope.attention.settings import HybridSettings
from attnscope.attention.structured import (
    Kind,
    before_rotation,
    in_raster_order,
    structured_qkv,
)
from attnscope.attention.variant import Call, LayerId

RESULTS = ("hybrid_nmse_std2", "hybrid_cpu_speedup_16k")

KINDS: tuple[Kind, ...] = ("content", "positional")
SEEDS = (100, 101)
TEXT = 256
QUERIES = 512
LAYER = LayerId("single", 0)

FORMS: dict[str, dict[str, Any]] = {
    "joint, default": {},
    "joint, not centred": {"global_centre": False},
    "joint, 32 coordinates": {"global_dim": 32},
    "joint, series of degree 0": {"global_P": 1},
    "window and text alone": {"global_weight": 0.0},
    "additive, linear, weight 0.1": {
        "combine": "additive", "global_P": 2, "global_weight": 0.1, "global_centre": False,
        "fallback_on_negative": False,
    },
}  # fmt: skip


def head(kind: Kind, std: float, seed: int, rows: int, columns: int) -> list[torch.Tensor]:
    """Query, key, value, and query and key before rotation; image tokens in raster order."""
    made = structured_qkv(kind, std, rows=rows, columns=columns, seed=seed)
    made, _ = in_raster_order(made)
    return [made.query, made.key, made.value, *before_rotation(made)]


def call(settings: dict[str, Any], parts: Sequence[torch.Tensor]) -> Call:
    chosen = HybridSettings(prefix_tokens=TEXT, **settings)
    scale = parts[0].shape[3] ** -0.5
    return Call(chosen, LAYER, None, 0, scale, pre_rope=(parts[3], parts[4]))


def errors(std: float, forms: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """NMSE of each form on each head."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for kind in KINDS:
        for seed in SEEDS:
            parts = head(kind, std, seed, 64, 64)
            query, key, value = parts[:3]
            case = Case(kind, kind, 0, None, query, key, value, key.shape[3] ** -0.5)
            exact = reference(case, QUERIES, 0)
            for name, settings in forms.items():
                result = HybridVariant().attend(query, key, value, call(settings, parts))
                if result.out is None:
                    raise RuntimeError(f"{name}: fell back, {result.fallback}")
                out = result.out.index_select(2, exact.rows).double()
                found[name].append(float(nmse(out, exact.out)))
    return found


def speedup(pairs: int) -> tuple[float, float, float]:
    """Ratio, milliseconds of exact attention, milliseconds of the hybrid; medians."""
    query, key, value, *_ = parts = head("content", 2.0, SEEDS[0], 104, 160)
    variant, about = HybridVariant(), call({}, parts)
    # The fit belongs to a run's first call.
    variant.attend(query, key, value, about)
    times: list[tuple[float, float]] = []
    for _ in range(pairs):
        began = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(query, key, value)
        between = time.perf_counter()
        variant.attend(query, key, value, about)
        times.append((between - began, time.perf_counter() - between))
    exact, ours = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    return statistics.median(a / b for a, b in times), exact, ours


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="errors alone")
    parser.add_argument("--std", type=float, nargs="*", default=(2.0,))
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    for std in options.std:
        found = errors(std, FORMS)
        for name, values in found.items():
            each = ", ".join(f"{value:.3g}" for value in values)
            print(f"std {std:g}: {name}: NMSE {statistics.fmean(values):.4g} ({each})", flush=True)
        if std == 2.0:
            print(f"RESULT {RESULTS[0]} {statistics.fmean(found['joint, default']):.5f}")
    if not options.quick:
        ratio, exact, ours = speedup(options.pairs)
        print(f"16,896 tokens, one head: exact {exact:.0f} ms, hybrid {ours:.0f} ms")
        print(f"RESULT {RESULTS[1]} {ratio:.3f}")


if __name__ == "__main__":
    main()
