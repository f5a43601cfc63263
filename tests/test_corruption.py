"""One flipped byte anywhere in a file: detected and named, or without any effect."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_difftune import MemoryBankDataModule
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import CheckpointError, StoreError
from lightning_difftune.models import load_dit

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import flips

TURNS = {"Trainer.fit": 12}  # of which each is a run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One of each kind of file, in a folder."""
    folder = tmp_path_factory.mktemp("files")
    flips.write_files(folder)
    return folder


@pytest.mark.parametrize("turns", [40, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", flips.READERS)
@pytest.mark.filterwarnings("ignore")
def test_any_flipped_byte_is_noticed_or_changes_nothing(files, name, turns):
    turns = min(turns, TURNS.get(name, turns))
    counts = flips.flip(files, name, turns, random.Random(name))
    assert counts["noticed"] == counts["named"]
    assert counts["noticed"] > 0.5 * turns


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
