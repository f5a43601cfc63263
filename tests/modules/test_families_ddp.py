"""Two processes draw the bank of each family that one does, to the byte. Run as a script, it is one of them."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from pipelines import FAMILIES
from tiny import finish, quiet_trainer, start

from lightning_difftune import MemoryBank, MemoryBankDataModule, TextToImageDiffTuningModule
from lightning_difftune.modules.families import flow_matching
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import LoRA

BANK_SIZE = 1030  # two shards, one for each process


def draw_and_train(weights: Path, folder: Path, world_size: int) -> None:
    flow_matching.T5_TOKENS = 8  # 512 words of text would take most of the time
    source: Any = [(np.full((8, 8, 3), 9 * i, dtype=np.uint8), "a") for i in range(8)]
    for family in FAMILIES:
        torch.manual_seed(0)  # of the LoRA's first factors
        module = TextToImageDiffTuningModule(
            weights / family,
            image_size=8,
            prompts=["a"],
            bank_prompts=["a cat", "a dog"],
            tuner=LoRA(2, 2, ("to_q", "to_v")),
            sampler=Sampler(None, 1, 1.0, None),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        data = MemoryBankDataModule(
            source,
            image_size=8,
            bank=folder / family,
            bank_size=BANK_SIZE,
            build_batch_size=256,
            batch_size=10 // world_size,
        )
        strategy = "ddp" if world_size > 1 else "auto"
        trainer = quiet_trainer(folder, 2, devices=world_size, strategy=strategy, enable_checkpointing=False)
        trainer.fit(module, data)
        if trainer.is_global_zero:
            torch.save([p.detach() for p in module.trainable_parameters()], folder / f"{family}.pt")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("shard-*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_bank_is_that_of_one_process_to_the_byte_and_so_is_the_training(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    weights, one, two = (tmp_path_factory.mktemp(name) for name in ("weights", "one", "two"))
    for family in FAMILIES:
        getattr(pipelines, family)(weights / family)
    processes = start(__file__, 2, weights, two)
    draw_and_train(weights, one, 1)
    finish(processes)
    for family in FAMILIES:
        assert len(MemoryBank(one / family)) == BANK_SIZE
        assert len(digests(one / family)) == 2
        assert digests(one / family) == digests(two / family)
        first, second = (torch.load(folder / f"{family}.pt") for folder in (one, two))
        for ours, theirs in zip(first, second, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_and_train(Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["WORLD_SIZE"]))
