"""One flipped byte anywhere in a file that is read: noticed and named, or without any effect."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_difftune import MemoryBank, MemoryBankDataModule
from lightning_difftune.cli.run_files import check_checkpoint
from lightning_difftune.data import ArrayImages
from lightning_difftune.data.latent_cache import LatentCache
from lightning_difftune.errors import CheckpointError, DiffTuneError, StoreError
from lightning_difftune.models import load_dit
from lightning_difftune.models.checkpoint_files import read_torch

path = Path(__file__).parents[1] / "benchmarks" / "kills.py"
spec = importlib.util.spec_from_file_location("kills", path)
writers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(writers)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One of each kind of file, in a folder."""
    folder = tmp_path_factory.mktemp("files")
    writers.write_bank(folder)
    writers.write_cache(folder)
    writers.write_export(folder)
    model = writers.small_dit()
    writers.AtomicCheckpointIO().save_checkpoint(
        {"state_dict": dict(model.state_dict()), "config": "trainer: {}", "global_step": 7}, folder / "last.ckpt"
    )
    torch.save({"ema": dict(model.state_dict())}, folder / "official.pt")
    return folder


def bank_of(folder):
    bank = MemoryBank(folder / "bank")
    bank.verify()
    return [bank.spec, *bank.read(torch.arange(len(bank))).values()]


def cache_of(folder):
    cache = LatentCache(folder / "cache")
    cache.verify()
    return [cache.spec, *cache.read(range(len(cache)), [False] * len(cache)).values()]


def model_of(path):
    model = load_dit(path)
    return [model.architecture, model.class_names, *model.state_dict().values()]


def checkpoint_of(path):
    content = check_checkpoint(path)
    return [content["config"], content["global_step"], *content["state_dict"], *content["state_dict"].values()]


READERS = {
    "bank/shard-00003.safetensors": bank_of,
    "bank/manifest.json": bank_of,
    "cache/shard-00001.safetensors": cache_of,
    "cache/manifest.json": cache_of,
    "tuned.safetensors": lambda folder: model_of(folder / "tuned.safetensors"),
    "last.ckpt": lambda folder: checkpoint_of(folder / "last.ckpt"),
    "official.pt": lambda folder: list(read_torch(folder / "official.pt").values()),
}


def flipped(data, rng):
    """A copy with one byte changed; half of the time near an end, where headers and directories are."""
    near = rng.random() < 0.5
    position = min(int(rng.expovariate(1 / 200)), len(data) - 1) if near else rng.randrange(len(data))
    position = len(data) - 1 - position if near and rng.random() < 0.5 else position
    return data[:position] + bytes([data[position] ^ rng.randint(1, 255)]) + data[position + 1 :]


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("turns", [60, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_any_flipped_byte_is_noticed_or_changes_nothing(files, name, turns):
    path, read, rng = files / name, READERS[name], random.Random(name)
    data, expected, noticed = path.read_bytes(), READERS[name](files), 0
    try:
        for _ in range(turns):
            path.write_bytes(flipped(data, rng))
            try:
                found = read(files)
            except DiffTuneError as error:
                noticed += path.name in str(error)
            else:
                assert same(found, expected)
    finally:
        path.write_bytes(data)
    assert noticed > 0.7 * turns


def test_altered_values_of_an_export_are_refused_by_name(files):
    path = files / "tuned.safetensors"
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert len(load_file(path)) > 10  # safetensors itself notices nothing
        with pytest.raises(CheckpointError, match=r"tuned.safetensors was altered: .*sha256.*Export it again"):
            load_dit(path)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("verify", [False, True])
def test_hashes_of_stores_are_compared_on_request(files, verify):
    path = files / "bank/shard-00003.safetensors"
    data = path.read_bytes()
    pictures = ArrayImages(torch.zeros(20, 16, 16, dtype=torch.uint8).numpy(), [0] * 20)
    module = MemoryBankDataModule(pictures, 1, 16, channels=1, batch_size=10, bank=files / "bank", verify_stores=verify)
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        if verify:
            with pytest.raises(StoreError, match=r"shard-00003.safetensors was altered"):
                module.train_dataloader()
        else:
            module.train_dataloader()
    finally:
        path.write_bytes(data)
