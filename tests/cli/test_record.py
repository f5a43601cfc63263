"""The record of a run's machine, also if several processes share it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from lightning_difftune.cli.record import SaveRun, class_counts


def test_two_processes_of_the_command_line_train_and_save_one_record(tiny_run: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_difftune", "fit", "--config", str(tiny_run.config)]
    command += ["--trainer.devices", "2", "--trainer.logger.init_args.save_dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.rglob("environment.json")
    assert json.loads(record.read_text())["processes"] == 2
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert "step=3" in checkpoint.name


class Parser:
    """Counts how often it writes the config as YAML, which takes a third of a second with a real one."""

    dumps = 0

    def dump(self, config: Namespace, skip_none: bool) -> str:
        self.dumps += 1
        return f"seed_everything: {config.seed_everything}\n"


@pytest.fixture
def saves(tmp_path: Path) -> tuple[SaveRun, Any]:
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer = SimpleNamespace(
        log_dir=str(tmp_path / "run"), loggers=[], callbacks=[], strategy=strategy, world_size=1, is_global_zero=True
    )
    return SaveRun(Parser(), Namespace(seed_everything=7), save_to_log_dir=False), trainer


def test_the_config_of_all_checkpoints_is_written_once(saves: Any, tmp_path: Path) -> None:
    record, trainer = saves
    record.setup(trainer, None, "fit")
    record.on_train_start(trainer, None)
    checkpoints: list[dict[str, Any]] = [{}, {}]
    for checkpoint in checkpoints:
        record.on_save_checkpoint(trainer, None, checkpoint)
    assert [*checkpoints[0].values(), *checkpoints[1].values()] == 2 * ["seed_everything: 7\n"]
    assert (tmp_path / "run/config.yaml").read_text() == "seed_everything: 7\n"
    assert record.parser.dumps == 1


def test_a_record_that_cannot_be_saved_does_not_stop_the_run(saves: Any, tmp_path: Path) -> None:
    (tmp_path / "run").touch()  # where the folder should be
    record, trainer = saves
    with pytest.warns(UserWarning, match=r"config.yaml could not be saved: .* continues"):
        record.setup(trainer, None, "validate")


def test_classes_of_one_name_are_counted_each() -> None:
    target = SimpleNamespace(labels=lambda: torch.tensor([0, 0, 1, 2]), class_names=["crane", "crane", "heron"])
    counts = class_counts(SimpleNamespace(target=target, num_classes=4))
    assert counts == {"crane (class 0)": 2, "crane (class 1)": 1, "heron": 1, "3": 0}
