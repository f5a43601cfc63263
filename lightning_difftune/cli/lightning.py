"""The LightningCLI behind ``difftune fit | validate | test | predict``."""

from __future__ import annotations

import logging
import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace, set_loader
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_difftune.callbacks.preemption import with_defaults
from lightning_difftune.cli.parser import DiffTuneParser, load, part_parser
from lightning_difftune.cli.record import SaveRun, completed, is_file_name
from lightning_difftune.cli.run import Run, entries
from lightning_difftune.cli.run_files import check_checkpoint, newest_checkpoint
from lightning_difftune.errors import ConfigError, DiffTuneError
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.modules.checkpoint_io import write_whole

# Logged by Lightning in every run, but already in our summary and config.yaml.
UNSAID = ("💡 Tip: For seamless cloud", "Seed set to", "TPU available", "`Trainer.fit` stopped: `max_steps")

# Lightning's warnings in every run that need no action.
for message in (
    "LightningCLI's args parameter",
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    "The .*_dataloader. does not have many workers",  # the config says how many
    "The number of training batches .* is smaller than the logging interval",  # which continues across epochs
    "The dirpath has changed from",  # every run has a folder of its own
    "Total length of .* across ranks is zero",  # no held-out pictures, or the bank is complete
    "ReduceLROnPlateau conditioned on metric .* which is not available but strict",  # the module steps it
):
    warnings.filterwarnings("ignore", message=message)
for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
    logging.getLogger(f"lightning.{name}").addFilter(lambda record: not record.getMessage().startswith(UNSAID))

set_loader("yaml", load, exceptions=(yaml.YAMLError,))


class DiffTuneCLI(LightningCLI):
    """LightningCLI in which seed, number of classes and picture size are set once for the model and the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the arguments that must be equal for the model and the data."""
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        for name in ("num_classes", "image_size"):  # only if the model has the argument
            parser.link_arguments(f"data.init_args.{name}", f"model.init_args.{name}")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and check a checkpoint before Lightning opens it."""
        super().parse_arguments(parser, args)
        expand_home(self.config)
        command = self.config.get("subcommand")
        set_seed(self.config[command] if command else self.config)
        settings = self.config[command] if command else Namespace()
        path = settings.get("ckpt_path")
        is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")  # a restarted SLURM job
        if path == "last" or (path is None and command == "fit" and is_requeued):
            # Lightning looks in the folder of the new run, where there is none yet.
            newest = newest_checkpoint(Path(settings.trainer.default_root_dir or "."))
            path = settings["ckpt_path"] = path if newest is None else str(newest)
            if newest is not None:
                rank_zero_info(f"Resuming from {newest}.")
        if path and is_file_name(str(path)):
            settings["ckpt_path"] = str(Run.find(path, saved=True).checkpoint)
            check_checkpoint(Path(settings["ckpt_path"]))

    def instantiate_classes(self) -> None:
        """Create the objects, and raise the original error of a constructor."""
        raised: list[Exception] = []

        def construct(class_type: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return class_type(*args, **kwargs)
            except Exception as error:
                raised.append(error)
                raise

        self.parser.add_instantiator(construct, object)  # after Lightning's own ones for the model and the data
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse's, which lists each type that an argument could have
            cause = original(error, raised)
            if isinstance(cause, DiffTuneError):
                raise cause from cause.__cause__
            raise ConfigError(f"{type(cause).__name__}: {cause}\n--debug shows where it was raised.") from cause

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Create the trainer, with a folder for the run, progress in steps and atomic checkpoints."""
        settings = self._get(self.config_init, "trainer", default={})
        kwargs["logger"] = loggers_of(settings.get("logger"), settings.get("default_root_dir"))
        if settings.get("barebones"):
            kwargs |= {**dict.fromkeys(NOT_BARE), "detect_anomaly": False, "fast_dev_run": False}
            settings["callbacks"] = [c for c in entries(settings.get("callbacks")) if not isinstance(c, Checkpoint)]
        trainer: Any = super().instantiate_trainer(**kwargs)
        if getattr(trainer.strategy, "_start_method", "popen") != "popen":
            raise ConfigError(
                f"trainer.strategy {settings.get('strategy')} starts its processes as a notebook needs it, and they "
                "would not have what the command line made. Set trainer.strategy to ddp."
            )
        trainer.callbacks = with_defaults(trainer.callbacks)
        write_whole(trainer.strategy)
        return trainer


# Lightning refuses these together with `barebones`.
NOT_BARE = (
    "logger",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "num_sanity_val_steps",
    "profiler",
)
LARGEST_SEED = 2**32 - 1


