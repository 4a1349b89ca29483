"""Hybrid attention on a GPU: right against float64 on the CPU, then timed against exact.

Heads of the structured synthetic set in raster order as in `hybrid.py`, the variant as a model
calls it, settings as they come. Times have 24 heads of d = 128 in bf16, with 256 tokens of text;
exact attention is the fastest of torch's own backends. Without a CUDA device it says so and ends.

``hybrid_gpu_speedup_<tokens>``: the time of exact attention over that of the hybrid, medians of
calls in turn, the host's part included.

    PYTHONPATH=<folder that holds attnscope> python benchmarks/gpu_hybrid.py
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable

import torch

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

RESULTS = ("hybrid_gpu_speedup_4608", "hybrid_gpu_speedup_16896")

HEADS, TEXT = 24, 256
GRIDS = {4_608: (32, 136), 16_896: (104, 160)}
"""Rows and columns of image tokens."""
KINDS: tuple[Kind, ...] = ("content", "positional")
NMSE_BOUND = {torch.float32: 1e-8, torch.bfloat16: 1e-4}
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION")


def head(kind: Kind, rows: int, columns: int) -> list[torch.Tensor]:
    """Query, key, value, and query and key before rotation; image tokens in raster order."""
    made, _ = in_raster_order(structured_qkv(kind, 2.0, rows=rows, columns=columns, seed=100))
    return [made.query, made.key, made.value, *before_rotation(made)]


def attend(parts: list[torch.Tensor], variant: HybridVariant, **settings: object) -> torch.Tensor:
    chosen = HybridSettings(prefix_tokens=TEXT, **settings)
    scale = parts[0].shape[3] ** -0.5
    call = Call(chosen, LayerId("single", 0), None, 0, scale, pre_rope=(parts[3], parts[4]))
    result = variant.attend(parts[0], parts[1], parts[2], call)
    if result.out is None:
        raise RuntimeError(f"fell back, {result.fallback}")
    return result.out


def check(kind: Kind, dtype: torch.dtype, **settings: object) -> bool:
    """One head of 2,304 tokens against the same in float64 on the CPU."""
    parts = [x.to(dtype) for x in head(kind, 32, 64)]
    wanted = attend([x.double() for x in parts], HybridVariant(), **settings)
    found = attend([x.cuda() for x in parts], HybridVariant(), **settings)
    error = float(nmse(found.cpu().double(), wanted))
    right = error <= NMSE_BOUND[dtype]
    print("PASS" if right else "FAIL", kind, dtype, settings, f"NMSE {error:.1e}", flush=True)
    return right


def elapsed(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def fastest(tensors: list[torch.Tensor]) -> str:
    """The backend of torch that takes the least time."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    times: dict[str, float] = {}
    for backend in BACKENDS:
        with contextlib.suppress(RuntimeError), sdpa_kernel(getattr(SDPBackend, backend)):
            for _ in range(3):
                times[backend] = elapsed(
                    lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)
                )
    return min(times, key=lambda name: times[name])


def measure(tokens: int) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows, columns = GRIDS[tokens]
    parts = [
        x.cuda().to(torch.bfloat16).expand(1, HEADS, -1, -1).contiguous()
        for x in head("content", rows, columns)
    ]
    backend = fastest(parts[:3])
    variant = HybridVariant()
    # The fit belongs to a run's first call.
    attend(parts, variant)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(parts, variant)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before

    def exact() -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(*parts[:3])

    pairs = [(elapsed(exact), elapsed(lambda: attend(parts, variant))) for _ in range(7)]
    theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{tokens} tokens: exact {theirs:.3f} ms ({backend.split('_')[0].lower()}), "
        f"hybrid {ours:.3f} ms, peak {peak / 2**20:.0f} MiB",
        flush=True,
    )
    print(f"RESULT hybrid_gpu_speedup_{tokens} {theirs / ours:.3f}", flush=True)


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}", flush=True)
    good = True
    for kind in KINDS:
        for dtype in NMSE_BOUND:
            good &= check(kind, dtype)
        good &= check(kind, torch.float32, combine="additive", global_P=2)
        good &= check(kind, torch.float32, global_P=1, global_centre=False)
    for tokens in GRIDS:
        measure(tokens)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
