"""``difftune init``: inspects pictures, and writes the config that tunes a model to them."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from rich.console import Console

from lightning_difftune.cli.arguments import CommandParser
from lightning_difftune.cli.data_check import facts_at, held_out_of, parts_of
from lightning_difftune.cli.init.bases import CAPTIONS, CLASSES, CONTROLS, FULL_DIT, Base, Plan, Seen, alike
from lightning_difftune.cli.init.config import config_text, described, quoted
from lightning_difftune.data.real_pictures import FEW_PICTURES
from lightning_difftune.data.source_facts import captions_of
from lightning_difftune.errors import CheckpointError, ConfigError, DataError
from lightning_difftune.files import atomic_write

DESCRIPTION = """Look at a folder of pictures and write a commented config that tunes a model to them.

  difftune init photos                   a folder for each class: DiT
  difftune init captioned                1.txt next to 1.png, or metadata.jsonl:
                                         text to image
  difftune init photos --captions        the classes' names become captions
  difftune init photos --control canny   a ControlNet that follows edges

The base model fits the machine: a bundled one for 32 px without a GPU; DiT-XL/2 or Stable Diffusion 1.5 with one, whose
weights the run downloads. --model chooses another one: SDXL, FLUX.1, Stable Diffusion 3.5, or a folder of such a
pipeline. A tenth of the pictures is held out, unless the folder has the parts train and val. What it will cost is
printed as by `difftune plan`."""


def init(argv: Sequence[str]) -> None:
    """Inspect the pictures, write the config, and print its cost and the next commands."""
    parser = CommandParser("init", DESCRIPTION)
    parser.usage = "difftune init FOLDER [options]"
    parser.add_argument("path", metavar="FOLDER", help="pictures: a folder, .npz, shards, or a data set on the hub")
    parser.add_argument("--model", help="the pre-trained model (default: one that fits the machine)")
    parser.add_argument("--captions", action="store_true", help="text to image, with captions or class names")
    parser.add_argument("--control", choices=list(CONTROLS), help="a ControlNet that follows such maps")
    parser.add_argument(
        "--output", type=Path, help="the config; the run gets its name (default: my.yaml, and the folder's name)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing config")
    parser.add_argument("--no_plan", action="store_true", help="do not open the model, and do not estimate the cost")
    options = parser.parse_args(list(argv))
    named, options.output = options.output, options.output or Path("my.yaml")
    if options.output.exists() and not options.overwrite:
        raise ConfigError(f"{options.output} exists. Name another --output, or pass --overwrite.")
    seen = look(options.path, options.captions or options.control is not None)
    made = planned(seen, options.model, options.control or ("captions" if seen.captions else "classes"))
    if named is not None:
        made.name = named.stem  # so that two configs for one folder do not share caches
    console = Console(highlight=False, markup=False)
    console.print("\n".join([f"Looked at {described(seen)}.", *made.notes]), soft_wrap=not console.is_terminal)
    text = config_text(made, options.output)
    if not options.no_plan:  # opens the model, so that a mistake in its name leaves no config behind
        from lightning_difftune.cli.plan import plan

        device = [] if torch.cuda.is_available() or made.base.is_large else ["--device", "measured"]
        try:
            with warnings.catch_warnings():
                for note in seen.facts.notes:  # said above
                    warnings.filterwarnings("ignore", re.escape(note))
                plan(["--config", text, *device])
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} {options.output} was not written; --no_plan writes it unchecked."
            ) from error
    atomic_write(options.output, text.encode())
    wrote = f"Wrote {options.output}: {made.base.name}, {made.steps:,} steps."
    console.print(wrote, soft_wrap=not console.is_terminal)
    print(f"\nNext: difftune fit --config {shlex.quote(str(options.output))}")


def look(path: str, wants_captions: bool) -> Seen:
    """Inspect all pictures as ``difftune data check`` does."""
    parts = parts_of(path)
    facts = facts_at(parts["train"], None, 0)
    if len(facts.readable) < 2:
        raise DataError(f"{path} holds {len(facts.readable)} pictures that can be read; a model needs two at least.")
    source, captions = source_of(facts.source, parts["train"]), []
    held = facts_at(parts["val"], None, 0) if "val" in parts else None
    val_source = source_of(held.source, parts["val"]) if held is not None else ""
    counts = facts.counts()
    if unknown := [] if held is None else [name for name in held.counts() if name not in counts]:
        raise DataError(f"{parts['val']} has classes that {parts['train']} does not have: {', '.join(unknown[:5])}.")
    if wants_captions and counts:
        named = "class_path: lightning_difftune.data.ClassCaptions\ninit_args:\n  source:\n"
        source, val_source = named + indent(source, 4 * " "), val_source and named + indent(val_source, 4 * " ")
        captions = [f"a photo of a {name.replace('_', ' ')}" for name in counts]
    elif not counts:
        captions = list(dict.fromkeys(captions_of(facts.source) or [""]))
    taken_out = len(held_out_of(facts)) if held is None else 0
    return Seen(
        path=path,
        facts=facts,
        source=source,
        val_source=val_source,
        captions=captions[:8],
        trained=len(facts.pictures) - taken_out,
        held_out=taken_out if held is None else len(held.pictures),
    )


def source_of(source: Any, path: str) -> str:
    """The data set as YAML."""
    name = type(source).__name__
    key = {"NpzImages": "path", "HubImages": "path", "WebDatasetShards": "shards"}.get(name, "root")
    return f"class_path: lightning_difftune.data.{name}\ninit_args: {{{key}: {quoted(path)}}}"


def planned(seen: Seen, model: str | None, task: str) -> Plan:
    """Choose the model and all sizes."""
    known = CLASSES if task == "classes" else CAPTIONS
    if task in CONTROLS and not seen.held_out:
        raise ConfigError(
            f"A ControlNet is judged by pictures that follow held-out maps, and {len(seen.facts.pictures)} are too few "
            "to hold any out. Add some: ten are enough for one."
        )
    has_gpu = torch.cuda.is_available()
    if model is None:
        base = next(base for base in reversed(known.values()) if base.is_large == has_gpu and base.channels == 3)
    elif model in known:
        base = known[model]
    elif model in CLASSES | CAPTIONS:
        wanted = "captions: pass --captions" if model in CAPTIONS else "classes: leave --captions and --control out"
        raise ConfigError(f"{model} takes {wanted}. Other models, for what was asked: {', '.join(known)}.")
    else:
        base = Base(**{**vars(alike(model, known)), "name": model})
    if task in CONTROLS and not base.has_controlnets:
        raise ConfigError(
            f"{base.name} is a transformer, whose ControlNets have another architecture and are not trained here. Use "
            "a Stable Diffusion 1.x, 2.x or XL."
        )
    asked = "" if task == "classes" else f"-{task}" if task in CONTROLS or seen.facts.counts() else ""
    plan = Plan(base, task, f"{Path(seen.path).expanduser().resolve().name or 'run'}{asked}", seen)
    if task == "classes" and base.is_large and has_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
        plan.is_tight = memory < FULL_DIT
        if plan.is_tight:
            plan.notes.append(f"The GPU has {memory / 1e9:.0f} GB, too few for all weights of {base.name}: DiffFit.")
    target_size = base.batch_size - base.retained
    fewest, most = (3000, 15_000) if task in CONTROLS and base.is_large else base.steps
    plan.steps = rounded(min(max(base.passes * seen.trained // target_size, fewest), most))
    read = base.retained * plan.steps
    plan.bank_size = rounded(min(max(read // 3, base.bank[0]), base.bank[1]))
    if unreadable := seen.facts.unreadable():
        first = next(iter(unreadable))
        plan.notes.append(f"{len(unreadable)} cannot be read, such as {first}; on_corrupt: skip replaces them.")
    plan.notes += seen.facts.notes
    counts = seen.facts.counts()
    if few := [name for name, count in counts.items() if 0 < count < FEW_PICTURES]:
        have = f"{len(few)} class{'es have' if len(few) > 1 else ' has'}"
        plan.notes.append(
            f"{have} fewer than {FEW_PICTURES} pictures: so few are learned by heart. The presets domain_guidance and "
            "self_teacher may help."
        )
    if model is None and not has_gpu:
        large = next(base for base in reversed(known.values()) if base.is_large)
        plan.notes.append(
            f"There is no GPU here, so the base is the bundled {base.name}, for {base.image_size} px; with one it is "
            f"{large.name} (--model)."
        )
    return plan


def rounded(count: int) -> int:
    """A round number near it.

    Example:
        >>> rounded(123), rounded(1234), rounded(23456)
        (120, 1200, 23500)
    """
    step = 10 if count < 500 else 100 if count < 5000 else 500
    return max(step, round(count / step) * step)
