"""Error of tiled attention as it comes: a window of 3×3 tiles, text exact, first order elsewhere.

Heads of the structured synthetic set (`attention/structured.py`), content and positional ones,
with logits of a standard deviation of 1, 2, 3 and 4, pictures of 64×64 and 128×128 tokens and 256
of text, through the whole variant in float32 as a sampler would call it, tokens in raster order.
NMSE = Σ (out - exact)² / Σ exact² against exact attention in float64, at every query of the
smaller picture and at `ROWS` queries of the larger one, spread over the whole sequence, always the
same ones.

``tiled_nmse_worst`` and ``tiled_nmse_median``: over all these heads. Choices were made on
`TUNING_SEEDS` and are reported on `SEEDS`, which they didn't look at.

    python benchmarks/tiled_nmse.py
"""

from __future__ import annotations

import argparse
import statistics
import time

from attnscope.attention.exact import reference_attention
from attnscope.attention.quality import nmse, sampled_indices
from attnscope.attention.settings import TiledSettings
from attnscope.attention.structured import in_raster_order, structured_qkv
from attnscope.attention.tiled.variant import TiledVariant
from attnscope.attention.variant import Call

RESULTS = ("tiled_nmse_worst", "tiled_nmse_median")

TUNING_SEEDS = (0, 1, 2)
SEEDS = (100, 101)
KINDS = ("content", "positional")
STD = (1.0, 2.0, 3.0, 4.0)
SIDES = (64, 128)
ROWS = 2048

SETTINGS = TiledSettings(window_radius=1, top_k=0)


def error(kind: str, std: float, side: int, seed: int, settings: TiledSettings) -> float:
    """NMSE of one head.

    Raises:
        RuntimeError: the variant fell back to exact attention.
    """
    made = structured_qkv(kind, std, rows=side, columns=side, seed=seed)  # type: ignore[arg-type]
    made, layout = in_raster_order(made)
    call = Call(settings, None, None, 0, made.scale, layout=layout)
    result = TiledVariant().attend(made.query, made.key, made.value, call)
    if result.out is None:
        raise RuntimeError(f"{kind}, std {std:g}, seed {seed}: {result.fallback}")
    samples = layout.tokens if side == SIDES[0] else ROWS
    rows = sampled_indices(layout.tokens, samples, 0, made.query.device)
    exact = reference_attention(made.query[:, :, rows], made.key, made.value, made.scale)
    return float(nmse(result.out[:, :, rows].double(), exact))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true", help="on the tuning seeds")
    parser.add_argument("--sides", type=int, nargs="*", default=SIDES)
    parser.add_argument("--centroid-size", default=SETTINGS.centroid_size)
    options = parser.parse_args()
    settings = SETTINGS.model_copy(update={"centroid_size": options.centroid_size})
    found: list[float] = []
    for side in options.sides:
        for kind in KINDS:
            for std in STD:
                began = time.perf_counter()
                errors = [
                    error(kind, std, side, seed, settings)
                    for seed in (TUNING_SEEDS if options.tune else SEEDS)
                ]
                found += errors
                print(
                    f"{side}×{side}, {kind}, std {std:g}: NMSE "
                    f"{', '.join(f'{one:.4f}' for one in errors)}; "
                    f"{time.perf_counter() - began:.0f} s",
                    flush=True,
                )
    print(f"RESULT {RESULTS[0]} {max(found):.5f}")
    print(f"RESULT {RESULTS[1]} {statistics.median(found):.5f}")


if __name__ == "__main__":
    main()
