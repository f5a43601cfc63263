"""The quality of samples, on a module whose samples are chosen by the test."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_difftune import MemoryBankDataModule
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.metrics import FrechetDistance, RecognisedDigits, SampleQuality, frechet_distance
from lightning_difftune.metrics.sample_quality import fit_linear_probe

CLASSES = 3


class Levels(nn.Module):
    """Features of a picture: the mean of each channel."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.float().mean((2, 3))


def pictures_of(labels: np.ndarray, seed: int, size: int = 4) -> np.ndarray:
    """Noisy pictures whose brightest channel is their class."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 100, (len(labels), size, size, 3))
    pictures[np.arange(len(labels)), ..., labels] += 100
    return pictures.astype(np.uint8)


class Drawn:
    """A module whose samples are pictures of a seed; ``shift`` moves the classes that it draws."""

    num_classes = CLASSES

    def __init__(self, data: Any, seed: int = 7, shift: int = 0, offset: int = 0) -> None:
        self.trainer = SimpleNamespace(datamodule=data, precision_plugin=MixedPrecision("bf16-mixed", "cpu"))
        self.types: list[torch.dtype] = []
        self.seed, self.shift, self.offset = seed, shift, offset

    def class_conditions(self, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        return class_labels, torch.full_like(class_labels, CLASSES)

    def generate(self, indices: Tensor, conditions: tuple[Tensor, Tensor]) -> Tensor:
        self.types.append((torch.eye(2) @ torch.eye(2)).dtype)
        labels = (conditions[0].numpy() + self.shift) % CLASSES
        pictures = pictures_of(labels, seed=self.seed + int(indices[0])) + np.uint8(self.offset)
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)


@pytest.fixture
def data() -> MemoryBankDataModule:
    train, val = np.arange(90) % CLASSES, np.arange(60) % CLASSES
    return MemoryBankDataModule(
        ArrayImages(pictures_of(train, 0), train),
        num_classes=CLASSES,
        image_size=4,
        val_target=ArrayImages(pictures_of(val, 1), val),
    )


def test_samples_like_the_data_are_near_it_and_recognised(data: MemoryBankDataModule) -> None:
    quality = SampleQuality(Levels(), num_samples=60, batch_size=25)
    values = quality.evaluate(Drawn(data))
    assert list(values) == ["fd_levels", "fd_levels_train", "precision", "recall", "recognised", "recognised_real"]
    assert values["recognised"] == values["recognised_real"] == 1
    assert values["precision"] > 0.7
    assert values["recall"] > 0.7
    assert values["fd_levels"] < 40
    moved = quality.evaluate(Drawn(data, offset=50))
    assert moved["fd_levels"] - values["fd_levels"] == pytest.approx(3 * 50**2, rel=0.1)
    assert moved["precision"] == moved["recall"] == 0
    assert quality.evaluate(Drawn(data, shift=1))["recognised"] == 0, "pictures of another class than asked for"


def test_samples_are_drawn_at_the_trainers_precision_and_measured_in_float32(data: MemoryBankDataModule) -> None:
    drawn, extractor = Drawn(data), Levels()
    extractor.register_forward_hook(lambda *_: drawn.types.append((torch.eye(2) @ torch.eye(2)).dtype))
    SampleQuality(extractor, num_samples=30, batch_size=15).evaluate(drawn)
    assert drawn.types.count(torch.bfloat16) == 2
    assert drawn.types.count(torch.float32) == len(drawn.types) - 2 > 0


def test_distances_are_those_of_the_metric_class(data: MemoryBankDataModule) -> None:
    quality = SampleQuality(Levels(), num_samples=30, batch_size=30)
    values = quality.evaluate(Drawn(data))
    for split, key in (("val", "fd_levels"), ("train", "fd_levels_train")):
        metric = FrechetDistance(Levels())
        for pictures, _ in data.labelled_images(split):
            metric.update(pictures, real=True)
        metric.update(Drawn(data).generate(torch.arange(30), (torch.arange(30) % CLASSES, None)), real=False)
        assert values[key] == pytest.approx(metric.compute().item(), rel=1e-6)


def test_features_of_the_real_pictures_are_kept(data: MemoryBankDataModule, tmp_path: Path) -> None:
    first, second = (SampleQuality(Levels(), num_samples=9, cache_dir=tmp_path) for _ in range(2))
    values = first.evaluate(Drawn(data))
    assert second.evaluate(Drawn(data)) == values
    assert (first.feature_extractor.seen, second.feature_extractor.seen) == (90 + 60 + 9, 9)


def test_labelled_images_are_all_pictures_in_order(data: MemoryBankDataModule) -> None:
    pictures, labels = (torch.cat(parts) for parts in zip(*data.labelled_images("val"), strict=True))
    assert labels.tolist() == (np.arange(60) % CLASSES).tolist()
    assert torch.equal(pictures, torch.from_numpy(pictures_of(labels.numpy(), 1)).permute(0, 3, 1, 2))
    assert torch.equal(pictures, torch.cat(list(data.reference_images())))
    assert data.images_identity("val") == data.reference_identity() != data.images_identity("train")


def test_captions_are_not_classes(data: MemoryBankDataModule) -> None:
    source = [(picture, "a red square") for picture in pictures_of(np.zeros(4, int), 0)]
    captioned = MemoryBankDataModule(source, image_size=4)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="image 0 has no class label"):
        next(captioned.labelled_images("train"))


def test_the_probe_is_a_minimum_of_its_loss_and_reads_no_tensor_of_inference_mode() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        labels = torch.arange(200) % 4
        features = torch.randn(200, 6) + 2 * torch.nn.functional.one_hot(labels, 6)
    probe = fit_linear_probe(features, labels, num_classes=4, weight_decay=0.1)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    inputs = ((features - features.mean(0)) / features.std(0)).clone()
    loss = nn.functional.cross_entropy(inputs @ weight.T + bias, labels.clone()) + 0.05 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-4
    assert (probe.classify(features) == labels).float().mean() > 0.85


def test_refusals(data: MemoryBankDataModule) -> None:
    with pytest.raises(ConfigError, match="num_samples of SampleQuality must be at least 1, found 0"):
        SampleQuality(Levels(), num_samples=0)
    with pytest.raises(ConfigError, match=r"needs labelled_images\(\) of the data module; NoneType has none"):
        SampleQuality(Levels()).evaluate(Drawn(None))
    with pytest.raises(ConfigError, match="draws samples of each class, which SimpleNamespace does not have"):
        SampleQuality(Levels()).check(SimpleNamespace())
    alone = MemoryBankDataModule(ArrayImages(pictures_of(np.zeros(4, int), 0), np.zeros(4, int)), 1, image_size=4)
    with pytest.raises(ConfigError, match="no held-out pictures"):
        SampleQuality(Levels()).check(Drawn(alone))


def test_a_missing_package_is_named_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match="Precision and recall needs the package torch-fidelity"):
        SampleQuality(Levels())


def test_equal_sets_are_at_distance_zero() -> None:
    features = torch.randn(20, 5)
    assert frechet_distance(features, features).item() == pytest.approx(0, abs=1e-9)


def test_digits_are_drawn_at_the_trainers_precision():
    types = []

    def generate(indices: Tensor, conditions: Any) -> Tensor:
        types.append((torch.eye(2) @ torch.eye(2)).dtype)
        return torch.zeros(len(indices), 1, 20, 20, dtype=torch.uint8)

    trainer = SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu"))
    RecognisedDigits(1).evaluate(
        SimpleNamespace(trainer=trainer, generate=generate, class_conditions=lambda labels: ())
    )
    assert types == [torch.bfloat16]
