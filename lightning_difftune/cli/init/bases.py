"""The choices of ``difftune init``, its findings and its decisions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lightning_difftune.data.batches import retained_samples
from lightning_difftune.data.inspection import Inspection
from lightning_difftune.errors import ConfigError, did_you_mean
from lightning_difftune.models import hub
from lightning_difftune.models.checkpoint_files import read_json

CONTROLS = {  # annotator, metric of control similarity, threshold and mode (the paper's, at 512 px)
    "canny": ("Canny", "BlurredSSIM", "control/ssim", 0.55, "max"),
    "sketch": ("HEDSketch", "BlurredSSIM", "control/ssim", 0.75, "max"),
    "depth": ("MidasDepth", "ControlMSE", "control/mse", 0.04, "min"),
    "normal": ("MidasNormal", "ControlMSE", "control/mse", 0.06, "min"),
}


FULL_DIT = 30e9  # bytes of GPU memory for training all weights of DiT-XL/2, by `difftune plan`; DiffFit 17e9


@dataclass(frozen=True)
class Base:
    """A pre-trained model, and its settings for tuning."""

    name: str  # as the module's `model`
    image_size: int  # side of its pictures in pixels
    lr: float  # learning rate
    batch_size: int  # samples in a batch, both streams together
    share: float  # share of the memory bank in a batch
    passes: int  # passes over the pictures, if the steps are within `steps`
    steps: tuple[int, int]  # minimum and maximum
    bank: tuple[int, int]  # minimum and maximum number of samples in the memory bank
    sampler: str  # settings of sampling, as YAML
    is_large: bool  # whether it needs a GPU
    channels: int = 3  # of the pictures
    autoencoder: str = ""  # of a latent DiT, as YAML
    extras: str = ""  # other arguments of the text-to-image module, as YAML
    has_controlnets: bool = True  # of the architecture that is trained here, if it takes captions

    @property
    def retained(self) -> int:
        """Samples of the memory bank in a batch."""
        return retained_samples(self.share, self.batch_size)


_DDIM = "{num_inference_steps: %d, guidance_scale: 1.5, guidance_channels: 3}"
_SD = "{num_inference_steps: %d, guidance_scale: %g, guidance_channels: null}"
_DPM = "{scheduler: diffusers.DPMSolverMultistepScheduler, " + _SD[1:]
_KEPT = """    bank_prompts:  # what is retained; a distilled model has no empty prompt
      - a photo of a person in a street
      - a photo of a dog on a beach
      - a painting of a landscape
      - an illustration of a city at night
    prompt_dropout: 0.0
    distilled_guidance: 3.5  # the bank is drawn at it
    target_guidance: 1.0  # your pictures are trained at it
"""
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
        Base("sd-nano-flowers", 32, 3e-4, 20, 0.2, 100, (400, 1500), (200, 1000), _DPM % (12, 3), False),
        Base(
            "stabilityai/stable-diffusion-3.5-medium", 1024, 1e-4, 4, 0.25, 100, (500, 4000), (500, 2000),
            _SD % (28, 7), True, extras="    frozen_dtype: bfloat16\n", has_controlnets=False,
        ),
        Base(
            "black-forest-labs/FLUX.1-dev", 1024, 1e-4, 4, 0.25, 100, (500, 4000), (500, 2000),
            _SD % (28, 1), True, extras=f"{_KEPT}    frozen_dtype: bfloat16\n", has_controlnets=False,
        ),
        Base(
            "stabilityai/stable-diffusion-xl-base-1.0", 1024, 1e-4, 4, 0.25, 100, (500, 4000), (500, 2000),
            _DPM % (30, 5), True, extras="    frozen_dtype: bfloat16\n",
        ),
        Base(
            "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 1e-4, 4, 0.25, 100, (500, 4000), (500, 2000),
            _DPM % (20, 7.5), True,
        ),
    )
}  # fmt: skip
ALIKE = {  # pipeline class, or part of a name on the hub => the base whose settings it gets
    "StableDiffusion3Pipeline": "stabilityai/stable-diffusion-3.5-medium",
    "FluxPipeline": "black-forest-labs/FLUX.1-dev",
    "StableDiffusionXLPipeline": "stabilityai/stable-diffusion-xl-base-1.0",
    "StableDiffusionPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stable-diffusion-3": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "xl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def alike(model: str, known: dict[str, Base]) -> Base:
    """The base whose settings another model gets, by the class in its ``model_index.json`` or by its name."""
    if hub.repository_of(model) is None and not Path(model).expanduser().exists():
        fix = did_you_mean(model, known) or f"Known are {', '.join(known)}."
        raise ConfigError(f"{model!r} is not a file or folder. {fix} A hub repository is written 'owner/name'.")
    large = next(base for base in reversed(known.values()) if base.is_large)
    if known is not CAPTIONS:
        return large
    index = Path(model).expanduser() / "model_index.json"
    if index.is_file():
        kind = str(read_json(index).get("_class_name"))
        if kind not in ALIKE:
            raise ConfigError(
                f"{model} is a {kind}; expected one of {', '.join(name for name in ALIKE if name[0].isupper())}."
            )
        return CAPTIONS[ALIKE[kind]]
    return next((CAPTIONS[base] for part, base in ALIKE.items() if part in model.lower()), large)


class Seen(NamedTuple):
    """The findings about the pictures."""

    path: str
    facts: Inspection
    source: str  # the data set, as YAML
    val_source: str  # that of a folder's own held-out part, as YAML; empty if a tenth is held out
    captions: list[str]  # a few captions; empty for classes
    trained: int  # number of training pictures
    held_out: int


@dataclass
class Plan:
    """The decisions for the config."""

    base: Base
    task: str  # "classes", "captions" or a control
    name: str
    seen: Seen
    steps: int = 0
    bank_size: int = 0
    is_tight: bool = False  # whether training all weights exceeds the GPU's memory
    notes: list[str] = field(default_factory=list)
