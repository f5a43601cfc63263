"""``difftune data check``: what a data set contains, and how a run would use it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from lightning_difftune.cli.arguments import CommandParser
from lightning_difftune.data.derived import Partition
from lightning_difftune.data.folders import SPLIT_FOLDERS, describe_counts, shorten
from lightning_difftune.data.inspection import Inspection, inspect, open_images
from lightning_difftune.data.real_pictures import FEW_PICTURES, MOST_WRONG_BITS
from lightning_difftune.data.source_facts import captions_of, class_names_of
from lightning_difftune.errors import ConfigError

DESCRIPTION = """Look at every picture of a data set before training on it.

  difftune data check photos                        folders or captions
  difftune data check photos/train --val photos/test
  difftune data check pictures.npz --split train    arrays
  difftune data check "data/train-{000..011}.tar"   WebDataset shards
  difftune data check owner/flowers --json          of the hub, for a program

Shown are pictures by class (those with fewer than ten are marked), sizes, grey and transparent pictures, those turned
by their EXIF orientation, unreadable ones by name, exact duplicates, what is left out (thumbnails, system files, types
that are not read), control maps, empty, short and long captions, and the split: without --val, that of a folder with
the parts train and val, or else a random tenth is held out, as configs/dit/folder.yaml does.

Exit status: 0 if all pictures can be used; 1 if some cannot, or the held-out ones have other classes; 2 if PATH is not
a data set, or one with mistakes that stop every run, such as a class without pictures."""

EXAMPLES = 10  # shortest and longest captions shown
CUT = 40  # characters shown of each
SHOWN = 20  # rows of a table; --json has all
HELD_OUT = {"train": 0.9, "val": 0.1}  # as in configs/dit/folder.yaml


def data(argv: Sequence[str]) -> int:
    """Run a data command; returns the exit status."""
    if argv and argv[0] in ("-h", "--help"):
        argv = ["check", "--help"]
    if not argv or argv[0] != "check":
        raise ConfigError("There is one command about data: `difftune data check PATH`.")
    parser = CommandParser("data check", DESCRIPTION)
    parser.usage = "difftune data check PATH [options]"
    parser.add_argument("path", metavar="PATH", help="file, folder, pattern of shards, or name on the hub")
    parser.add_argument("--split", help="of an .npz file or hub data set that has several")
    parser.add_argument("--val", metavar="PATH", help="held-out pictures; `PATH:SPLIT` for a split")
    parser.add_argument("--image_size", type=int, default=256, help="size to which a run would crop (default: 256)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode pictures (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(list(argv[1:]))
    given = {"train": options.path} | ({} if options.val is None else {"val": options.val})
    parts = parts_of(options.path) if options.val is None and options.split is None else given
    facts = facts_at(parts["train"], options.split, options.num_workers)
    held_out = None
    if "val" in parts:
        path, _, split = parts["val"].rpartition(":")
        is_split = path != "" and not Path(parts["val"]).exists()
        place, part = (path, split) if is_split else (parts["val"], None)
        held_out = facts_at(place, part, options.num_workers)
    report = report_of(options.path, facts, held_out, options.image_size)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console())
    wrong = report["unreadable"], report["split"].get("unreadable"), report["split"].get("unknown_classes")
    return 1 if any(wrong) or is_nearly_black(report["deep"]) else 0


def parts_of(path: str) -> dict[str, str]:
    """``train`` and, if it exists, ``val`` of a folder with splits; else the whole folder as ``train``."""
    place = Path(path).expanduser()
    names = {folder.name.lower(): folder for folder in place.iterdir() if folder.is_dir()} if place.is_dir() else {}
    train = next((names[name] for name in ("train", "training") if name in names), None)
    if train is None or not SPLIT_FOLDERS.issuperset(name for name in names if not name.startswith(".")):
        return {"train": path}
    held = next((names[name] for name in ("val", "valid", "validation", "test", "testing") if name in names), None)
    return {"train": str(train)} | ({} if held is None else {"val": str(held)})


def facts_at(path: str, split: str | None, num_workers: int) -> Inspection:
    """Open a data set and inspect its pictures, with a progress bar on a terminal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = open_images(path, split)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"Reading {path}", total=len(source))
        facts = inspect(source, num_workers, lambda done: bar.update(task, completed=done))
    facts.notes = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return facts


