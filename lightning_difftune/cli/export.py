"""``difftune export``: the tuned network of a run as a file or folder that others open."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn

from lightning_difftune.cli.lightning import ModelReader
from lightning_difftune.cli.tuned import open_run
from lightning_difftune.draws import noise_of
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.models import DiT, export_dit, export_network, load_dit
from lightning_difftune.models.diffusers_folder import open_network
from lightning_difftune.models.export import exact_arithmetic, put_in_place
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.protocols import RetentionBatch

DESCRIPTION = """Write the tuned network of a run's checkpoint, for others to open.

The averaged weights are taken where the checkpoint has them, and a tuner's layers are merged into the plain network.
A DiT goes to FILE.safetensors (official key names) or to a folder for diffusers; a UNet or ControlNet to a folder.
What was written is read back, and must compute the same as the tuned network before it takes its place.

The run's config is found beside its checkpoint. All other options are --config and overrides of its keys."""

TOLERANCE = 1e-4  # of the largest output: float32 rounds differently once factors are multiplied out


def export(argv: Sequence[str]) -> None:
    """Export the network of one checkpoint and say what was done.

    Args:
        argv: The command line after ``export``.

    Raises:
        ConfigError: If the command line or a config cannot be used, or the tuner cannot be merged.
        CheckpointError: If the checkpoint cannot be used, or the result does not compute the same.
    """
    parser = argparse.ArgumentParser(
        prog="difftune export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint of a run")
    parser.add_argument("--output", type=Path, help="file ending in .safetensors, or a folder")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, although there are averages")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the output")
    options, rest = parser.parse_known_args(argv)
    if options.ckpt_path is None or options.output is None:
        raise ConfigError("difftune export needs --ckpt_path RUN/checkpoints/last.ckpt and --output FILE or FOLDER.")
    run = open_run(options.ckpt_path, rest)
    module = run.module
    done = [f"{options.ckpt_path}, step {run.step}, tuned from {module.base_identity['name']}"]
    with run.weights(options.raw, done):
        network = plain_network(module, done)
        if isinstance(network, DiT):
            network.sampling = module.sampler.spec()
            if network.class_names is None:
                network.class_names = class_names_of(run.reader, network.num_classes, done)
            else:
                done.append("class names: those of the checkpoint")
        write(module, network, options, done)
    print("\n".join(done))


def plain_network(module: DiffTuningModule, done: list[str]) -> Any:
    """The one network that was trained, with its tuner's layers merged.

    Raises:
        ConfigError: If there are several, or the tuner cannot be merged.
    """
    networks = module.trainable_modules()
    if len(networks) != 1:
        raise ConfigError(f"difftune export writes one network; {type(module).__name__} trains {len(networks)}.")
    if module.tuner is None:
        done.append("tuner: none")
        return networks[0]
    name = type(module.tuner).__name__
    merge = getattr(module.tuner, "merge", None)
    if merge is None:
        raise ConfigError(f"{name} has no `merge`, which says what its layers fold into. Give it one, or keep the run.")
    done.append(f"tuner: {name}, merged into the plain network")
    return merge(networks[0])


def class_names_of(reader: ModelReader, num_classes: int, done: list[str]) -> list[str] | None:
    """Names of the classes from the run's data, if its files are here."""
    try:
        names = reader.open_data().target.class_names
    except Exception as error:  # whatever a data set raises where its files are not
        done.append(f"class names: none, since the data cannot be opened ({str(error).partition(chr(10))[0]})")
        return None
    if names is None:
        return None
    done.append(f"class names: {len(names)} from the data")
    return [*names, *(f"unused {i}" for i in range(num_classes - len(names)))]


def write(module: DiffTuningModule, network: Any, options: argparse.Namespace, done: list[str]) -> None:
    """Write the network beside its place, compare what is read back with the tuned one, and move it there.

    Raises:
        CheckpointError: If it computes something else, or cannot be written.
    """
    output: Path = options.output
    if output.exists() and not options.overwrite:
        raise CheckpointError(f"{output} exists. Choose another path, or pass --overwrite.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as workspace:
        draft = Path(workspace) / output.name
        if isinstance(network, DiT):
            is_file = output.suffix == ".safetensors"
            autoencoder = None if is_file else getattr(module, "autoencoder", None)
            export_dit(network, draft, "safetensors" if is_file else "diffusers", autoencoder=autoencoder)
            reloaded: nn.Module = load_dit(draft)
        elif hasattr(network, "save_pretrained"):
            reloaded = open_network(type(network), export_network(network, draft))
        else:
            raise ConfigError(f"difftune export knows DiTs and networks of diffusers, not {type(network).__name__}.")
        error = difference(module, reloaded)
        if not error <= TOLERANCE:
            raise CheckpointError(
                f"Not exported: what was written computes something else than the tuned network, off by {error:.1e} of "
                "its largest output. If the tuner is one of your own, check its merge."
            )
        done.append(f"checked: read back, its outputs differ from the tuned network's by {error:.1e} of the largest")
        put_in_place(draft, output, Path(workspace) / "replaced")
    size = sum(file.stat().st_size for file in [output, *output.rglob("*")] if file.is_file())
    done.append(f"wrote {output} ({size / 1e6:.1f} MB)")


@torch.inference_mode()
def difference(module: DiffTuningModule, other: nn.Module) -> float:
    """How far another network's outputs are from the trained one's, over the largest output, at three noise levels."""
    indices = torch.arange(3)
    x_t = noise_of(0, indices, module.sample_shape).to(module.device)
    columns = cast("RetentionBatch", {"latents": x_t, **module.bank_columns(indices, x_t)})
    steps = module.objective.diffusion.num_timesteps
    given = x_t, torch.tensor([0, steps // 2, steps - 1]), module.retention_condition(columns)
    trained = module.trainable_modules()[0]
    name = next(name for name, child in module.named_children() if child is trained)
    with exact_arithmetic(module.device):
        expected = module.denoise(*given)
        setattr(module, name, other.eval())
        try:
            output = module.denoise(*given)
        finally:
            setattr(module, name, trained)
    return ((output - expected).abs().max() / expected.abs().max()).item()
