"""Flips one byte in each kind of file: is it detected and named, or without any effect?

    python benchmarks/flips.py                      # 500 flips, a few minutes on one core
    python benchmarks/flips.py --flips 50 --seed 7 --only adapter

Any result of a reader other than an error of this package or the same content ends the benchmark.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import kills

from lightning_difftune import DiTDiffTuningModule, MemoryBank
from lightning_difftune.cli.run_files import check_checkpoint
from lightning_difftune.data.latent_cache import LatentCache
from lightning_difftune.errors import DiffTuneError
from lightning_difftune.models import load_dit
from lightning_difftune.models.checkpoint_files import read_torch
from lightning_difftune.models.diffusers_layout import open_network
from lightning_difftune.sampling import Sampler


def write_files(folder: Path) -> None:
    """One of each kind of file."""
    for name in ("bank", "cache", "export", "adapter", "network"):
        kills.TARGETS[name].write(folder)
    model = kills.small_dit()
    content = {"state_dict": dict(model.state_dict()), "config": "trainer: {}", "global_step": 7}
    kills.AtomicCheckpointIO().save_checkpoint(content, folder / "last.ckpt")
    torch.save({"ema": dict(model.state_dict())}, folder / "official.pt")
    kills.fit(folder, kills.write_base(folder), None, steps=2)


def read_bank(folder: Path) -> list[Any]:
    """All of the bank."""
    bank = MemoryBank(folder / "bank")
    bank.verify()
    return [bank.spec, *bank.read(torch.arange(len(bank))).values()]


def read_cache(folder: Path) -> list[Any]:
    """All of the cache."""
    cache = LatentCache(folder / "cache")
    cache.verify()
    return [cache.spec, *cache.read(range(len(cache)), [False] * len(cache)).values()]


def read_export(folder: Path) -> list[Any]:
    """The model of the exported file."""
    model = load_dit(folder / "tuned.safetensors")
    return [model.architecture, model.class_names, *model.state_dict().values()]


def read_folder(folder: Path) -> list[Any]:
    """The model of the exported folder."""
    return list(load_dit(folder / "tuned").state_dict().values())


def read_checkpoint(folder: Path) -> list[Any]:
    """A checkpoint as the command line reads it."""
    content = check_checkpoint(folder / "last.ckpt")
    return [content["config"], content["global_step"], *content["state_dict"], *content["state_dict"].values()]


def resume(folder: Path) -> list[Any]:
    """What ``Trainer.fit(ckpt_path=...)`` makes of a run's checkpoint in one more step."""
    copy = folder / "resumed.ckpt"
    copy.write_bytes((folder / "run/last.ckpt").read_bytes())
    with tempfile.TemporaryDirectory() as other:
        (Path(other) / "run-bank").symlink_to(folder / "run-bank")
        try:
            return list(kills.fit(Path(other), folder / "base.safetensors", copy, steps=3)[1].state_dict().values())
        except DiffTuneError as error:
            raise type(error)(str(error).replace("resumed.ckpt", "last.ckpt")) from error


def read_module(folder: Path) -> list[Any]:
    """What ``load_from_checkpoint`` makes of it."""
    module = DiTDiffTuningModule.load_from_checkpoint(folder / "run/last.ckpt", sampler=Sampler())
    return list(module.state_dict().values())


def read_adapter(folder: Path) -> list[Any]:
    """A model with the adapter in it."""
    model = kills.tuned_dit()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    kills.ADAPTER.load_adapter(model, folder / "adapter", "base")
    return list(model.state_dict().values())


def read_network(folder: Path) -> list[Any]:
    """The UNet of the exported folder."""
    return list(open_network(type(kills.small_unet()), folder / "network").state_dict().values())


READERS: dict[str, tuple[str, Callable[[Path], list[Any]]]] = {
    "bank": ("bank/shard-00003.safetensors", read_bank),
    "bank's manifest": ("bank/manifest.json", read_bank),
    "cache": ("cache/shard-00001.safetensors", read_cache),
    "cache's manifest": ("cache/manifest.json", read_cache),
    "export": ("tuned.safetensors", read_export),
    "exported folder": ("tuned/transformer/diffusion_pytorch_model.safetensors", read_folder),
    "checkpoint": ("last.ckpt", read_checkpoint),
    "Trainer.fit": ("run/last.ckpt", resume),
    "load_from_checkpoint": ("run/last.ckpt", read_module),
    "adapter": ("adapter/adapter_model.safetensors", read_adapter),
    "adapter's config": ("adapter/adapter_config.json", read_adapter),
    "network": ("network/diffusion_pytorch_model.safetensors", read_network),
    "official": ("official.pt", lambda folder: list(read_torch(folder / "official.pt").values())),
}


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A copy with one byte changed; half of the time near the start or end, where headers and directories are."""
    near = rng.random() < 0.5
    position = min(int(rng.expovariate(1 / 200)), len(data) - 1) if near else rng.randrange(len(data))
    position = len(data) - 1 - position if near and rng.random() < 0.5 else position
    return data[:position] + bytes([data[position] ^ rng.randint(1, 255)]) + data[position + 1 :]


def same(one: list[Any], two: list[Any]) -> bool:
    """Whether two readings are equal to the bit."""
    return len(one) == len(two) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True)
    )


def flip(folder: Path, name: str, turns: int, rng: random.Random) -> dict[str, int]:
    """Flip a byte of a file many times, and read it each time.

    Raises:
        AssertionError: If it was read with other content.
    """
    place, read = READERS[name]
    path = folder / place
    data, expected = path.read_bytes(), read(folder)
    counts = {"flips": 0, "noticed": 0, "without effect": 0, "named": 0}
    try:
        for _ in range(turns):
            path.write_bytes(flipped(data, rng))
            counts["flips"] += 1
            try:
                found = read(folder)
            except DiffTuneError as error:
                counts["noticed"] += 1
                counts["named"] += path.name in str(error) or str(path.parent) in str(error)
            else:
                counts["without effect"] += 1
                if not same(found, expected):
                    raise AssertionError(f"{name}: an altered file was read as something else")
    finally:
        path.write_bytes(data)
    return counts


def main() -> None:
    """Flip bytes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=500, help="flips in all, over the files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    table = Table("file", "flips", "noticed", "without effect", "named")
    with tempfile.TemporaryDirectory() as workspace:
        write_files(Path(workspace))
        for name in options.only:
            turns = -(-options.flips // len(options.only))
            counts = flip(Path(workspace), name, turns, random.Random(f"{options.seed} {name}"))
            table.add_row(name, *(str(value) for value in counts.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
