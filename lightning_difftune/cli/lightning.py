"""The LightningCLI behind ``difftune fit | validate | test | predict``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# Lightning warns of arguments that are passed from Python; passing them is what this module is for.
warnings.filterwarnings("ignore", message="LightningCLI's args parameter")


class DiffTuneCLI(LightningCLI):
    """LightningCLI whose seed and number of classes are set once, for the model and the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what the model and the data must agree on."""
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("data.init_args.num_classes", "model.init_args.num_classes")


def run_lightning(args: Sequence[str], run: bool = True) -> DiffTuneCLI:
    """Run one LightningCLI command, such as ``["fit", "--config", "configs/quickstart.yaml"]``.

    Args:
        args: The command line without the program's name.
        run: Whether to run the command; without, ``args`` has no command and the objects are only instantiated.

    Returns:
        The CLI object, with its ``model``, ``datamodule`` and ``trainer``.
    """
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU, as in the authors' code
    return DiffTuneCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=list(args),
        run=run,
    )
