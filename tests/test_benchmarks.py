"""Every benchmark starts: what it imports is there, and its options are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name != "harness.py"))
def test_it_says_what_it_measures(file: str) -> None:
    run = subprocess.run(
        [sys.executable, BENCHMARKS / file, "--help"], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert f"python benchmarks/{file}" in run.stdout, "its command comes in its description"
