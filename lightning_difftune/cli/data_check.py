"""``difftune data check``: what is in a data set, and what a run would make of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from lightning_difftune.cli.arguments import CommandParser
from lightning_difftune.data.class_counts import FEW_PICTURES
from lightning_difftune.data.inspection import SourceFacts, inspect
from lightning_difftune.data.partition import Partition
from lightning_difftune.data.sources import open_images
from lightning_difftune.errors import ConfigError

DESCRIPTION = """Look at every picture of a data set before training on it.

  difftune data check data/flowers                a folder of class folders, or of captioned pictures
  difftune data check data/flowers --val data/flowers-test
  difftune data check pictures.npz --split train  arrays
  difftune data check "data/train-{000..011}.tar" WebDataset shards
  difftune data check owner/flowers --json        a data set on the Hugging Face hub, for a program to read

Shown are pictures by class (those with fewer than ten are marked), sizes, grey and transparent pictures, those turned
by their EXIF orientation, unreadable ones by name, exact duplicates, and the split: without --val, a tenth is held out
at random, as configs/dit/folder.yaml does.

Exit status: 0 if all pictures can be used; 1 if some cannot be read; 2 if PATH is no data
set, or one with mistakes that no run would get past, such as a class without pictures."""

SHOWN = 20  # rows of a table; --json has all
HELD_OUT = {"train": 0.9, "val": 0.1}  # as configs/dit/folder.yaml


def data(argv: Sequence[str]) -> int:
    """Run one of the commands about data; returns the exit status.

    Args:
        argv: The command line after ``data``.

    Raises:
        ConfigError: If the command line cannot be used.
        DataError: If there is no data set.
    """
    if argv and argv[0] in ("-h", "--help"):
        argv = ["check", "--help"]
    if not argv or argv[0] != "check":
        raise ConfigError("There is one command about data: `difftune data check PATH`.")
    options = parser().parse_args(list(argv[1:]))
    facts = facts_at(options.path, options.split, options.num_workers)
    held_out = None
    if options.val is not None:
        path, _, split = options.val.rpartition(":")
        is_split = path != "" and not Path(options.val).exists()
        place, part = (path, split) if is_split else (options.val, None)
        held_out = facts_at(place, part, options.num_workers)
    report = report_of(options.path, facts, held_out, options.image_size)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console())
    return 1 if report["unreadable"] or report["split"].get("unreadable") else 0


def parser() -> CommandParser:
    """The options of the command."""
    options = CommandParser("data check", DESCRIPTION)
    options.add_argument("path", help="file, folder, pattern of shards, or name on the hub")
    options.add_argument("--split", help="of an .npz file or hub data set that has several")
    options.add_argument("--val", metavar="PATH", help="held-out pictures; `PATH:SPLIT` for a split")
    options.add_argument("--image_size", type=int, default=256, help="that a run would crop to (default: 256)")
    options.add_argument("--num_workers", type=int, default=0, help="processes that decode pictures (default: 0)")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return options


def facts_at(path: str, split: str | None, num_workers: int) -> SourceFacts:
    """Open a data set and look at its pictures, with a bar where somebody watches."""
    source = open_images(path, split)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"Reading {path}", total=len(source))
        return inspect(source, num_workers, lambda done: bar.update(task, completed=done))


def report_of(path: str, facts: SourceFacts, held_out: SourceFacts | None, image_size: int) -> dict[str, Any]:
    """All that was seen, as plain JSON values."""
    pictures = facts.readable
    counts = facts.counts()
    return {
        "path": path,
        "kind": type(facts.source).__name__,
        "pictures": len(facts.pictures),
        "labels": "classes" if counts else "captions",
        "classes": counts,
        "small_classes": [name for name, count in counts.items() if count < FEW_PICTURES],
        "width": spread([picture.width for picture in pictures]),
        "height": spread([picture.height for picture in pictures]),
        "aspect_ratio": spread([round(picture.width / picture.height, 3) for picture in pictures]),
        "image_size": image_size,
        "enlarged": sum(min(picture.width, picture.height) < image_size for picture in pictures),
        "cropped": sum(picture.width != picture.height for picture in pictures),
        "grey": sum(picture.is_grey for picture in pictures),
        "alpha": sum(picture.has_alpha for picture in pictures),
        "exif_rotated": sum(picture.is_rotated for picture in pictures),
        "unreadable": facts.unreadable(),
        "duplicates": [[facts.name(index) for index in group] for group in facts.duplicates()],
        "duplicates_of_two_classes": sum(
            len({facts.pictures[index].label for index in group}) > 1 for group in facts.duplicates()
        ),
        "split": split_of(facts, held_out),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, middle and largest value."""
    return {"min": min(values), "median": median(values), "max": max(values)} if values else {}


