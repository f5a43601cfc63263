"""Two processes do what one does: fit, its memory bank, validate and predict. Run as a script, it is one of the two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from lightning_difftune import DiTDiffTuningModule, MemoryBank, MemoryBankDataModule
from lightning_difftune.callbacks import EMA
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import ConfigError
from lightning_difftune.models import DiT, export_dit
from lightning_difftune.sampling import Sampler

STEPS = 8
BANK_SIZE = 1030  # two shards, one for each process


class Losses(L.Callback):
    """The loss of every step on this process."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def module_of(folder):
    return DiTDiffTuningModule(
        str(folder / "tiny.safetensors"),
        num_classes=3,
        label_dropout=0.3,
        sampler=Sampler(num_inference_steps=2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),  # Adam would blow rounding up
    )


def data_of(bank, world_size):
    pictures = np.random.default_rng(0).integers(
        0, 256, (30 + 129, 8, 8), dtype=np.uint8
    )  # 129: 64 batches of 2 and one of 1
    train, val = (ArrayImages(part, np.arange(len(part)) % 3) for part in (pictures[:30], pictures[30:]))
    return MemoryBankDataModule(
        train,
        3,
        image_size=8,
        channels=1,
        bank=bank,
        bank_size=BANK_SIZE,
        batch_size=10 // world_size,  # 8 target samples an optimizer step and 2 of the bank
        val_target=val,
        horizontal_flip=True,
    )


def trainer_of(folder, world_size, *callbacks):
    return L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=4,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def run(weights, folder, world_size):
    """Every command, one after the other, and a report of what this process saw."""
    module, losses, average = module_of(weights), Losses(), EMA(decay=0.5)
    trainer = trainer_of(folder, world_size, losses, average)
    trainer.fit(module, data_of(folder / "bank", world_size))
    rank = trainer.global_rank
    fitted = trainer.callback_metrics["val/loss"].item()
    (validated,) = trainer_of(folder, world_size).validate(module, data_of(None, world_size), verbose=False)
    trainer_of(folder, world_size).predict(
        module_of(weights), data_of(folder / "predicted", world_size), return_predictions=False
    )
    report = {"losses": losses.values, "fitted": fitted, "validated": validated["val/loss"]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))
    if rank == 0:
        with average.average_parameters(module):
            torch.save(dict(module.state_dict()), folder / "average.pt")
        torch.save(dict(module.state_dict()), folder / "weights.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the run on one process and of the same run on two."""
    weights = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    export_dit(model, weights / "tiny.safetensors")

    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(weights), str(two)],
            env={**shared, "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        run(weights, one, 1)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return one, two


def report(folder, rank):
    return json.loads((folder / f"rank-{rank}.json").read_text())


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_losses_and_weights_are_those_of_one_process(runs):
    one, two = runs
    first, second = (np.array(report(two, rank)["losses"]) for rank in range(2))
    expected = np.array(report(one, 0)["losses"])
    assert len(expected) == STEPS
    assert np.abs(first - second).max() > 0.01  # each process has samples of its own
    np.testing.assert_allclose((first + second) / 2, expected, rtol=1e-4)
    for file in ("weights.pt", "average.pt"):
        assert_close(*(torch.load(folder / file, weights_only=True) for folder in runs))


def test_the_bank_is_the_same_to_the_byte(runs):
    one, two = runs
    files = sorted(file.name for file in (one / "bank").iterdir())
    assert files == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    for folder in (two / "bank", one / "predicted", two / "predicted"):
        assert sorted(file.name for file in folder.iterdir()) == files
        for file in files:
            assert (folder / file).read_bytes() == (one / "bank" / file).read_bytes()
        MemoryBank(folder).verify()


def test_the_validation_loss_counts_every_picture_once(runs):
    one, two = runs
    expected = report(one, 0)
    for rank in range(2):
        assert report(two, rank)["fitted"] == pytest.approx(expected["fitted"], rel=1e-4)
        assert report(two, rank)["validated"] == pytest.approx(expected["validated"], rel=1e-4)


def validation_batches(pictures, world_size):
    """How many held-out batches each process has."""
    data = MemoryBankDataModule(images(4), 1, image_size=8, channels=1, val_target=images(pictures))
    counts = []
    for rank in range(world_size):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        counts.append(len(list(data.val_dataloader())))
    return counts


def images(count):
    return ArrayImages(np.zeros((count, 8, 8), dtype=np.uint8), np.zeros(count, dtype=np.int64))


@pytest.mark.parametrize(("pictures", "world_size"), [(2, 2), (9, 8), (65, 64), (200, 8), (5000, 8)])
def test_no_process_is_without_a_batch_while_the_others_validate(pictures, world_size):
    counts = validation_batches(pictures, world_size)
    assert min(counts) >= 1
    assert sum(counts) == sum(validation_batches(pictures, 1))


def test_too_few_held_out_pictures_for_the_processes_are_refused():
    with pytest.raises(ConfigError, match="3 pictures in 3 batches, too few for 4 processes"):
        validation_batches(3, 4)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["WORLD_SIZE"]))
