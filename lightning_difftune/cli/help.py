"""What the commands that take a config say about their keys: the ones that people set."""

from __future__ import annotations

KEYS = {  # those that people set, in what is left of a line of 80 characters
    "model": {
        "model": "what is tuned: a name, file, folder or hub id",
        "objective": "the loss: Eq. 5 of the paper with a schedule",
        "optimizer": "class of an optimizer; lr and others below it",
        "lr_scheduler": "class of a scheduler, stepped each step",
        "tuner": "LoRA or another method of few parameters",
        "sampler": "how pictures are drawn for FID and grids",
        "bank_sampler": "how the memory bank is drawn",
    },
    "data": {
        "target": "training pictures, such as ImageFolder",
        "val_target": "held-out pictures",
        "num_classes": "classes of the target",
        "image_size": "side of the pictures in pixels",
        "channels": "1 (grey) or 3 (RGB)",
        "batch_size": "samples of a step and process, both streams",
        "bank": "folder of the memory bank; null for none",
        "bank_size": "samples in the memory bank",
        "retention_share": "share of a batch that comes from the bank",
        "latent_cache": "folder of encoded pictures, for latent models",
        "horizontal_flip": "whether half of the pictures are mirrored",
        "num_workers": "processes that read the pictures",
    },
    "trainer": {
        "max_steps": "length of the run in steps",
        "val_check_interval": "steps between two validations",
        "precision": "bf16-mixed, 16-mixed or 32-true",
        "devices": "how many GPUs or processes",
        "callbacks": "+= adds one, such as EMA or SampleGrid",
        "default_root_dir": "folder of logs and checkpoints",
    },
}


def short_help(command: str) -> str:
    """A screen about a command that takes a config: how it is used, and the keys that people set."""
    use = {"fit": "resume a run", "predict": "build the bank of a run"}.get(command, "look at a finished run")
    lines = [
        f"difftune {command} --config FILE [--config OVERLAY ...] [--KEY VALUE ...]",
        f"difftune {command} RUN [--KEY VALUE ...]      {use}",
        "",
        "--config may be given several times; a later one counts more, and keys given",
        "as options count most. A key inside of a class is written without init_args.",
        "",
        row("model CLASS", "the model family, such as DiTDiffTuningModule"),
    ]
    for part, keys in KEYS.items():
        lines += [row(f"{part}.{key}", about) for key, about in keys.items()] + [""]
    lines += [
        row("seed_everything N", "seed of model, data and bank"),
        row("print_config", "print the composed config and stop"),
        "",
        "All keys of a class, such as DiTDiffTuningModule or ImageFolder:",
        f"  difftune {command} --model.help CLASS     (or --data.help, --data.target.help)",
        f"All keys of the trainer: difftune {command} --help_all",
    ]
    return "\n".join(lines)


def row(key: str, about: str) -> str:
    """A line about a key."""
    return f"  --{key:<28}{about}"