def split_of(facts: SourceFacts, held_out: SourceFacts | None) -> dict[str, Any]:
    """Which pictures a run would train on and hold out, and how many are the same on both sides."""
    if held_out is not None:
        digests = {picture.digest for picture in facts.readable}
        both = sum(picture.digest in digests for picture in held_out.readable)
        return {
            "by": "given",
            "train": len(facts.pictures),
            "val": len(held_out.pictures),
            "in_both": both,
            "unreadable": held_out.unreadable(),
        }
    try:
        held = set(Partition(facts.source, HELD_OUT, "val").indices)
    except ConfigError:
        return {"by": "too few pictures to hold some out", "train": len(facts.pictures), "val": 0, "in_both": 0}
    both = sum(0 < len(held.intersection(group)) < len(group) for group in facts.duplicates())
    by = "Partition, seed 0, as in configs/dit/folder.yaml"
    return {"by": by, "train": len(facts.pictures) - len(held), "val": len(held), "in_both": both}


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report as tables."""
    overview = Table(title=escape(f"{report['path']} ({report['kind']})"), show_header=False, title_justify="left")
    count = report["pictures"]
    for name, value in (
        ("pictures", f"{count:,} with {report['labels']}"),
        (
            "classes",
            f"{len(report['classes']):,}, {len(report['small_classes'])} of them below {FEW_PICTURES} pictures",
        ),
        *((name, between(report[name])) for name in ("width", "height", "aspect_ratio")),
        ("enlarged", f"{report['enlarged']:,} are smaller than {report['image_size']} px"),
        ("cropped", f"{report['cropped']:,} are not square and lose their ends"),
        ("grey / alpha", f"{report['grey']:,} / {report['alpha']:,}"),
        ("EXIF-rotated", f"{report['exif_rotated']:,}"),
        ("unreadable", f"{len(report['unreadable']):,}"),
        ("duplicates", f"{len(report['duplicates']):,} groups, {report['duplicates_of_two_classes']} across classes"),
        ("split", "{train:,} to train on, {val:,} held out ({by}), {in_both:,} in both".format(**report["split"])),
    ):
        if name != "classes" or report["classes"]:
            overview.add_row(name.replace("_", " "), value)
    console.print(overview)
    if report["classes"]:
        table = Table("class", "pictures", title="Smallest classes", title_justify="left")
        for name, number in sorted(report["classes"].items(), key=lambda entry: entry[1])[:SHOWN]:
            table.add_row(escape(name), f"{number:,}" + (" [yellow]few" if number < FEW_PICTURES else ""))
        console.print(table)
        if len(report["classes"]) > SHOWN:
            console.print(f"... and {len(report['classes']) - SHOWN} larger ones")
    unreadable = {**report["unreadable"], **report["split"].get("unreadable", {})}
    for name, reason in list(unreadable.items())[:SHOWN]:
        console.print(f"[red]cannot be read:[/] {escape(f'{name} ({reason})')}", highlight=False, soft_wrap=True)
    for group in report["duplicates"][:SHOWN]:
        console.print(f"[yellow]the same picture:[/] {escape(' = '.join(group))}", highlight=False, soft_wrap=True)
    for what in (unreadable, report["duplicates"]):
        if len(what) > SHOWN:
            console.print(f"... and {len(what) - SHOWN} more; --json has all")


def between(values: dict[str, float]) -> str:
    """Least to largest value, and the middle one."""
    return "{min:g} to {max:g}, median {median:g}".format(**values) if values else "unknown"
