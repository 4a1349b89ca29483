"""Attention by tiles in Triton on a GPU: right against float64, then timed against exact.

Attention has Flux's shape: 24 heads, d = 128, bf16, 512 tokens of text and the image tokens of
1024², 2048² and 4096² pictures. Exact attention is the fastest of torch's own backends. The model
is `gpu_flux_model`, of Flux.1's shape with random weights. Every group runs in a process of its
own, so that a crash of one leaves the others; checks run side by side, times alone. Without an
NVIDIA GPU the program says so and ends.

    PYTHONPATH=<folder that holds attnscope> python benchmarks/gpu_tiled.py --out table.md
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attnscope.attention.structured import structured_qkv
from attnscope.attention.taylor.triton_support import unavailable
from attnscope.attention.tiled import triton_attend, triton_job, triton_pool
from attnscope.attention.tiled.attend import Attended, tiled_attention
from attnscope.attention.tiled.options import Options
from attnscope.attention.tiled.triton_attend import tiled_attention_triton
from attnscope.attention.tiled.triton_plan import Config, default_config
from attnscope.attention.token_layout import TokenLayout

RESULTS = (
    "tiled_speedup_4608",
    "tiled_speedup_16896",
    "tiled_speedup_66048",
    "tiled_flux_speedup_2048",
    "tiled_flux_speedup_4096",
)

HEADS, HEAD_DIM, TEXT = 24, 128, 512
SCALE = HEAD_DIM**-0.5
SIDES = (64, 128, 256)
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
CONFIGS = {
    "1 tile": Config(),
    "1 tile, 3 stages": Config(stages=3),
    "2 tiles": Config(together=2, warps=8, stages=3),
    "2 tiles, 128 registers": Config(together=2, warps=8, stages=2, registers=128),
}
NMSE_BOUND = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 1e-9}
STARTED = time.monotonic()


def say(*words: object) -> None:
    print(*words, flush=True)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def milliseconds(call: Callable[[], object], target_ms: float = 150.0) -> float:
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
    return statistics.median(begin.elapsed_time(finish) for begin, finish in events)


def graph_milliseconds(call: Callable[[], object]) -> float:
    """The same from a CUDA graph, without the host's part; NaN where capture fails."""
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
        say("CUDA graph:", one_line(error))
        torch.cuda.synchronize()
        return float("nan")


def nmse(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).square().sum() / wanted.square().sum())


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        yield


def best_backend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, label: str
) -> tuple[str, float]:
    """The fastest of torch's backends, and its ms."""
    times: dict[str, float] = {}
    for name in BACKENDS:
        try:
            with backend(name):
                times[name] = milliseconds(lambda: sdpa(query, key, value))
        except Exception as error:
            say(f"{label} {name}:", one_line(error))
    shown = ", ".join(f"{name.split('_')[0].lower()} {ms:.3f} ms" for name, ms in times.items())
    say(f"{label}: {shown}")
    name = min(times, key=lambda key: times[key])
    return name, times[name]


