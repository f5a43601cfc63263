from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_difftune.data.memory_bank import MemoryBank
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


def test_a_store_of_something_else_is_not_a_bank(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, kind="memory-bank", spec={}, num_samples=2, shard_size=2)
    build(writer, lambda batches: ({"pixels": torch.zeros(len(indices), 3)} for indices in batches), 2)
    assert len(ShardReader(tmp_path, kind="memory-bank")) == 2
    with pytest.raises(StoreError, match="holds pixels; a memory bank holds"):
        MemoryBank(tmp_path)


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype of MemoryBank must be 'float32' or 'float16', found 'bfloat16'"):
        make(tmp_path, dtype="bfloat16")


# -- more samples, and fewer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [3, 7, 10, 14])  # a part of a shard, whole ones, both
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bank_grows_by_what_it_lacks(finished: Path, tmp_path: Path, first: int, world_size: int) -> None:
    make(tmp_path, num_samples=first)
    seen: list[int] = []
    for rank in reversed(range(world_size)):
        if world_size == 2 and rank == 1:  # as rank 0 would before the barrier
            writer = ShardWriter(tmp_path, kind="memory-bank", spec={**TinyModule().bank_spec(), "dtype": "float32"},
                                 num_samples=23, shard_size=7)  # fmt: skip
            writer.folder.lock()
            writer.folder.unlock()
        module = TinyModule()
        bank = None
        if rank == 0:
            bank = make(tmp_path, module, rank=rank, world_size=world_size)
        else:
            with pytest.raises(StoreError, match="unfinished"):  # opened before rank 0 has finished
                make(tmp_path, module, rank=rank, world_size=world_size)
        seen += module.seen
    assert sorted(seen) == list(range(first, 23))
    assert bank is not None
    assert torch.equal(bank.read(torch.arange(23))["latents"], MemoryBank(finished).read(torch.arange(23))["latents"])
    assert contents(tmp_path) == contents(finished)


def test_a_larger_bank_serves_a_run_that_asks_for_less(finished: Path) -> None:
    before, module = contents(finished), TinyModule()
    bank = make(finished, module, num_samples=10)
    assert (len(bank), module.seen, contents(finished)) == (10, [], before)
    every = MemoryBank(finished)
    assert torch.equal(bank.read(torch.arange(10))["latents"], every.read(torch.arange(10))["latents"])
    with pytest.raises(IndexError, match="samples 0 to 9; asked for 10"):
        bank.read(torch.tensor([10]))
    assert len(every) == 23
    with pytest.raises(StoreError, match="23 samples, fewer than the 24 that are needed"):
        MemoryBank(finished, 24)


def test_growth_that_was_killed_serves_the_first_run_again(tmp_path: Path) -> None:
    class Dying(TinyModule):
        def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
            if int(indices[-1]) > 18:
                raise KeyboardInterrupt
            return super().generate_bank(indices)

    make(tmp_path, num_samples=10)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Dying())
    with pytest.raises(StoreError, match="unfinished"):
        MemoryBank(tmp_path)
    small, module = make(tmp_path, num_samples=10), TinyModule()
    assert len(small) == 10
    assert len(make(tmp_path, module)) == 23
    assert set(module.seen) <= set(range(14, 23))


def test_samples_are_made_in_the_given_context(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Asking(TinyModule):
        def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
            seen.append((torch.zeros(1, 1) @ torch.zeros(1, 1)).dtype)
            return super().generate_bank(indices)

    make(tmp_path, Asking(), context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert set(seen) == {torch.bfloat16}
