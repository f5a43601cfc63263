from __future__ import annotations

import os
import pickle
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_difftune.data.memory_bank import MemoryBank, MemoryBankWriter, bank_work
from lightning_difftune.data.shards import ShardReader, ShardWriter, build
from lightning_difftune.errors import ConfigError, StoreError
from lightning_difftune.protocols import BankGenerator

SHAPE = (2, 3, 3)


class TinyModule(L.LightningModule):
    """Sample i as a function of i alone, through a module that lives on a device."""

    def __init__(self, seed: int = 0, labels: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.125))
        self.seed, self.labels = seed, labels
        self.seen: list[int] = []

    def bank_spec(self) -> dict[str, Any]:
        return {"weights": "tiny", "seed": self.seed}

    def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
        self.seen += indices.tolist()
        pattern = (indices.view(-1, 1, 1, 1) * 7919 + torch.arange(18).view(SHAPE) * 104729 + self.seed) % 1000
        made = {"latents": (pattern * self.scale).detach()}
        return made | ({"class_labels": indices % 5} if self.labels else {})

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self.generate_bank(batch["indices"])


def make(path: Path, module: TinyModule | None = None, num_samples: int = 23, **settings: Any) -> MemoryBank:
    return MemoryBank.build(
        path, module or TinyModule(), num_samples, **({"batch_size": 3, "shard_size": 7} | settings)
    )


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("finished") / "bank").path


# -- the bank --------------------------------------------------------------------------------------------------------


def test_round_trip(finished: Path) -> None:
    bank, wanted = MemoryBank(finished), torch.tensor([22, 0, 7, 7, 13])
    batch, made = bank.read(wanted), TinyModule().generate_bank(wanted)
    assert isinstance(TinyModule(), BankGenerator)
    assert torch.equal(batch["latents"], made["latents"])
    assert torch.equal(batch["class_labels"], made["class_labels"])
    assert (len(bank), bank.latent_shape, bank.path) == (23, SHAPE, finished)
    assert bank.spec == {"weights": "tiny", "seed": 0, "dtype": "float32"}
    bank.verify()


def test_bank_without_labels(tmp_path: Path) -> None:
    batch = make(tmp_path, TinyModule(labels=False)).read(torch.tensor([3]))
    assert batch.keys() == {"latents"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_columns_are_kept(tmp_path: Path, dtype: str) -> None:
    class Richer(TinyModule):
        def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
            controls = (indices % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
            return super().generate_bank(indices) | {"controls": controls, "noise": indices.view(-1, 1) / 4}

    wanted = torch.tensor([22, 3])
    batch = make(tmp_path, Richer(), dtype=dtype).read(wanted)
    made = Richer().generate_bank(wanted)
    assert batch.keys() == made.keys()
    assert {name: column.dtype for name, column in batch.items()} == {n: column.dtype for n, column in made.items()}
    assert all(torch.equal(batch[name], made[name]) for name in ("controls", "noise", "class_labels"))


def test_half_precision_halves_the_files_and_reads_as_float32(finished: Path, tmp_path: Path) -> None:
    bank, wanted = make(tmp_path, dtype="float16"), torch.arange(23)
    latents = bank.read(wanted)["latents"]
    assert latents.dtype == torch.float32
    assert torch.equal(latents, TinyModule().generate_bank(wanted)["latents"].half().float())
    saved = (finished / "shard-00000.safetensors").stat().st_size - (
        tmp_path / "shard-00000.safetensors"
    ).stat().st_size
    assert abs(saved - 7 * 18 * 2) < 16


def test_latents_that_overflow_half_precision_are_refused(tmp_path: Path) -> None:
    module = TinyModule()
    module.scale.data.fill_(1e6)
    with pytest.raises(StoreError, match="latents is not finite"):
        make(tmp_path, module, dtype="float16")


def test_pickled_bank_reads_the_same(finished: Path) -> None:
    bank, wanted = MemoryBank(finished), torch.tensor([5, 21])
    bank.read(wanted)
    assert torch.equal(pickle.loads(pickle.dumps(bank)).read(wanted)["latents"], bank.read(wanted)["latents"])


def test_another_shape(finished: Path) -> None:
    bank = MemoryBank(finished)
    bank.require_shape(torch.Size(SHAPE))
    with pytest.raises(StoreError, match=r"another shape: its samples are \(2, 3, 3\), but the model .* \(4, 32, 32\)"):
        bank.require_shape((4, 32, 32))


def test_require(finished: Path) -> None:
    bank = MemoryBank(finished)
    bank.require({"seed": 0, "dtype": "float32", "weights": "tiny"})
    with pytest.raises(StoreError, match="seed: 0, now 1"):
        bank.require({"seed": 1, "dtype": "float32", "weights": "tiny"})


# -- building --------------------------------------------------------------------------------------------------------


def test_finished_bank_is_opened_and_not_generated_again(finished: Path) -> None:
    module = TinyModule()
    assert len(make(finished, module)) == 23
    assert module.seen == []


def test_interrupted_build_is_gone_on_with(finished: Path, tmp_path: Path) -> None:
    class Interrupted(TinyModule):
        def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
            if 17 in indices:
                raise KeyboardInterrupt
            return super().generate_bank(indices)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Interrupted())
    with pytest.raises(StoreError, match="unfinished"):
        MemoryBank(tmp_path)
    module = TinyModule()
    make(tmp_path, module)
    assert module.seen == list(range(14, 23))
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_do_not_depend_on_world_size(finished: Path, tmp_path: Path, world_size: int) -> None:
    for rank in reversed(range(1, world_size)):  # they cannot open what rank 0 has not finished
        with pytest.raises(StoreError, match="unfinished"):
            make(tmp_path, rank=rank, world_size=world_size)
    make(tmp_path, rank=0, world_size=world_size)
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (TinyModule(seed=1), {}, "seed: 0, now 1"),
        (TinyModule(), {"dtype": "float16"}, 'dtype: "float32", now "float16"'),
        (TinyModule(), {"num_samples": 24}, "num_samples: 23, now 24"),
    ],
)
def test_bank_of_another_generator_is_refused(
    finished: Path, module: TinyModule, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        make(finished, module, **settings)
    assert module.seen == []


def test_damaged_bank_is_refused_by_name(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "bank"))
    os.truncate(path / "shard-00001.safetensors", 200)
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors has 200 bytes.*Delete it and"):
        make(path)