def set_seed(settings: Namespace) -> None:
    """Check the seed, or draw one if it is ``true``, for Lightning, the model and the data."""
    seed = settings.get("seed_everything")
    if seed is True:
        seed = settings["seed_everything"] = secrets.randbelow(LARGEST_SEED)
        for key in ("model.init_args.seed", "data.init_args.seed"):
            if key in settings:
                settings[key] = seed
    elif isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed_everything must be from 0 to {LARGEST_SEED}, got {seed}; true draws one at random.")


def expand_home(settings: Any) -> Any:
    """Expand a leading ``~/`` in all strings of a config, as a shell does on the command line."""
    if isinstance(settings, str):
        return os.path.expanduser(settings) if settings.startswith("~/") else settings
    for key, value in list(settings.items() if isinstance(settings, dict | Namespace) else ()):
        settings[key] = expand_home(value)
    return [expand_home(value) for value in settings] if isinstance(settings, list) else settings


def loggers_of(given: Any, folder: str | None) -> Any:
    """Loggers of a run: those of the config, or by default CSV and, if installed, TensorBoard in a new ``version_N``.

    Loggers of services, such as Weights & Biases and MLflow, have no folder of the run for its config, checkpoints and
    pictures: the CSV file is then written in addition.
    """
    if given is False:
        return False
    loggers = [] if given is None or given is True else list(given) if isinstance(given, list | tuple) else [given]
    if any(isinstance(logger, CSVLogger | TensorBoardLogger) for logger in loggers):
        return loggers
    table = CSVLogger(folder or ".")
    if given is not None and given is not True:
        return [table, *loggers]
    return [table, TensorBoardLogger(folder or ".", version=table.version)] if find_spec("tensorboard") else [table]


def original(error: BaseException, raised: Sequence[BaseException]) -> BaseException:
    """What an error of jsonargparse is about: ours, if one of ours is in its chain, else the last that was raised."""
    causes = [*raised[-1:], *causes_of(error), error]
    return next((cause for cause in causes if isinstance(cause, DiffTuneError)), causes[0])


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """The chain of an error's causes, nearest first."""
    while error.__cause__ is not None:
        error = error.__cause__
        yield error


# The settings of the LightningCLI, whether it runs a command or only reads configs.
_WIRING: dict[str, Any] = {
    "model_class": L.LightningModule,
    "datamodule_class": L.LightningDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "auto_configure_optimizers": False,
    "seed_everything_default": 0,
    "parser_kwargs": {"prog": "difftune", "allow_abbrev": False},
    "parser_class": DiffTuneParser,
}


class ConfigReader(DiffTuneCLI):
    """Composes and checks configs without creating objects."""

    def __init__(self) -> None:
        super().__init__(**_WIRING, args=[], run=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse nothing and set no seed; only the parser is needed."""
        self.config = Namespace(seed_everything=False)

    def instantiate_classes(self) -> None:
        """Create nothing."""

    def compose(self, args: Sequence[str]) -> str:
        """The settings of a command line without a command, as YAML, without defaults of the code."""
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # skip_none, in version 4
            settings = self.parser.parse_args(list(args), defaults=False)  # and checks them
            return self.parser.dump(settings, skip_none=False, skip_check=True)


class ModelReader(DiffTuneCLI):
    """Creates the model of a run without its trainer, and on request the data, whose files may be missing."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(**{**_WIRING, "model_class": DiffTuningModule}, args=list(args), run=False)

    def instantiate_classes(self) -> None:
        """Create only the model."""
        self.composed = self.config
        self.config = Namespace(model=self.composed["model"])
        self.parser = part_parser(DiffTuningModule, "model")
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None."""

    def open_data(self) -> Any:
        """The data module; raises any error of its constructor."""
        parser = part_parser(L.LightningDataModule, "data")
        return parser.instantiate_classes(Namespace(data=self.composed["data"])).data


def run_lightning(args: Sequence[str], run: bool = True, callbacks: Sequence[Callback] = ()) -> DiffTuneCLI:
    """Run one LightningCLI command, such as ``["fit", "--config", "configs/quickstart.yaml"]``.

    Args:
        args: The command line without the program's name.
        run: Whether to run the command; otherwise ``args`` has no command and the objects are only created.
        callbacks: Of the trainer, in addition to the config's; they are not part of the run's config.

    Returns:
        The CLI object, with its ``model``, ``datamodule`` and ``trainer``.

    Raises:
        DiffTuneError: If the command line, a config, or what they name cannot be used.
    """
    try:
        return DiffTuneCLI(
            **_WIRING,
            save_config_callback=SaveRun,
            save_config_kwargs={"save_to_log_dir": False},  # it saves by itself
            trainer_defaults={"callbacks": list(callbacks)},
            args=completed(args) if run else list(args),
            run=run,
        )
    except (MisconfigurationException, ModuleNotFoundError) as error:  # the latter of an optional package
        raise ConfigError(str(error)) from error
