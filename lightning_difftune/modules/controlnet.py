"""Diff-Tuning of ControlNets (Section 4.2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError, ConfigError, DataError, check_kinds
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.diffusers_layout import open_network
from lightning_difftune.models.frozen import DEFAULT_PROMPT, Frozen
from lightning_difftune.modules.family import Asked, Subject
from lightning_difftune.modules.text_pipeline import TextPipelineModule
from lightning_difftune.pictures import to_pixels, to_uint8, with_channels
from lightning_difftune.protocols import Annotator, Denoiser, RetentionBatch, SupportsControlExamples, TargetBatch
from lightning_difftune.source import SourceFacts


class ControlNetDiffTuningModule(TextPipelineModule):
    """Diff-Tuning of a ControlNet for the frozen UNet of a Stable Diffusion pipeline.

    The ControlNet starts as a copy of the UNet's encoder with zero outputs. The memory bank holds pictures that the
    pipeline draws with the default prompt, and the control maps that ``annotator`` extracts from these pictures
    (App. C). Guidance drops the prompt and keeps the control, as in diffusers' pipeline.

    Takes the arguments of :class:`~lightning_difftune.modules.TextPipelineModule`, such as ``tuner``, except for
    ``frozen_dtype``, ``distilled_guidance`` and ``target_guidance``; and:

    Args:
        annotator: Turns pictures of the target, of the bank and generated ones into control maps.
        controlnet: A ControlNet in diffusers' layout to continue from, instead of a copy of the UNet's encoder.
        conditioning_embedding_out_channels: Widths of the layers that reduce a control map to the latents' size,
            one more than there are halvings. By default as many of diffusers' (16, 32, 96, 256) as are needed.
        conditioning_scale: Factor of the ControlNet's outputs in sampling.

    Raises:
        ConfigError: If control maps have the wrong number of channels, or the widths do not fit the autoencoder.

    Example:
        >>> from lightning_difftune import ControlNetDiffTuningModule
        >>> from lightning_difftune.data.annotators import Canny
        >>> module = ControlNetDiffTuningModule(Canny(), "stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> module.bank_prompts
        ('a high-quality, detailed, and professional image',)
    """

    unet: Any
    controlnet: Any

    def __init__(
        self,
        annotator: Annotator,
        model: str | Path = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision: str | None = None,
        controlnet: str | Path | None = None,
        conditioning_embedding_out_channels: Sequence[int] | None = None,
        conditioning_scale: float = 1.0,
        prompts: Sequence[str] = (DEFAULT_PROMPT,),
        bank_prompts: Sequence[str] = (DEFAULT_PROMPT,),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=model,
            revision=revision,
            prompts=prompts,
            bank_prompts=bank_prompts,
            frozen_dtype="float32",  # gradients flow through the UNet
            distilled_guidance=None,
            target_guidance=None,
            **kwargs,
        )
        check_kinds(type(self).__name__, annotator=(annotator, Annotator, "an annotator, such as Canny()"))
        self.annotator = annotator
        self.controlnet_source = controlnet
        self.embedding_widths = conditioning_embedding_out_channels
        self.conditioning_scale = conditioning_scale
        self._captions: dict[int, str] = {}  # of the held-out examples that were read for pictures

    def setup(self, stage: str) -> None:
        """Forget the captions of another run's data."""
        super().setup(stage)
        self._captions.clear()

    # -- networks -------------------------------------------------------------------------------------------------

    def build(self) -> SourceFacts:
        """Open the pipeline's networks and make a ControlNet for them.

        Raises:
            CheckpointError: If the pipeline's network is not the UNet of Stable Diffusion 1.x, 2.x or XL.
        """
        unet = self.open_pipeline()
        if not hasattr(self.family, "unet_inputs"):
            raise CheckpointError(
                f"{self.model}: ControlNets are trained for the UNets of Stable Diffusion 1.x, 2.x and XL, and this "
                f"pipeline has a {type(unet).__name__}, whose ControlNets have another architecture."
            )
        self.controlnet = self.new_controlnet(unet)
        for network in (unet, self.controlnet):  # gradients flow through both
            self.apply_memory_options(network)
        self.unet = Frozen(unet)
        own = {} if self.controlnet_source is None else {"controlnet": fingerprint(self.controlnet)}
        return self.facts(unet, **own)

    def new_controlnet(self, unet: Any) -> Any:
        """A copy of the UNet's encoder whose outputs are zero, or the given ControlNet."""
        from diffusers.models import ControlNetModel

        halvings = self.autoencoder.downsample.bit_length() - 1
        widths = self.embedding_widths
        if widths is None:
            widths = (16, 32, 96, 256, 256, 256)[: halvings + 1]
        if len(widths) != halvings + 1:
            raise ConfigError(
                f"conditioning_embedding_out_channels {tuple(widths)} bring a control map down by a factor of "
                f"{2 ** (len(widths) - 1)}, but the autoencoder's is {self.autoencoder.downsample}: give "
                f"{halvings + 1} widths."
            )
        if self.controlnet_source is not None:
            controlnet = open_network(ControlNetModel, self.controlnet_source)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                controlnet = ControlNetModel.from_unet(
                    unet,
                    conditioning_embedding_out_channels=tuple(widths),
                    conditioning_channels=self.annotator.channels,
                )
        if controlnet.config.cross_attention_dim != unet.config.cross_attention_dim:
            raise ConfigError(
                f"The ControlNet takes text of width {controlnet.config.cross_attention_dim}, the pipeline's UNet of "
                f"width {unet.config.cross_attention_dim}: it is another model's. Give one that was trained with "
                f"{self.model}."
            )
        if controlnet.config.conditioning_channels != self.annotator.channels:
            raise ConfigError(
                f"The ControlNet takes control maps of {controlnet.config.conditioning_channels} channels, but "
                f"{type(self.annotator).__name__} makes {self.annotator.channels}."
            )
        return controlnet

    def configure_model(self) -> None:
        """Build the networks; a tuner's layers and those without pre-trained weights are trained."""
        fresh = not self._is_built
        super().configure_model()
        if fresh and self.tuner is not None:
            net = self.controlnet
            for module in (net.controlnet_cond_embedding, net.controlnet_down_blocks, net.controlnet_mid_block):
                module.requires_grad_(True)

    def trainable_modules(self) -> list[nn.Module]:
        """The ControlNet."""
        return [self.controlnet]

    def denoising_modules(self) -> list[nn.Module]:
        """The ControlNet, and the frozen UNet that it controls."""
        return [self.controlnet, self.unet.network]

    def denoise(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Network output (B, c, h, w) under a prompt's conditions and control maps (B, C, H, W) in [0, 1]."""
        given = cast("Any", self.family).unet_inputs(condition)
        maps = condition["conditioning_pixel_values"]
        down, middle = self.controlnet(x_t, t, **given, controlnet_cond=maps, return_dict=False)
        if "conditioning_scale" in condition:  # of generated pictures, not of losses
            scale = condition["conditioning_scale"]
            down, middle = [(part * scale).to(part) for part in down], (middle * scale).to(middle)
        given |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(x_t, t, **given).sample

    def pretrained(self) -> Denoiser:
        """The pipeline's UNet without control; it is frozen here, so it needs no copy."""
        return partial(self.family.call, self.unet)

    def source_condition(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The prompt alone: the pre-trained network takes no control."""
        return {name: condition[name] for name in self.null_text()}

    # -- control --------------------------------------------------------------------------------------------------

    def annotate(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 => their control maps (B, C, H, W) uint8."""
        return self.checked(self.annotator(pictures), type(self.annotator).__name__)

    def checked(self, maps: Tensor, maker: str) -> Tensor:
        """Control maps (B, C, H, W) uint8 with the ControlNet's number of channels: grey ones may be saved in colour.

        Raises:
            ConfigError: If the ControlNet takes grey maps and these are in colour, or the maps are not 8-bit.
        """
        channels = self.annotator.channels
        maps = with_channels(maps, channels)
        if maps.ndim != 4 or maps.shape[1] != channels or maps.dtype != torch.uint8:
            raise ConfigError(
                f"{maker} has control maps {maps.dtype} {tuple(maps.shape)}, but this ControlNet takes "
                f"uint8 (B, {channels}, H, W). Use an annotator, or maps, of {channels} "
                f"channel{'s' if channels > 1 else ''}."
            )
        return maps

    def controlled(self, captions: Sequence[str], maps: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Condition and null condition of B captions and control maps (B, C, H, W) uint8."""
        control = self.control_values(self.checked(maps, "The batch"))
        condition = {**self.text_encoder.encode(captions), "conditioning_pixel_values": control}
        if self.conditioning_scale != 1:
            condition["conditioning_scale"] = control.new_full((len(control), 1, 1, 1), self.conditioning_scale)
        return condition, self.null_condition(condition)

    def control_values(self, maps: Tensor) -> Tensor:
        """Control maps uint8 => float32 in [0, 1], on this module's device."""
        return maps.to(self.device).float() / 255

    @property
    def _examples(self) -> SupportsControlExamples | None:
        """The trainer's data module, if it has held-out examples."""
        data = getattr(self._trainer, "datamodule", None)
        return data if isinstance(data, SupportsControlExamples) and data.num_control_examples > 0 else None

    def conditions(self, indices: Tensor) -> tuple[Any, Any]:
        """Picture i follows the caption and the control map of held-out example i mod N of the data module.

        Raises:
            ConfigError: If there are no held-out examples.
        """
        if (data := self._examples) is None:
            lacks = "module has no trainer with data" if self._trainer is None else "data have no held-out pictures"
            raise ConfigError(
                f"A ControlNet draws pictures from control maps, and there are none: the {lacks}. Set val_target of "
                "the data, or call generate_controlled with maps of your own."
            )
        places = [index % data.num_control_examples for index in indices.tolist()]
        pictures, captions, *own = data.control_examples(places)
        self._captions |= dict(zip(places, captions, strict=True))
        return self.controlled(captions, own[0] if own else self.annotate(pictures.to(self.device)))

    def names_of(self, indices: Sequence[int]) -> list[str] | None:
        """The captions of those examples."""
        if (data := self._examples) is None:
            return super().names_of(indices)
        places = [index % data.num_control_examples for index in indices]
        if unread := [place for place in dict.fromkeys(places) if place not in self._captions]:
            self._captions |= dict(zip(unread, data.control_examples(unread)[1], strict=True))
        return [self._captions[place] for place in places]

    def generate_controlled(self, indices: Tensor, conditioning: Tensor, captions: Sequence[str]) -> Tensor:
        """Pictures (B, 3, H, W) uint8 for control maps (B, C, H, W) uint8 and B captions.

        Picture i's noise depends only on the seed and indices[i].
        """
        return self.generate(indices, self.controlled(captions, conditioning))

    # -- hooks of the base ----------------------------------------------------------------------------------------

    def encode(self, batch: TargetBatch) -> TargetBatch:
        """Add the control maps (B, C, H, W) uint8: the target's own, or the annotator's."""
        encoded = super().encode(batch)
        own = batch.get("conditioning_pixel_values")
        maps = self.annotate(to_uint8(batch["pixel_values"])) if own is None else self.checked(own, "The target")
        return {**encoded, "conditioning_pixel_values": maps}

    def encoder_identity(self) -> str | None:
        """Autoencoder, text encoder and annotator."""
        return f"{super().encoder_identity()}; {self.annotator.identity()}"

    def bank_columns(self, indices: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """The prompts' numbers, and the control maps of the generated pictures themselves."""
        return {**super().bank_columns(indices, latents), **self._maps_of(latents)}

    def picture_columns(self, latents: Tensor) -> dict[str, Tensor]:
        """The prompt's number, and the control maps of the pictures."""
        return {**super().picture_columns(latents), **self._maps_of(latents)}

    def _maps_of(self, latents: Tensor) -> dict[str, Tensor]:
        return {"conditioning_pixel_values": self.annotate(to_uint8(self.decode(latents)))}

    def retention_condition(self, retention: RetentionBatch) -> dict[str, Tensor]:
        """The bank's prompts and control maps."""
        maps = self.control_values(retention["conditioning_pixel_values"])
        return {**super().retention_condition(retention), "conditioning_pixel_values": maps}

    def target_condition(self, target: TargetBatch) -> dict[str, Tensor]:
        """The captions and control maps."""
        maps = self.control_values(target["conditioning_pixel_values"])
        return {**super().target_condition(target), "conditioning_pixel_values": maps}

    def bank_spec(self) -> dict[str, Any]:
        """The prompts, and what decodes and annotates the pictures."""
        vae = self.autoencoder.identity()
        return {**super().bank_spec(), "autoencoder": vae, "annotator": self.annotator.identity()}

    # -- requests of users -------------------------------------------------------------------------------------------

    def subjects(self, asked: Asked) -> list[Subject]:
        """One row per control map, under its own prompt or the only one; the annotator makes those of pictures."""
        prompted, controls = super().subjects(asked._replace(controls=None, maps=None)), asked.controls or asked.maps
        if not controls or (asked.controls and asked.maps):
            raise ConfigError(
                "A ControlNet draws from control maps: name pictures for them, --controls FILE ..., or else maps of "
                "your own, --maps FILE ..."
            )
        if len(prompted) not in (1, len(controls)):
            raise ConfigError(
                f"{len(prompted)} prompts for {len(controls)} control pictures: give one, or one for each."
            )
        size = self.sample_shape[-1] * self.autoencoder.downsample
        rows = []
        for number, file in enumerate(controls):
            try:
                with Image.open(file) as image:
                    pixels = torch.from_numpy(to_pixels(image, size, 3))[None]
            except (OSError, ValueError, UnidentifiedImageError) as error:
                raise DataError(f"The control picture {file} cannot be read: {error}") from error
            maps = self.annotate(pixels.to(self.device)).cpu() if asked.controls else self.checked(pixels, str(file))
            rows.append(Subject(Path(file).stem, prompted[number % len(prompted)].asked, maps[0]))
        return rows

    def conditions_for(self, subjects: Sequence[Subject]) -> tuple[Any, Any]:
        """Their prompts and control maps."""
        maps = torch.stack([subject.control for subject in subjects if subject.control is not None])
        return self.controlled([subject.asked for subject in subjects], maps)