def report_of(path: str, facts: Inspection, held_out: Inspection | None, image_size: int) -> dict[str, Any]:
    """The findings, as plain JSON values."""
    pictures, counts, duplicates = facts.readable, facts.counts(), facts.duplicates()
    largest = max((picture.largest for picture in pictures if picture.largest is not None), default=0)
    deep = sum(picture.largest is not None for picture in pictures)
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
        "deep": {"pictures": deep, "largest": largest, "bits": largest.bit_length()} if deep else {},
        "control_maps": control_maps_of(facts),
        "captions": captions_of_report(facts),
        "left_out": {what: count for what, count in getattr(facts.source, "left_out", {}).items() if count},
        "unreadable": facts.unreadable(),
        "duplicates": [[facts.name(index) for index in group] for group in duplicates],
        "duplicates_of_two_classes": sum(
            len({facts.pictures[index].label for index in group}) > 1 for group in duplicates
        ),
        "split": split_of(facts, held_out),
        "notes": [*facts.notes, *(held_out.notes if held_out is not None else [])],
    }


def is_nearly_black(deep: dict[str, int]) -> bool:
    """Whether there are 16-bit pictures that use so few bits that a run refuses them."""
    return bool(deep) and deep["bits"] <= MOST_WRONG_BITS


def control_maps_of(facts: Inspection) -> dict[str, int]:
    """The number of control maps, and of those that are cropped otherwise than their pictures; empty without maps."""
    sizes = [(picture.width / picture.height, picture.control_size) for picture in facts.readable]
    ratios = [(ratio, size[0] / size[1]) for ratio, size in sizes if size is not None]
    other = sum(not 0.9 < own / ratio < 1.1 for ratio, own in ratios)  # tools round sides to a multiple of 64
    return {"maps": len(ratios), "of_another_shape": other} if ratios else {}


def captions_of_report(facts: Inspection) -> dict[str, Any]:
    """The number of empty captions, and the shortest and longest of the others."""
    captions = captions_of(facts.source)
    if captions is None:
        return {}
    said = sorted({caption for caption in captions if caption.strip()}, key=len)
    empty = [facts.name(index) for index, caption in enumerate(captions) if not caption.strip()]
    return {"empty": empty, "shortest": said[:EXAMPLES], "longest": said[-EXAMPLES:][::-1]}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": median(values), "max": max(values)} if values else {}


def split_of(facts: Inspection, held_out: Inspection | None) -> dict[str, Any]:
    """Numbers of pictures that a run would train on and hold out, and of the held-out ones that it trains on, too."""
    if held_out is not None:
        digests = {picture.digest for picture in facts.readable}
        classes, others = facts.counts(), held_out.counts()
        named = class_names_of(facts.source) is not None and class_names_of(held_out.source) is not None
        unknown = [name for name, count in others.items() if count and name not in classes]
        return {
            "by": "given",
            "train": len(facts.pictures),
            "val": len(held_out.pictures),
            "in_both": sum(picture.digest in digests for picture in held_out.readable),
            "unreadable": held_out.unreadable(),
            "missing_classes": [name for name in classes if not others.get(name)] if named else [],
            "unknown_classes": unknown if named else [],
        }
    held = held_out_of(facts)
    both = sum(len(held.intersection(group)) for group in facts.duplicates() if not held.issuperset(group))
    by = "Partition, seed 0, as in configs/dit/folder.yaml" if held else "too few pictures to hold some out"
    return {"by": by, "train": len(facts.pictures) - len(held), "val": len(held), "in_both": both}


