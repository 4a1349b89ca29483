"""Taylor attention's Triton paths on a GPU: right against float64, then timed against exact.

Shapes are Flux's: 24 heads, d = 128, bf16, at 4,608, 16,896 and 66,048 tokens (1024², 2048² and
4096² pictures with their text). Exact attention is the fastest of torch's own backends. "whole"
rows time `attend.taylor_attention`, preparation and division included; "full" and "streaming"
rows the sums alone. Each group of cases has a process of its own, for a fault on a GPU spoils the
process. Without an NVIDIA GPU it says so and ends.

    PYTHONPATH=<folder that holds attnscope> python benchmarks/gpu_taylor.py --out table.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from attnscope.attention.taylor import triton_full, triton_stream
from attnscope.attention.taylor.attend import Options, taylor_attention
from attnscope.attention.taylor.features import feature_dim
from attnscope.attention.taylor.paths import pick
from attnscope.attention.taylor.triton_memory import full_memory_bytes, streaming_memory_bytes
from attnscope.attention.taylor.triton_stream import StreamConfig
from attnscope.attention.taylor.triton_support import kernels, unavailable

RESULTS = (
    "taylor_p3_speedup_4608",
    "taylor_p3_speedup_16896",
    "taylor_p4_speedup_16896",
    "taylor_p3_speedup_66048",
    "taylor_p4_speedup_66048",
    "taylor_default_speedup_4608",
    "taylor_default_speedup_16896",
    "taylor_default_speedup_66048",
)

TOKENS = (4_608, 16_896, 66_048)
HEADS = 24
HEAD_DIM = 128
BLOCKS = 4
NMSE_BOUND = 1e-5
WHOLE_NMSE_BOUND = 3e-5
"""Query and key are rounded once more, centred and scaled, and the output is bf16."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way of splitting a head: sub-heads of ``head_dim``, each with ``value_dim`` values."""

    name: str
    terms: int
    head_dim: int = HEAD_DIM // BLOCKS
    value_dim: int = HEAD_DIM // BLOCKS
    projected: bool = False
    """Whether ``head_dim`` is what a projection leaves of a whole head."""

    @property
    def options(self) -> Options:
        if self.projected:
            return Options(feature_projection=self.head_dim)
        blocks = HEAD_DIM // self.head_dim
        independent = self.value_dim == self.head_dim
        return Options(
            sub_head_blocks=blocks, sub_head_mode="independent" if independent else "shared"
        )

    @property
    def sub_heads(self) -> int:
        return HEADS if self.projected else HEADS * (HEAD_DIM // self.head_dim)

    @property
    def useful_flop_per_token(self) -> int:
        """Of one sub-head, build and read, by the count of unique monomials."""
        return 4 * feature_dim(self.head_dim, self.terms) * self.value_dim


CASES = {
    "p3": Case("4 independent blocks", 3),
    "p4": Case("4 independent blocks", 4),
    "default": Case("projected to 32", 3, value_dim=HEAD_DIM, projected=True),
    "shared3": Case("4 blocks, shared V", 3, value_dim=HEAD_DIM),
    "shared4": Case("4 blocks, shared V", 4, value_dim=HEAD_DIM),
    "head": Case("whole head", 3, head_dim=HEAD_DIM, value_dim=HEAD_DIM),
    "stream4": Case("4 independent blocks", 4),
    "stream5": Case("16 blocks, independent", 5, head_dim=8, value_dim=8),
}


def milliseconds(call: Callable[[], object], target_ms: float = 120.0) -> float:
    """Median time of ``call`` on the device, in ms, of as many runs as fit ``target_ms``."""
    call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    runs = max(3, min(30, int(target_ms / max(start.elapsed_time(end), 0.05))))
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
    for begin, finish in events:
        begin.record()
        call()
        finish.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(finish) for begin, finish in events)
    return times[len(times) // 2]


def graph_milliseconds(call: Callable[[], object]) -> float | None:
    """The same from a CUDA graph, without the host's part; None where capture fails."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return milliseconds(graph.replay)
    except Exception as error:
        print("  CUDA graph:", one_line(error), flush=True)
        torch.cuda.synchronize()
        return None


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def inputs(case: Case, queries: int, keys: int, sub_heads: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value of sub-heads, the share of the scale included."""
    root = case.head_dim**-0.25
    return (
        normal(1, sub_heads, queries, case.head_dim, seed=0) * root,
        normal(1, sub_heads, keys, case.head_dim, seed=1) * root,
        normal(1, sub_heads, keys, case.value_dim, seed=2),
    )


def whole_inputs(queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    """Whole heads as a projection leaves them, tokens before heads in memory."""
    return tuple(
        normal(1, tokens, HEADS, HEAD_DIM, seed=seed).transpose(1, 2)
        for seed, tokens in enumerate((queries, keys, keys))
    )


def whole_call(
    case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Callable[[], torch.Tensor]:
    options = case.options
    choice, sums = pick("auto", StreamConfig(), options, query, value, case.terms)
    print(f"whole {case}: {choice}", flush=True)
    scale = HEAD_DIM**-0.5
    return lambda: (
        taylor_attention(query, key, value, scale, case.terms, options=options, sums=sums).out
    )


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: int
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = query.double() @ key.double().transpose(-1, -2)
    term, kernel = torch.ones_like(logits), torch.zeros_like(logits)
    for degree in range(terms):
        kernel += term
        term = term * logits / (degree + 1)
    return kernel @ value.double(), kernel.sum(-1, keepdim=True)


def nmse(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).square().sum() / wanted.square().sum())


def check(name: str, sums: Callable[..., tuple[torch.Tensor, torch.Tensor]], case: Case) -> bool:
    """One path against float64 at an odd length, with weights, NaN in masked keys and twice."""
    query, key, value = inputs(case, 333, 1777, 2)
    weights = normal(1, 1, 1777, seed=3, dtype=torch.float32).abs() + 0.1
    weights[..., 5:50] = 0
    wanted = reference(query, key, value, case.terms)
    w_num, _ = reference(query, key, value.double() * weights.double()[..., None], case.terms)
    w_den, _ = reference(query, key, weights.double()[..., None], case.terms)
    found = sums(query, key, value, case.terms)
    again = sums(query, key, value, case.terms)
    key[:, :, 5:50], value[:, :, 5:50] = float("nan"), float("inf")
    weighted = sums(query, key, value, case.terms, weights=weights)
    errors = [
        nmse(found[0], wanted[0]),
        nmse(found[1], wanted[1]),
        nmse(weighted[0], w_num),
        nmse(weighted[1], w_den),
    ]
    same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    right = same and all(error <= NMSE_BOUND for error in errors)
    print(
        "PASS" if right else "FAIL",
        f"{name} {case}: NMSE num/den {errors[0]:.1e}/{errors[1]:.1e},",
        f"weighted {errors[2]:.1e}/{errors[3]:.1e}, {'equal bits' if same else 'BITS DIFFER'}",
        flush=True,
    )
    return right


def check_whole(case: Case) -> bool:
    """The whole call against the same in float64 and in torch."""
    tensors = whole_inputs(333, 1777)
    found = whole_call(case, *tensors)()
    error = nmse(found, whole_call(case, *(x.double() for x in tensors))())
    right = error <= WHOLE_NMSE_BOUND
    print("PASS" if right else "FAIL", f"whole {case}: NMSE {error:.1e}", flush=True)
    return right


def spills(module_name: str, kernel_name: str) -> str:
    """Registers, spills and shared memory of what a kernel compiled to last."""
    try:
        kernel = getattr(kernels(module_name), kernel_name)
        compiled = list(kernel.device_caches[torch.cuda.current_device()][0].values())[-1]
        return f"{compiled.n_regs}/{compiled.n_spills}/{compiled.metadata.shared}"
    except Exception as error:
        return f"no resource usage ({one_line(error)[:60]})"


def measure(
    case: Case, path: str, tokens: int, call: Callable[[], object], expected: int | None
) -> None:
    """Time ``call`` and print its row as JSON for the process above."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    ms = milliseconds(call)
    graph = graph_milliseconds(call)
    tflop = case.useful_flop_per_token * case.sub_heads * tokens / 1e12
    row = {
        "mode": case.name, "terms": case.terms, "path": path, "tokens": tokens, "ms": ms,
        "graph": graph, "tflops": tflop / (graph or ms) * 1e3, "peak": peak / 2**20,
        "expected": expected / 2**20 if expected else None,
    }  # fmt: skip
    print("ROW", json.dumps(row), flush=True)


def run_group(name: str) -> int:
    """Check and time one group of cases."""
    case = CASES[name]
    good = True
    if name.startswith("stream"):
        good &= check("streaming", triton_stream.sums, case)
        # It is not made to be fast: the shortest length alone.
        tokens, config = TOKENS[0], StreamConfig()
        tensors = inputs(case, tokens, tokens, case.sub_heads)
        expected = streaming_memory_bytes(
            case.sub_heads,
            tokens,
            case.head_dim,
            case.value_dim,
            case.terms,
            torch.bfloat16,
        )

        def stream() -> object:
            return triton_stream.sums(*tensors, case.terms, config=config)

        measure(case, "streaming", tokens, stream, expected)
        return 0 if good else 1
    good &= check("full", triton_full.sums, case)
    good &= check_whole(case)
    for tokens in TOKENS:
        expected = full_memory_bytes(
            case.sub_heads,
            tokens,
            tokens,
            case.head_dim,
            case.value_dim,
            case.terms,
            torch.bfloat16,
        )
        sums = partial(triton_full.sums, *inputs(case, tokens, tokens, case.sub_heads), case.terms)
        measure(case, "full", tokens, sums, expected)
        del sums
        if not name.startswith("shared"):
            measure(case, "whole", tokens, whole_call(case, *whole_inputs(tokens, tokens)), None)
        torch.cuda.empty_cache()
    module, prefix = ("full", "") if case.terms < 4 else ("cubic", "cubic_")
    for kernel in (f"{prefix}build_kernel", f"{prefix}read_kernel"):
        usage = spills(f"triton_{module}_kernels", kernel)
        print(f"{kernel}: registers/spills/shared {usage}", flush=True)
    return 0 if good else 1


def run_exact() -> int:
    """The matmul ceiling and the fastest exact backend at each length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    a, b = (normal(8192, 8192, seed=seed) for seed in range(2))
    print("ROW", json.dumps({"ceiling": 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9}))
    for tokens in TOKENS:
        tensors = whole_inputs(tokens, tokens)
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
            try:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    ms = milliseconds(
                        lambda t=tensors: torch.nn.functional.scaled_dot_product_attention(*t)
                    )
            except Exception as error:
                print(f"exact {tokens} {backend}:", one_line(error), flush=True)
                continue
            row = {"exact": tokens, "backend": backend.split("_")[0].lower(), "ms": ms}
            print("ROW", json.dumps(row), flush=True)
    return 0


def start(name: str, seconds: float) -> tuple[list[dict[str, object]], bool]:
    """Run one group in a process of its own: its rows, and whether all was well."""
    command = [sys.executable, __file__, "--group", name]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
        )
        output, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as expired:
        raw = expired.stdout or b""
        output = raw.decode() if isinstance(raw, bytes) else raw
        output, failed = output + f"\n{name}: cut off after {seconds:.0f} s", True
    lines = output.splitlines()
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    # A compiler's complaint may be thousands of lines; what it is about stands at its end.
    told = [line[:240] for line in lines if line and not line.startswith("ROW ")]
    for line in told if len(told) <= 12 else [*told[:4], "…", *told[-8:]]:
        print(f"  {line}", flush=True)
    return rows, not failed


def table_row(
    row: dict[str, object], exact: dict[int, tuple[str, float]], ceiling: float
) -> tuple[str, float]:
    """A row of the table and its speed-up over exact attention."""
    graph, expected, tokens = row["graph"], row["expected"], int(str(row["tokens"]))
    backend, exact_ms = exact.get(tokens, ("none", float("nan")))
    speedup = exact_ms / float(str(graph or row["ms"]))
    tflops = float(str(row["tflops"]))
    shown = "-" if graph is None else f"{graph:.3f}"
    return (
        f"| {row['mode']} | {row['terms']} | {row['path']} | {tokens:,} | {row['ms']:.3f} "
        f"| {shown} | {exact_ms:.3f} ({backend}) | {speedup:.2f} | {tflops:.0f} "
        f"| {tflops / ceiling:.0%} | {row['peak']:.0f} "
        f"| {'-' if expected is None else f'{expected:.0f}'} |"
    ), speedup


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="markdown table to write")
    parser.add_argument("--seconds", type=float, default=330.0, help="time limit")
    parser.add_argument("--groups", default=",".join(CASES), help="which cases, by name")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU: nothing to measure")
        return 0
    reason = unavailable("cuda")
    if reason:
        print(f"no measurement: {reason}")
        return 0
    if arguments.group:
        try:
            return run_exact() if arguments.group == "exact" else run_group(arguments.group)
        except Exception as error:
            print(one_line(error))
            return 1
    started = time.monotonic()
    triton = __import__("triton")
    name = torch.cuda.get_device_properties(0).name
    machine = f"{name}, torch {torch.__version__}, triton {triton.__version__}"
    lines = [
        f"Taylor attention on {machine}; {HEADS} heads, d = {HEAD_DIM}, bf16.",
        "",
        "| mode | P | path | tokens | ms | ms (graph) | exact ms | speed-up | useful TFLOP/s "
        "| of matmul | peak MiB | estimate MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print(machine, flush=True)
    rows, failed = start("exact", 60)[0], False
    ceiling = float(str(next((row["ceiling"] for row in rows if "ceiling" in row), "nan")))
    exact: dict[int, tuple[str, float]] = {}
    for row in rows:
        if "exact" in row:
            tokens, found = int(str(row["exact"])), (str(row["backend"]), float(str(row["ms"])))
            if tokens not in exact or found[1] < exact[tokens][1]:
                exact[tokens] = found
    print(f"matmul ceiling {ceiling:.0f} TFLOP/s, exact {exact}", flush=True)
    for group in arguments.groups.split(","):
        left = arguments.seconds - (time.monotonic() - started)
        if left < 10:
            print(f"left out for time: {group}")
            continue
        print(f"[{time.monotonic() - started:5.1f}s] {group}: {CASES[group]}", flush=True)
        rows, good = start(group, left)
        failed |= not good
        for row in rows:
            line, speedup = table_row(row, exact, ceiling)
            lines.append(line)
            print(f"  {line}", flush=True)
            result = f"taylor_{group}_speedup_{row['tokens']}"
            if row["path"] == "whole" and result in RESULTS:
                print(f"RESULT {result} {speedup:.3f}", flush=True)
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("done", "with failures" if failed else "", f"{time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
