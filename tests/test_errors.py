"""What all classes refuse alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_pictures, tiny_weights
from torch.optim import SGD

from lightning_difftune import (
    ControlNetDiffTuningModule,
    DiffTuningObjective,
    DiTDiffTuningModule,
    MemoryBankDataModule,
    PowerSchedule,
    SNRSchedule,
    TextToImageDiffTuningModule,
)
from lightning_difftune.callbacks import EMA, ControlSimilarity, RegionalCompile, SuddenConvergence
from lightning_difftune.data import ArrayImages, ClassCaptions, HandwrittenDigits, ListedImages, WebDatasetShards
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.models import FrozenAutoencoder
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import AdaptFormer, LoRA

PICTURES = np.zeros((4, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda folder: ArrayImages(PICTURES, [0, 1, 2, 3], class_names="rose"), "class_names of ArrayImages"),
        (lambda folder: ClassCaptions(tiny_pictures(), class_names="rose"), "class_names of ClassCaptions"),
        (lambda folder: ListedImages(folder, folder / "a.csv", class_names="rose"), "class_names of ListedImages"),
        (lambda folder: WebDatasetShards(str(folder / "a.tar"), class_names="rose"), "class_names of WebDatasetShards"),
        (
            lambda folder: DiTDiffTuningModule(str(tiny_weights(folder)), num_classes=4, class_names="rose"),
            "class_names of DiTDiffTuningModule",
        ),
        (lambda folder: RegionalCompile(devices="cuda"), "devices of RegionalCompile"),
        (lambda folder: RegionalCompile(blocks="Block"), "blocks of RegionalCompile"),
        (lambda folder: LoRA(target_modules="to_q"), "target_modules of LoRA"),
    ],
)
def test_a_text_is_not_taken_letter_by_letter(make, name, tmp_path) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is a list of texts, got '\w+'\. Write \['"):
        make(tmp_path)


def data_of(**settings):
    return MemoryBankDataModule(tiny_pictures(), 3, 8, 1, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DiTDiffTuningModule("tiny", label_table="new"),
            "label_table .* must be 'keep' or 'resize', found 'new'",
        ),
        (lambda: DiTDiffTuningModule("tiny", retention_labels="own"), "retention_labels .* must be 'null' or 'source'"),
        (lambda: TextToImageDiffTuningModule("tiny", frozen_dtype="int8"), "frozen_dtype .* 'float32' or 'bfloat16'"),
        (lambda: FrozenAutoencoder("tiny", dtype="int8"), "dtype of FrozenAutoencoder must be 'float32' or 'bfloat16'"),
        (lambda: data_of(reference="test"), "reference .* must be 'val' or 'train', found 'test'"),
        (lambda: data_of(on_corrupt="ignore"), "on_corrupt .* must be 'error' or 'skip', found 'ignore'"),
        (lambda: data_of(bank="bank", bank_source="photos"), "bank_source .* must be 'target', found 'photos'"),
        (lambda: data_of(build_batch_size="most"), "build_batch_size .* must be a whole number, found 'most'"),
        (lambda: data_of(build_batch_size=0), "build_batch_size .* must be at least 1, found 0"),
        (lambda: data_of(batch_size=4.5), "batch_size .* must be a whole number, found 4.5"),
        (lambda: data_of(bank="bank", bank_size=0), "bank_size .* must be at least 1, found 0"),
        (lambda: HandwrittenDigits("val"), "split of HandwrittenDigits must be 'train' or 'test', found 'val'"),
        (lambda: HandwrittenDigits(crop=30), "crop of HandwrittenDigits must be from 1 to 28, found 30"),
        (lambda: GaussianDiffusion(beta_schedule="cosine"), "beta_schedule .* must be 'linear' or 'scaled_linear'"),
        (lambda: SuddenConvergence("val/loss", mode="least"), "mode of SuddenConvergence must be 'max' or 'min'"),
        (lambda: LoRA(rank=0), "rank of LoRA must be at least 1, found 0"),
        (lambda: LoRA(alpha=0), "alpha of LoRA must be above 0, found 0: nothing would be trained"),
        (lambda: AdaptFormer(scale=0.0), "scale of AdaptFormer must be above 0, found 0.0: nothing would be trained"),
        (lambda: AdaptFormer(bottleneck=0), "bottleneck of AdaptFormer must be at least 1, found 0"),
        (lambda: EMA(every_n_steps=1.5), "every_n_steps of EMA must be a whole number, found 1.5"),
    ],
)
def test_a_setting_that_is_none_of_the_known_ones_is_refused_from_python_too(make, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "given", "found"),
    [
        ("objective", PowerSchedule(1.0), "an objective, such as DiffTuningObjective.*, found a PowerSchedule"),
        ("objective", DiffTuningObjective, "an objective, such as .*, found <class '.*DiffTuningObjective'>"),
        ("optimizer", "AdamW", "a function, such as partial.*, found 'AdamW'"),
        ("optimizer", SGD(torch.nn.Linear(1, 1).parameters()), "a function, such as partial.*, found a SGD"),
        ("lr_scheduler", "cosine", "a function, such as partial.*, found 'cosine'"),
        ("tuner", "lora", r"a tuner, such as LoRA\(rank=8\), found 'lora'"),
        ("tuner", LoRA, "a tuner, such as LoRA.*, found <class '.*LoRA'>"),
        ("sampler", {"guidance_scale": 2.0}, "a Sampler, such as Sampler.*, found a dict"),
        ("bank_sampler", DDIMScheduler(), "a Sampler, such as Sampler.*, found a DDIMScheduler"),
        ("seed", "0", "a whole number, found '0'"),
        ("seed", 0.5, "a whole number, found 0.5"),
        ("autoencoder", "vae", "a FrozenAutoencoder, such as .*, found 'vae'"),
    ],
)
def test_an_object_of_another_kind_is_refused_by_the_module(name, given, found) -> None:
    with pytest.raises(ConfigError, match=f"^{name} of DiTDiffTuningModule must be {found}"):
        DiTDiffTuningModule("tiny", **{name: given})


@pytest.mark.parametrize("name", ["objective", "sampler", "bank_sampler"])
def test_and_so_is_one_that_is_assigned(name) -> None:
    with pytest.raises(ConfigError, match=f"^{name} of DiTDiffTuningModule must be .*, found 'other'"):
        setattr(DiTDiffTuningModule("tiny"), name, "other")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffTuningObjective(1.0), "schedule of DiffTuningObjective must be a schedule.*, found 1.0"),
        (lambda: DiffTuningObjective(SNRSchedule), "must be a schedule, such as .*, found <class '.*SNRSchedule'>"),
        (lambda: DiffTuningObjective(loss="mse"), "loss of .* must be a loss, such as eps_mse_loss, found 'mse'"),
        (lambda: DiffTuningObjective(diffusion=DDIMScheduler()), "diffusion .* such as .*, found a DDIMScheduler"),
        (
            lambda: DiffTuningObjective(weighting="min_snr"),
            "weighting .* such as MinSNRWeighting.*found 'min_snr'",
        ),
        (lambda: DiffTuningObjective(retention_target="own"), "retention_target .* such as OnlineTeacher.*found 'own'"),
        (lambda: DiffTuningObjective(density="uniform"), r"density .* such as LogitNormal\(\), found 'uniform'"),
        (lambda: ControlNetDiffTuningModule("canny"), r"annotator .* such as Canny\(\), found 'canny'"),
        (lambda: ControlSimilarity("ssim"), r"metric of .* such as BlurredSSIM\(\), found 'ssim'"),
        (lambda: data_of(seed="0"), "seed of MemoryBankDataModule must be a whole number, found '0'"),
        (
            lambda: Sampler(num_inference_steps=50.0),
            "num_inference_steps .* must be a whole number, found 50.0",
        ),
    ],
)
def test_an_object_of_another_kind_is_refused(make, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("photos", "the image source is the path 'photos'; pass a data set that reads it"),
        (Path("photos"), "the image source is the path 'photos'; pass a data set that reads it"),
        ({"train": tiny_pictures(), "test": tiny_pictures()}, "is a dictionary of train, test; pass one of its parts"),
    ],
)
def test_what_is_no_data_set_is_refused(source, message) -> None:
    with pytest.raises(DataError, match=message):
        MemoryBankDataModule(source, num_classes=3)
