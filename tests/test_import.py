"""Imports load no heavy packages, and parts of the package only what they need; see benchmarks/import_time.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import lightning_difftune

HEAVY = {
    *("torch", "lightning", "torchvision", "diffusers", "transformers", "peft", "timm", "torchmetrics", "numpy"),
    *("torch_fidelity", "matplotlib", "PIL", "jsonargparse", "huggingface_hub", "cv2", "pandas", "scipy", "rich"),
}


def imported(statement):
    """The heavy packages that a fresh interpreter has after a statement."""
    code = f"import sys, json; {statement}; print(json.dumps([m for m in sys.modules if '.' not in m]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return HEAVY & set(json.loads(done.stdout))


@pytest.mark.parametrize("statement", ["import lightning_difftune", "from lightning_difftune.cli import main"])
def test_package_and_command_import_nothing_heavy(statement):
    assert imported(statement) == set()


def test_help_and_version_import_nothing_heavy():
    assert (
        imported(
            "from lightning_difftune.cli import main; sys.stdout = sys.stderr; main(['--help']); "
            "main(['--version']); sys.stdout = sys.__stdout__"
        )
        == set()
    )


def test_the_method_needs_torch_alone():
    parts = "objective, schedules, losses, weightings, retention_targets, diffusion, sampling, tuners, ideal_denoiser"
    assert imported(f"from lightning_difftune import {parts}") <= {"torch", "numpy"}


def test_modules_leave_what_only_some_need():
    """Pipelines, adapters and OpenCV are imported where they are used. (Lightning and torchmetrics bring the rest.)"""
    everything = ", ".join(lightning_difftune.__all__)
    assert not imported(f"from lightning_difftune import {everything}") & {"diffusers", "peft", "cv2", "pandas"}


def test_every_public_name_is_there():
    assert sorted(lightning_difftune.__all__) == sorted(lightning_difftune._HOMES)
    for name in lightning_difftune.__all__:
        assert getattr(lightning_difftune, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lightning_difftune.Nothing
