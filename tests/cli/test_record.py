"""The record of a run's machine, also if several processes share it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


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
