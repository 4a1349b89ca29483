"""What watching costs the sampler: sampling time with telemetry on over the same without it.

The same small Flux (64×64 latent, 1,024 image and 32 text tokens) is sampled by ComfyUI's own
sampler in one process, in rounds of four: unwatched, watched, watched, unwatched, and the next
the other way round, so that a steady drift of the machine's speed falls on both sides alike. Each
round gives a ratio, and the median of the ratios counts. A sampling has 20 steps, as users' do;
quartiles and the processors' time are printed because the rest of that drift is more than what is
to be measured. The attention is the same on both sides.

That drift can hide the ratio. So each comparison also prints an account of the same samplings: the
time inside our hooks on the sampler's thread, and with it the link's processor time, over the time
of the unwatched samplings. It leaves out what our work does to the caches and to the other core.

``telemetry_overhead``: the monitor at its defaults, each layer measured at every fourth step,
against the plain model. The receiver, in a process of its own, does no more than a receiver must:
it unpacks a batch, looks the sequence numbers up and answers them. A further line tells what the
recorder and outbox cost by themselves (``quality_samples=0``).
``telemetry_overhead_all``: Taylor attention with every diagnostic that there is: besides those of
the monitor the error against exact attention, the same after shaping, and the log mass. The other
side is the same Taylor attention, told to send nothing. Further lines tell what either costs where
every layer is measured at every step (``quality_every=1``).
``telemetry_overhead_with_server``: recorder and outbox (``quality_samples=0``) with the real
server, which validates, stores and publishes every event on the same cores.

    COMFYUI_DIR=… python benchmarks/telemetry_overhead.py
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "comfyui"), str(ROOT / "tools")]

RESULTS = (
    "telemetry_overhead",
    "telemetry_overhead_all",
    "telemetry_overhead_with_server",
)

SIDE = 64
STEPS = 20
ROUNDS = 9
"""Each result then takes three to four minutes."""

TAYLOR = {"P": 3, "feature_projection": 32, "qk_norm_power": 0.5}
"""A step about as short as exact attention's, of which the diagnostics are the largest share.
Shaping gives the effective errors something to compare."""
DEFAULT = frozenset(["qk_std", "qk_p01", "qk_p50", "qk_p99", "q_norm", "k_norm", "attn_ms"])
ALL = DEFAULT | frozenset(
    ["nmse", "cosine", "nmse_eff", "cosine_eff", "log_mass_bias", "denom_min", "denom_bad_frac"]
)

# Left to itself, glibc gives memory back to the system after every large tensor of a plain run
# and not where a small one of ours lies above it, which makes the plain side up to 10 % slower.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}

_EVENT = re.compile(rb'"run_id":"([0-9a-f]{32})","seq":(\d+)')


async def _receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """HTTP as far as our sender speaks it."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            if head.startswith(b"GET"):
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                    b"Connection: close\r\n\r\n"
                )
                await reader.read()
                return
            body = await reader.readexactly(int(length[1]))
            if b"content-encoding: gzip" in head.lower():
                body = zlib.decompress(body, wbits=31)
            durable = {run.decode(): seq.decode() for run, seq in _EVENT.findall(body)}
            pairs = ",".join(f'"{run}":{seq}' for run, seq in durable.items())
            answer = f'{{"durable":{{{pairs}}}}}'.encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(answer), answer)
            )
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _serve() -> None:
    server = await asyncio.start_server(_receive, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def bare_receiver() -> Iterator[str]:
    """The receiver that costs next to nothing; its address."""
    command = [sys.executable, __file__, "--receiver"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.terminate()


@contextmanager
def real_server() -> Iterator[str]:
    """The real server on a port and data of its own; its address."""
    from serve import start_server
    from toolkit import free_port

    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        service = start_server(port, data=Path(folder) / "data", log=Path(folder) / "log")
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            service.stop()


class Account:
    """Seconds that the sampler's thread spends in our hooks, whatever else the machine does.

    A hook calls ComfyUI, which calls the next hook: each moment counts for whoever works in it.
    """

    def __init__(self) -> None:
        self.ours = 0.0
        self._in_ours = False
        self._since = 0.0
        self._undo: list[tuple[Any, str, Any]] = []

    def _turn(self, now: float, ours: bool) -> bool:
        """Whose work comes now; answers whose it was."""
        before = self._in_ours
        if before:
            self.ours += now - self._since
        self._in_ours = ours
        self._since = time.perf_counter()
        return before

    def wrap(self, work: Callable[..., Any], ours: bool) -> Callable[..., Any]:
        """The same function, its time counted as ours or not.

        The account's own work is between the two readings of the clock, and counts for nobody.
        """
        clock, turn = time.perf_counter, self._turn

        def counted(*args: Any, **kwargs: Any) -> Any:
            before = turn(clock(), ours)
            try:
                return work(*args, **kwargs)
            finally:
                turn(clock(), before)

        return counted

    def _replace(self, owner: Any, name: str, new: Callable[..., Any]) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def _count(self, owner: Any, name: str, ours: bool) -> None:
        self._replace(owner, name, self.wrap(getattr(owner, name), ours))

    def _count_hook(self, hook: type) -> None:
        """A hook is handed what it stands before: the sampler, the model, exact attention."""
        call = self.wrap(hook.__call__, True)  # type: ignore[operator]

        def counted(hook_: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
            return call(hook_, _Theirs(inner, self), *args, **kwargs)

        self._replace(hook, "__call__", counted)

    @contextmanager
    def kept(self) -> Iterator[Account]:
        """Count for the length of the context."""
        from attnscope.attention.taylor import attend, variant
        from attnscope.comfy_plugin import hooks

        for hook in (hooks.SamplerHook, hooks._Evaluation, hooks._ModelCall, hooks.AttentionHook):
            self._count_hook(hook)
        self._count(hooks._Callback, "__call__", True)
        # Taylor attention is no telemetry, but for the mass that is made for it alone.
        self._count(variant, "taylor_attention", False)
        self._count(attend, "log_mass", True)
        self._count(variant, "shape", False)
        try:
            yield self
        finally:
            for owner, name, old in reversed(self._undo):
                setattr(owner, name, old)


class _Theirs:
    """What a hook stands before, with its time taken off ours."""

    def __init__(self, inner: Any, account: Account) -> None:
        self._inner = inner
        self._call = account.wrap(inner, False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Taken(NamedTuple):
    """Seconds of one sampling."""

    clock: float
    processors: float
    """Of this process."""
    hooks: float
    """In our hooks, on the sampler's thread."""
    link: float
    """Of the processor, on the link's thread."""


@dataclass
class Figures:
    """Samplings, watched and not, two of each a round."""

    on: list[Taken]
    off: list[Taken]

    def median(self, side: list[Taken], which: str) -> float:
        return statistics.median(getattr(item, which) for item in side)

    def ratios(self, which: str) -> list[float]:
        """Quartiles of the rounds' ratios."""
        on, off = ([getattr(item, which) for item in side] for side in (self.on, self.off))
        rounds = range(0, len(on), 2)
        return statistics.quantiles(sum(on[i : i + 2]) / sum(off[i : i + 2]) for i in rounds)

    def more(self, which: str) -> float:
        """Seconds by which the watched side's median is above the other's."""
        return self.median(self.on, which) - self.median(self.off, which)


class Sampler:
    """Samples the small Flux watched and not."""

    def __init__(self, url: str, folder: Path, variant: str, settings: dict[str, Any]) -> None:
        from flux import small_flux

        from attnscope.attention.settings import settings_model
        from attnscope.comfy_plugin import hooks
        from attnscope.comfy_plugin.config import Config
        from attnscope.comfy_plugin.plugin import Plugin

        self.plugin = Plugin(folder / "spool")
        hooks.get_plugin = lambda: self.plugin
        self.config = Config(url=url)
        self.plain = small_flux(mlp_ratio=4.0)
        chosen = settings_model(variant)(**settings)
        self.quality_every: int = chosen.quality_every  # type: ignore[attr-defined]
        self.watched = hooks.attach(self.plain, hooks.Plan(variant, chosen, "", self.config))
        silent = hooks.Plan(variant, chosen, "", Config(url=url, disabled=True))
        # What the monitor leaves when it is told to send nothing is the plain model.
        self.unwatched = hooks.attach(self.plain, silent)

    def link_seconds(self) -> float:
        """Of the processor, that the link's thread has taken; it outlasts a run by a second."""
        thread = self.plugin.link._thread
        if thread is None or thread.ident is None:
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))

    def time(self, model: Any) -> Taken:
        """Sample once.

        What the link does when the sampler has returned is waited for, and counted but for the
        clock.
        """
        from flux import sample

        # Both sides begin with the model loaded, the threads awake and the allocator warm.
        sample(self.plain, side=SIDE, steps=1, tokens=(32, 32))
        self.plugin.link.ensure()
        link, account = self.link_seconds(), Account()
        wall, processors = time.perf_counter(), time.process_time()
        with account.kept():
            sample(model, side=SIDE, steps=STEPS, tokens=(32, 32))
        wall = time.perf_counter() - wall
        self.wait_until_sent()
        processors = time.process_time() - processors
        return Taken(wall, processors, account.ours, self.link_seconds() - link)

    def wait_until_sent(self) -> None:
        """Let the link finish what the last sampling left it."""
        channel = self.plugin.channel(self.config)
        deadline = time.monotonic() + 60.0
        while channel.has_work or len(channel.spool):
            assert time.monotonic() < deadline, "the receiver did not keep up"
            time.sleep(0.002)

    def measure(self, rounds: int) -> Figures:
        """Samplings in turn."""
        for model in (self.unwatched, self.watched):
            self.time(model)
        on: list[Taken] = []
        off: list[Taken] = []
        watched, unwatched = (self.watched, on), (self.unwatched, off)
        for index in range(rounds):
            outer, inner = (watched, unwatched) if index % 2 else (unwatched, watched)
            for model, times in (outer, inner, inner, outer):
                times.append(self.time(model))
        return Figures(on, off)


@contextmanager
def watched_metrics() -> Iterator[dict[str, int]]:
    """At how many steps of a run each layer had a metric at least; known when the context ends."""
    from attnscope.comfy_plugin.recorder import ClosedStep

    least: dict[str, int] = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    build = ClosedStep.build

    def listening(self: ClosedStep, seq: int) -> Any:
        closed = build(self, seq)
        layers = closed.layers
        for name, column in layers.metrics.items():
            for layer, value in zip(layers.layer, column, strict=True):
                counts[name, closed.run_id, layer] += value is not None
        return closed

    ClosedStep.build = listening  # type: ignore[method-assign]
    try:
        yield least
    finally:
        ClosedStep.build = build  # type: ignore[method-assign]
        for (name, _, _), count in counts.items():
            least[name] = min(count, least.get(name, count))


def compare(
    what: str,
    receiver: Callable[[], Any],
    rounds: int,
    variant: str = "exact",
    diagnostics: frozenset[str] = frozenset(),
    **settings: Any,
) -> float:
    """Measure against a receiver, and print both sides.

    Args:
        what: for people.
        receiver: of the events.
        rounds: of samplings.
        variant: that runs on both sides.
        diagnostics: metrics that every layer has to have had as often as it is its turn.
        settings: of the variant.
    """
    with receiver() as url, tempfile.TemporaryDirectory() as folder, watched_metrics() as seen:
        sampler = Sampler(url, Path(folder), variant, settings)
        figures = sampler.measure(rounds)
    turns = STEPS // sampler.quality_every
    missing = sorted(name for name in diagnostics if seen.get(name, 0) < turns)
    assert not missing, f"not measured everywhere: {missing}"
    for which in ("clock", "processors"):
        on, off = (figures.median(side, which) for side in (figures.on, figures.off))
        low, middle, high = figures.ratios(which)
        print(
            f"{what}, {which}: watched {on / STEPS * 1e3:.1f} ms a step, unwatched "
            f"{off / STEPS * 1e3:.1f} ms a step, median ratio of {rounds} rounds {middle:.4f} "
            f"(quartiles {low:.4f} and {high:.4f})",
            flush=True,
        )
    hooks, link = figures.more("hooks"), figures.more("link")
    plain = figures.median(figures.off, "clock")
    print(
        f"{what}, account: {hooks / STEPS * 1e3:.2f} ms a step more in our hooks, "
        f"{link / STEPS * 1e3:.2f} ms of the link's thread, of {plain / STEPS * 1e3:.1f} ms "
        f"unwatched: {hooks / plain:.4f} and {(hooks + link) / plain:.4f}",
        flush=True,
    )
    return figures.ratios("clock")[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--receiver", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of four samplings each")
    parser.add_argument("--threads", type=int, help="torch's threads; all cores by default")
    options = parser.parse_args()
    if options.receiver:
        asyncio.run(_serve())
        return
    if not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    logging.disable(logging.INFO)
    shim = runpy.run_path(str(ROOT / "tools" / "torchvision_shim" / "sitecustomize.py"))
    from comfyui import ensure_comfyui

    from attnscope.comfy_plugin.demo.train import import_comfy

    import_comfy(Path(os.environ.get("COMFYUI_DIR") or ensure_comfyui()))
    assert shim
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    only = os.environ.get("BENCH_ONLY")
    if only in (None, RESULTS[0]):
        ratio = compare(
            "monitor at its defaults", bare_receiver, options.rounds, diagnostics=DEFAULT
        )
        compare("recorder alone", bare_receiver, 2, quality_samples=0)
        compare(
            "every layer at every step",
            bare_receiver,
            2,
            diagnostics=DEFAULT,
            quality_every=1,
        )
        print(f"RESULT {RESULTS[0]} {ratio:.4f}")
    if only in (None, RESULTS[1]):
        ratio = compare(
            "every diagnostic",
            bare_receiver,
            options.rounds,
            "taylor",
            diagnostics=ALL,
            **TAYLOR,
        )
        compare(
            "every diagnostic of every layer at every step",
            bare_receiver,
            2,
            "taylor",
            diagnostics=ALL,
            quality_every=1,
            **TAYLOR,
        )
        print(f"RESULT {RESULTS[1]} {ratio:.4f}")
    if only in (None, RESULTS[2]):
        ratio = compare("real server", real_server, options.rounds, quality_samples=0)
        print(f"RESULT {RESULTS[2]} {ratio:.4f}")


if __name__ == "__main__":
    main()
