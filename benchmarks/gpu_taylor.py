"""Taylor attention's Triton paths on a GPU: right against float64, then timed against exact.

Shapes are Flux's: 24 heads, d = 128, bf16, at 4,608, 16,896 and 66,048 tokens (1024², 2048² and
4096² pictures with their text). Exact attention is the fastest of torch's own backends. Each
part reports its own failure and the rest goes on. Without an NVIDIA GPU it says so and ends.

    PYTHONPATH=<folder that holds attnscope> python benchmarks/gpu_taylor.py --out table.md
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from attnscope.attention.taylor import triton_full, triton_stream
from attnscope.attention.taylor.features import feature_dim
from attnscope.attention.taylor.triton_full import FullConfig, default_config
from attnscope.attention.taylor.triton_memory import full_memory_bytes, streaming_memory_bytes
from attnscope.attention.taylor.triton_plan import lifted_rows
from attnscope.attention.taylor.triton_stream import StreamConfig
from attnscope.attention.taylor.triton_support import kernels, unavailable

RESULTS = (
    "taylor_p3_speedup_16896",
    "taylor_p4_speedup_16896",
    "taylor_p3_speedup_66048",
    "taylor_p4_speedup_66048",
)

TOKENS = (4_608, 16_896, 66_048)
TUNE_TOKENS = 16_896
HEADS = 24
HEAD_DIM = 128
BLOCKS = 4
NMSE_BOUND = 1e-5
STARTED = time.monotonic()


@dataclass(frozen=True, slots=True)
class Case:
    """One way of splitting a head: sub-heads of ``head_dim``, each with ``value_dim`` values."""

    name: str
    terms: int
    head_dim: int = HEAD_DIM // BLOCKS
    value_dim: int = HEAD_DIM // BLOCKS

    @property
    def useful_flop_per_token(self) -> int:
        """Of one sub-head, build and read, by the count of unique monomials."""
        return 4 * feature_dim(self.head_dim, self.terms) * self.value_dim


CASES = (
    Case("4 independent blocks", 3),
    Case("4 independent blocks", 4),
    Case("4 blocks, shared V", 3, value_dim=HEAD_DIM),
    Case("4 blocks, shared V", 4, value_dim=HEAD_DIM),
    Case("whole head", 3, head_dim=HEAD_DIM, value_dim=HEAD_DIM),
)


def say(*words: object) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f}s]", *words, flush=True)


def spent(budget: float) -> bool:
    return time.monotonic() - STARTED > budget


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
        say("  CUDA graph:", one_line(error))
        torch.cuda.synchronize()
        return None


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def inputs(case: Case, tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)
    # A sub-head's values are the same tensor in every block where V is shared.
    sub_heads = HEADS * (HEAD_DIM // case.head_dim)
    root = case.head_dim**-0.25

    def normal(columns: int) -> torch.Tensor:
        return torch.randn(
            1, sub_heads, tokens, columns, device="cuda", generator=generator, dtype=torch.bfloat16
        )

    return normal(case.head_dim) * root, normal(case.head_dim) * root, normal(case.value_dim)


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
    good = True
    # fp32 kernels take long to compile; the aims' cases stand for all.
    bounds = {torch.bfloat16: NMSE_BOUND} | ({torch.float32: 1e-10} if case in CASES[:2] else {})
    for dtype, bound in bounds.items():
        try:
            generator = torch.Generator("cuda").manual_seed(1)

            def normal(
                *shape: int, generator: torch.Generator = generator, dtype: torch.dtype = dtype
            ) -> torch.Tensor:
                return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

            root = case.head_dim**-0.25
            query = normal(1, 2, 333, case.head_dim) * root
            key = normal(1, 2, 1777, case.head_dim) * root
            value = normal(1, 2, 1777, case.value_dim)
            weights = torch.rand(1, 1, 1777, device="cuda", generator=generator) + 0.1
            weights[..., 5:50] = 0
            wanted = reference(query, key, value, case.terms)
            w_value = value.double() * weights.double()[..., None]
            w_num, _ = reference(query, key, w_value, case.terms)
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
            right = same and all(error <= bound for error in errors)
            good &= right
            say(
                "PASS" if right else "FAIL",
                f"{name} {case} {dtype}: NMSE num/den {errors[0]:.1e}/{errors[1]:.1e},",
                f"weighted {errors[2]:.1e}/{errors[3]:.1e}, bound {bound:.0e},",
                "equal bits" if same else "BITS DIFFER",
            )
        except Exception as error:
            good = False
            say(f"FAIL {name} {case} {dtype}:", one_line(error))
    return good


def matmul_ceiling() -> float:
    """TFLOP/s of an 8192³ bf16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9


