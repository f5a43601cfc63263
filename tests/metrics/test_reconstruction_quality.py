"""The quality of reconstructions, on modules whose reconstructions are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_difftune import MemoryBankDataModule
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import ConfigError
from lightning_difftune.metrics import FrechetDistance, ReconstructionQuality


class Means(nn.Module):
    """Features of a picture: the mean of each channel."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


class Shifted:
    """A module whose autoencoder makes every picture brighter by some grey levels."""

    device = torch.device("cpu")

    def __init__(self, data: Any, levels: int = 0) -> None:
        self.trainer = SimpleNamespace(datamodule=data)
        self.levels = levels

    def reconstruct(self, pictures: Tensor) -> Tensor:
        return pictures + self.levels


@pytest.fixture
def pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 200, (count, 4, 4, 3), np.uint8) for name, count in (("train", 37), ("val", 20))}


@pytest.fixture
def data(pictures: dict[str, np.ndarray]) -> MemoryBankDataModule:
    sources = {name: ArrayImages(array, np.zeros(len(array), int)) for name, array in pictures.items()}
    return MemoryBankDataModule(sources["train"], num_classes=1, image_size=4, batch_size=5, val_target=sources["val"])


def distance(train: np.ndarray, val: np.ndarray) -> float:
    metric = FrechetDistance(Means())
    for array, real in ((val, True), (train, False)):
        metric.update(torch.from_numpy(array).permute(0, 3, 1, 2), real=real)
    return metric.compute().item()


def test_a_perfect_autoencoder_leaves_the_pictures_distance(data: Any, pictures: dict[str, np.ndarray]) -> None:
    values = ReconstructionQuality(Means()).evaluate(Shifted(data))
    expected = pytest.approx(distance(**pictures), rel=1e-4)
    assert values == {"fd_means_real": expected, "fd_means_reconstructed": expected, "psnr": math.inf}


def test_an_autoencoder_that_is_off_costs_what_it_is_off(data: Any, pictures: dict[str, np.ndarray]) -> None:
    values = ReconstructionQuality(Means()).evaluate(Shifted(data, levels=6))
    assert values["fd_means_real"] == pytest.approx(distance(**pictures), rel=1e-4)
    brighter = distance(pictures["train"] + np.uint8(6), pictures["val"])
    assert values["fd_means_reconstructed"] == pytest.approx(brighter, rel=1e-4)
    assert values["psnr"] == pytest.approx(20 * math.log10(255 / 6), rel=1e-6)


def test_every_third_picture_of_all_batches(data: Any, pictures: dict[str, np.ndarray]) -> None:
    values = ReconstructionQuality(Means(), every=3).evaluate(Shifted(data))
    assert values["fd_means_real"] == pytest.approx(distance(pictures["train"][::3], pictures["val"]), rel=1e-4)


def test_mistakes_are_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="every of ReconstructionQuality must be at least 1, found 0"):
        ReconstructionQuality(Means(), every=0)
    with pytest.raises(ConfigError, match=r"needs labelled_images\(\) of the data module; object has none"):
        ReconstructionQuality(Means()).evaluate(Shifted(object()))
    with pytest.raises(ConfigError, match=r"needs reconstruct\(\) of the module; SimpleNamespace has none"):
        ReconstructionQuality(Means()).evaluate(SimpleNamespace(trainer=SimpleNamespace(datamodule=data)))
