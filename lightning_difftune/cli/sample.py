"""``difftune sample``: pictures of a run, an export or a bundled model, as files with their parameters."""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_difftune import __version__
from lightning_difftune.cli.arguments import CommandParser, check_writable
from lightning_difftune.cli.facts import export_command
from lightning_difftune.cli.run_files import checkpoints_below, launches_below
from lightning_difftune.cli.tuned import TunedRun
from lightning_difftune.errors import ConfigError
from lightning_difftune.files import atomic_write
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.modules.family import Asked, Subject
from lightning_difftune.modules.opening import open_model
from lightning_difftune.pictures import grid_of, to_png
from lightning_difftune.sampling import Sampler, adds_noise, scheduler_named

DESCRIPTION = """Draw pictures with a model as PNG files, one per picture and all in grid.png, a row per class or
prompt; a row of a ControlNet begins with its map.

  difftune sample runs/flowers --classes sunflower rose --num_samples 8
  difftune sample tuned.safetensors --classes 3 17 --solver UniPCMultistep
  difftune sample sd-nano-flowers --prompts "a photo of a rose" --output roses
  difftune sample CONTROLNET.ckpt --controls 1.jpg --prompts "a red house"

SOURCE is a run (its folder or a checkpoint), an export, a model that `load_dit` opens, a text-to-image pipeline or the
name of a bundled model. Sampler settings that are not given are those of the run or the exported DiT, and else the
defaults of the model's family.
A run draws at its trainer's precision, as in its validations (--trainer.precision 32-true changes it).
Picture j of a class has the start noise of (seed, j), so it stays the same whatever else is drawn.
Each PNG carries its settings as text, under "parameters". The same command line gives the same bytes on the same
machine; another batch size or device rounds differently and may move a pixel by one level in 255."""


@dataclass
class Source:
    """A model to sample from."""

    module: DiffTuningModule  # built
    done: list[str]  # messages about it
    run: TunedRun | None = None  # its run, if any
    has_base: bool = True  # whether its pre-trained model is available


def sample(argv: Sequence[str]) -> None:
    """Draw the pictures and print their paths."""
    parser = CommandParser("sample", DESCRIPTION)
    parser.add_run("run, export, pipeline, or bundled name", "SOURCE")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers (default: the first ten)")
    what.add_argument("--prompts", nargs="+", metavar="TEXT", help="for text-to-image (default: the run's)")
    maps = parser.add_mutually_exclusive_group()
    maps.add_argument("--controls", nargs="+", metavar="FILE", help="for a ControlNet: pictures to take maps from")
    maps.add_argument("--maps", nargs="+", metavar="FILE", help="for a ControlNet: control maps, as they are")
    parser.add_argument("--num_samples", type=int, default=4, metavar="N", help="pictures of each (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the same one draws the same (default: 0)")
    parser.add_argument("--guidance_scale", type=float, metavar="G", help="strength of guidance; 1 is none")
    parser.add_argument("--guidance_channels", metavar="K", help="guided leading channels, or `all`")
    parser.add_argument(
        "--domain_guidance", action="store_true", help="guide away from the pre-trained model (arXiv 2504.01521)"
    )
    parser.add_argument("--solver", metavar="NAME", help="a scheduler of diffusers, such as DDIM or UniPCMultistep")
    parser.add_argument("--steps", type=int, metavar="N", help="reverse steps")
    parser.add_argument("--output", type=Path, help="folder (default: runs/samples, or with the next free number)")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--raw", action="store_true", help="the trained weights, not their averages (EMA)")
    parser.add_argument("--base", help="of an export: the model that it was tuned from; the pipeline of a UNet")
    parser.add_argument("--vae", help="autoencoder of a latent DiT in one file, such as stabilityai/sd-vae-ft-ema")
    parser.add_argument("--batch_size", type=int, default=16, metavar="B", help="pictures at a time (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU, if there is one)")
    options, rest = parser.parse_known_args(argv)
    if options.num_samples < 1 or options.batch_size < 1:
        raise ConfigError("--num_samples and --batch_size must be at least 1.")
    output = free_folder(options.output, options.overwrite)
    check_writable(output)
    source = open_source(options, rest)
    module = source.module.to(device_of(options.device))
    drawing = nullcontext() if source.run is None else source.run.drawing()
    module.seed = options.seed
    module.sampler = sampler_of(source, options)
    subjects = module.subjects(Asked(options.classes, options.prompts, options.controls, options.maps))
    with nullcontext() if source.run is None else source.run.weights(options.raw, source.done), drawing:
        parameters = {
            "source": options.run,
            "weights": "+".join(fingerprint(network) for network in module.trainable_modules()),
            "raw": options.raw,
            "seed": options.seed,
            **({} if source.run is None else {"precision": source.run.precision}),
            **module.sampler.spec(),
        }
        pictures = draw(module, subjects, options.num_samples, options.batch_size)
    written = save(pictures, subjects, output, parameters)
    several = "s" if len(pictures) > 1 else ""
    done = [*source.done, f"wrote {output / 'grid.png'} and {len(pictures)} picture{several} in that folder"]
    if left := {file.name for file in output.iterdir() if not file.name.startswith(".")} - written:
        done.append(f"files in that folder from before: {len(left)}, such as {min(left)}")
    if source.run is not None:
        done.append(f"Next: {export_command(source.run.run)}")
    print("\n".join(done))


