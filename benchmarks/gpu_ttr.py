"""Attention students on a GPU: right against float64, then timed against exact, and trained.

Attention has Flux's shape: 24 heads, d = 128, bf16, 512 tokens of text and the image tokens of
2048² and 4096² pictures. Exact attention is the fastest of torch's own backends, timed in turn
with the student. Training is what an update costs: the teacher's masses, prediction and loss of as
many queries as the settings say, gradients and the optimizer's step. Without an NVIDIA GPU the
program says so and ends.

``ttr_speedup_N``: exact over the residual student's serving, at N tokens.
``ttr_updates_per_second_N``: updates of one layer's residual student.

    PYTHONPATH=<folder that holds attnscope> python benchmarks/gpu_ttr.py
"""

from __future__ import annotations

import argparse
import gc
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu_tiled import backend, best_backend, milliseconds, nmse, say, sdpa

from attnscope.attention.settings.ttr import TtrSettings
from attnscope.attention.taylor.triton_support import unavailable
from attnscope.attention.token_layout import TokenLayout
from attnscope.attention.ttr.build import build_student
from attnscope.attention.ttr.loss import LossOptions, loss
from attnscope.attention.ttr.student import Rows, Student, StudentOptions, Target
from attnscope.attention.ttr.teacher import log_mass

RESULTS = (
    "ttr_speedup_16896",
    "ttr_speedup_66048",
    "ttr_updates_per_second_16896",
    "ttr_updates_per_second_66048",
)

SIDES, TEXT, HEADS, HEAD_DIM = (128, 256), 512, 24, 128
SCALE = HEAD_DIM**-0.5
NMSE_BOUND = 1e-4
"""Of bf16 serving to float64 of the same student: rounded inputs, weights and output."""

TOO_LARGE = "TOO LARGE"

SETTINGS = TtrSettings()


def student_of(kind: str, heads: int) -> Student:
    options = StudentOptions(
        kind, heads, HEAD_DIM, SETTINGS.features, SETTINGS.window_radius, SETTINGS.landmarks
    )
    return build_student(options, torch.Generator().manual_seed(0)).to("cuda")


def tensors(layout: TokenLayout, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (3, 1, heads, layout.tokens, HEAD_DIM)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype).unbind(0)


def check(kind: str) -> list[str]:
    """Serving in bf16 against prediction in float64, of the same student and tensors."""
    layout = TokenLayout(77, ((64, 53), (40, 40)))
    query, key, value = tensors(layout, 2, torch.bfloat16)
    student = student_of(kind, 2)
    index = torch.arange(layout.tokens, device="cuda")
    student.start(Rows(query[:, :, ::8], index[::8], key, value, SCALE, layout))
    out = student.serve(query, key, value, SCALE, layout, SETTINGS.serve_chunk, index[::9])
    wide = Rows(query.double(), index, key.double(), value.double(), SCALE, layout)
    with torch.no_grad():
        made = student.double().predict(wide, 512)
    error = nmse(out.out, made.out)
    bound = NMSE_BOUND if kind != "scan" else 10 * NMSE_BOUND
    verdict = "right" if error < bound else TOO_LARGE
    told = [f"{kind}: bf16 against float64, NMSE {error:.2g}, {verdict}"]
    if out.log_mass is not None and made.log_mass is not None:
        off = (out.log_mass - made.log_mass[:, :, ::9]).abs().max()
        told.append(f"{kind}: log mass off by {float(off):.2g} at most")
    return told


def speed(side: int, kind: str) -> list[str]:
    """Serving against exact attention."""
    layout = TokenLayout(TEXT, ((side, side),))
    query, key, value = tensors(layout, HEADS, torch.bfloat16)
    student = student_of(kind, HEADS)

    def served() -> object:
        return student.serve(query, key, value, SCALE, layout, SETTINGS.serve_chunk)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    served()
    held = torch.cuda.max_memory_allocated() - before
    estimate = student.serving_bytes(tuple(query.shape), query.dtype, layout, SETTINGS.serve_chunk)
    exact_ms, ratios, mine = [], [], []
    name, _ = best_backend(query, key, value, f"{layout.tokens} tokens")
    for _ in range(5):
        with backend(name):
            exact_ms.append(milliseconds(lambda: sdpa(query, key, value)))
        mine.append(milliseconds(served))
        ratios.append(exact_ms[-1] / mine[-1])
    told = [
        f"{kind}, {layout.tokens} tokens: exact ({name}) {statistics.median(exact_ms):.3f} ms, "
        f"student {statistics.median(mine):.3f} ms, ratio {statistics.median(ratios):.3f}; held "
        f"{held / 2**20:.0f} MB, estimated {estimate / 2**20:.0f} MB"
    ]
    if kind == "residual":
        told.append(f"RESULT ttr_speedup_{layout.tokens} {statistics.median(ratios):.3f}")
        told += kernel_times(served)
    return told


