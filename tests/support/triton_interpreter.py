"""Runs a file of tests in Triton's interpreter, in a process of its own.

The interpreter must be chosen before triton is imported and stays for the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_interpreted(file: Path) -> None:
    """Run the tests of a file that pytest does not collect by its name.

    Raises:
        AssertionError: one of them fails; with what pytest printed.
    """
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTEST_ADDOPTS": "",
        "OMP_NUM_THREADS": "1",
    }
    for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