def open_source(options: argparse.Namespace, settings: Sequence[str]) -> Source:
    """Open a run, with ``--config`` and overrides if given, or else a model by ``open_model``."""
    path = Path(options.run).expanduser()
    if path.suffix == ".ckpt" or (path.is_dir() and (launches_below(path) or any(checkpoints_below(path)))):
        run = TunedRun(path, settings)
        return Source(run.module, [str(run)], run)
    if settings:
        raise ConfigError(f"Unknown options: {' '.join(settings)}. Only a checkpoint takes keys of its run's config.")
    has_prompts = options.prompts is not None
    module = open_model(options.run, base=options.base, vae=options.vae, text=has_prompts, solver=options.solver)
    network = module.trainable_modules()[0]
    return Source(module.eval(), [f"{options.run}: {type(network).__name__}"], has_base=options.base is not None)


def device_of(name: str | None) -> torch.device:
    """The named device, or by default a GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used: {str(error).partition(chr(10))[0]}") from error


def free_folder(folder: Path | None, overwrite: bool) -> Path:
    """The given folder, or ``runs/samples``, with the next free number if it exists."""
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
            raise ConfigError(f"{folder} is not empty. Choose another --output, or pass --overwrite.")
        return folder
    default = Path("runs/samples")
    numbers = (default.with_name(f"samples-{n}") for n in range(1, 100_000))
    return default if not default.exists() else next(place for place in numbers if not place.exists())


def sampler_of(source: Source, options: argparse.Namespace) -> Sampler:
    """The model's own sampler with the command line's changes."""
    own, channels = source.module.sampler, options.guidance_channels
    given = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "domain_guidance": options.domain_guidance or None,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if channels is not None:
        if channels != "all" and not channels.isdecimal():
            raise ConfigError(f"--guidance_channels is {channels!r}; expected a number, or `all`.")
        changes["guidance_channels"] = None if channels == "all" else int(channels)
    if options.solver is not None:
        changes["scheduler"] = scheduler_named(options.solver, own.scheduler.config)
    sampler = source.module.fitted(replace(own, **changes))
    if (sampler.domain_guidance or sampler.pretrained_tail) and not source.has_base:
        what = "Domain Guidance" if sampler.domain_guidance else f"A pretrained_tail of {sampler.pretrained_tail:g}"
        raise ConfigError(f"{what} needs the model that this one was tuned from; name it with --base.")
    if adds_noise(sampler.scheduler):
        raise ConfigError(
            f"{type(sampler.scheduler).__name__} adds noise at each step, so that a picture would depend on those "
            "drawn before it. Take a solver without: DDIM, UniPCMultistep, DPMSolverMultistep, EulerDiscrete."
        )
    return sampler


@torch.inference_mode()
def draw(module: DiffTuningModule, subjects: Sequence[Subject], num_samples: int, batch_size: int) -> Tensor:
    """Pictures (rows * num_samples, C, H, W) uint8 on the CPU, row by row."""
    wanted = [(subject, index) for subject in subjects for index in range(num_samples)]
    pictures = []
    for start in range(0, len(wanted), batch_size):
        shown, indices = zip(*wanted[start : start + batch_size], strict=True)
        pictures.append(module.generate(torch.tensor(indices), module.conditions_for(shown)).cpu())
    return torch.cat(pictures)


def save(pictures: Tensor, subjects: Sequence[Subject], output: Path, parameters: dict[str, Any]) -> set[str]:
    """Write ``grid.png`` and one file per picture, with the parameters in text chunks; returns the files' names."""
    written = {"grid.png"}
    columns = len(pictures) // len(subjects)
    controls = [row.control for row in subjects if row.control is not None]
    names = [f"{row.name}: map, then drawn" if controls else row.name for row in subjects]
    shown = pictures
    if controls:  # each row begins with its map
        maps = torch.stack([control.expand(pictures.shape[1:]) for control in controls])
        shown = torch.cat([maps[:, None], pictures.unflatten(0, (-1, columns))], 1).flatten(0, 1)
    grid = grid_of(shown, columns + len(controls[:1]), names)
    write_png(grid, output / "grid.png", {"rows": names, **parameters}, rows=", ".join(names))
    for row, subject in enumerate(subjects):
        name = unicodedata.normalize("NFC", subject.name).lower()  # letters of any script
        slug = re.sub(r"[\W_]+", "-", name).strip("-")[:40].rstrip("-") or "unconditional"
        place = f"{row:02d}-{slug}"
        shows = (
            {"shows": subject.name} if subject.control is None else {"shows": subject.asked, "control": subject.name}
        )
        for index in range(columns):
            text = {**shows, "index": index, **parameters}
            written.add(f"{place}-{index:03d}.png")
            write_png(pictures[row * columns + index], output / f"{place}-{index:03d}.png", text)
        if subject.control is not None:
            written.add(f"{place}-control.png")
            write_png(subject.control, output / f"{place}-control.png", {"control": subject.name})
    return written


def write_png(picture: Tensor, file: Path, parameters: dict[str, Any], **texts: str) -> None:
    """Write a picture (1 or 3, H, W) uint8 with its parameters as JSON and other texts."""
    software = f"lightning_difftune {__version__}"
    atomic_write(file, to_png(picture, Software=software, parameters=json.dumps(parameters), **texts))
