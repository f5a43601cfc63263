"""Every benchmark starts: its imports work, and its options are parsed. The GPU benchmark runs on tiny shapes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny import tiny_config, tiny_weights, write_pictures

from lightning_difftune.cli import main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
COMMANDS = sorted(
    path.name for path in BENCHMARKS.glob("*.py") if path.name != "harness.py" and not path.name.startswith("gpu_")
)


def test_the_gpu_benchmark_keeps_what_was_measured_before_an_error(tmp_path) -> None:
    """And runs from the root of the repository without installation."""
    command = [sys.executable, BENCHMARKS / "gpu.py", "--tiny", "--output", tmp_path, "--parts", "authors", "sampling"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=BENCHMARKS.parent, env=environment
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"authors", "sampling"}
    assert not [row for row in rows if "error" in row]
    assert all(row["pictures_per_s"] > 0 for row in rows if "compiling" not in row["name"])


def test_a_part_that_is_stuck_loses_only_itself(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu = importlib.import_module("gpu")

    def parts(size):
        yield "quick", lambda: {"ms": 1.0}
        yield "wrong", lambda: 1 / 0
        yield "stuck", lambda: time.sleep(60)

    monkeypatch.setitem(gpu.PARTS, "xl", parts)
    rows, _ = gpu.run_part("xl", "tiny", tmp_path, 1.0, "fork")
    assert [row["name"] for row in rows] == ["quick", "wrong", "the rest of this part"]
    assert rows[0]["ms"] == 1.0
    assert "ZeroDivisionError" in rows[1]["error"]
    assert "its limit" in rows[2]["error"]


@pytest.mark.slow
def test_all_parts_of_the_gpu_benchmark_run_on_tiny_shapes(tmp_path, monkeypatch) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--tiny", "--output", tmp_path, "--budget", "1000"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert not [row for row in rows if "error" in row]
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert {row["part"] for row in rows} == set(importlib.import_module("gpu").PARTS)


def test_guidance_is_measured_once_for_each_scale(tmp_path) -> None:
    tiny_weights(tmp_path)
    write_pictures(tmp_path / "pictures", 9)
    config = tiny_config({"sampler": {"num_inference_steps": 4}}, {"batch_size": 4}, {"max_steps": 3}, tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 0
    run = tmp_path / "run/lightning_logs/version_0"
    options = ["--num_samples", "12", "--batch_size", "6", "--output", tmp_path / "guidance.json"]
    found = []
    for scales in ["1", "2"]:
        command = [
            sys.executable,
            BENCHMARKS / "guidance.py",
            run,
            "--scales",
            scales,
            "--domain_scales",
            "2",
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / "guidance.json").read_text())["results"]["version_0"])
    first, second = found
    assert list(first) == ["1", "2 domain"]
    assert list(second) == ["1", "2 domain", "2"]
    assert {name: second[name] for name in first} == first
    assert len({values["fd_efficientnet_lite0"] for values in second.values()}) == 3, "each scale has its own samples"


@pytest.mark.parametrize("kept", sorted((BENCHMARKS.parent / "results").rglob("guidance.json")), ids=str)
def test_the_pages_commands_may_add_to_the_kept_figures_of_guidance(kept, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    count = 1020 if "photos32" in kept.parts else 1000
    options = SimpleNamespace(output=kept, num_samples=count)
    assert importlib.import_module("guidance").earlier(options).keys() == json.loads(kept.read_text())["results"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("file", COMMANDS)
def test_it_says_what_it_measures(file: str) -> None:
    run = subprocess.run(
        [sys.executable, BENCHMARKS / file, "--help"], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert f"python benchmarks/{file}" in run.stdout, "its command comes in its description"


def test_a_study_on_a_card_does_its_first_runs_with_all_seeds_first(monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    in_order = importlib.import_module("study_on_gpu").in_order
    assert in_order(["full", "dt", "lora"], [0, 1], first=2) == [
        *(("full", 0), ("dt", 0), ("full", 1), ("dt", 1)),
        *(("lora", 0), ("lora", 1)),
    ]


def test_the_archive_of_a_study_holds_what_is_finished(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    write_archive = importlib.import_module("study_on_gpu").write_archive
    done, begun = (
        SimpleNamespace(result_path=Path(f"{name}.json"), grid_path=Path(f"{name}.png"), folder=Path(name))
        for name in ("done", "begun")
    )
    for path in (done.result_path, done.grid_path):
        path.write_text("{}")
    begun.folder.mkdir()
    (begun.folder / "log.txt").write_text("step 1")
    write_archive(tmp_path / "study.tar.gz", [done, begun])
    with tarfile.open("study.tar.gz") as archive:
        assert archive.getnames() == ["done.json", "done.png", "begun/log.txt"]
