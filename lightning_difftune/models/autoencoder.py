"""The frozen autoencoder of latent diffusion: pictures to latents and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError, ConfigError, DataError
from lightning_difftune.models import hub
from lightning_difftune.models.checkpoints import fingerprint

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL


class FrozenAutoencoder(nn.Module):
    """A diffusers ``AutoencoderKL`` that is never trained, and whose weights are in nobody's checkpoint.

    It follows its parent module to any device, but its weights are no parameters of the parent: they enter neither its
    state dict nor its optimizer, EMA or gradient synchronisation. Always in eval mode and without gradients.

    Args:
        source: Hub repository, local folder, or an ``AutoencoderKL``, which is taken over and frozen.
        scaling_factor: Multiplies raw latents so that they have about unit variance; 0.18215 for Stable Diffusion's.
        subfolder: Folder of the autoencoder in ``source``, such as ``"vae"`` of a pipeline.
        dtype: Precision of its weights and computation, whatever autocast is active around it.

    Raises:
        CheckpointError: If the source is not found, unreadable, or no ``AutoencoderKL``.
        ConfigError: If the scaling factor is not positive.
    """

    autoencoder: AutoencoderKL

    def __init__(
        self,
        source: str | Path | AutoencoderKL = "stabilityai/sd-vae-ft-ema",
        scaling_factor: float = 0.18215,
        subfolder: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__()
        if not scaling_factor > 0:
            raise ConfigError(f"scaling_factor must be positive, got {scaling_factor}.")
        autoencoder = open_autoencoder(source, subfolder or "") if isinstance(source, str | Path) else source
        autoencoder.requires_grad_(False).eval()
        if autoencoder.dtype != getattr(torch, dtype):
            autoencoder.to(getattr(torch, dtype))
        self.__dict__["autoencoder"] = autoencoder  # past nn.Module's registration
        self.scaling_factor = scaling_factor
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the autoencoder stays in eval mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the autoencoder along with the parent module."""
        self.autoencoder._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def downsample(self) -> int:
        """Pixels on one side of a latent's footprint; 8 for Stable Diffusion's."""
        return 2 ** (len(self.autoencoder.config["block_out_channels"]) - 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latents of square pictures.

        Raises:
            ConfigError: If the size is no multiple of ``downsample``.
        """
        if image_size % self.downsample or image_size <= 0:
            raise ConfigError(f"image_size {image_size} must be a positive multiple of {self.downsample}.")
        side = image_size // self.downsample
        return self.autoencoder.config["latent_channels"], side, side

    def fingerprint(self) -> str:
        """Identity of the weights; the key of cached latents, together with ``scaling_factor``."""
        return fingerprint(self.autoencoder)

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
        channels = self.autoencoder.config["in_channels"]
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % self.downsample or shape[3] % self.downsample:
            raise DataError(
                f"The autoencoder takes pictures (B, {channels}, H, W) with sides that are multiples of "
                f"{self.downsample}; got {shape}."
            )
        if not pixel_values.is_floating_point():
            raise DataError(f"pixel_values must be floats in [-1, 1], got {pixel_values.dtype}.")
        with torch.autocast(pixel_values.device.type, enabled=False):
            posterior = self.autoencoder.encode(pixel_values.to(self.autoencoder.dtype)).latent_dist
        return posterior.mean.float() * self.scaling_factor, posterior.std.float() * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) => pixel values (B, 3, H, W) float32, clamped to [-1, 1]."""
        raw = (latents.float() / self.scaling_factor).to(self.autoencoder.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            pictures = self.autoencoder.decode(raw).sample
        return pictures.float().clamp(-1, 1)


def open_autoencoder(source: str | Path, subfolder: str) -> AutoencoderKL:
    """Open an ``AutoencoderKL`` from a local folder or the hub, refusing weights that do not fill it."""
    folder = Path(source).expanduser()
    if not folder.exists():
        if not isinstance(source, str) or not hub.is_repo_id(source):
            raise CheckpointError(f"{str(source)!r} is no local folder; a hub repository is written 'owner/name'.")
        folder = hub.fetch(source, (subfolder,))
    folder /= subfolder
    from diffusers.models import AutoencoderKL as Autoencoder  # slow to import

    try:
        # Through a folder whose configuration has another class, diffusers would fill a default autoencoder at random.
        config: dict[str, Any] = Autoencoder.load_config(str(folder), local_files_only=True)
        if config.get("_class_name") != "AutoencoderKL":
            raise CheckpointError(f"{folder} holds a {config.get('_class_name')}, not an AutoencoderKL.")
        autoencoder, info = Autoencoder.from_pretrained(
            str(folder), local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} cannot be opened as diffusers' AutoencoderKL: {error}. It needs config.json and "
            f"{hub.WEIGHT_FILES[0]}; name the subfolder if they lie in one."
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(map(str, info[kind]))[:3]
            raise CheckpointError(f"{folder}: the weights do not fit config.json; {kind.replace('_', ' ')}: {names}.")
    return autoencoder
