"""Diff-Tuning of class-conditional diffusion transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_difftune.draws import choices_of
from lightning_difftune.errors import ConfigError, check_choice, check_kinds, check_lists
from lightning_difftune.models import DiT, FrozenAutoencoder, export_dit, load_dit
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.usage import usage_of_dit, usage_of_file
from lightning_difftune.modules.base import DiffTuningModule
from lightning_difftune.modules.family import Asked, Subject, class_subjects
from lightning_difftune.modules.optimization import adamw
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.pictures import to_pixel_values, to_uint8
from lightning_difftune.protocols import RetentionBatch, TargetBatch, Tuner
from lightning_difftune.sampling import AUTHORS, Sampler
from lightning_difftune.source import LatentScale, SourceFacts


class DiTDiffTuningModule(DiffTuningModule):
    """Diff-Tuning of a :class:`~lightning_difftune.models.DiT` on a labelled target (Section 3.2 of the paper).

    Args:
        model: The pre-trained model: a bundled name, a file or folder or hub id that
            :func:`~lightning_difftune.models.load_dit` reads, or a :class:`DiT` as it is (fresh weights included).
        num_classes: Classes K of the target; by default those of the model.
        class_names: Names of the target's classes, saved in checkpoints and exports; those of the data by default.
        label_table: ``"keep"`` reuses rows 0..K-1 of the pre-trained table and its null row, as the authors' code
            does; ``"resize"`` creates K fresh rows next to the copied null row, as Table 1 counts them.
        retention_labels: ``"null"`` retains samples under the null class, as the paper does; ``"source"`` under the
            source class that a sample was drawn for, or the null class if the target uses its row.
        label_dropout: Probability that a target sample is shown without its label.
        autoencoder: Frozen autoencoder of latent models; ``None`` for pixel models.
        objective: The loss of Eq. 5; the authors' preset by default.
        optimizer: Callable that takes the trainable parameters; by default AdamW, lr 1e-4, no weight decay.
        lr_scheduler: Callable that takes the optimizer; the scheduler steps every training step. Constant by default.
        tuner: A parameter-efficient method; ``None`` trains everything but ``pos_embed``.
        sampler: How pictures are generated; by default the authors' protocol, DDIM-50 with guidance 1.5 on 3 channels.
        bank_sampler: How the memory bank is generated; unset fields are those of ``sampler``.
        seed: Seed of the training draws, the generated pictures and the bank.

    Raises:
        ConfigError: If K exceeds the rows of a kept table, if ``retention_labels="source"`` meets a resized table or a
            teacher, or if the autoencoder's latents do not fit the model.

    Example:
        >>> from lightning_difftune import DiTDiffTuningModule
        >>> small = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=5)
        >>> module = DiTDiffTuningModule(model=small)
        >>> module.configure_model()
        >>> module.generate(torch.arange(2)).shape
        torch.Size([2, 1, 8, 8])
    """

    dit: DiT

    def __init__(
        self,
        model: str | DiT | Path = "facebook/DiT-XL-2-256",
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        label_table: Literal["keep", "resize"] = "keep",
        retention_labels: Literal["null", "source"] = "null",
        label_dropout: float = 0.1,
        autoencoder: FrozenAutoencoder | None = None,
        objective: DiffTuningObjective | None = None,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        tuner: Tuner | None = None,
        sampler: Sampler | None = None,
        bank_sampler: Sampler | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(objective, optimizer, lr_scheduler, tuner, sampler, bank_sampler, seed)
        check_choice(type(self).__name__, "label_table", label_table, "keep", "resize")
        check_choice(type(self).__name__, "retention_labels", retention_labels, "null", "source")
        encoder = autoencoder, FrozenAutoencoder, 'a FrozenAutoencoder, such as FrozenAutoencoder("path or hub name")'
        check_kinds(type(self).__name__, autoencoder=encoder)
        if not 0 <= label_dropout < 1:
            raise ConfigError(f"label_dropout must be in [0, 1), got {label_dropout}.")
        if retention_labels == "source" and (label_table == "resize" or self.objective.retention_target is not None):
            raise ConfigError(
                "retention_labels: source needs the rows of the source classes (label_table: keep) and compares with "
                f"the noise (no retention_target); found label_table: {label_table} and retention_target: "
                f"{self.objective.retention_target}. Set retention_labels: null."
            )
        # A given model is trained in place; its copy draws the bank. In a tuple, so that nn.Module registers neither.
        self._given = (model, copy.deepcopy(model)) if isinstance(model, DiT) else None
        self._source = "a DiT built here" if isinstance(model, DiT) else str(model)
        self._num_classes = num_classes
        check_lists(type(self).__name__, class_names=class_names)
        self.class_names = class_names
        self.label_table, self.retention_labels = label_table, retention_labels
        self.label_dropout = label_dropout
        self.autoencoder = autoencoder

    @property
    def condition_dropout(self) -> float:
        """Probability that a target sample is shown without its label."""
        return self.label_dropout

    @property
    def num_classes(self) -> int:
        """Classes K of the target."""
        return self._num_classes if self._num_classes is not None else self.dit.num_classes

    def default_sampler(self) -> Sampler:
        """The authors' protocol: 50 steps, guidance 1.5 on the first 3 channels."""
        return AUTHORS

    def pretrained(self) -> DiT:
        """A fresh copy of the transformer as it was before tuning, frozen and in eval mode, on this module's device."""
        model = copy.deepcopy(self._given[1]) if self._given is not None else load_dit(self._source)
        return self.frozen(model)

    def build(self) -> SourceFacts:
        """Load the model and fit its label table to the target."""
        self.dit = self._given[0] if self._given is not None else load_dit(self._source)
        name, facts = self._source, self._facts()
        if self.label_table == "resize":
            self.dit.resize_label_table(self.num_classes, self.class_names)
        elif self.num_classes > self.dit.num_classes:
            raise ConfigError(
                f"The target has {self.num_classes} classes but the label table of {name} has rows for "
                f"{self.dit.num_classes}. Use label_table: resize."
            )
        elif self.class_names is not None:
            self.name_classes(self.class_names)
        elif self.num_classes != self.dit.num_classes:
            self.dit.class_names = None  # the names are of the source's classes, whose rows are reused
        if self.autoencoder is not None:
            channels = self.autoencoder.latent_shape(64)[0]
            if channels != self.dit.sample_shape[0]:
                raise ConfigError(
                    f"The autoencoder makes latents of {channels} channels, but {name} denoises "
                    f"{self.dit.sample_shape}. Use the one that it was trained with; a model of pixels has none "
                    "(autoencoder: null)."
                )
        return facts

    def _facts(self) -> SourceFacts:
        """The facts that the DiT's file states, completed from its architecture and the autoencoder."""
        sampling = self.dit.sampling or {}
        scheduler = None
        if "scheduler" in sampling:
            scheduler = {**sampling["scheduler_config"], "_class_name": sampling["scheduler"]}
        latents = self.autoencoder.scale if self.autoencoder is not None else None
        named = LatentScale.of_export(sampling, latents)
        if latents is not None and named is not None and not latents.is_close(named):
            raise ConfigError(
                f"{self._source} denoises latents with a scaling_factor of {named}, but the autoencoder here has "
                f"{latents}. Take the model's own autoencoder; its scaling_factor can be set."
            )
        latents = latents or named
        if latents is None and self.dit.sample_shape[0] not in (1, 3):
            latents = LatentScale()  # the autoencoder is not available
        return SourceFacts.of_scheduler(
            self._source,
            fingerprint(self.dit),
            scheduler,
            learned_variance=self.dit.architecture["learn_sigma"],
            latents=latents,
            condition="classes",
            identity={"num_classes": self.dit.num_classes},
        )

    def name_classes(self, names: Sequence[str]) -> None:
        """Name the first rows of the label table; more names than rows are refused."""
        if len(names) > self.dit.num_classes:
            raise ConfigError(f"{len(names)} class names were given for a label table of {self.dit.num_classes} rows.")
        self.dit.class_names = list(names)

    def on_fit_start(self) -> None:
        """Take over the names of the data's classes, unless names were given."""
        super().on_fit_start()
        self.dit.sampling = self.sampling_settings()  # for `export_dit(module.dit, path)`
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if self.class_names is None and names is not None:
            self.name_classes(names[: self.num_classes])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the names of the classes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["class_names"] = self.dit.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the names of the classes, unless names were given."""
        super().on_load_checkpoint(checkpoint)
        self.dit.sampling = self.sampling_settings()  # for `export_dit(module.dit, path)`, as after a fit
        if self.class_names is None and checkpoint.get("class_names") is not None:
            self.dit.class_names = checkpoint["class_names"]

    def trainable_modules(self) -> list[nn.Module]:
        """The transformer."""
        return [self.dit]

    denoising_modules = trainable_modules

    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) uint8 => the autoencoder's reconstructions, uint8; unchanged for pixel models."""
        if self.autoencoder is None:
            return pictures
        mean, _ = self.autoencoder.encode(to_pixel_values(pictures.to(self.device)))
        return to_uint8(self.autoencoder.decode(mean))

    def denoise(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Network output (B, C or 2C, h, w) under class ids (B,), null class included."""
        return self.dit(x_t, t, condition)

    def target_condition(self, target: TargetBatch) -> Tensor:
        """The class labels (B,)."""
        return target["class_labels"]

    def null_condition(self, condition: Tensor) -> Tensor:
        """The null class."""
        return torch.full_like(condition, self.dit.null_class)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape (c, h, w) that the transformer denoises."""
        return self.dit.sample_shape

    def conditions(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Picture i has class i mod K, so that every class is shown equally often."""
        return self.class_conditions(indices % self.num_classes)

    def names_of(self, indices: Sequence[int]) -> list[str]:
        """Their classes, by name or number."""
        names = dict(enumerate(self.dit.class_names or ()))
        return [names.get(index % self.num_classes, f"class {index % self.num_classes}") for index in indices]

    def source_conditions(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Classes of the pre-trained model, drawn uniformly; class i depends only on the seed and i."""
        labels = choices_of(self.seed, indices, self.base_identity["num_classes"]).to(self.device)
        return labels, self.source_condition(labels)

    def source_condition(self, condition: Tensor) -> Tensor:
        """The null class: the pre-trained model does not know the target's classes."""
        return torch.full_like(condition, self.base_identity["num_classes"])

    def retention_condition(self, retention: RetentionBatch) -> Tensor:
        """The null class (Section 3.2, "Conditional Generation"), or the source class if the target left it its row."""
        null = torch.full((len(retention["latents"]),), self.dit.null_class, device=self.device)
        if self.retention_labels == "null":
            return null
        if "class_labels" not in retention:
            raise ConfigError("The memory bank is of pictures without source classes. Set retention_labels: null.")
        source = retention["class_labels"].to(self.device)
        return torch.where(source >= self.num_classes, source, null)

    def bank_columns(self, indices: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """The source classes."""
        return {"class_labels": choices_of(self.seed, indices, self.base_identity["num_classes"])}

    def bank_spec(self) -> dict[str, Any]:
        """How the source classes are drawn."""
        return {"class_labels": f"uniform over {self.base_identity['num_classes']}"}

    def class_conditions(self, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Condition and null condition for target classes (B,), for :meth:`generate`."""
        labels = class_labels.to(self.device)
        return labels, self.null_condition(labels)

    card_tags = ("dit",)

    def subjects(self, asked: Asked) -> list[Subject]:
        """Classes, by name or number."""
        asked.refuse("prompts", "controls", "maps", because="it knows classes and no words; use --classes.")
        return class_subjects(asked.classes, self.dit.class_names, self.num_classes)

    def conditions_for(self, subjects: Sequence[Subject]) -> tuple[Tensor, Tensor]:
        """Their classes, and the null class."""
        return self.class_conditions(torch.tensor([subject.asked for subject in subjects]))

    @property
    def lacks_class_names(self) -> bool:
        """Whether the rows of the label table have no names."""
        return self.dit.class_names is None

    def sampling_settings(self) -> dict[str, Any]:
        """What exports state: sampler, autoencoder and the scale of latents."""
        parts = {"autoencoder": self.autoencoder, "latents": self.source_facts.latents}
        stated = {name: part.settings() for name, part in parts.items() if part is not None}
        return self.sampler.settings() | {name: settings for name, settings in stated.items() if settings is not None}

    def write_export(self, network: DiT, path: Path) -> DiT:
        """Write one file with the official key names or a folder for diffusers, with sampler and autoencoder."""
        is_file = path.suffix == ".safetensors"
        network.sampling = self.sampling_settings()
        autoencoder = None if is_file else self.autoencoder
        export_dit(network, path, "safetensors" if is_file else "diffusers", autoencoder=autoencoder)
        return load_dit(path)

    def usage(self, network: DiT, path: Path, base: str) -> str:
        """How to open the file or folder."""
        if path.suffix == ".safetensors":
            named = "autoencoder" in (network.sampling or {}) or network.sample_shape[0] in (1, 3)
            return usage_of_file(path.name, needs_autoencoder=not named)
        return usage_of_dit(network.architecture, network.sampling, self.autoencoder is not None)