def exact_times() -> dict[int, tuple[str, float]]:
    """Fastest exact backend and its ms, by tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    best: dict[int, tuple[str, float]] = {}
    for tokens in TOKENS:
        query, key, value = inputs(Case("exact", 1, HEAD_DIM, HEAD_DIM), tokens)
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
            try:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    ms = milliseconds(
                        lambda q=query, k=key, v=value: (
                            torch.nn.functional.scaled_dot_product_attention(q, k, v)
                        )
                    )
            except Exception as error:
                say(f"exact {tokens} {backend}:", one_line(error))
                continue
            tflops = 4 * tokens**2 * HEAD_DIM * HEADS / ms / 1e9
            say(f"exact {tokens} {backend}: {ms:.3f} ms, {tflops:.0f} TFLOP/s")
            if tokens not in best or ms < best[tokens][1]:
                best[tokens] = (backend.split("_")[0].lower(), ms)
    return best


def full_configs(case: Case) -> list[tuple[str, FullConfig]]:
    """The default, then variations of the build's and of the read's options."""
    base = default_config(case.head_dim, case.value_dim, case.terms, torch.bfloat16)
    build: list[dict[str, int]] = [
        {"block_t": t, "build_warps": w, "build_stages": s}
        for t, w, s in (
            (64, 8, 2), (64, 4, 2), (64, 4, 3), (128, 8, 2), (128, 8, 3), (128, 4, 2), (32, 4, 3)
        )
    ]  # fmt: skip
    read: list[dict[str, int]] = [
        {"block_m": m, "read_warps": w, "read_stages": s}
        for m, w, s in (
            (128, 8, 2), (128, 8, 4), (128, 4, 3), (64, 4, 3), (64, 4, 4), (256, 8, 3),
            (256, 16, 3),
        )
    ]  # fmt: skip
    # Smaller tiles waste fewer rows on products that are not sorted, larger ones run faster.
    pairs = [(base.chunk, base.lifts), (base.chunk * 2, base.lifts)]
    if case.value_dim <= 64:
        pairs += [(base.chunk, base.lifts * 2), (base.chunk, base.lifts // 2)]
    if case.terms >= 4:
        pairs += [(base.chunk // 2, base.lifts), (base.chunk // 2, base.lifts * 2)]
    shapes: list[dict[str, int]] = [{"chunk": c, "lifts": n} for c, n in pairs]
    if case not in CASES[:2]:
        # The cases that the aims are about get most of the time.
        build, read = build[:3], read[:3]
    found = [("both", replace(base, **shape)) for shape in shapes]
    found += [("build", replace(base, **change)) for change in build]
    found += [("read", replace(base, **change)) for change in read]
    return found


def spills(module_name: str, kernel_name: str) -> str:
    """Registers, spills and shared memory of what a kernel compiled to last."""
    try:
        kernel = getattr(kernels(module_name), kernel_name)
        compiled = list(kernel.device_caches[torch.cuda.current_device()][0].values())[-1]
        return (
            f"{compiled.n_regs} regs, {compiled.n_spills} spills, "
            f"{compiled.metadata.shared} B shared"
        )
    except Exception as error:
        return f"no resource usage ({one_line(error)[:60]})"


def tune_full(case: Case, budget: float) -> FullConfig:
    """The fastest tile sizes at `TUNE_TOKENS`, build and read apart; prints every one."""
    query, key, value = inputs(case, TUNE_TOKENS)
    base = default_config(case.head_dim, case.value_dim, case.terms, torch.bfloat16)
    best = base
    fastest = {"build": float("inf"), "read": float("inf")}
    shape_total = float("inf")
    for part, option in full_configs(case):
        if spent(budget):
            say("  tuning ends here: its time is up")
            break
        # What the shapes' round found best carries over to the later rounds.
        config = option if part == "both" else replace(
            option, chunk=best.chunk, lifts=best.lifts
        )  # fmt: skip
        times: dict[str, float] = {}
        try:
            statistics = triton_full.build(key, value, case.terms, weights=None, config=config)
            if part in ("both", "build"):
                times["build"] = milliseconds(
                    lambda c=config: triton_full.build(
                        key, value, case.terms, weights=None, config=c
                    ),
                    40,
                )
            if part in ("both", "read"):
                times["read"] = milliseconds(
                    lambda c=config, s=statistics: triton_full.read(
                        query, s, case.terms, case.value_dim, config=c
                    ),
                    40,
                )
        except Exception as error:
            say(f"  {part} {config}: {one_line(error)}")
            torch.cuda.synchronize()
            continue
        shown = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
        say(
            f"  {shown}: {config}",
            f"[build {spills('triton_full_kernels', 'build_kernel')};"
            f" read {spills('triton_full_kernels', 'read_kernel')}]",
        )
        if part == "both":
            if sum(times.values()) < shape_total:
                shape_total, best, fastest = sum(times.values()), config, dict(times)
        elif times[part] < fastest[part]:
            fastest[part] = times[part]
            names = (
                ("block_t", "build_warps", "build_stages")
                if part == "build"
                else ("block_m", "read_warps", "read_stages")
            )
            best = replace(best, **{name: getattr(config, name) for name in names})
    say(f"best of {case}: {best}")
    return best


def measure_full(
    case: Case, config: FullConfig, exact: dict[int, tuple[str, float]], ceiling: float
) -> list[str]:
    """Table rows of one case at every length."""
    rows = []
    sub_heads = HEADS * (HEAD_DIM // case.head_dim)
    for tokens in TOKENS:
        try:
            query, key, value = inputs(case, tokens)

            def call(
                q: torch.Tensor = query, k: torch.Tensor = key, v: torch.Tensor = value
            ) -> object:
                return triton_full.sums(q, k, v, case.terms, config=config)

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            expected = full_memory_bytes(
                sub_heads, tokens, tokens, case.head_dim, case.value_dim, case.terms,
                torch.bfloat16, config=config,
            )  # fmt: skip
            ms = milliseconds(call)
            graph = graph_milliseconds(call)
            rows.append(row(case, "full", tokens, ms, graph, exact, ceiling, peak, expected))
        except Exception as error:
            say(f"full {case} at {tokens}:", one_line(error))
            torch.cuda.empty_cache()
    return rows


def row(
    case: Case,
    path: str,
    tokens: int,
    ms: float,
    graph: float | None,
    exact: dict[int, tuple[str, float]],
    ceiling: float,
    peak: int,
    expected: int,
) -> str:
    sub_heads = HEADS * (HEAD_DIM // case.head_dim)
    best = min(ms, graph or ms)
    tflops = case.useful_flop_per_token * sub_heads * tokens / best / 1e9
    backend, exact_ms = exact.get(tokens, ("none", float("nan")))
    name = f"taylor_p{case.terms}_speedup_{tokens}"
    if path == "full" and case.name == CASES[0].name and name in RESULTS:
        print(f"RESULT {name} {exact_ms / best:.3f}", flush=True)
    say(
        f"{path} {case.name} P={case.terms} N={tokens}: {ms:.3f} ms (graph {graph or 0:.3f}),",
        f"{exact_ms / best:.2f}x {backend}, {tflops:.0f} useful TFLOP/s of {ceiling:.0f},",
        f"{peak / 2**20:.0f} MiB (estimate {expected / 2**20:.0f})",
    )
    shown = f"{graph:.3f}" if graph else "-"
    return (
        f"| {case.name} | {case.terms} | {path} | {tokens:,} | {ms:.3f} | {shown} | "
        f"{exact_ms:.3f} ({backend}) | {exact_ms / best:.2f} | {tflops:.0f} | "
        f"{tflops / ceiling:.0%} | {peak / 2**20:.0f} | {expected / 2**20:.0f} |"
    )


def measure_streaming(exact: dict[int, tuple[str, float]], ceiling: float) -> list[str]:
    """Table rows of the streaming path, at the shortest length: it is not made to be fast."""
    rows = []
    tokens = TOKENS[0]
    for case, config in (
        (CASES[0], StreamConfig()),
        (CASES[0], StreamConfig(store_bf16=True)),
        (CASES[1], StreamConfig(store_bf16=True)),
        (CASES[1], StreamConfig(store_bf16=True, block_f=128, block_m=128, warps=8)),
        (CASES[4], StreamConfig(store_bf16=True)),
    ):
        try:
            query, key, value = inputs(case, tokens)

            def call(
                q: torch.Tensor = query,
                k: torch.Tensor = key,
                v: torch.Tensor = value,
                c: StreamConfig = config,
                terms: int = case.terms,
            ) -> object:
                return triton_stream.sums(q, k, v, terms, config=c)

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            expected = streaming_memory_bytes(
                query.shape[1], tokens, case.head_dim, case.value_dim, case.terms, query.dtype,
                config=config,
            )  # fmt: skip
            say(
                f"  {config} [build {spills('triton_stream_kernels', 'build_chunk_kernel')};"
                f" read {spills('triton_stream_kernels', 'read_chunk_kernel')}]"
            )
            ms = milliseconds(call)
            path = "streaming, bf16 sums" if config.store_bf16 else "streaming"
            rows.append(row(case, path, tokens, ms, None, exact, ceiling, peak, expected))
        except Exception as error:
            say(f"streaming {case}:", one_line(error))
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="markdown table to write")
    parser.add_argument("--seconds", type=float, default=400.0, help="time limit, roughly")
    parser.add_argument("--no-tune", action="store_true", help="default tile sizes only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU: nothing to measure")
        return 0
    reason = unavailable("cuda")
    if reason:
        print(f"no measurement: {reason}")
        return 0
    triton = sys.modules.get("triton") or __import__("triton")
    properties = torch.cuda.get_device_properties(0)
    machine = f"{properties.name}, torch {torch.__version__}, triton {triton.__version__}"
    say(machine)

    lines = [
        f"Taylor attention on {machine}; {HEADS} heads, d = {HEAD_DIM}, bf16.",
        "",
        "| mode | P | path | tokens | ms | ms (graph) | exact ms | speed-up | useful TFLOP/s "
        "| of matmul | peak MiB | estimate MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    notes = ["", "Tile sizes:", ""]

    def write() -> None:
        if arguments.out:
            arguments.out.write_text("\n".join(lines + notes) + "\n", encoding="utf-8")

    failed = False
    ceiling = float("nan")
    exact: dict[int, tuple[str, float]] = {}
    try:
        ceiling = matmul_ceiling()
        say(f"matmul ceiling {ceiling:.0f} TFLOP/s")
        exact = exact_times()
    except Exception:
        traceback.print_exc()
    for case in CASES:
        failed |= not check("full", triton_full.sums, case)
    for case in (*CASES[:2], Case("blocks of 8", 5, 8, 16)):
        failed |= not check("streaming", triton_stream.sums, case)
    for index, case in enumerate(CASES):
        if spent(arguments.seconds):
            say(f"left out for time: {case}")
            continue
        try:
            # Each case may use an equal share of what is left, the streaming path too.
            now = time.monotonic() - STARTED
            share = now + (arguments.seconds - now) / (len(CASES) + 1 - index)
            base = default_config(case.head_dim, case.value_dim, case.terms, torch.bfloat16)
            rows = lifted_rows(case.head_dim, case.terms, base)
            say(f"full {case}: R {feature_dim(case.head_dim, case.terms)}, lifted rows {rows}")
            config = base if arguments.no_tune else tune_full(case, share)
            lines += measure_full(case, config, exact, ceiling)
            notes.append(f"- {case.name}, P = {case.terms}: `{config}`")
        except Exception:
            failed = True
            traceback.print_exc()
        torch.cuda.empty_cache()
        write()
    if not spent(arguments.seconds):
        lines += measure_streaming(exact, ceiling)
    write()
    say("done", "with failures" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
