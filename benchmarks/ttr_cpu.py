"""Speed of the residual student's serving on the CPU, over torch's exact attention.

A picture of 128×128 tokens and 512 of text (16,896 in all), two heads of 128, float32, a window of
3×3 tiles, 128 features, in one process and in turn, the order changing from pair to pair. Each
pair gives a ratio of times, exact over student, and the median of the ratios counts. Everything
that a call does is timed: order of tiles, features and their sums, loop, text queries, the way
back. Its weights are as they begin, which costs the same as any others.

Beside it, without a name of its own, the same of 64×64 tokens and 512 of text (4,608).

    python benchmarks/ttr_cpu.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from attnscope.attention.settings.ttr import TtrSettings
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr.build import build_student
from attnscope.attention.ttr.student import StudentOptions

RESULTS = ("ttr_cpu_speedup_16k",)

SIDES, TEXT, HEADS, HEAD_DIM = (128, 64), 512, 2, 128
PAIRS = 9


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(side: int, pairs: int) -> float:
    """Measure one size, print both sides; the median ratio, exact over tiled."""
    layout = TokenLayout(TEXT, ((side, side),))
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, HEADS, layout.tokens, HEAD_DIM)
    query, key, value = torch.randn(shape, generator=generator).unbind(0)
    settings = TtrSettings()
    options = StudentOptions(
        "residual", HEADS, HEAD_DIM, settings.features, settings.window_radius, settings.landmarks
    )
    student = build_student(options, generator)
    chunk = settings.serve_chunk

    def exact() -> object:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def served() -> object:
        return student.serve(query, key, value, HEAD_DIM**-0.5, layout, chunk)

    times: dict[Callable[[], object], list[float]] = {exact: [], served: []}
    for work in times:
        work()
    for pair in range(pairs):
        for work in (exact, served) if pair % 2 else (served, exact):
            times[work].append(seconds(work))
    ratio = statistics.median(e / t for e, t in zip(times[exact], times[served], strict=True))
    print(
        f"{layout.tokens} tokens, {torch.get_num_threads()} threads: exact "
        f"{statistics.median(times[exact]) * 1e3:.0f} ms, student "
        f"{statistics.median(times[served]) * 1e3:.0f} ms, median ratio of {pairs} pairs "
        f"{ratio:.2f}",
        flush=True,
    )
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, help="torch's threads; all cores by default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if os.environ.get("BENCH_ONLY") in (None, RESULTS[0]):
        ratios = [compare(side, options.pairs) for side in SIDES]
        print(f"RESULT {RESULTS[0]} {ratios[0]:.2f}", flush=True)


if __name__ == "__main__":
    main()
