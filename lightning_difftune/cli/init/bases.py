"""What ``difftune init`` chooses from, and what it has seen and decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_difftune.data.inspection import SourceFacts

CONTROLS = {  # annotator, metric of control similarity, threshold and mode (the paper's, at 512 px)
    "canny": ("Canny", "BlurredSSIM", "control/ssim", 0.55, "max"),
    "sketch": ("HEDSketch", "BlurredSSIM", "control/ssim", 0.75, "max"),
    "depth": ("MidasDepth", "ControlMSE", "control/mse", 0.04, "min"),
    "normal": ("MidasNormal", "ControlMSE", "control/mse", 0.06, "min"),
}


@dataclass(frozen=True)
class Base:
    """A pre-trained model, and how long and how finely one tunes it.

    Attributes:
        name: As the module's ``model``.
        image_size: Side of its pictures in pixels.
        lr: Learning rate.
        batch_size: Samples in a batch, both streams together.
        share: Of them from the memory bank.
        passes: Over the pictures, as long as the steps stay within ``steps``.
        steps: Fewest and most.
        bank: Fewest and most samples of the memory bank.
        sampler: Settings of pictures, as YAML.
        is_large: Whether it wants a GPU.
        channels: Of the pictures.
        autoencoder: Of a latent DiT, as YAML.
    """

    name: str
    image_size: int
    lr: float
    batch_size: int
    share: float
    passes: int
    steps: tuple[int, int]
    bank: tuple[int, int]
    sampler: str
    is_large: bool
    channels: int = 3
    autoencoder: str = ""


_DDIM = "{num_inference_steps: %d, guidance_scale: 1.5, guidance_channels: 3}"
_SD = "{num_inference_steps: %d, guidance_scale: %g, guidance_channels: null}"
CLASSES = {
    base.name: base
    for base in (
        Base(
            "dit-nano-imagenet", 32, 1e-3, 32, 0.2, 100, (400, 1500), (200, 1000), _DDIM % 25, False,
            autoencoder="{source: sd-nano-flowers, subfolder: vae, scaling_factor: 0.6331849073798264}",
        ),
        Base(
            "dit-nano-omniglot", 20, 2e-3, 64, 0.2, 100, (400, 1500), (200, 1000), _DDIM.replace("3}", "null}") % 20,
            False, channels=1,
        ),
        Base(
            "facebook/DiT-XL-2-256", 256, 1e-4, 32, 0.2, 300, (2000, 24_000), (2000, 50_000), _DDIM % 50, True,
            autoencoder="{source: stabilityai/sd-vae-ft-ema, scaling_factor: 0.18215}",
        ),
    )
}  # fmt: skip
CAPTIONS = {
    base.name: base
    for base in (
        Base("sd-nano-flowers", 32, 3e-4, 20, 0.2, 100, (400, 1500), (200, 1000), _SD % (12, 3), False),
        Base(
            "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 1e-4, 4, 0.25, 100, (500, 4000), (500, 2000),
            _SD % (20, 7.5), True,
        ),
    )
}  # fmt: skip


class Seen(NamedTuple):
    """What is known before anything is asked."""

    path: str
    facts: SourceFacts
    source: str  # the data set, as YAML
    captions: list[str]  # a few of them; empty for classes
    trained: int  # pictures
    held_out: int


@dataclass
class Plan:
    """What the config says."""

    base: Base
    task: str  # "classes", "captions" or a control
    name: str
    seen: Seen
    steps: int = 0
    bank_size: int = 0
    notes: list[str] = field(default_factory=list)
