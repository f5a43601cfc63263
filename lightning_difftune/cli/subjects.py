"""What the pictures of ``difftune sample`` show: classes by name, prompts, or what follows a control picture."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.modules import ControlNetDiffTuningModule, DiffTuningModule, DiTDiffTuningModule
from lightning_difftune.modules.stable_diffusion import StableDiffusionModule
from lightning_difftune.pictures import to_pixels

FEW_CLASSES = 10  # rows of the grid where neither classes nor prompts are asked for


class Subject(NamedTuple):
    """What one row of the grid shows."""

    name: str
    asked: Any  # a class number, or a prompt
    control: Tensor | None = None  # (c, H, W) uint8, of a ControlNet


def subjects_of(module: DiffTuningModule, options: argparse.Namespace) -> list[Subject]:
    """The rows that a command line asks a model for.

    Raises:
        ConfigError: If the model takes something else, or does not have such a class.
        DataError: If a control picture cannot be read.
    """
    if isinstance(module, DiTDiffTuningModule):
        if options.prompts is not None or options.controls is not None:
            raise ConfigError("This model knows classes and no words: use --classes in place of --prompts.")
        names, count = module.dit.class_names, module.num_classes
        asked = options.classes if options.classes is not None else [str(i) for i in range(min(count, FEW_CLASSES))]
        labels = [class_of(one, names, count) for one in asked]
        return [Subject(names[label] if names is not None else f"class {label}", label) for label in labels]
    if not isinstance(module, StableDiffusionModule):
        raise ConfigError(f"difftune sample does not know how to ask a {type(module).__name__}.")
    if options.classes is not None:
        raise ConfigError("This model is asked in words: use --prompts in place of --classes.")
    prompts = options.prompts or list(module.prompts)
    if isinstance(module, ControlNetDiffTuningModule):
        return controlled(module, options.controls or [], prompts)
    if options.controls is not None:
        raise ConfigError("This model follows no control pictures; leave --controls out.")
    return [Subject(prompt, prompt) for prompt in prompts]


def controlled(module: ControlNetDiffTuningModule, files: Sequence[str], prompts: Sequence[str]) -> list[Subject]:
    """A row for each control picture, whose map the run's annotator makes; under its own prompt or the only one."""
    if not files:
        raise ConfigError("A ControlNet draws after control maps: name pictures to take them from, --controls FILE ...")
    if len(prompts) not in (1, len(files)):
        raise ConfigError(f"{len(prompts)} prompts for {len(files)} control pictures: give one, or one for each.")
    size = module.sample_shape[-1] * module.autoencoder.downsample
    subjects = []
    for number, file in enumerate(files):
        try:
            with Image.open(file) as image:
                pixels = torch.from_numpy(to_pixels(image, size, 3))
        except (OSError, ValueError, UnidentifiedImageError) as error:
            raise DataError(f"The control picture {file} cannot be read: {error}") from error
        (control,) = module.annotate(pixels[None].to(module.device)).cpu()
        subjects.append(Subject(Path(file).stem, prompts[number % len(prompts)], control))
    return subjects


def class_of(asked: str, names: Sequence[str] | None, count: int) -> int:
    """The number of a class by its name, or one of several names between commas; else by the number itself.

    Case, underscores and hyphens do not matter.

    Raises:
        ConfigError: If there is no such class.

    Example:
        >>> class_of("white shark", ["tench, Tinca tinca", "great white shark, White_shark"], 2), class_of("1", None, 2)
        (1, 1)
    """
    labels: dict[str, int] = {}
    for label, name in enumerate(names or ()):
        for synonym in (name, *name.split(",")):
            labels.setdefault(plain(synonym), label)
    if plain(asked) in labels:
        return labels[plain(asked)]
    if asked.isdecimal() and int(asked) < count:
        return int(asked)
    if names is None:
        raise ConfigError(f"There is no class {asked!r}: this model has no names, and the numbers 0 to {count - 1}.")
    near = difflib.get_close_matches(plain(asked), labels, n=5)
    known = (
        f"Did you mean {', '.join(near)}?"
        if near
        else f"Its classes are {', '.join(names[:10])}" + (", ..." if len(names) > 10 else ".")
    )
    raise ConfigError(f"There is no class {asked!r} among the {count}. {known}")


def plain(name: str) -> str:
    """A name as it is compared."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


@torch.inference_mode()
def draw(module: DiffTuningModule, subjects: Sequence[Subject], num_samples: int, batch_size: int) -> Tensor:
    """Pictures (rows * num_samples, C, H, W) uint8 on the CPU, row by row."""
    wanted = [(subject, index) for subject in subjects for index in range(num_samples)]
    pictures = []
    for start in range(0, len(wanted), batch_size):
        shown, indices = zip(*wanted[start : start + batch_size], strict=True)
        pictures.append(module.generate(torch.tensor(indices), conditions_of(module, shown)).cpu())
    return torch.cat(pictures)


def conditions_of(module: DiffTuningModule, subjects: Sequence[Subject]) -> tuple[Any, Any]:
    """Condition and null condition of one picture of each subject."""
    asked = [subject.asked for subject in subjects]
    if isinstance(module, DiTDiffTuningModule):
        return module.class_conditions(torch.tensor(asked))
    if isinstance(module, ControlNetDiffTuningModule):
        maps = [subject.control for subject in subjects if subject.control is not None]
        return module.controlled(asked, torch.stack(maps))
    assert isinstance(module, StableDiffusionModule)
    return module.prompted(tuple(asked), torch.arange(len(asked)))