def kernel_times(call: Callable[[], object], most: int = 12) -> list[str]:
    """The kernels of a call that take longest, in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    rows = sorted(trace.key_averages(), key=lambda row: -row.device_time_total)[:most]
    return [f"  {row.device_time_total:9.1f} us {row.count:4d} x {row.key[:90]}" for row in rows]


def updates(side: int, kind: str) -> list[str]:
    """Updates of a layer's student."""
    layout = TokenLayout(TEXT, ((side, side),))
    query, key, value = tensors(layout, HEADS, torch.bfloat16)
    exact = sdpa(query, key, value)
    student = student_of(kind, HEADS)
    optimizer = torch.optim.AdamW(student.parameters(), lr=SETTINGS.learning_rate)
    options = LossOptions(SETTINGS.huber_beta, SETTINGS.cosine_weight, SETTINGS.far_weight)
    generator = torch.Generator("cuda").manual_seed(1)

    def update() -> None:
        index = torch.randperm(layout.tokens, generator=generator, device="cuda")
        index = index[: SETTINGS.batch_queries]
        some = query[:, :, index]
        target = Target(exact[:, :, index].float(), log_mass(some, key, SCALE))
        rows = Rows(some.float(), index, key.float(), value.float(), SCALE, layout)
        found = loss(student.predict(rows, SETTINGS.training_chunk), target, options)
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()

    update()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    update()
    held = torch.cuda.max_memory_allocated() - before
    estimate = student.training_bytes(
        tuple(query.shape), SETTINGS.batch_queries, SETTINGS.training_chunk
    )
    ms = milliseconds(update)
    told = [
        f"{kind}, {layout.tokens} tokens: an update takes {ms:.2f} ms; held "
        f"{held / 2**20:.0f} MB, float32 copies of key and value included, estimated "
        f"{estimate / 2**20:.0f} MB without them"
    ]
    if kind == "residual":
        told.append(f"RESULT ttr_updates_per_second_{layout.tokens} {1e3 / ms:.1f}")
    return told


class Report:
    """What is said, on the terminal and in a file, each line at once."""

    def __init__(self, out: Path | None, seconds: float) -> None:
        self._out, self._end = out, time.monotonic() + seconds
        self.failed = False
        if out:
            out.write_text("", encoding="utf-8")

    def part(self, name: str, work: Callable[[], list[str]]) -> None:
        """One part: what it tells, or why it failed; cut off where the time is over."""
        left = self._end - time.monotonic()
        if left < 5:
            self.failed = True
            self._tell([f"{name}: left out for time"])
            return
        before = time.monotonic()

        def cut_off(*_: object) -> None:
            raise TimeoutError(f"cut off after {left:.0f} s")

        signal.signal(signal.SIGALRM, cut_off)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            lines = work()
        except Exception:
            # What is left runs all the same: time on a GPU is short.
            self.failed = True
            lines = [f"{name}: FAILED", traceback.format_exc()]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._tell([*lines, f"{name}: {time.monotonic() - before:.1f} s"])
        gc.collect()
        torch.cuda.empty_cache()

    def _tell(self, lines: list[str]) -> None:
        self.failed |= any(line.endswith(TOO_LARGE) for line in lines)
        for line in lines:
            say(line)
        if self._out:
            with self._out.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", default="residual,kernel,scan", help="students, by commas")
    parser.add_argument("--out", type=Path, help="text file to write, part by part")
    parser.add_argument("--seconds", type=float, default=150.0, help="time limit")
    options = parser.parse_args()
    missing = unavailable("cuda") if torch.cuda.is_available() else "there is no NVIDIA GPU"
    if missing:
        say(missing)
        return 0
    report = Report(options.out, options.seconds)
    kinds = options.kinds.split(",")
    for kind in kinds:
        # The founding form's sums take minutes where the others take milliseconds.
        sides = SIDES[:1] if kind == "scan" else SIDES
        report.part(f"{kind} check", partial(check, kind))
        for side in sides:
            report.part(f"{kind} speed {side}", partial(speed, side, kind))
            report.part(f"{kind} updates {side}", partial(updates, side, kind))
    return 1 if report.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
