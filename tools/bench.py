"""`make bench`: runs the benchmarks, each in a process of its own.

    python tools/bench.py                    all of them
    python tools/bench.py --only <name>      the one that prints `RESULT <name> <value>`
    python tools/bench.py --list             the names

A benchmark is a file in benchmarks/ that declares ``RESULTS = ("name", …)`` and prints one
``RESULT <name> <value>`` line for each.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from comfyui import ensure_comfyui
from setup import ensure_venv
from toolkit import ROOT, Failure, say, start

BENCHMARKS = ROOT / "benchmarks"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark file and the results that it promises."""

    path: Path
    results: tuple[str, ...]


def declared_results(path: Path) -> tuple[str, ...]:
    """The names in a file's RESULTS, read without running it; none where it declares none."""
    for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
        targets = (
            node.targets if isinstance(node, ast.Assign)
            else [node.target] if isinstance(node, ast.AnnAssign)
            else []
        )  # fmt: skip
        if any(isinstance(target, ast.Name) and target.id == "RESULTS" for target in targets):
            try:
                names = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            except ValueError:
                names = None
            if isinstance(names, (tuple, list)) and all(isinstance(n, str) for n in names):
                return tuple(names)
            raise Failure(
                f"{path.name}: RESULTS must be a plain tuple of names, such as "
                '("overhead_percent",): mend it and run again.'
            )
    return ()


def discover(folder: Path = BENCHMARKS) -> list[Benchmark]:
    """Every benchmark; a result that two files promise is a failure."""
    found: list[Benchmark] = []
    owners: dict[str, Path] = {}
    for path in sorted(folder.glob("*.py")):
        results = declared_results(path)
        if not results:
            continue
        for name in results:
            if name in owners:
                raise Failure(
                    f"{owners[name].name} and {path.name} both declare {name!r} in RESULTS: "
                    "rename one."
                )
            owners[name] = path
        found.append(Benchmark(path, results))
    return found


def choose(benchmarks: list[Benchmark], only: str | None) -> list[Benchmark]:
    """All, or the one that prints the named result."""
    if only is None:
        return benchmarks
    chosen = [benchmark for benchmark in benchmarks if only in benchmark.results]
    if not chosen:
        names = sorted(name for benchmark in benchmarks for name in benchmark.results)
        raise Failure(
            f"no benchmark prints {only!r}: choose one of {', '.join(names) or '(none yet)'}."
        )
    return chosen


def missing_results(promised: tuple[str, ...], printed: list[str]) -> list[str]:
    """The promised names for which no ``RESULT <name> <value>`` line was printed."""
    seen = {
        words[1]
        for words in (line.split() for line in printed)
        if len(words) >= 3 and words[0] == "RESULT"
    }
    return [name for name in promised if name not in seen]


def run_benchmark(benchmark: Benchmark, python: Path, only: str | None) -> str | None:
    """Run one with its output shown; returns what is wrong with it, if anything."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "COMFYUI_DIR": str(ensure_comfyui())}
    if only is not None:
        # A file with several results may save itself the others.
        env["BENCH_ONLY"] = only
    printed: list[str] = []
    with subprocess.Popen(
        [str(python), str(benchmark.path)],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            printed.append(line)
    if process.returncode != 0:
        return f"{benchmark.path.name} ended with status {process.returncode}"
    missing = missing_results((only,) if only else benchmark.results, printed)
    if missing:
        return f"{benchmark.path.name} printed no RESULT for {', '.join(missing)}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench.py")
    parser.add_argument("--only", metavar="NAME", help="the result that is wanted")
    parser.add_argument("--list", action="store_true", help="print the names of all results")
    options = parser.parse_args()
    benchmarks = choose(discover(), options.only or None)
    if options.list:
        for benchmark in benchmarks:
            print("\n".join(benchmark.results))
        return 0
    python = ensure_venv()
    problems: list[str] = []
    for benchmark in benchmarks:
        say(f"running {benchmark.path.relative_to(ROOT).as_posix()}")
        began = time.monotonic()
        problem = run_benchmark(benchmark, python, options.only or None)
        say(f"{benchmark.path.name}: {time.monotonic() - began:.0f} s")
        if problem:
            problems.append(problem)
    if problems:
        raise Failure(f"{'; '.join(problems)}: see above.")
    return 0


if __name__ == "__main__":
    start(main)
