"""Memory estimates of Taylor attention's paths against the peak that a GPU really sees.

A call of each path, with sizes of Flux's attention: `memory.working_bytes` beside what
`torch.cuda.max_memory_allocated` grew by. ``RESULT taylor_memory_ratio_<path>`` is the ratio of
measured to estimated bytes that lies farthest from 1 (the bound is 15 %). Without a CUDA device,
or without Triton for its paths, it says so and prints no result.

    PYTHONPATH=<folder that holds attnscope> python benchmarks/gpu_memory.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnscope.attention.sums_paths import Path
from attnscope.attention.taylor import kernel
from attnscope.attention.taylor.attend import Options, taylor_attention
from attnscope.attention.taylor.blocks import Sums
from attnscope.attention.taylor.memory import Shape, working_bytes
from attnscope.attention.taylor.paths import TritonSums
from attnscope.attention.taylor.triton_stream import StreamConfig
from attnscope.attention.taylor.triton_support import unavailable

RESULTS = (
    "taylor_memory_ratio_torch",
    "taylor_memory_ratio_streaming",
    "taylor_memory_ratio_full",
)

HEADS, HEAD_DIM, SCALE = 24, 128, 128**-0.5
BOUND = 0.15
INDEPENDENT = Options(sub_head_blocks=4, sub_head_mode="independent")
SHARED = Options(sub_head_blocks=4)
DEFAULT_STREAM = StreamConfig()


@dataclass(frozen=True, slots=True)
class Case:
    """One call."""

    path: Path
    terms: int
    options: Options
    tokens: int = 4_608
    dtype: torch.dtype = torch.bfloat16
    stream: StreamConfig = DEFAULT_STREAM

    @property
    def shape(self) -> Shape:
        return Shape(1, HEADS, self.tokens, self.tokens, HEAD_DIM, HEAD_DIM)

    @property
    def sums(self) -> Sums:
        if self.path == "torch":
            return kernel.sums
        return TritonSums(self.path, self.dtype, self.stream)


CASES = (
    Case("torch", 3, INDEPENDENT),
    Case("torch", 3, SHARED),
    Case("torch", 3, Options(), dtype=torch.float32),
    Case("streaming", 3, Options()),
    Case("streaming", 3, Options(), stream=StreamConfig(feature_chunk=1024, store_bf16=True)),
    Case("streaming", 5, INDEPENDENT, stream=StreamConfig(feature_chunk=32_768)),
    Case("full", 3, INDEPENDENT),
    Case("full", 3, INDEPENDENT, tokens=16_896),
    Case("full", 3, SHARED),
    Case("full", 3, Options()),
    Case("full", 3, Options(feature_projection=32)),
    Case("full", 4, INDEPENDENT, dtype=torch.float32),
    Case("full", 4, INDEPENDENT),
    Case("full", 4, SHARED),
)


def measured(case: Case) -> int:
    """Bytes that the call allocates at its peak, its input not counted."""
    query, key, value = (
        torch.randn(1, HEADS, case.tokens, HEAD_DIM, device="cuda", dtype=case.dtype)
        for _ in range(3)
    )

    def call() -> None:
        taylor_attention(
            query, key, value, SCALE, case.terms, options=case.options, sums=case.sums
        )

    # The first call compiles, and makes tables that are kept.
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    missing = unavailable("cuda")
    if missing:
        print(f"Triton's paths are left out: {missing}")
    worst: dict[str, float] = {}
    for case in CASES:
        if case.path != "torch" and missing:
            continue
        estimate = working_bytes(
            case.path, case.shape, case.dtype, case.terms, case.options, device,
            stream=case.stream,
        )  # fmt: skip
        peak = measured(case)
        ratio = peak / estimate
        print(
            f"{case.path} P={case.terms} N={case.tokens} {case.dtype} "
            f"{case.options.sub_head_mode} x{case.options.sub_head_blocks} "
            f"chunk {case.stream.feature_chunk}: measured "
            f"{peak / 2**20:.0f} MiB, estimate {estimate / 2**20:.0f} MiB, ratio {ratio:.3f}",
            flush=True,
        )
        if abs(ratio - 1) >= abs(worst.get(case.path, 1.0) - 1):
            worst[case.path] = ratio
        torch.cuda.empty_cache()
    for path, ratio in worst.items():
        print(f"RESULT taylor_memory_ratio_{path} {ratio:.3f}")
    return 1 if any(abs(ratio - 1) > BOUND for ratio in worst.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