@pytest.mark.parametrize("made", [{}, {"pixels": torch.zeros(3, 1)}, {"latents": torch.zeros(3, 1, dtype=torch.int64)}])
def test_generator_of_something_else_is_refused_at_once(tmp_path: Path, made: dict[str, Tensor]) -> None:
    class Other(TinyModule):
        def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
            return made

    with pytest.raises(StoreError, match="holds floating-point latents, but the generator made"):
        make(tmp_path, Other())


def test_store_of_something_else_is_no_bank(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, kind="memory-bank", spec={}, num_samples=2, shard_size=2)
    build(writer, lambda indices: {"pixels": torch.zeros(len(indices), 3)}, 2)
    assert len(ShardReader(tmp_path, kind="memory-bank")) == 2
    with pytest.raises(StoreError, match="holds pixels; a memory bank holds"):
        MemoryBank(tmp_path)


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float32, float16, got 'bfloat16'"):
        make(tmp_path, dtype="bfloat16")


# -- trainer.predict -------------------------------------------------------------------------------------------------


def open_writer(path: Path) -> ShardWriter:
    return MemoryBank.writer(path, TinyModule().bank_spec(), 23, shard_size=7)


def predict(path: Path, module: TinyModule | None = None, **settings: Any) -> None:
    writer = open_writer(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Couldn't infer the batch indices")
        trainer(MemoryBankWriter(writer), **settings).predict(
            module or TinyModule(), bank_work(writer, 3), return_predictions=False
        )


def test_predict_writes_the_same_bank_as_build(finished: Path, tmp_path: Path) -> None:
    predict(tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_predict_goes_on_where_it_was_stopped(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="lacks 2 of 4 shards"):
        predict(tmp_path, limit_predict_batches=7)  # two shards of three batches, and one batch
    module = TinyModule()
    predict(tmp_path, module)
    assert module.seen == list(range(14, 23))
    assert contents(tmp_path) == contents(finished)


def test_predict_after_an_error_keeps_the_finished_shards(finished: Path, tmp_path: Path) -> None:
    class Broken(TinyModule):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
            made = super().predict_step(batch, batch_idx)
            return made | {"latents": made["latents"] * torch.nan} if batch["shard"] == 1 else made

    with pytest.raises(StoreError, match="latents is not finite in 7 of 7 samples, the first one sample 7"):
        predict(tmp_path, Broken())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["building.json", "shard-00000.safetensors"]
    predict(tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_predict_finishes_a_bank_that_lacks_only_its_manifest(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "bank"))
    (path / "manifest.json").unlink()
    module = TinyModule()
    predict(path, module)
    assert module.seen == []
    assert contents(path) == contents(finished)


def test_writer_is_silent_in_other_stages(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    MemoryBankWriter(writer).teardown(trainer(), TinyModule(), "fit")
    assert not writer.complete


class SlowSecondRank(TinyModule):
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        time.sleep(0.1 * self.global_rank)
        return super().predict_step(batch, batch_idx)


class RankWork(L.LightningDataModule):
    """Each process deals out its own share; a rank may have nothing left to do."""

    def __init__(self, writer: ShardWriter) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.writer = writer

    def predict_dataloader(self) -> Any:
        return bank_work(self.writer, 3, self.trainer.global_rank, self.trainer.world_size)


@pytest.mark.parametrize("done", [[], [1, 3], [0, 1, 2, 3]])  # the shards that an earlier run finished
def test_predict_on_two_processes(finished: Path, tmp_path: Path, done: list[int]) -> None:
    writer = open_writer(tmp_path)
    for shard in done:
        shutil.copy(finished / f"shard-{shard:05d}.safetensors", tmp_path)
    two = trainer(MemoryBankWriter(writer), devices=2, strategy="ddp_fork")
    two.predict(SlowSecondRank(), datamodule=RankWork(writer), return_predictions=False)
    assert contents(tmp_path) == contents(finished)
