"""The data module of Diff-Tuning: target and memory bank, interleaved in every batch."""

from __future__ import annotations

import warnings
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_difftune.data.batches import (
    BalancedStream,
    EvaluationBatches,
    ShuffledStream,
    TrainingBatches,
    TrainingSteps,
    changed_batches,
    changed_held_out,
    describe_no_retention,
    evaluation_batch_size,
    retained_samples,
)
from lightning_difftune.data.building import BATCH_SIZE, building, rank_of
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.latent_cache import LatentCache
from lightning_difftune.data.memory_bank import MemoryBank
from lightning_difftune.data.real_pictures import LabelledTargets, RealPictures
from lightning_difftune.draws import seed_of
from lightning_difftune.errors import ConfigError, check_choice, check_counts, check_kinds
from lightning_difftune.protocols import SupportsBankGeneration, SupportsCaptions, SupportsEncode


class MemoryBankDataModule(RealPictures):
    """Target pictures and replayed samples of the pre-trained model, in fixed shares of every batch.

    A batch of B holds ``int(retention_share * B)`` bank samples and B minus that target samples (Algorithm 1; the share
    is 0.2 in the authors' code, 0.5 in the paper). The batch of a step depends only on the seed and the step's number,
    not on workers or on how often the run was resumed. ``batch_size`` is per process, and several processes together
    read what one process with the whole batch would read.

    A missing bank or latent cache is built by all processes when ``fit`` starts, and an interrupted build is resumed;
    ``trainer.predict`` builds the bank without training.

    Args:
        target: Training pictures: any :class:`~lightning_difftune.data.ImageSource`, such as torchvision's data sets.
        num_classes: Classes K of the target; labels outside 0..K-1 are refused. ``None`` for captions.
        image_size: Side of the pictures in pixels.
        channels: 1 (grey) or 3 (RGB).
        bank: Folder of the memory bank; ``None`` is fine-tuning without retention.
        bank_size: Samples in the bank (5K to 200K in Fig. 6d).
        bank_source: Pictures that fill the bank in place of samples, such as the pre-training set (the last bar of
            Fig. 6d), or ``"target"`` for the target's own. At most ``bank_size``, chosen at random, without labels.
        retention_share: Share of a batch that comes from the bank.
        batch_size: Samples in a batch of each process, both streams together.
        val_target: Held-out pictures, for the validation loss and FID; classes are matched with the target's by name.
        reference: The real pictures for FID: the held-out or the training pictures.
        latent_cache: Folder of cached latents for models with an autoencoder; ``None`` encodes in the training loop.
        horizontal_flip: Whether half of the target pictures are mirrored.
        class_balanced: Whether all classes of the target are shown equally often.
        on_corrupt: Policy on pictures that cannot be read: ``"error"`` or ``"skip"``.
        build_batch_size: Batch size for building a bank or cache, and the largest one of validation. ``"auto"`` builds
            with the largest up to 512 that fits into the device's memory, and validates with 64. A bank's samples are
            the same to the bit only at the same batch size, so set a number if that matters.
        num_workers: Worker processes that read the data.
        verify_stores: Whether to compare every byte of a finished bank and cache with their hashes before training.
        seed: Seed of the order and the flips.

    Raises:
        ConfigError: If the shares leave one stream without a sample, or the bank's source has too few pictures.

    Example:
        >>> import numpy as np
        >>> from lightning_difftune.data import ArrayImages
        >>> pictures = ArrayImages(np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 4)
        >>> data = MemoryBankDataModule(pictures, num_classes=4, image_size=8, channels=1, batch_size=16)
        >>> next(iter(data.train_dataloader()))["target"]["pixel_values"].shape
        torch.Size([16, 1, 8, 8])
    """

    def __init__(
        self,
        target: Dataset,
        num_classes: int | None = None,
        image_size: int = 256,
        channels: int = 3,
        bank: str | Path | None = None,
        bank_size: int = 50_000,
        bank_source: Literal["target"] | Dataset | None = None,
        retention_share: float = 0.2,
        batch_size: int = 32,
        val_target: Dataset | None = None,
        reference: Literal["val", "train"] = "val",
        latent_cache: str | Path | None = None,
        horizontal_flip: bool = False,
        class_balanced: bool = False,
        on_corrupt: Literal["error", "skip"] = "error",
        build_batch_size: int | Literal["auto"] = 64,
        num_workers: int = 0,
        verify_stores: bool = False,
        seed: int = 0,
    ) -> None:
        check_counts(type(self).__name__, batch_size=batch_size, bank_size=bank_size)
        check_kinds(type(self).__name__, seed=(seed, Integral, "a whole number"))
        super().__init__(
            target,
            val_target,
            num_classes=num_classes,
            image_size=image_size,
            channels=channels,
            on_corrupt=on_corrupt,
            reference=reference,
            build_batch_size=None if build_batch_size == "auto" else build_batch_size,
        )
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank may have no shards left to build
        self.bank_path = Path(bank).expanduser() if bank is not None else None
        self.bank_size, self.bank_source = int(bank_size), None
        if bank_source == "target":
            self.bank_size, self.bank_source = min(bank_size, len(self.target)), self.target
        elif bank_source is not None:
            if isinstance(bank_source, str):
                check_choice(type(self).__name__, "bank_source", bank_source, "target")
            self.bank_source = ImageTargets(bank_source, image_size, channels, on_corrupt)
        self.retention_share = retention_share
        self.batch_size = batch_size
        self.latent_cache_path = Path(latent_cache).expanduser() if latent_cache is not None else None
        self.horizontal_flip = horizontal_flip
        self.class_balanced = class_balanced
        self.num_workers = num_workers
        self.verify_stores = verify_stores
        self.seed = seed
        if not 0 <= self.retention_share < 1:
            raise ConfigError(f"retention_share must be in [0, 1), got {self.retention_share}.")
        if self.bank_path is not None and self.retention_batch_size == 0:
            raise ConfigError(describe_no_retention(retention_share, batch_size))
        if self.batch_size - self.retention_batch_size < 1:
            raise ConfigError(f"A batch_size of {self.batch_size} leaves no room for a target sample.")
        if self.bank_source is not None and len(self.bank_source) < self.bank_size:
            raise ConfigError(
                f"bank_source has {len(self.bank_source):,} pictures, too few for a bank of {self.bank_size:,}. Set "
                "bank_size to their number, or to less."
            )

    @property
    def retention_batch_size(self) -> int:
        """Bank samples in a batch: ``int(retention_share * batch_size)``, 0 without a bank."""
        return retained_samples(self.retention_share, self.batch_size) if self.bank_path is not None else 0

    def state_dict(self) -> dict[str, Any]:
        """What determines the pictures of a step and of a validation, for comparison when the run is resumed."""
        held_out = self.val_target
        return {
            "seed": self.seed,
            "pictures": len(self.target),
            "content": self.target.unread_identity,
            "class_balanced": self.class_balanced,
            "horizontal_flip": self.horizontal_flip,
            "bank_size": self.bank_path and self.bank_size,
            "batch_size": self.batch_size,
            "retention_batch_size": self.retention_batch_size if self._uses_retention else 0,
            "processes": rank_of(self.trainer)[1],
            "held_out": None if held_out is None else (len(held_out), held_out.unread_identity),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say what changed since the checkpoint that a run is resumed from."""
        # Lightning warns of every loader without a state that a run resumed within an epoch may read other batches.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        now = self.state_dict()
        if said := changed_held_out(state_dict.get("held_out"), now["held_out"]):
            rank_zero_warn(said)
        if changed := changed_batches(state_dict, now):
            rank_zero_info(
                f"Changed since the checkpoint: {', '.join(changed)}. Each further step has the batch that the new "
                "settings give to it, as if the run had begun with them: some pictures come sooner, some later."
            )

    # -- stores -----------------------------------------------------------------------------------------------------

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else None

    @property
    def _uses_retention(self) -> bool:
        return bool(getattr(self._module, "uses_retention", True))

    def open_bank(self) -> MemoryBank | None:
        """The memory bank, built first if it is missing; ``None`` if the run does not use one.

        Raises:
            StoreError: If the bank is damaged, has other settings or another model, or is missing and cannot be built.
            ConfigError: If the bank is to be filled with pictures, and the module builds no bank.
        """
        if self.bank_path is None or not self._uses_retention:
            return None
        if isinstance(self._module, SupportsBankGeneration):
            return self._build_bank(self._module, self.bank_path)
        if self.bank_source is not None:
            name = type(self._module).__name__
            raise ConfigError(f"{name} has no bank_generator to encode the pictures of bank_source. Leave it out.")
        bank = MemoryBank(self.bank_path)
        return bank if len(bank) <= self.bank_size else MemoryBank(self.bank_path, self.bank_size)

    def _build_bank(self, module: SupportsBankGeneration, path: Path) -> MemoryBank:
        """The bank at the trainer's precision, on all processes."""
        assert self.trainer is not None
        context = self.trainer.precision_plugin.forward_context
        generator = module.bank_generator(self.bank_source)

        def compute(count: int) -> None:
            with context():
                generator.generate_bank(torch.arange(count))

        with building("Memory bank", path, self.trainer, self.build_batch_size, compute) as options:
            bank = MemoryBank.build(path, generator, self.bank_size, context=context, **options)
        rank_zero_info(f"Memory bank {path}: {len(bank):,} samples of shape {bank.latent_shape}.")
        return bank

    def open_latent_cache(self) -> LatentCache | None:
        """The cached encodings of the target, built first if missing; ``None`` without a cache."""
        if self.latent_cache_path is None:
            return None
        if not isinstance(module := self._module, SupportsEncode) or module.encoder_identity() is None:
            raise ConfigError("latent_cache is set, but the model has no autoencoder; pixel models need no cache.")
        encode, pixels = module.encode, self.target.pixels

        def compute(count: int) -> None:
            encode(pixels([0] * count, [False] * count))

        with building("Latent cache", self.latent_cache_path, self.trainer, self.build_batch_size, compute) as options:
            return LatentCache.build(
                self.latent_cache_path,
                self.target,
                encode,
                {"autoencoder": module.encoder_identity()},
                mirrored=self.horizontal_flip,
                of_caption=module.caption_columns if isinstance(module, SupportsCaptions) else (),
                num_workers=self.num_workers,
                **options,
            )

    # -- loaders ----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Batches ``{"target": ..., "retention": ...}`` of one rank."""
        cache, bank = self.open_latent_cache(), self.open_bank()
        rank, world_size = rank_of(self.trainer)
        for store in (cache, bank):
            if store is not None and self.verify_stores and rank == 0:
                store.verify()
        read = cache.read if cache is not None else self.target.pixels
        retained = self.retention_batch_size if bank is not None else 0
        if bank is not None and retained == 0:  # after an assignment, such as by Lightning's BatchSizeFinder
            rank_zero_warn(describe_no_retention(self.retention_share, self.batch_size))
        bank_seed = seed_of("bank", self.seed)
        batches = TrainingBatches(
            LabelledTargets(read, self.num_classes, self.target.describe),
            self._target_stream(self.batch_size - retained, rank, world_size),
            bank.read if bank is not None else None,
            ShuffledStream(len(bank), retained, bank_seed, rank, world_size) if bank is not None else None,
            self.horizontal_flip,
        )
        return self._loader(batches, TrainingSteps.in_trainer(batches, self.trainer))

    def _target_stream(self, batch_size: int, rank: int, world_size: int) -> ShuffledStream:
        seed = seed_of("target", self.seed)
        if not self.class_balanced:
            return ShuffledStream(len(self.target), batch_size, seed, rank, world_size)
        labels = self.target.labels()
        if labels is None:
            raise ConfigError(
                "class_balanced needs the classes of all pictures before they are read, which this data set does not "
                "know. Use one with labels, such as lightning_difftune.data.ImageFolder, or set class_balanced: false."
            )
        return BalancedStream(labels.numpy(), batch_size, seed, rank, world_size)

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Held-out target batches, every picture once over all ranks; none without ``val_target``, for a fit."""
        if self.val_target is None:
            if self.trainer is not None and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
                raise ConfigError(
                    "There are no held-out pictures to measure on. Set val_target: to a data set of them."
                )
            return []
        rank, world_size = rank_of(self.trainer)
        read = LabelledTargets(self.val_target.pixels, self.num_classes, self.val_target.describe)
        size = evaluation_batch_size(len(self.val_target), self.build_batch_size or BATCH_SIZE)
        batches = EvaluationBatches(read, len(self.val_target), size)
        if len(batches) < world_size:
            raise ConfigError(
                f"val_target has {len(self.val_target)} pictures in {len(batches)} batches, too few for "
                f"{world_size} processes. Hold out more pictures, or set val_target: null."
            )
        return self._loader(batches, UnrepeatedDistributedSampler(batches, world_size, rank, shuffle=False))

    def test_dataloader(self) -> DataLoader | list[Any]:
        """The held-out batches, as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[Any]:
        """Build the memory bank as ``fit`` would; ``trainer.predict`` does nothing else."""
        if self.bank_path is None or not isinstance(self._module, SupportsBankGeneration):
            raise ConfigError("predict builds the memory bank: set bank: to a folder and use a Diff-Tuning module.")
        self._build_bank(self._module, self.bank_path)
        return []

    def _loader(self, batches: Dataset, sampler: DistributedSampler) -> DataLoader:
        return DataLoader(
            batches,
            batch_size=None,  # an item is a whole batch
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
