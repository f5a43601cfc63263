"""The frozen autoencoder of latent diffusion models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_difftune.errors import CheckpointError, ConfigError, DataError, check_choice
from lightning_difftune.models.checkpoint_files import read_json
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.diffusers_layout import open_network
from lightning_difftune.models.frozen import Frozen
from lightning_difftune.models.hub import folder_of
from lightning_difftune.source import LatentScale

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL


class FrozenAutoencoder(Frozen):
    """A diffusers ``AutoencoderKL`` that is never trained, and whose weights are not in any checkpoint.

    Args:
        source: Hub repository, local folder, or an ``AutoencoderKL``, which is frozen in place.
        scaling_factor: Multiplies raw latents so that they have about unit variance; by default that of the
            autoencoder's ``config.json``, 0.18215 for Stable Diffusion's. Its ``shift_factor``, or ``latents_mean`` and
            ``latents_std``, are also read from there.
        subfolder: Folder of the autoencoder in ``source``, such as ``"vae"`` of a pipeline.
        dtype: Precision of its weights and computation, independent of autocast.

    Raises:
        CheckpointError: If the source is not found, unreadable, not an ``AutoencoderKL``, or has an unknown
            normalisation of latents.
        ConfigError: If the scaling factor is not positive.
    """

    keeps_type = True  # the requested one

    def __init__(
        self,
        source: str | AutoencoderKL | Path = "stabilityai/sd-vae-ft-ema",
        scaling_factor: float | None = None,
        subfolder: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        check_choice(type(self).__name__, "dtype", dtype, "float32", "bfloat16", "float16")
        if scaling_factor is not None:
            LatentScale(scaling_factor)  # refuses a factor that is not positive, before anything is opened
        if isinstance(source, str | Path):
            from diffusers.models import AutoencoderKL as Autoencoder  # slow to import

            autoencoder: AutoencoderKL = open_network(Autoencoder, source, subfolder or "")
        else:
            autoencoder = source
        if autoencoder.dtype != getattr(torch, dtype):
            autoencoder.to(getattr(torch, dtype))
        super().__init__(autoencoder)
        stated = scale_of(*stated_by(source, subfolder or ""))
        self.scale = stated if scaling_factor is None else replace(stated, scaling_factor=scaling_factor)
        self._named = (str(source), subfolder) if isinstance(source, str) and not Path(source).exists() else None

    @property
    def scaling_factor(self) -> float:
        """The factor of raw latents."""
        return self.scale.scaling_factor

    @property
    def downsample(self) -> int:
        """Pixels per latent along one side; 8 for Stable Diffusion's."""
        return 2 ** (len(self.network.config["block_out_channels"]) - 1)

    def settings(self) -> dict[str, Any] | None:
        """Arguments that rebuild this autoencoder on any machine; ``None`` if it is an object or a local file.

        Example:
            >>> FrozenAutoencoder("sd-nano-flowers", 0.633, "vae").settings()
            {'source': 'sd-nano-flowers', 'scaling_factor': 0.633, 'subfolder': 'vae'}
        """
        if self._named is None:
            return None
        source, subfolder = self._named
        return {"source": source, "scaling_factor": self.scaling_factor, "subfolder": subfolder}

    def latent_shape(self, image_size: int, patch_size: int = 1) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latents of square pictures, for a network that takes patches of them.

        Raises:
            ConfigError: If the size is not a multiple of ``downsample * patch_size``.
        """
        multiple = self.downsample * patch_size
        if image_size % multiple or image_size <= 0:
            raise ConfigError(f"image_size {image_size} must be a positive multiple of {multiple}.")
        side = image_size // self.downsample
        return self.network.config["latent_channels"], side, side

    def fingerprint(self) -> str:
        """Identity of the weights."""
        return fingerprint(self.network)

    def identity(self) -> str:
        """Weights, scale and shift, which determine a picture's latents; the key of the latent cache."""
        return f"{self.fingerprint()} x {self.scale}"

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents' posterior.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1], with sides that are multiples of ``downsample``.

        Returns:
            Mean and std, each (B, c, H / downsample, W / downsample) float32.

        Raises:
            DataError: If the pictures have another type or shape.
        """
        channels = self.network.config["in_channels"]
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % self.downsample or shape[3] % self.downsample:
            raise DataError(
                f"The autoencoder takes pictures (B, {channels}, H, W) with sides that are multiples of "
                f"{self.downsample}; got {shape}."
            )
        if not pixel_values.is_floating_point():
            raise DataError(f"pixel_values must be floats in [-1, 1], got {pixel_values.dtype}.")
        with torch.autocast(pixel_values.device.type, enabled=False):
            posterior = self.network.encode(pixel_values.to(self.network.dtype)).latent_dist
        return self.scale.scale(posterior.mean.float(), posterior.std.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) => pixel values (B, 3, H, W) float32, clamped to [-1, 1]."""
        raw = self.scale.unscale(latents.float()).to(self.network.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            pictures = self.network.decode(raw).sample
        return pictures.float().clamp(-1, 1)


def stated_by(source: str | AutoencoderKL | Path, subfolder: str) -> tuple[Mapping[str, Any], str]:
    """The configuration of an autoencoder, including keys that diffusers drops on opening, and its name."""
    if not isinstance(source, str | Path):
        return source.config, "The autoencoder"
    file = folder_of(source, subfolder) / subfolder / "config.json"
    return read_json(file), str(file)


def scale_of(config: Mapping[str, Any], name: str) -> LatentScale:
    """The normalisation of latents in an ``AutoencoderKL``'s configuration."""
    from diffusers.models import AutoencoderKL as Autoencoder

    known = inspect.signature(Autoencoder.__init__).parameters
    unknown = [
        key
        for key, value in config.items()
        if key not in known and value is not None and re.search(r"mean|std|scal|shift|norm", key) and key[0] != "_"
    ]
    if unknown:
        raise CheckpointError(
            f"{name} states {', '.join(unknown)} for its latents, a normalisation that is not known here. Known are "
            "scaling_factor, shift_factor, and latents_mean with latents_std."
        )
    try:
        scale = LatentScale.of_config(config)
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from error
    if scale.latents_mean is not None and len(scale.latents_mean) != config["latent_channels"]:
        raise CheckpointError(
            f"{name} states {len(scale.latents_mean)} latents_mean for {config['latent_channels']} channels."
        )
    return scale
