"""Speed of Taylor attention's torch kernel on the CPU, over torch's exact attention.

16,896 tokens (2048² and 512 of text), two heads of 128, float32, four independent sub-head blocks,
in one process and in turn, the order changing from pair to pair. Each pair gives a ratio of times,
exact over Taylor, and the median of the ratios counts. Everything that a call does is timed:
centring, features, sums, division. Another operator than exact attention is computed, as
`sub_head_mode` says: these are figures of speed, not of quality.

``taylor_cpu_speedup_16k``: P = 3. ``taylor_cpu_speedup_16k_p4``: P = 4.

    python benchmarks/taylor_cpu.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from attnscope.attention.taylor.attend import Options, taylor_attention

RESULTS = ("taylor_cpu_speedup_16k", "taylor_cpu_speedup_16k_p4")

TOKENS, HEADS, HEAD_DIM, BLOCKS = 16_896, 2, 128, 4
PAIRS = 9


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(terms: int, pairs: int) -> float:
    """Measure one P, print both sides; the median ratio, exact over Taylor."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, HEADS, TOKENS, HEAD_DIM)
    query, key, value = torch.randn(shape, generator=generator).unbind(0)
    options = Options(sub_head_blocks=BLOCKS, sub_head_mode="independent")

    def exact() -> object:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def taylor() -> object:
        return taylor_attention(query, key, value, HEAD_DIM**-0.5, terms, options=options)

    times: dict[Callable[[], object], list[float]] = {exact: [], taylor: []}
    for work in times:
        work()
    for pair in range(pairs):
        for work in (exact, taylor) if pair % 2 else (taylor, exact):
            times[work].append(seconds(work))
    ratio = statistics.median(e / t for e, t in zip(times[exact], times[taylor], strict=True))
    print(
        f"P = {terms}, {BLOCKS} independent blocks: exact "
        f"{statistics.median(times[exact]) * 1e3:.0f} ms, Taylor "
        f"{statistics.median(times[taylor]) * 1e3:.0f} ms, median ratio of {pairs} pairs "
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
    only = os.environ.get("BENCH_ONLY")
    for name, terms in zip(RESULTS, (3, 4), strict=True):
        if only in (None, name):
            print(f"RESULT {name} {compare(terms, options.pairs):.2f}", flush=True)


if __name__ == "__main__":
    main()