def heads_of(
    layout: TokenLayout, heads: int, dtype: torch.dtype, width: int = HEAD_DIM, seed: int = 0
) -> list[torch.Tensor]:
    """Query, key and value: smooth along the sequence, so that tiles have means and spreads."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    made = []
    for factor in (2.0, 1.0, 1.0):
        smooth = torch.nn.functional.interpolate(
            normal(1, heads * width, 16), size=layout.tokens, mode="linear"
        )
        x = smooth.view(1, heads, width, layout.tokens).transpose(-1, -2)
        made.append(((x + 0.5 * normal(*x.shape)) * factor).to(dtype).contiguous())
    return made


# Checks ----------------------------------------------------------------------------------------

FULL_GRID = TokenLayout(TEXT, ((64, 64),))
RAGGED = TokenLayout(77, ((37, 51), (20, 30)))
ODD = TokenLayout(64, ((64, 72),))


@dataclass(frozen=True, slots=True)
class Check:
    """One call against the torch path in float64."""

    layout: TokenLayout
    dtype: torch.dtype = torch.bfloat16
    options: Options = field(default_factory=Options)
    config: Config | None = None
    width: int = HEAD_DIM

    def run(self, name: str) -> bool:
        query, key, value = heads_of(self.layout, 2, self.dtype, self.width)
        scale = self.width**-0.5
        every = torch.arange(self.layout.tokens, device=query.device)

        def call(mass: bool) -> Attended:
            return tiled_attention_triton(
                query, key, value, scale, self.layout, self.options,
                log_mass_rows=every if mass else None, config=self.config,
            )  # fmt: skip

        found, again, with_mass = call(False), call(False), call(True)
        wanted = tiled_attention(
            query.double(), key.double(), value.double(), scale, self.layout, self.options,
            log_mass_rows=every,
        )  # fmt: skip
        exact = sdpa_scaled(query, key, value, scale)
        assert with_mass.log_mass is not None and wanted.log_mass is not None
        errors = nmse(found.out, wanted.out), nmse(with_mass.out, wanted.out)
        mass = float((with_mass.log_mass.double() - wanted.log_mass).abs().max())
        same = torch.equal(found.out, again.out)
        bound = NMSE_BOUND[self.dtype]
        if self.options.top_k:
            # Roundings can change which of two nearly equal tiles is picked.
            bound = max(bound, 1e-3)
        right = same and all(error <= bound for error in errors)
        say(
            "PASS" if right else "FAIL",
            f"{name}: NMSE {errors[0]:.1e}, with log mass {errors[1]:.1e} (bound {bound:.0e}),",
            f"log mass within {mass:.1e}, against exact {nmse(found.out, exact):.1e}",
            f"(definition {nmse(wanted.out, exact):.1e}),",
            "equal bits" if same else "BITS DIFFER",
        )
        return right


def sdpa_scaled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=scale
    )


CHECKS = {
    **{name: Check(FULL_GRID, config=config) for name, config in CONFIGS.items()},
    "ragged, two grids": Check(RAGGED),
    "16 keys a block, ragged": Check(RAGGED, options=Options(block=16)),
    "16 keys a block": Check(FULL_GRID, options=Options(block=16)),
    "8 picks": Check(FULL_GRID, options=Options(top_k=8)),
    "odd rows": Check(ODD),
    "odd rows, 2 tiles": Check(ODD, config=CONFIGS["2 tiles"]),
    "text in the loop": Check(FULL_GRID, config=Config(text_in_kernel=True)),
    "8 picks, 2 tiles": Check(FULL_GRID, options=Options(top_k=8), config=CONFIGS["2 tiles"]),
    "order 0, no correction": Check(
        RAGGED, options=Options(first_order=False, correction=False, radius=0)
    ),
    "all exact": Check(TokenLayout(100, ((24, 40),)), options=Options(radius=5)),
    "fp16, ragged": Check(RAGGED, torch.float16),
    "fp32, ragged": Check(RAGGED, torch.float32),
    "d = 64": Check(FULL_GRID, width=64),
}


def structured_error() -> None:
    """NMSE against exact on the structured set, of the kernels and of the definition."""
    side = 128
    for kind, spread in itertools.product(("content", "positional"), (2.0, 4.0)):
        made = structured_qkv(kind, spread, heads=1, rows=side, columns=side, seed=1)
        text = made.query.shape[2] - side * side
        place = made.ids[text:, 1] * side + made.ids[text:, 2]
        order = torch.cat([torch.arange(text), text + torch.argsort(place)])
        query, key, value = (
            x[:, :, order].to("cuda", torch.bfloat16) for x in (made.query, made.key, made.value)
        )
        layout = TokenLayout(text, ((side, side),))
        exact = torch.cat(
            [sdpa_scaled(rows, key, value, made.scale) for rows in query.split(2048, 2)], 2
        )
        found = tiled_attention_triton(query, key, value, made.scale, layout, Options()).out
        say(f"structured {kind}, std {spread:g}, 128²: NMSE to exact {nmse(found, exact):.2e}")


# Attention -------------------------------------------------------------------------------------


def phases(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    config: Config,
) -> Iterator[tuple[str, float, float]]:
    """Name, ms and useful TFLOP/s of each phase over all heads."""
    options = Options()
    out = torch.empty_like(query)
    job = triton_job.make_job(query, key, value, out, None, SCALE, layout, options, config)
    table, groups = job.tables, list(triton_job.head_runs(job))
    tiles, tokens, text = table.tiles, layout.tokens, layout.text_tokens
    width = HEAD_DIM

    def timed(name: str, flop: float, call: Callable[[], object]) -> tuple[str, float, float]:
        ms = milliseconds(call)
        return name, ms, flop * HEADS / ms / 1e9

    yield timed("text queries, SDPA", 4 * text * tokens * width, lambda: sdpa(
        query[:, :, :text], key, value
    ))  # fmt: skip
    pooled = [triton_pool.pool_tiles(job, *some) for some in groups]
    yield timed("pooling", 4 * tiles * 64 * width**2, lambda: [
        triton_pool.pool_tiles(job, *some) for some in groups
    ])  # fmt: skip
    firsts = [first for first, _ in groups]

    def spreads() -> list[triton_pool.Spread]:
        return [
            triton_pool.spreads(job, first, one) for first, one in zip(firsts, pooled, strict=True)
        ]

    spread = spreads()
    yield timed("spread", 6 * tiles * 13 * width**2, spreads)
    exact = table.exact

    def weigh() -> list[torch.Tensor]:
        return [triton_attend.weigh(job, p, s, exact) for p, s in zip(pooled, spread, strict=True)]

    weights = weigh()
    yield timed("weights", 4 * tiles**2 * width, weigh)
    terms = [triton_attend.add_terms(w, p) for w, p in zip(weights, pooled, strict=True)]
    yield timed("weights · C", 2 * tiles**2 * width**2 / table.shared, lambda: [
        triton_attend.add_terms(w, p) for w, p in zip(weights, pooled, strict=True)
    ])  # fmt: skip

    def loop(with_job: triton_job.Job) -> None:
        for first, p, s, t in zip(firsts, pooled, spread, terms, strict=True):
            triton_attend.loop(with_job, first, p, s, t, exact, None, skip_text=True)

    near = float(table.exact.sum()) / tiles * 64
    flop = tiles * 64 * (4 * (text + near + tiles) * width + 4 * width**2)
    yield timed("loop", flop, lambda: loop(job))
    for name, other in CONFIGS.items():
        if other == config:
            continue
        try:
            changed = triton_job.make_job(
                query, key, value, out, None, SCALE, layout, options, other
            )
            yield timed(f"(loop with {name})", flop, lambda job=changed: loop(job))
        except Exception as error:
            say(f"loop with {name}:", one_line(error))


def measure_attention(side: int) -> None:
    layout = TokenLayout(TEXT, ((side, side),))
    tokens = layout.tokens
    query, key, value = heads_of(layout, HEADS, torch.bfloat16)
    name, _ = best_backend(query, key, value, f"exact {tokens}")
    short = name.split("_")[0].lower()
    best_backend(query[:, :, :TEXT], key, value, f"text queries {tokens}")
    flop = 4 * tokens**2 * HEAD_DIM * HEADS
    base = default_config(torch.bfloat16)
    for label, config, options in (
        ("default", base, Options()),
        ("order 0", base, Options(first_order=False)),
        ("16 keys a block", base, Options(block=16)),
        ("8 picks", None, Options(top_k=8)),
    ):
        try:

            def call(o: Options = options, c: Config | None = config) -> object:
                return tiled_attention_triton(query, key, value, SCALE, layout, o, config=c)

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            ms = milliseconds(call)
            graph = graph_milliseconds(call) if label == "default" else float("nan")
            with backend(name):
                again = milliseconds(lambda: sdpa(query, key, value))
            best = min(ms, graph) if graph == graph else ms
            if label == "default":
                say(f"RESULT tiled_speedup_{tokens} {again / best:.3f}")
            say(
                f"ROW | {tokens:,} | {label} | {ms:.3f} | {graph:.3f} | {again:.3f} ({short}) | "
                f"{again / best:.2f} | {flop / again / 1e9:.0f} | {peak / 2**20:.0f} |"
            )
        except Exception as error:
            say(f"{label} {tokens}:", one_line(error))
            torch.cuda.empty_cache()
    for phase, ms, tflops in phases(query, key, value, layout, base):
        say(f"PHASE | {tokens:,} | {phase} | {ms:.3f} | {tflops:.0f} |")


# Model -----------------------------------------------------------------------------------------


def measure_model(pixels: int) -> None:
    from gpu_flux_model import FluxShaped

    side = pixels // 16
    layout = TokenLayout(TEXT, ((side, side),))
    with torch.inference_mode():
        model = FluxShaped(torch.bfloat16, "cuda")
        inputs = model.inputs(side, side, TEXT)
        query, key, value = heads_of(layout, HEADS, torch.bfloat16)
        name, _ = best_backend(query, key, value, f"exact {layout.tokens}")
        del query, key, value
        short = name.split("_")[0].lower()

        def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with backend(name):
                return sdpa(q, k, v)

        def tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return tiled_attention_triton(q, k, v, SCALE, layout, Options()).out

        def none(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return v

        def forward_ms(attention: Callable[..., torch.Tensor]) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            model.forward(inputs, attention)
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end)

        for attention in (tiled, exact):
            forward_ms(attention)
        pairs = [(forward_ms(exact), forward_ms(tiled)) for _ in range(3)]
        without = forward_ms(none)
        exact_ms, tiled_ms = (statistics.median(times) for times in zip(*pairs, strict=True))
        wanted, found = model.forward(inputs, exact), model.forward(inputs, tiled)
        say(f"RESULT tiled_flux_speedup_{pixels} {exact_ms / tiled_ms:.3f}")
        say(
            f"MODEL | {pixels}² ({layout.tokens:,}) | {exact_ms:.0f} ({short}) | {tiled_ms:.0f} | "
            f"{exact_ms / tiled_ms:.2f} | {without:.0f} | "
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} |"
        )
        say(f"pairs {pairs}; output NMSE {nmse(found, wanted.double()):.1e} (random weights)")


# Groups ----------------------------------------------------------------------------------------


def run_group(group: str) -> int:
    kind, _, name = group.partition(":")
    if kind == "check":
        return 0 if CHECKS[name].run(name) else 1
    if kind == "structured":
        structured_error()
    if kind == "attention":
        measure_attention(int(name))
    if kind == "model":
        measure_model(int(name))
    return 0


def start_group(group: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--group", group]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def finish_group(group: str, process: subprocess.Popen[str], seconds: float) -> list[str]:
    """What a group printed; it is ended after so many seconds."""
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        output += f"\n{group}: ended after its time"
    lines = output.splitlines()
    if process.returncode:
        lines.append(f"FAIL group {group}: exit {process.returncode}")
        lines = lines[-40:]
    for line in lines:
        place = (
            "" if line.startswith("RESULT") else f"[{time.monotonic() - STARTED:5.0f}s] {group}: "
        )
        say(place + line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="markdown table to write")
    parser.add_argument("--seconds", type=float, default=280.0, help="time limit")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--only", help="groups to run, by their beginnings, comma-separated")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU: nothing to measure")
        return 0
    reason = unavailable("cuda")
    if reason:
        print(f"no measurement: {reason}")
        return 0
    if arguments.group:
        return run_group(arguments.group)
    groups = [f"check:{name}" for name in CHECKS] + ["structured:"]
    alone = [f"attention:{side}" for side in SIDES] + ["model:2048", "model:4096"]
    wanted = tuple((arguments.only or "check,structured,attention,model").split(","))
    properties = torch.cuda.get_device_properties(0)
    machine = f"{properties.name}, torch {torch.__version__}"
    say(machine)

    def left() -> float:
        return arguments.seconds - (time.monotonic() - STARTED)

    lines: list[str] = []
    beside = [group for group in groups if group.startswith(wanted)]
    started = [(group, start_group(group)) for group in beside]
    for group, process in started:
        lines += finish_group(group, process, left())
    for group in alone:
        if group.startswith(wanted):
            if left() < 10:
                lines.append(f"FAIL left out for time: {group}")
                say(lines[-1])
                continue
            lines += finish_group(group, start_group(group), left())
        write(arguments.out, machine, lines)
    failed = [line for line in lines if line.startswith("FAIL")]
    say(f"[{time.monotonic() - STARTED:5.0f}s] done, {len(failed)} failures")
    return 1 if failed else 0


def write(out: Path | None, machine: str, lines: list[str]) -> None:
    if out is None:
        return

    def rows(mark: str) -> list[str]:
        return [line.removeprefix(mark + " ") for line in lines if line.startswith(mark + " ")]

    text = [
        f"Tiled attention on {machine}; {HEADS} heads, d = {HEAD_DIM}, bf16.", "",
        "| tokens | what | ms | ms (graph) | exact ms | speed-up | exact TFLOP/s | peak MiB |",
        "|---|---|---|---|---|---|---|---|", *rows("ROW"), "",
        "| tokens | phase | ms | useful TFLOP/s |", "|---|---|---|---|", *rows("PHASE"), "",
        "| picture (tokens) | exact ms | tiled ms | speed-up | without attention ms | peak GiB |",
        "|---|---|---|---|---|---|", *rows("MODEL"), "",
        *rows("PASS"), *rows("FAIL"), *(line for line in lines if line.startswith("structured")),
    ]  # fmt: skip
    out.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
