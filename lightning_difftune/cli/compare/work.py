"""``python -m lightning_difftune.cli.compare.work FOLDER``: do one run of a study in its own process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_difftune.cli import STOPPED
from lightning_difftune.cli.lightning import DiffTuneCLI, run_lightning
from lightning_difftune.cli.record import circumstances
from lightning_difftune.cli.tuned import averaged_weights, callbacks_with, count_trainable, stop_if_asked
from lightning_difftune.errors import ConfigError, DiffTuneError
from lightning_difftune.files import atomic_write
from lightning_difftune.pictures import to_png
from lightning_difftune.protocols import ChecksModule, Evaluator, SupportsGenerate

GRID = 100  # pictures in a result's sample grid
COLUMNS = 10


def work(folder: Path) -> None:
    """Fit and evaluate the run that a folder describes, and write its result."""
    job = json.loads((folder / "job.json").read_text())
    measures = evaluators(job["evaluate"])
    resume = [] if job["checkpoint"] is None else ["--ckpt_path", job["checkpoint"]]
    record = RunRecord()  # not in the config, so that the run's other commands do not make it
    cli = run_lightning(["fit", "--config", str(folder / "config.yaml"), *resume], callbacks=[record, Checks(measures)])
    stop_if_asked(cli)
    if not cli.trainer.is_global_zero:
        return
    with averaged_weights(cli):
        measured = [measure.evaluate(cli.model) for measure in measures]
        grid = sample_grid(cli)
    convergence = [
        {"monitor": c.monitor, "threshold": c.threshold, "step": c.convergence_step, "leap": c.leap}
        for c in callbacks_with(cli, "convergence_step")
    ]
    content = {
        "name": job["name"],
        "seed": job["seed"],
        "values": final_values(record.history, measures, measured),
        "history": record.history,
        "sudden_convergence": convergence,
        "steps": cli.trainer.global_step,
        "trainable_parameters": count_trainable(cli),
        "fit_seconds": round(record.seconds_of_fit, 2),
        "pictures": pictures_of(cli.datamodule),
        **circumstances(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "digest": job["digest"],
        "identity": job["identity"],
        "files": job["files"],
    }
    if grid is not None:
        atomic_write(folder / "samples.png", grid)
    atomic_write(Path(job["result"]), (json.dumps(content, indent=1) + "\n").encode())


def pictures_of(data: Any) -> dict[str, Any]:
    """How many pictures a run had, and what identifies them, as far as the data say it in their state."""
    state = {} if data is None else data.state_dict()
    found = {key: state[key] for key in ("pictures", "content", "held_out") if key in state}
    return json.loads(json.dumps(found, default=str))  # data of one's own may have anything there


class RunRecord(Callback):
    """Every scalar at every validation, and the seconds of training; both continue when a run is resumed.

    A value that is measured in between, as by ``EWC(every_n_steps=...)``, is recorded as last measured. The seconds
    start at the first batch, so that building a memory bank, which several runs share, is not counted; those after the
    last checkpoint of an interrupted run are not counted either.
    """

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def seconds_of_fit(self) -> float:
        """Seconds of training, validation included."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._seconds, self._since = self.seconds_of_fit, None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the metrics so far, except for the loss of the last training batch."""
        if trainer.sanity_checking:
            return
        for name, value in trainer.callback_metrics.items():
            if not name.startswith("train/"):
                self.history[name].append((trainer.global_step, float(value)))

    def state_dict(self) -> dict[str, Any]:
        """The history and the seconds."""
        return {"history": dict(self.history), "seconds": self.seconds_of_fit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.history = defaultdict(list, {name: list(values) for name, values in state_dict["history"].items()})
        self._seconds, self._since = state_dict["seconds"], None


class Checks(Callback):
    """Says at the start of a run, not at its end, what the evaluators could not measure."""

    def __init__(self, measures: list[Evaluator]) -> None:
        self.measures = measures

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let each evaluator look at the module and its data."""
        for measure in self.measures:
            if isinstance(measure, ChecksModule):
                measure.check(pl_module)


def final_values(
    history: Mapping[str, list[tuple[int, float]]],
    measures: Sequence[Evaluator],
    measured: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    """What a run logged last and its evaluators measured; a measurement goes before what is logged under its name.

    A name that several evaluators have begins with theirs, as in ``SampleQuality-2/precision`` for the second of a
    class.
    """
    kinds = [type(measure).__name__ for measure in measures]
    owners = [
        kind if kinds.count(kind) == 1 else f"{kind}-{kinds[: place + 1].count(kind)}"
        for place, kind in enumerate(kinds)
    ]
    times = Counter(name for found in measured for name in found)
    return {name: points[-1][1] for name, points in history.items()} | {
        name if times[name] == 1 else f"{owner}/{name}": float(value)
        for owner, found in zip(owners, measured, strict=True)
        for name, value in found.items()
    }


def evaluators(named: list[Mapping[str, Any]]) -> list[Evaluator]:
    """The objects given by ``class_path`` and ``init_args``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--evaluate", type=list[Evaluator])
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # its name in version 4
            return parser.instantiate_classes(
                parser.parse_object({"evaluate": [dict(entry) for entry in named]})
            ).evaluate
    except DiffTuneError:
        raise
    except Exception as error:  # constructors may raise anything
        raise ConfigError(f"`evaluate` of the study file cannot be used: {' '.join(str(error).split())}") from error


def sample_grid(cli: DiffTuneCLI) -> bytes | None:
    """PNG of the first hundred samples in rows of ten, if the module generates pictures."""
    if not isinstance(cli.model, SupportsGenerate):
        return None
    from torchvision.utils import make_grid

    with torch.inference_mode(), cli.trainer.precision_plugin.forward_context():
        pictures = torch.cat([cli.model.generate(indices).cpu() for indices in torch.arange(GRID).split(25)])
    grid = make_grid(pictures, nrow=COLUMNS)  # three channels, also for grey pictures
    return to_png(grid[: pictures.shape[1]])


def stop_with_parent() -> None:
    """Send this process SIGTERM when its standard input, the parent's pipe, ends."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """Do the run in the folder on the command line; returns 0, 2 for an input error, 143 after SIGTERM."""
    stop_with_parent()
    try:
        work(Path(sys.argv[1]))
    except DiffTuneError as error:
        print(f"difftune: {error}", file=sys.stderr)
        return 2
    except SIGTERMException:
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