def held_out_of(facts: Inspection) -> set[int]:
    """The pictures that are held out at random, by number; empty if they are too few for that."""
    try:
        return set(Partition(facts.source, HELD_OUT, "val").indices)
    except ConfigError:
        return set()


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report as tables."""
    overview = Table(title=escape(f"{report['path']} ({report['kind']})"), show_header=False, title_justify="left")
    classes, deep, split = report["classes"], report["deep"], report["split"]
    small = f"{len(classes):,}, {len(report['small_classes'])} of them below {FEW_PICTURES} pictures"
    maps = report["control_maps"]
    bits = "{pictures:,} pictures, largest value {largest:,} of 65,535 ({bits} bits)".format(**deep) if deep else ""
    if is_nearly_black(deep):
        bits += ": nearly black, a run refuses them"
    for name, value in (
        ("pictures", f"{report['pictures']:,} with {report['labels']}"),
        ("classes", small if classes else ""),
        *((name, between(report[name])) for name in ("width", "height", "aspect_ratio")),
        ("enlarged", f"{report['enlarged']:,} are smaller than {report['image_size']} px"),
        ("cropped", f"{report['cropped']:,} are not square and are cropped to a square"),
        ("grey / alpha", f"{report['grey']:,} / {report['alpha']:,}"),
        ("EXIF-rotated", f"{report['exif_rotated']:,}"),
        ("unreadable", f"{len(report['unreadable']):,}"),
        ("16 bits", bits),
        ("captions", f"{len(report['captions'].get('empty', [])):,} are empty" if report["captions"] else ""),
        (
            "control maps",
            "{maps:,}, of another shape than their picture: {of_another_shape:,}".format(**maps) if maps else "",
        ),
        ("left out", escape(describe_counts(report["left_out"]))),
        ("duplicates", f"groups: {len(report['duplicates']):,}, across classes: {report['duplicates_of_two_classes']}"),
        ("split", "{train:,} to train on, {val:,} held out ({by}), {in_both:,} in both".format(**split)),
    ):
        if value:
            overview.add_row(name.replace("_", " "), value)
    console.print(overview)
    if classes:
        table = Table("class", "pictures", title="Smallest classes", title_justify="left")
        for name, number in sorted(classes.items(), key=lambda entry: entry[1])[:SHOWN]:
            table.add_row(escape(name), f"{number:,}" + (" [yellow]few" if number < FEW_PICTURES else ""))
        console.print(table)
        if len(classes) > SHOWN:
            console.print(f"... and {len(classes) - SHOWN} larger ones")
    for length in ("shortest", "longest"):
        if captions := report["captions"].get(length):
            said = ", ".join(f"{caption[:CUT]!r} ({len(caption):,})" for caption in captions)
            console.print(f"{length} captions (characters): {escape(said)}", highlight=False, soft_wrap=True)
    for note in report["notes"]:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    unknown = "held-out classes that the training pictures do not have, which a run refuses"
    for said, which in (
        ("empty caption", report["captions"].get("empty")),
        ("no held-out pictures of", split.get("missing_classes")),
        (unknown, split.get("unknown_classes")),
    ):
        if which:
            console.print(f"[yellow]{said}:[/] {escape(shorten(which))}", highlight=False, soft_wrap=True)
    unreadable = {**report["unreadable"], **split.get("unreadable", {})}
    for name, reason in list(unreadable.items())[:SHOWN]:
        console.print(f"[red]cannot be read:[/] {escape(f'{name} ({reason})')}", highlight=False, soft_wrap=True)
    for group in report["duplicates"][:SHOWN]:
        console.print(f"[yellow]the same picture:[/] {escape(' = '.join(group))}", highlight=False, soft_wrap=True)
    for what in (unreadable, report["duplicates"]):
        if len(what) > SHOWN:
            console.print(f"... and {len(what) - SHOWN} more; --json has all")


def between(values: dict[str, float]) -> str:
    """The range and the median in words."""
    return "{min:g} to {max:g}, median {median:g}".format(**values) if values else "unknown"
