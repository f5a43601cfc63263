"""``difftune plan``: the cost of a config, before it is run."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lightning_difftune.cli.arguments import CommandParser
from lightning_difftune.cli.lightning import ModelReader, causes_of, original
from lightning_difftune.cli.plan.phases import (
    PEAKS,
    UTILISATION,
    Phase,
    Speed,
    keepers_of_weights,
    num_devices,
    phases_of,
)
from lightning_difftune.cli.plan.probe import Costs, Probe, count
from lightning_difftune.cli.plan.shapes import published_shapes
from lightning_difftune.data.building import BATCH_SIZE
from lightning_difftune.errors import ConfigError
from lightning_difftune.files import atomic_write
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.protocols import SupportsEncode

DESCRIPTION = """Say what a config costs before it is run: floating-point operations, memory, disk and hours of its
memory bank, latent cache, training and evaluation. Nothing is trained or written.

For a named accelerator, the hours are the operations over a share of its peak (--utilisation); with `measured`, each
part is timed on this machine. All other options are --config and overrides of its keys, as of `difftune fit`."""


def plan(argv: Sequence[str]) -> None:
    """Print the cost of a run."""
    parser = CommandParser("plan", DESCRIPTION)
    parser.usage = "difftune plan --config FILE [--config OVERLAY ...] [options]"
    parser.add_argument("--device", choices=[*PEAKS, "measured"], default="a100", help="default: a100")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="share of the peak (default: 0.2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    options, rest = parser.parse_known_args(argv)
    if not 0 < options.utilisation <= 1:
        raise ConfigError(f"--utilisation is a share of the peak, in (0, 1], got {options.utilisation}.")
    with published_shapes(with_values=options.device == "measured") as mode:
        reader = ModelReader(rest)
        module: DiffTuningModule = reader.model
        if not isinstance(module, SupportsEncode):
            raise ConfigError(
                f"difftune plan knows Diff-Tuning modules with encode() and encoder_identity(); "
                f"{type(module).__name__} is not one."
            )
        config = reader.composed
        data, precision = config.data.init_args, str(config.trainer.precision or "32-true")
        if hasattr(module, "channels_last"):  # a memory format, which changes no count
            module.channels_last = False
        module.configure_model()
        module.train()
        shape = (data.channels, data.image_size, data.image_size)
        timed = measured(module, data, shape, precision) if options.device == "measured" else None
        costs = count(module, shape, precision, mode)
        speed = timed or Speed.of_data_sheet(options.device, options.utilisation, precision, costs)
        num_targets, num_held_out, reason = sizes(reader)
        found = phases_of(config, module, costs, num_targets, num_held_out)
    memory = Memory.of(costs, data.batch_size, data.latent_cache is not None, keepers_of_weights(config.trainer))
    show(found, costs, speed, memory, num_devices(config.trainer), options.json)
    if reason:
        print(f"The number of pictures is unknown, since they could not be opened: {reason}")


CPU_BATCH = 16
FLOAT = 4  # bytes of float32, the type of weights, gradients and Adam's moments, also under autocast


def measured(module: DiffTuningModule, data: Any, shape: tuple[int, ...], precision: str) -> Speed:
    """This machine's speed, on its GPU if it has one, measured by training the module briefly."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = copy.deepcopy(module).to(device)
    trained.train()
    of_training = Probe(trained, shape, data.batch_size, precision)
    size = BATCH_SIZE if data.build_batch_size == "auto" else data.build_batch_size
    if device.type == "cpu":
        size = min(size, CPU_BATCH)  # larger batches take as long per sample
    return Speed.measured(of_training, Probe(trained, shape, size, precision))


def sizes(reader: ModelReader) -> tuple[int | None, int | None, str]:
    """Numbers of target and held-out pictures or, if their files are not available, the reason.

    Raises:
        ConfigError: If the settings of the data contradict each other, with or without files.
    """
    try:
        data = reader.open_data()
    except Exception as error:  # data sets without files may raise anything
        cause = original(error, [*causes_of(error)])
        if isinstance(cause, ConfigError):
            raise cause from None
        return None, None, str(cause) or type(cause).__name__
    return len(data.target), len(data.val_target) if data.val_target is not None else 0, ""


@dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    weights: float  # of all networks, for building bank and cache, without activations
    kept: float  # weights, gradients, Adam's moments and callbacks' copies of the weights in training
    activations: float  # of a training step's samples
    keepers: tuple[str, ...] = ()  # names of these callbacks

    @classmethod
    def of(cls, costs: Costs, batch_size: int, caches_captions: bool, keepers: Sequence[str] = ()) -> Memory:
        """From the costs of a sample; text encoders leave the device in training if captions are cached."""
        kept = (4 + len(keepers)) * FLOAT * costs.trained + costs.frozen_bytes + costs.teacher_bytes
        kept -= costs.text_bytes if caches_captions else 0
        weights, activations = FLOAT * costs.trained + costs.frozen_bytes, costs.activation_bytes * batch_size
        return cls(weights, kept, activations, tuple(keepers))

    @property
    def most(self) -> float:
        """The maximum of building and training."""
        return max(self.weights, self.kept + self.activations)

    def __str__(self) -> str:
        step = self.kept + self.activations
        *parts, last = "weights", "gradients", "Adam", *self.keepers
        words = (
            f"about {size(step)} per device: {size(self.kept)} for {', '.join(parts)} and {last}, and "
            f"{size(self.activations)} for the activations"
        )
        if step >= self.weights:
            return f"Memory of a training step, {words}."
        return (
            f"Memory, about {size(self.weights)} per device for the weights alone, until bank and cache are made and "
            f"the text encoders leave. Memory of a training step, {words}."
        )


def show(found: Sequence[Phase], costs: Costs, speed: Speed, memory: Memory, devices: int, file: Path | None) -> None:
    """Print the table, and write it as JSON if a file is given."""
    rows: dict[str, dict[str, Any]] = {
        phase.name: {
            "what": phase.what,
            "flops": phase.flops(costs),
            "seconds": phase.seconds(speed, devices),
            "disk_bytes": phase.disk,
        }
        for phase in found
    }
    total = {key: sum(row[key] for row in rows.values()) for key in ("flops", "seconds", "disk_bytes")}
    table = Table(title=f"{speed.name}, {devices} device{'s' if devices > 1 else ''}", title_justify="left")
    for heading in ("", "what", "FLOPs", "time", "disk"):
        table.add_column(heading, justify="left" if heading in ("", "what") else "right")
    for name, row in {**rows, "in all": {"what": "", **total}}.items():
        if name == "in all":
            table.add_section()
        table.add_row(name, row["what"], f"{row['flops']:.2g}", duration(row["seconds"]), size(row["disk_bytes"]))
    console = Console(highlight=False)
    console.soft_wrap = not console.is_terminal  # for a program or a file
    console.print(table)
    console.print(str(memory))
    console.print(
        "Not counted: reading pictures, feature extractors, an annotator whose weights are not here, and waiting of "
        "the device. The hours of a named device are as good as --utilisation is; --device measured times this machine."
    )
    if file is not None:
        content = {"device": speed.name, "devices": devices, "memory_bytes": memory.most, "phases": rows}
        atomic_write(file, (json.dumps(content, indent=1) + "\n").encode())


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best.

    Example:
        >>> duration(42), duration(4200), duration(420_000)
        ('42 s', '1.2 h', '117 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.{1 if seconds < 36_000 else 0}f} h"


def size(count: float) -> str:
    """Bytes in the unit that reads best.

    Example:
        >>> size(0), size(52_000_000), size(3.4e10), size(999_900_000), size(1.2345e12)
        ('', '52 MB', '34 GB', '1 GB', '1,234 GB')
    """
    if count == 0:
        return ""
    amount, unit = (count / 1e9, "GB") if count >= 999.5e6 else (count / 1e6, "MB")
    return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:,.0f} {unit}"
